"07b_learned_variance, 09a_gradient_denoising, 16i_ran_network, 16j_ran: formulas against other implementations, descent, the method, one network for several categories."
import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings, strategies as st
from torch.distributions import Normal, kl_divergence

from dynad.config import ConfigError, make_config
from dynad.data import load_images, open_dataset, to_float
from dynad.diffusion import make_schedule, q_sample
from dynad.features import load_features
from dynad.gradient_denoising import (FeatureGaussian, GradientDenoisingError, gradient_denoise, gradient_step,
                                      unit_gradient)
from dynad.learned_variance import (discrete_nll, gaussian_kl, learned_log_variance, make_posterior, respaced, reverse_step,
                                    step_kl, vlb)
from dynad.method import open_run
from dynad.places import PlaceError, stacked_features
from dynad.ran import RAN, fit_unified
from dynad.ran_network import (RAN_DIFFUSION, RANError, RANMaps, RANNet, RANOptions, chain_of, combine, resolved,
                               rotated)
from dynad.store import StoreError
from dynad.synthetic import write_synthetic

SCHEDULE = make_schedule(RAN_DIFFUSION)
P = make_posterior(SCHEDULE)
TINY = {'widths': (32, 64), 'attention': (), 'layers_per_block': 1, 'steps': 12, 'batch': 4, 'dims': 12, 'start': 10}


def tensors(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, noise, eps, v = (torch.randn(n, 3, 8, 8, generator=g) for _ in range(4))
    return x0.clamp(-1, 1), noise, noise + .2*eps, v.clamp(-1, 1)


# formulas

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(.01, 5))
def test_closed_form_kl_is_that_of_torch(seed, spread):
    g = torch.Generator().manual_seed(seed)
    m, n = (torch.randn(40, generator=g, dtype=torch.float64) for _ in range(2))
    a, b = (spread*torch.randn(40, generator=g, dtype=torch.float64) for _ in range(2))
    want = kl_divergence(Normal(m, (a/2).exp()), Normal(n, (b/2).exp()))
    got = gaussian_kl(m, a, n, b)
    assert torch.allclose(got, want, rtol=1e-8, atol=1e-8) and (got > -1e-12).all()


def test_step_kl_of_a_pixel_is_the_divergence_of_two_normals():
    x0, noise, eps, v = tensors()
    t = torch.tensor([1, 50, 999])
    x_t = q_sample(x0, t, SCHEDULE.abar, noise=noise)
    kl = step_kl(x0, x_t, eps, v, t, SCHEDULE, P)
    for b, k in enumerate(t.tolist()):
        abar, before, beta = SCHEDULE.abar[k], SCHEDULE.abar[k - 1], SCHEDULE.betas[k]
        x, y = x0[b, 1, 2, 3].double(), x_t[b, 1, 2, 3].double()
        mean = lambda clean: before.sqrt()*beta/(1 - abar)*clean + SCHEDULE.alphas[k].sqrt()*(1 - before)/(1 - abar)*y
        tilde = beta*(1 - before)/(1 - abar)
        clean = (y - (1 - abar).sqrt()*eps[b, 1, 2, 3])/abar.sqrt()
        share = (v[b, 1, 2, 3].double() + 1)/2
        variance = beta**share*tilde**(1 - share)
        want = kl_divergence(Normal(mean(x), tilde.sqrt()), Normal(mean(clean), variance.sqrt()))
        assert float(kl[b, 1, 2, 3]) == pytest.approx(float(want), rel=2e-3, abs=1e-4)


@pytest.mark.parametrize('t', [1, 5, 100, 500, 999])
def test_reverse_step_is_that_of_diffusers(t):
    ddpm = DDPMScheduler(1000, RAN_DIFFUSION.beta_start, RAN_DIFFUSION.beta_end, 'linear', variance_type='learned_range',
                         clip_sample=False)
    _, x_t, eps, v = tensors()
    mean, log_variance = reverse_step(x_t, eps, v, torch.full((3,), t), SCHEDULE, P)
    draws = []
    import diffusers.schedulers.scheduling_ddpm as module
    real, module.randn_tensor = module.randn_tensor, lambda shape, **k: draws.append(1) or torch.zeros(shape)
    try: got = ddpm.step(torch.cat([eps, v], 1), t, x_t).prev_sample
    finally: module.randn_tensor = real
    assert draws and torch.allclose(got, mean, atol=2e-4)
    want = ddpm._get_variance(t, predicted_variance=v) # learned_range gives the logarithm
    assert torch.allclose(log_variance, want, atol=2e-3)


def test_ends_of_the_learned_variance():
    t = torch.tensor([3, 300])
    for v, want in ((-1., P.log_variance), (1., P.log_beta)):
        got = learned_log_variance(torch.full((2, 3, 4, 4), v), t, P)
        assert torch.allclose(got[:, 0, 0, 0].double(), want[t], atol=1e-5)


