"16g_static: simplex noise, the settings, equality with DynAD's own static walk, shared stages, AnoDDPM's map."
import numpy as np
import pytest
import torch

from dynad.config import ConfigError, make_config
from dynad.data import load_images, to_float
from dynad.detector import DynAD
from dynad.fusion import smooth
from dynad.method import Prediction, open_run
from dynad.static_noise import Static, StaticOptions, simplex_for, simplex_noise, simplex_octave, static_config

SMOKE = {'denoiser.steps': 40, 'latents.finetune_steps': 5, 'adaptation.gamma': 1, 'denoiser.checkpoint_every': 10} # as the fixture `smoke`

def config(**options): return make_config('smoke', SMOKE | {'options': options}, method='static')

# noise

@pytest.mark.parametrize('size', [4, 8, 16, 33, 128])
def test_simplex_noise_has_unit_variance_and_its_seed(size):
    n = simplex_noise((2, 3, size, size), 1)
    assert n.shape == (2, 3, size, size) and n.isfinite().all()
    assert torch.allclose(n.mean((2, 3)), torch.zeros(2, 3), atol=1e-4) and torch.allclose(n.std((2, 3), correction=0), torch.ones(2, 3), atol=1e-3)
    assert torch.equal(n, simplex_noise((2, 3, size, size), 1)) and not torch.equal(n, simplex_noise((2, 3, size, size), 2))
    assert not torch.equal(n[0, 0], n[0, 1])

def test_an_octave_is_smooth_at_its_wavelength_and_bounded():
    o = simplex_octave(256, 64, np.random.default_rng(0))
    assert np.abs(o).max() <= 1 and np.abs(np.diff(o, axis=0)).max() < .1 # continuous over the edges of its triangles
    assert np.abs(np.diff(o, axis=1)).max() < .1 and o.std() > .1
    fine = simplex_octave(256, 4, np.random.default_rng(0))
    assert np.abs(np.diff(fine, axis=0)).mean() > 5*np.abs(np.diff(o, axis=0)).mean()

def test_octaves_add_fine_structure():
    rough = lambda k: float(simplex_noise((1, 128, 128), 3, octaves=k).diff(dim=1).abs().mean())
    assert rough(1) < rough(3) < rough(6)

def test_noise_of_an_image_does_not_depend_on_its_batch():
    o = StaticOptions(noise='simplex')
    assert torch.equal(simplex_for(o, [4, 2], (3, 8, 8), 0)[1], simplex_for(o, [2], (3, 8, 8), 0)[0])
    assert simplex_for(o, [], (3, 8, 8), 0).shape == (0, 3, 8, 8)

# settings

def test_settings():
    r = static_config(config(t_hat=300, omega=.5)).reconstruction
    assert (r.severity, r.static_t, r.omega, r.eta) == ('static', 300, .5, 0.)
    c = static_config(config())
    assert static_config(c) == c # opened again it is the same
    with pytest.raises(ConfigError, match='leave it out'): static_config(config(denoiser='own'))
    with pytest.raises(ConfigError, match='diffusion.T'):
        static_config(make_config('smoke', {'diffusion.T': 200, 'options': {'t_hat': 250}}))
    with pytest.raises(ConfigError, match='options.noise'): static_config(config(noise='perlin'))

# the method

@pytest.fixture
def kept(smoke):
    "The run directory of a fitted DynAD, as it was for the other tests."
    dynad, run = smoke
    before = {n: (run/n).read_bytes() for n in ('run.json', 'config.json')}
    yield dynad, run
    for n, text in before.items(): (run/n).write_bytes(text)

def test_is_dynad_under_static_settings_and_trains_nothing(kept, boards):
    dynad, run = kept
    told = []
    model = Static(config()).fit(boards, run, progress=False, callback=lambda *a: told.append(a))
    assert told == [] and model.stages == dynad.stages
    same = dynad.with_settings({'fusion.neighbour': 0., 'reconstruction.severity': 'static', 'reconstruction.static_t': 250, 'reconstruction.omega': 1.})
    files = [s.image for s in boards.test[:4]]
    a, b = model.predict(files), same.predict(files)
    assert torch.equal(a.map, b.map) and (a.t_hat == 250).all()
    again = open_run(run, progress=False)
    assert isinstance(again, Static) and torch.equal(again.predict(files).score, a.score)

def test_simplex_noise_on_the_shared_and_on_an_own_unet(kept, boards):
    dynad, run = kept
    told = []
    shared = Static(config(noise='simplex', denoiser='shared')).fit(boards, run, progress=False, callback=lambda *a: told.append(a))
    assert told == [] and shared.stages['denoiser'] == dynad.stages['denoiser']
    own = Static(config(noise='simplex')).fit(boards, run, progress=False, callback=lambda stage, *_: told.append(stage))
    assert set(told) == {'denoiser', 'phi'} and own.stages['denoiser'] != dynad.stages['denoiser']
    files = [s.image for s in boards.test[:3]]
    x = to_float(load_images(boards.test, 64))
    images = shared.test_images(boards.test, boards)
    for m in (shared, own):
        stored = Prediction.concatenated([Prediction(p.score, p.map) for _, p in m.predict_set(images)])
        assert torch.allclose(m.predict_batch(x, list(range(len(x)))).map, stored.map, atol=1e-4)
    gaussian = Static(config()).fit(boards, run, progress=False)
    assert not torch.allclose(gaussian.predict(files).map, shared.predict(files).map)

def test_map_of_anoddpm_is_the_squared_error(kept, boards):
    _, run = kept
    m = Static(config(map='pixels')).fit(boards, run, progress=False)
    images = m.test_images(boards.test, boards)
    (rows, p), *_ = m.predict_set(images)
    x, x_hat = to_float(images.images[rows]), m.reconstructions(images, rows)
    want = smooth((x - x_hat).square().mean(1, keepdim=True), m.config.fusion.sigma)
    assert torch.allclose(p.map, want, atol=1e-6) and torch.allclose(p.score, want.amax((1, 2, 3)), atol=1e-6)
    assert p.reconstruction is None and m.predict([boards.test[0].image]).reconstruction is not None
    assert m.decision.pixel_threshold > 0
