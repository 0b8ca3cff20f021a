"16k_scorers: every scorer against its definition, the curve, errors."
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dynad.data import load_images, to_float
from dynad.diffusion import predict_x0, q_sample
from dynad.fusion import latent_map
from dynad.scorers import (COMPLETE, CURVE, SCORERS, Batch, ScorerError, batch_of, curve_figure, fixed_variance_kl, invert, prior_nll,
                           rebuilt, run_scorer, scorer_curve, top_percent)

@pytest.fixture(scope='module')
def batch(smoke, boards):
    "Eight test images as a scorer gets them."
    return batch_of(smoke[0], to_float(load_images(boards.test[-8:], 64)))

def answer(model, name, batch): return SCORERS[name](model)(batch)

def test_ten_steps_is_the_latent_map_of_the_method(smoke, boards, batch):
    model = smoke[0]
    walk = model.cached_walk(model.test_images(boards.test[-8:], boards))
    assert torch.equal(batch.t_hat, walk.t_hat)
    assert torch.allclose(answer(model, 'ten steps (the paper)', batch)[0], walk.raw_maps().latent, atol=1e-4)

def test_one_step_is_the_first_clean_estimate(smoke, batch):
    model = smoke[0]
    p, t = model.parts, batch.t_hat - 1
    z_t = q_sample(batch.z0, t, p.schedule.abar, omega=0.)
    with torch.no_grad(): x0 = predict_x0(z_t, p.denoiser(z_t, t), t, p.schedule.abar)
    assert torch.allclose(answer(model, 'one step', batch)[0], latent_map(batch.z0, x0), atol=1e-4)

def test_three_calls_at_most(smoke, batch):
    calls = rebuilt(smoke[0], batch, S=3, steps='stride', t_max=160).calls
    assert max(calls) <= 3 and min(calls) >= 1

def test_static_sampler_of_the_public_code(smoke, batch):
    r = rebuilt(smoke[0], batch, torch.tensor(160), t_max=160, sampler='authors')
    assert r.calls == [10]*8
    assert torch.allclose(answer(smoke[0], "the public code's static sampler", batch)[0], latent_map(batch.z0, r.z_hat), atol=1e-5)

class Exact(torch.nn.Module):
    "The best predictor of the noise for latents that are N(0, 1): E[ε|z_t] = sqrt(1-ᾱ_t) z_t."
    def __init__(self, abar): super().__init__(); self.abar = abar
    def forward(self, z, t): return ((1 - self.abar[t]).sqrt().view(-1, 1, 1, 1)*z).float()

def test_inversion_takes_the_ddim_steps_upwards(smoke, batch):
    model = smoke[0]
    abar = model.parts.schedule.abar
    exact = model.with_parts(denoiser=Exact(abar))
    got = invert(exact, batch.z0, steps=3)
    stops = [0, 333, 666, 999]
    angle = abar.sqrt().acos()      # for this network each step turns by the angle between two levels
    factor = math.prod(math.cos(float(angle[b] - angle[a])) for a, b in zip(stops, stops[1:]))
    assert torch.allclose(got, factor*batch.z0, atol=1e-3)
    fine = invert(exact, batch.z0, steps=99)
    assert (fine.std()/batch.z0.std() > got.std()/batch.z0.std())

def test_scores_of_the_inversion(smoke, batch):
    m, own = answer(smoke[0], 'inversion, three steps', batch)
    z = invert(smoke[0], batch.z0)
    assert own is None and torch.allclose(m, .5*z.square().mean(1, keepdim=True), atol=1e-4)
    m, own = answer(smoke[0], "InvAD's scoring rule on our UNet", batch)
    d = z[0].numel()
    want = .5*z.square().flatten(1).sum(1)/d + (z.flatten(1).norm(dim=1)/d**.5 - 1).abs()
    assert torch.allclose(own, want, rtol=1e-3)
    assert float(prior_nll(torch.ones(1, 4, 2, 2)).mean()) == .5