def test_vlb_is_the_direct_computation():
    x0, noise, eps, v = tensors(4)
    x0 = ((x0 + 1)*127.5).round()/127.5 - 1
    t = torch.tensor([0, 1, 200, 999])
    x_t = q_sample(x0, t, SCHEDULE.abar, noise=noise)
    got = vlb(x0, x_t, eps, v, t, SCHEDULE, P)
    for b in range(4):
        one = slice(b, b + 1)
        mean, log_variance = (m.double() for m in reverse_step(x_t[one], eps[one], v[one], t[one], SCHEDULE, P))
        model = Normal(mean, (log_variance/2).exp())
        if t[b] == 0: # log of the mass of each 8-bit level
            x = x0[one].double()
            upper, lower = model.cdf(x + 1/255), model.cdf(x - 1/255)
            mass = torch.where(x < -.999, upper, torch.where(x > .999, 1 - lower, upper - lower))
            bits = -mass.clamp(min=1e-12).log().mean()/math.log(2)
        else:
            k = int(t[b])
            before, abar, beta = SCHEDULE.abar[k - 1], SCHEDULE.abar[k], SCHEDULE.betas[k]
            true = before.sqrt()*beta/(1 - abar)*x0[one] + SCHEDULE.alphas[k].sqrt()*(1 - before)/(1 - abar)*x_t[one]
            sd = (beta*(1 - before)/(1 - abar)).sqrt()
            bits = kl_divergence(Normal(true, sd.expand_as(true)), model).mean()/math.log(2)
        assert float(got[b]) == pytest.approx(float(bits), rel=5e-3, abs=1e-4), int(t[b])


def test_the_bound_trains_the_variance_alone():
    x0, noise, eps, v = tensors()
    eps.requires_grad_(); v.requires_grad_()
    t = torch.tensor([0, 50, 500])
    vlb(x0, q_sample(x0, t, SCHEDULE.abar, noise=noise), eps, v, t, SCHEDULE, P).sum().backward()
    assert eps.grad is None and (v.grad.abs().amax((1, 2, 3)) > 0).all()


def test_masses_of_all_levels_sum_to_one_and_extremes_are_finite():
    levels = (torch.arange(256)/255*2 - 1).view(1, 1, 16, 16)
    for log_variance in (-8., -2., 1.):
        nll = discrete_nll(levels, torch.full_like(levels, .2), torch.full_like(levels, log_variance))
        assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-3)
    assert discrete_nll(levels, torch.full_like(levels, 9.), torch.full_like(levels, -20.)).isfinite().all()


def test_respaced_chain():
    short, kept = respaced(SCHEDULE, 250)
    assert kept[[5, 50, 100]].tolist() == [20, 201, 401] and kept[0] == 0 and kept[-1] == 999
    assert torch.allclose(short.alphas.cumprod(0), SCHEDULE.abar[kept], atol=1e-12) and (short.betas > 0).all()
    full, same = respaced(SCHEDULE, 1000)
    assert torch.equal(same, torch.arange(1000)) and torch.allclose(full.betas, SCHEDULE.betas, atol=1e-9)


# gradient denoising

@pytest.fixture(scope='module')
def gears(tmp_path_factory):
    return open_dataset(write_synthetic(tmp_path_factory.mktemp('gears')/'gear', 'gear', n_train=30, n_good=4, n_defect=8, size=64, seed=0))

@pytest.fixture(scope='module')
def descent(gears):
    "Distance to normal features, anomalous and normal test images in [-1,1]."
    phi = load_features(make_config('smoke').features).requires_grad_(False)
    with torch.no_grad(): f = stacked_features(phi(to_float(load_images(gears.train, 64))))
    gaussian = FeatureGaussian.fit(f.split(7), dims=12)
    whole = FeatureGaussian.fit([f], dims=12)
    assert torch.allclose(gaussian.precision, whole.precision, rtol=1e-3, atol=1e-3) # batches do not matter
    bad, good = ([s for s in gears.test if s.label == y] for y in (1, 0))
    x = [2*to_float(load_images(s, 64)) - 1 for s in (bad[:4], good)]
    return lambda x: gaussian.distance(stacked_features(phi((x + 1)/2))), *x

def test_distance_is_mahalanobis(descent):
    g = torch.Generator().manual_seed(0)
    f = torch.randn(50, 6, 2, 2, generator=g)
    gaussian = FeatureGaussian.fit(f.split(20), dims=6, ridge=.01)
    x = torch.randn(3, 6, 2, 2, generator=g)
    at = f[:, :, 1, 0].double()
    cov = at.T.cov() + .01*torch.eye(6).double()
    off = x[:, :, 1, 0].double() - at.mean(0)
    want = (off @ torch.linalg.inv(cov)*off).sum(1)
    assert torch.allclose(gaussian.distance(x)[:, 1, 0].double(), want, rtol=1e-3)
    again = FeatureGaussian.from_state_dict(gaussian.state_dict())
    assert torch.equal(again.distance(x), gaussian.distance(x))

