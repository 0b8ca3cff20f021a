"16f_ddad: parity with the public code's figures, maxima, adaptation, shared stages, errors."
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dynad.config import ConfigError, DiffusionSettings, make_config
from dynad.data import load_images, to_float
from dynad.ddad import (DDAD, DDADOptions, adaptation_pairs, ddad_loss, ddad_map, ddad_reconstruct, ddad_timesteps,
                        feature_distance, matching_steps, maxima_of, pixel_distance)
from dynad.diffusion import make_schedule
from dynad.denoiser import eps_loss
from dynad.fusion import smooth
from dynad.method import open_run
from dynad.store import StoreError
from dynad.subjects import pixel_space
from dynad.walk import decode, encode

SCHEDULE = make_schedule(DiffusionSettings(beta_start=1e-4, beta_end=.02))
SMOKE = {'denoiser.steps': 40, 'latents.finetune_steps': 5, 'adaptation.gamma': 1, 'denoiser.checkpoint_every': 10} # as the fixture `smoke`

def net(x, t): return .3*torch.tanh(x) + .1*torch.sin(.05*t).view(-1, 1, 1, 1)

@pytest.fixture(scope='module')
def theirs(): return load_file(Path(__file__).parent/'fixtures'/'ddad.safetensors')

# parity

@pytest.mark.parametrize('w', [0, 2, 8])
@pytest.mark.parametrize('eta', [0, 1])
def test_sampler(theirs, w, eta):
    got = ddad_reconstruct(net, theirs['sampler.x'], theirs['sampler.target'], SCHEDULE, theirs['sampler.noise'], w=w, eta=eta)
    want = theirs[f'sampler.w{w}_eta{eta}']
    assert torch.allclose(got, want, atol=2e-4*float(want.abs().max())), float((got - want).abs().max())

def test_distances_and_map(theirs):
    x, x_hat = ((theirs[f'map.{k}'] + 1)/2 for k in ('target', 'output'))
    f, f_hat = ({j: theirs[f'map.{k}_layer{j}'] for j in (1, 2, 3)} for k in ('target', 'output'))
    d_p, d_f = pixel_distance(x, x_hat), feature_distance(f, f_hat, (2, 3), 64)
    assert torch.allclose(d_p, theirs['map.pixel'], atol=1e-5) and torch.allclose(d_f, theirs['map.feature'], atol=1e-5)
    maxima = torch.stack([d_p.max(), d_f.max()])
    for v in (1, 7):
        A = smooth(ddad_map(d_p, d_f, maxima, v=v, sigma=0.), 4., scale=False) # the public code's σ does not scale
        assert torch.allclose(A, theirs[f'map.A_v{v}'], atol=1e-4)

def test_adaptation_loss(theirs):
    of = lambda k: {j: theirs[f'{k}_layer{j}'] for j in (1, 2, 3)}
    for lam in (.1, .01):
        got = ddad_loss(of('map.output'), of('map.target'), of('loss.output_frozen'), of('loss.target_frozen'), lam)
        assert float(got) == pytest.approx(float(theirs[f'loss.lambda{lam}']), abs=1e-5)

def test_training_loss_is_a_sum_there_and_a_mean_here(theirs):
    x, t = theirs['sampler.x'], theirs['train.t']
    got = eps_loss(net, x, t, theirs['sampler.noise'][0], SCHEDULE.abar).mean()*x[0].numel()
    assert float(got) == pytest.approx(float(theirs['train.loss']), rel=1e-5)

# parts

def test_timesteps():
    assert ddad_timesteps(250, 25) == [225, 200, 175, 150, 125, 100, 75, 50, 25, 0]
    assert ddad_timesteps(10, 25) == [0] and ddad_timesteps(60, 25) == [50, 25, 0]

def test_matching_steps_is_the_nearest_level():
    known = make_schedule(DiffusionSettings())
    m = matching_steps(known, SCHEDULE)
    gap = (known.abar[m].sqrt() - SCHEDULE.abar.sqrt()).abs()
    assert (m.diff() >= 0).all() and gap.max() < .005
    for t in (0, 100, 999): assert gap[t] == (known.abar.sqrt() - SCHEDULE.abar[t].sqrt()).abs().min()

@pytest.mark.parametrize('n, batch', [(40, 16), (21, 8), (5, 16), (2, 16), (3, 3)])
def test_pairs_cut_batches_in_two(n, batch):
    pairs = adaptation_pairs(n, 2, batch, 0)
    assert pairs and all(len(a) == len(b) and not set(a.tolist()) & set(b.tolist()) for a, b in pairs)
    assert max(int(torch.cat(p).max()) for p in pairs) < n

def test_maxima_of_zero_are_no_division_by_zero():
    A = ddad_map(torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32), torch.tensor([0., 1.]))
    assert A.isfinite().all()

# the method