def test_kl_with_a_fixed_variance_is_that_of_two_normals(smoke, batch):
    model = smoke[0]
    s = model.parts.schedule
    got = fixed_variance_kl(model, batch.z0, batch.keys, at=(50,))
    from dynad.reconstruction import noise_for
    noise, t = noise_for(batch.keys, tuple(batch.z0.shape[1:]), 31*model.config.seed), torch.full((8,), 50)
    z_t = q_sample(batch.z0, t, s.abar, noise=noise)
    with torch.no_grad(): clean = predict_x0(z_t, model.parts.denoiser(z_t, t), t, s.abar)
    a, before, beta = s.abar[50], s.abar[49], s.betas[50]
    mean = lambda x: (before.sqrt()*beta/(1 - a)*x + s.alphas[50].sqrt()*(1 - before)/(1 - a)*z_t).double()
    sd = (beta*(1 - before)/(1 - a)).sqrt()
    want = kl_divergence(Normal(mean(batch.z0), sd), Normal(mean(clean), sd)).mean(1)
    assert torch.allclose(got[:, 0].double(), want, rtol=1e-2, atol=1e-3)

def test_kl_is_standardised_by_held_out_images(smoke):
    model = smoke[0]
    z = model.held_out.z0
    m, _ = answer(model, "RAN's KL, variance fixed, on our UNet", Batch(torch.empty(0), z, torch.empty(0), list(range(len(z)))))
    assert abs(float(m.mean())) < .05

def test_glad_pools_the_largest_percent(smoke, batch):
    assert top_percent(torch.arange(1000.).view(1, 1, 10, 100)).tolist() == [994.5]
    assert top_percent(torch.ones(2, 1, 3, 3)).tolist() == [1, 1]
    f = SCORERS["GLAD's scoring rule on our UNet"](smoke[0])
    assert f.pool is top_percent and f(batch)[0].shape == (8, 1, *batch.z0.shape[2:])

def test_every_scorer_is_the_same_in_every_batch(smoke, batch):
    two = Batch(batch.image[2:4], batch.z0[2:4], batch.t_hat[2:4], batch.keys[2:4])
    for name in SCORERS:
        f = SCORERS[name](smoke[0])
        (m, s), (a, b) = f(batch), f(two)
        assert m.shape == (8, 1, *batch.z0.shape[2:]) and m.isfinite().all(), name
        assert torch.allclose(m[2:4], a, rtol=1e-3, atol=1e-3) and (s is None or torch.allclose(s[2:4], b, rtol=1e-3)), name

def test_curve(smoke, boards):
    model, found = smoke[0], {}
    from dynad.config import make_config
    from dynad.ran import RAN
    table = scorer_curve(model, boards, ['one step', 'ten steps (the paper)'], {'ten steps (the paper), with φ': {}}, seen=found)
    assert list(table.index) == ['one step', 'ten steps (the paper)', 'ten steps (the paper), with φ'] == list(found)
    assert table.calls.tolist() == [1, 10, 10] and (table.seconds > 0).all() and table[list(CURVE)].stack().between(0, 1).all()
    assert table.seconds['one step'] < table.seconds['ten steps (the paper)']
    images = model.test_images(boards.test, boards)
    whole = torch.cat([p.map for _, p in model.predict_set(images)])
    assert torch.allclose(found['ten steps (the paper), with φ'].maps, whole, atol=1e-3)
    assert len(curve_figure(table).axes) == 2 and COMPLETE

def test_ran_beside_it(smoke, boards, tmp_path):
    from dynad.config import make_config
    from dynad.ran import RAN
    options = {'widths': (32, 64), 'steps': 2, 'batch': 2, 'dims': 8}
    ran = RAN(make_config('smoke', {'options': options}, method='ran')).fit(boards, tmp_path, progress=False)
    table = scorer_curve(smoke[0], boards, [], {}, others={'RAN from scratch': ran})
    assert table.calls.tolist() == [3] and 0 <= table.pro.iloc[0] <= 1

def test_an_unknown_scorer_is_named(smoke):
    with pytest.raises(ScorerError, match="scorer 'two steps' does not exist; there are ten steps"): run_scorer(smoke[0], 'two steps', [])