def test_descent_lowers_the_distance(descent):
    distance, bad, good = descent
    done = gradient_denoise(bad, distance, SCHEDULE, start=25, keep=2)
    assert done.distances.shape == (26, 4) and (done.distances[-1] < .7*done.distances[0]).all()
    assert [k for k, _ in done.trajectory] == [8, 17]
    up = bad + (bad - gradient_step(bad, unit_gradient(distance, bad)[0], 2e-4)) # a plus, as the review prints it
    assert (distance(up).mean((1, 2)) > distance(bad).mean((1, 2))).all()

def test_a_normal_image_is_left_almost_unchanged(descent):
    distance, bad, good = descent
    done = gradient_denoise(good, distance, SCHEDULE, start=100)
    assert float((done.x - good).abs().mean()) < .02 # of a range of 2

def test_gradient_has_unit_variance_and_none_is_none(descent):
    distance, bad, _ = descent
    assert torch.allclose(unit_gradient(distance, bad)[0].std((1, 2, 3)), torch.ones(4), atol=1e-3)
    g, d = unit_gradient(lambda x: 0*x[:, 0], bad)
    assert not g.any() and not d.any()

def test_samples_come_every_fifth_iteration(descent):
    distance, bad, _ = descent
    asked = []
    gradient_denoise(bad[:1], distance, SCHEDULE, lambda x, t: asked.append(t) or x, start=12, every=5)
    assert asked == [7, 2]

def test_errors_of_the_gaussian(descent):
    with pytest.raises(PlaceError, match='at least 2'): FeatureGaussian.fit([torch.zeros(1, 3, 2, 2)])
    with pytest.raises(PlaceError, match='at least 2'): FeatureGaussian.fit([])
    with pytest.raises(PlaceError, match='side 4'):
        FeatureGaussian.fit([torch.randn(5, 3, 2, 2)], dims=2).distance(torch.zeros(1, 3, 4, 4))
    with pytest.raises(GradientDenoisingError, match='start = 1001'): gradient_denoise(descent[1], descent[0], SCHEDULE, start=1001)


# the method

@pytest.fixture(scope='module')
def ran(gears, tmp_path_factory):
    run = tmp_path_factory.mktemp('ran')
    return RAN(make_config('smoke', {'options': TINY}, method='ran')).fit(gears, run, progress=False), run

def test_scores_do_not_depend_on_the_batch(ran, gears):
    model, _ = ran
    x = to_float(load_images(gears.test, 64))
    whole = model.predict_batch(x, list(range(len(x))))
    some = model.predict_batch(x[[5, 2]], [5, 2])
    assert torch.allclose(whole.score[[5, 2]], some.score, atol=1e-3) and whole.map.shape == (len(x), 1, 64, 64)

def test_opened_run_answers_alike_and_trains_nothing(ran, gears):
    model, run = ran
    files = [s.image for s in gears.test[:3]]
    again = open_run(run, progress=False)
    assert isinstance(again, RAN) and torch.equal(again.predict(files).score, model.predict(files).score)
    told = []
    RAN(make_config('smoke', {'options': TINY}, method='ran')).fit(gears, run, progress=False, callback=lambda *a: told.append(a))
    assert told == []

def test_alpha_mixes_the_two_errors(ran, gears):
    model, _ = ran
    x = to_float(load_images(gears.test[:2], 64))
    a, b, both = (model.asked(alpha=v).predict_batch(x, [0, 1]).map for v in (1., 0., .5))
    assert torch.allclose(both, (a + b)/2, atol=1e-3) and not torch.allclose(a, b)

def test_both_readings_of_t(ran, gears):
    model, run = ran
    x = to_float(load_images(gears.test[:2], 64))
    other = model.asked(timesteps='respaced')
    assert not torch.allclose(other.predict_batch(x, [0, 1]).map, model.predict_batch(x, [0, 1]).map)
    assert chain_of('respaced').steps[[5, 50, 100]].tolist() == [20, 201, 401]
    assert model.decision != other.decision

def test_kl_maps_are_standardised_by_held_out_images(ran):
    model, _ = ran
    from dynad.ran import raw_maps, scale_of
    held = model.held_out_set
    m = raw_maps(model, to_float(held.images))
    scale = scale_of(model)
    z = (m.kl - scale[:, 0].view(1, -1, 1, 1))/scale[:, 1].view(1, -1, 1, 1)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-2) and torch.allclose(z.std((0, 2, 3)), torch.ones(3), atol=1e-2)

