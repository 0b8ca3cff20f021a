"The neighbour map, the mean over T̂, the references of f_map and the choice per set, in a fitted detector."
import numpy as np
import pytest
import torch

from dynad.choosing import chosen, stored_maps
from dynad.config import load_config, make_config
from dynad.data import load_images, open_dataset, to_float
from dynad.detector import DynAD
from dynad.fusion import Calibration, feature_map, fuse, score, smooth, upsample
from dynad.map_cache import Setting
from dynad.session import Session
from dynad.store import StoreError
from dynad.synthetic import write_synthetic
from dynad.walk import averaged_t_hat, walk

PARTS = {'fusion.choice': 'synthetic', 'fusion.lam': .5, 'fusion.neighbour': .5, 'fusion.score': 'top', 'fusion.layers': [1, 2],
         'fusion.false_alarms': .05, 'reconstruction.average': 2, 'features.enlarge': 2, 'adaptation.gamma': 0,
         'denoiser.steps': 20, 'latents.finetune_steps': 4}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return open_dataset(write_synthetic(tmp_path_factory.mktemp('d')/'board', 'board', 16, 4, 8, size=64))


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
    return tmp_path_factory.mktemp('r')/'run'


@pytest.fixture(scope='module')
def model(data, run):
    return DynAD(make_config('smoke', PARTS)).fit(data, run, progress=False)


@pytest.fixture(scope='module')
def images(data): return to_float(load_images(data.test, 64))


def test_what_was_chosen_is_in_the_run_and_a_second_fit_chooses_the_same(model, run, data):
    kept = load_config(run/'config.json')
    assert kept == model.config and kept.fusion.choice == 'synthetic'
    stages = sorted(p.name for p in (run/'stages').glob('*/*') if p.is_dir())
    again = DynAD(make_config('smoke', PARTS)).fit(data, run, progress=False)
    assert again.config == model.config and sorted(p.name for p in (run/'stages').glob('*/*') if p.is_dir()) == stages


def test_an_opened_run_decides_alike(model, run, images):
    a, b = model.predict(images), DynAD.open(run, progress=False).predict(images)
    assert torch.allclose(a.score, b.score) and torch.equal(a.anomalous, b.anomalous) and torch.equal(a.p_value, b.p_value)


def test_one_by_one_together_and_from_the_store_are_the_same(model, data, images):
    together = model.predict(images)
    single = torch.cat([model.predict(x[None]).score for x in images[:3]])
    stored = torch.cat([p.score for _, p in model.predict_set(model.test_images(data.test, data))])
    assert torch.allclose(together.score[:3], single, atol=1e-4) and torch.allclose(together.score, stored, atol=1e-4)


def test_the_map_is_the_mixture_by_hand(model, images):
    m = model.with_settings({'reconstruction.average': 2, 'reconstruction.severity': 'dynamic', 'fusion.lam': .3,
                             'fusion.neighbour': .4})
    w, size, parts = walk(m.parts, images[:3]), 64, []
    for T in averaged_t_hat(m.config):
        t = torch.full((3,), T)
        held = m.held_out.raw_maps(torch.full((len(m.held_out),), T))
        cal = Calibration({T: Calibration.measure(upsample(held.latent, size), feature_map(held.features, size))})
        raw = next(r for r, at in w.averaged if int(at[0]) == T)
        parts.append(cal(upsample(raw.latent, size), feature_map(raw.features, size), t))
    l, f = (sum(x)/2 for x in zip(*parts))
    def near(k):
        held = upsample(m.held_out.neighbour_maps()[k], size, False).flatten()
        low, high = held.sort().values[[len(held)//2, int(.99*len(held))]]
        return upsample((w.neighbour[k] - low)/(high - low), size, False)
    A = smooth(fuse(l, f, .3, (near(0) + near(1))/2, .4), m.config.fusion.sigma)
    p = m.predict(images[:3])
    assert torch.allclose(p.map, A, atol=1e-4) and torch.allclose(p.score, score(A, m.config.fusion.score), atol=1e-4)
    assert set(p.t_hat.tolist()) <= set(averaged_t_hat(m.config))


def test_weight_one_is_the_neighbour_map_and_weight_zero_none(model, images):
    alone = model.with_settings({'fusion.neighbour': 1.}).predict(images[:2])
    assert torch.allclose(alone.map, smooth(alone.neighbour_map, model.config.fusion.sigma), atol=1e-5)
    off = model.with_settings({'fusion.neighbour': 0.}).predict(images[:2])
    assert not torch.allclose(off.map, alone.map, atol=.05)


def test_static_severity_has_one_t_hat_whatever_is_averaged(model, images):
    p = model.with_settings({'reconstruction.severity': 'static', 'reconstruction.static_t': 80}).predict(images[:2])
    assert p.t_hat.tolist() == [80, 80]


def test_the_decoded_reference_is_blind_to_what_the_autoencoder_loses(model, images):
    "At T̂ = 0 the reconstruction is D(z_0) itself."
    zero = torch.zeros(len(model.held_out), dtype=torch.long)
    raw = {r: model.with_settings({'fusion.reference': r}).held_out.raw_maps(zero) for r in ('input', 'decoded')}
    largest = {r: max(float(f.abs().max()) for f in x.features.values()) for r, x in raw.items()}
    assert largest['decoded'] < 1e-5 < 1e-3 < largest['input']


def test_saved_without_its_run(model, images, tmp_path):
    a, b = model.predict(images[:3]), DynAD.from_pretrained(model.save_pretrained(tmp_path/'m')).predict(images[:3])
    assert torch.allclose(a.map, b.map, atol=1e-5) and torch.equal(a.p_value, b.p_value)
    (tmp_path/'m'/'spatial.safetensors').unlink()
    with pytest.raises(StoreError, match='spatial.safetensors'): DynAD.from_pretrained(tmp_path/'m')


@pytest.mark.parametrize('change', [{}, {'severity': 'static', 't_max': 160}, {'lam': .9, 'sigma': 2.}])
def test_a_session_shows_what_the_detector_gives(model, data, change):
    session = Session(model, data)
    setting = Setting(**{**{k: getattr(Setting.of(model.config), k) for k in ('t_max', 'severity', 'lam', 'sigma')}, **change})
    cache, same = session.maps(setting), model.with_settings(setting.overrides)
    own = torch.cat([p.map for _, p in same.predict_set(session.test_set)])[:, 0].numpy()
    assert np.abs(session.anomaly_maps(setting) - own).max() < 1e-3
    assert cache.thresholds(setting.lam, setting.sigma) == pytest.approx(
        (same.decision.pixel_threshold, same.decision.image_threshold), abs=1e-3)
    scores = np.concatenate([p.score for _, p in same.predict_set(session.test_set)])
    assert session.metrics(setting)[1] == pytest.approx(scores, abs=1e-3)


def test_false_alarms_are_those_promised_on_held_out_images(model):
    d, g = model.decision, model.decision.guarantee
    above = sum(s > d.image_threshold for s in d.normal_scores)
    assert above == g.n - g.k and len(d.normal_scores) == len(model.held_out)


def test_the_choice_hangs_on_no_test_image(model):
    "The images of the stage are held-out ones, with and without defects."
    maps = stored_maps(model.parts, model.held_out_set)
    assert maps.normal == len(model.held_out) and set(maps.source) <= set(range(maps.normal))
    assert set(chosen(model.parts, model.held_out_set)) == {'settings', 'prior', 'rows'}