@pytest.fixture(scope='module')
def ddad(smoke, boards):
    "In the run directory of a fitted DynAD."
    dynad, run = smoke
    told = []
    config = make_config('smoke', SMOKE, method='ddad')
    before = (run/'run.json').read_bytes(), (run/'config.json').read_bytes()
    model = DDAD(config).fit(boards, run, progress=False, callback=lambda stage, *_: told.append(stage))
    yield model, run, set(told), dynad
    for name, text in zip(('run.json', 'config.json'), before): (run/name).write_bytes(text) # for the other tests

def test_shares_what_dynad_has_trained(ddad):
    model, _, told, dynad = ddad
    assert told == {'phi'}
    assert all(model.stages[k] == dynad.stages[k] for k in ('autoencoder', 'denoiser')) and model.stages['phi'] != dynad.stages['phi']

def test_score_does_not_depend_on_the_batch_but_for_the_leak(ddad, boards):
    model = ddad[0]
    x = to_float(load_images(boards.test, 64))
    whole, some = model.predict_batch(x, list(range(len(x)))), model.predict_batch(x[[7, 1]], [7, 1])
    assert torch.allclose(whole.score[[7, 1]], some.score, atol=1e-3)
    leak = DDAD(make_config('smoke', SMOKE | {'options': {'maxima': 'batch'}}, method='ddad'))
    leak.parts, leak.held_out_set = model.parts, model.held_out_set
    assert not torch.allclose(leak.predict_batch(x, list(range(len(x)))).score[[7, 1]], leak.predict_batch(x[[7, 1]], [7, 1]).score, atol=1e-3)

def test_opened_run(ddad, boards):
    model, run, *_ = ddad
    files = [s.image for s in boards.test[:3]]
    again = open_run(run, progress=False)
    assert isinstance(again, DDAD) and torch.equal(again.predict(files).score, model.predict(files).score)
    assert torch.equal(maxima_of(again), maxima_of(model)) and (maxima_of(model) > 0).all()
    with pytest.raises(StoreError, match='names no stage'): model.load({})

def test_reconstructions(ddad, boards):
    model = ddad[0]
    images = model.test_images(boards.test, boards)
    two, one = model.reconstructions(images, [4, 2]), model.reconstructions(images, [2])
    assert two.shape == (2, 3, 64, 64) and torch.allclose(two[1:], one, atol=1e-3)

def test_own_denoiser_is_trained_on_its_own_schedule():
    own = DDAD(make_config('smoke', {'options': {'denoiser': 'own'}}, method='ddad'))
    assert own.config.diffusion.beta_start == 1e-4 and own.steps.tolist() == list(range(1000))
    paper = DDAD(make_config('paper', {'options': {'denoiser': 'own'}, 'features.backbone': 'resnet18'}, method='ddad'))
    assert (paper.config.denoiser.lr, paper.config.denoiser.weight_decay) == (3e-4, .05)
    shared = DDAD(make_config('smoke', method='ddad'))
    assert shared.config.diffusion == make_config('smoke').diffusion and shared.steps.tolist() != list(range(1000))

def test_in_pixels_with_a_denoiser_of_its_own(boards, tmp_path):
    "As its authors run it: no autoencoder, and a UNet trained on DDAD's β."
    told, overrides = set(), {'denoiser.steps': 20, 'adaptation.gamma': 1, 'denoiser.checkpoint_every': 10}
    config = make_config('smoke', pixel_space('smoke') | overrides | {'options': {'denoiser': 'own'}}, method='ddad')
    model = DDAD(config).fit(boards, tmp_path/'run', progress=False, callback=lambda stage, *_: told.add(stage))
    x = to_float(load_images(boards.test[:3], 64))
    z = encode(model.parts, x)
    assert z.shape == x.shape and torch.allclose(decode(model.parts, z), x, atol=1e-6)
    assert {'denoiser', 'phi'} <= told and torch.equal(model.schedule.abar, SCHEDULE.abar)
    p = model.predict([s.image for s in boards.test[:3]])
    assert p.map.shape == (3, 1, 64, 64) and p.map.isfinite().all() and p.score.isfinite().all()
    back = model.reconstructions(model.test_images(boards.test, boards), [0, 1, 2])
    assert back.shape == x.shape and 0 <= back.min() and back.max() <= 1 and (back - x).abs().max() > 0
    again = open_run(tmp_path/'run', progress=False)
    assert again.config.latents.kind == 'identity' and torch.equal(again.predict([s.image for s in boards.test[:3]]).score, p.score)

@pytest.mark.parametrize('options, words', [({'t_hat': 1000}, 'options.t_hat'), ({'skip': 0}, 'options.skip'), ({'typo': 1}, 'options.typo')])
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ConfigError, match=words): DDAD(make_config('smoke', {'options': options}, method='ddad'))
    assert DDADOptions().w == 2