def test_map_is_the_sum_over_t():
    m = RANMaps(torch.ones(1, 2, 8, 8), torch.full((1, 2, 2, 2), 3.))
    A = combine(m, torch.tensor([[0., 1.], [.5, .25]]), alpha=.25, sigma=0.)
    assert torch.allclose(A, torch.full((1, 1, 8, 8), .25*(1 + 2) + .75*6))

def test_reconstruction_is_the_same_in_every_batch(ran, gears):
    model, _ = ran
    images = model.test_images(gears.test, gears)
    both, one = model.reconstructions(images, [3, 1]), model.reconstructions(images, [1])
    assert both.shape == (2, 3, 64, 64) and torch.allclose(both[1:], one, atol=1e-3) and both.min() >= 0 and both.max() <= 1

def test_samples_carry_noise_and_means_do_not(ran, gears):
    model, _ = ran
    x = to_float(load_images([s for s in gears.test if not s.label][:2], 64))
    change = {v: float((model.asked(temperature=v).gradient_denoising(x).x - (2*x - 1)).abs().mean()) for v in (0., .5, 1.)}
    assert change[0.] < change[.5] < change[1.]

def test_rotation_mirrors_what_comes_in():
    x = torch.rand(2, 3, 16, 16)
    assert torch.allclose(rotated(x, torch.zeros(2)), x, atol=1e-4)
    quarter = rotated(x, torch.full((2,), 90.))
    assert any(torch.allclose(quarter, x.rot90(k, (2, 3)), atol=1e-4) for k in (1, -1))
    assert rotated(torch.full((1, 3, 16, 16), .7), torch.tensor([5.])).allclose(torch.tensor(.7), atol=1e-4) # no black corners

@pytest.mark.parametrize('options, words', [
    ({'at': (5, 700)}, 'raise options.below'), ({'at': (0,)}, 'no step of the full chain'),
    ({'at': (300,), 'timesteps': 'respaced'}, 'no step of the respaced chain'),
    ({'classes': 3, 'label': 3}, 'give 0…2'), ({'start': 600}, 'lower options.start'), ({'patch': 3}, 'options.patch')])
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ConfigError, match=words): RAN(make_config('smoke', {'options': options}, method='ran'))

def test_training_options_need_a_fit(ran):
    with pytest.raises(ConfigError, match='would need training'): ran[0].asked(widths=(32, 32))

def test_a_stage_of_another_network_is_refused(ran, tmp_path):
    model, _ = ran
    other = RAN(make_config('smoke', {'options': TINY | {'widths': (32, 32)}}, method='ran'))
    other.training_set = model.training_set
    with pytest.raises(StoreError, match='not a network of these settings'): other.load(model.stages)
    with pytest.raises(StoreError, match='names no stage'): model.load({})

def test_presets():
    assert resolved(RANOptions(), 'paper').widths[0] == 256 and resolved(RANOptions(), 'paper').below == 1000
    assert resolved(RANOptions(steps=7), 'small').steps == 7 and resolved(RANOptions(), 'mine').steps == resolved(RANOptions(), 'small').steps
    assert all(v is not None for v in resolved(RANOptions(), 'authors').model_dump().values())

@pytest.mark.parametrize('patch', [1, 2, 4])
def test_feature_head_is_at_a_quarter_of_the_image(patch):
    o = resolved(RANOptions(patch=patch, **{k: v for k, v in TINY.items() if k != 'patch'}), 'smoke')
    out = RANNet(o, 32, 20)(torch.randn(1, 3, 32, 32), torch.tensor([7]))
    assert out.eps.shape == out.v.shape == (1, 3, 32, 32) and out.features.shape == (1, 20, 8, 8)

def test_one_network_for_two_categories(gears, boards, tmp_path):
    config = make_config('smoke', {'options': TINY | {'steps': 4}}, method='ran')
    models = fit_unified({'gear': gears, 'board': boards}, config, tmp_path, progress=False)
    a, b = models.values()
    assert all(torch.equal(x, y) for x, y in zip(a.net.state_dict().values(), b.net.state_dict().values()))
    assert (a.options.label, b.options.label) == (0, 1)
    again = open_run(tmp_path/'board', progress=False)
    files = [s.image for s in boards.test[:2]]
    assert torch.equal(again.predict(files).score, b.predict(files).score)
    x = torch.randn(1, 3, 64, 64)
    outs = [a.net(x, torch.tensor([50]), torch.tensor([k])).eps for k in (0, 1)]
    assert not torch.equal(*outs) # the label is heard
    with pytest.raises(RANError, match='at least two'): fit_unified({'gear': gears}, config, tmp_path/'one', progress=False)
