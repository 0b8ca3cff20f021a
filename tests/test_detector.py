import json
import shutil

import pytest
import torch
from PIL import Image

from dynad.config import ConfigError, make_config
from dynad.data import DataError, load_images, open_dataset, to_float
from dynad.detector import DynAD
from dynad.evaluate import MEASURED, evaluate
from dynad.fusion import score
from dynad.scales import calibration_of_set
from dynad.store import StoreError

from conftest import SMOKE


def set_maps(model, data):
    "A_map, l_map, f_map of a data set's test images, by way of the store."
    images = model.test_images(data.test, data)
    model = model.for_test_set(images)
    return model.all_maps(model.cached_walk(images))


@pytest.fixture(scope='module')
def images(boards): return to_float(load_images(boards.test, 64))


def test_predict_gives_what_it_promises(smoke, images):
    model, _ = smoke
    p, n = model.predict(images), len(images)
    assert p.score.shape == p.t_hat.shape == p.anomalous.shape == p.distance.shape == (n,)
    assert p.map.shape == p.mask.shape == p.latent_map.shape == p.feature_map.shape == (n, 1, 64, 64)
    assert p.reconstruction.shape == (n, 3, 64, 64) and 0 <= p.reconstruction.min() and p.reconstruction.max() <= 1
    assert torch.equal(p.score, score(p.map)) and p.mask.dtype == p.anomalous.dtype == torch.bool
    assert set(p.t_hat.tolist()) <= set(range(16, 161))


def test_a_image_has_the_same_answer_alone_and_in_a_set(smoke, boards, images):
    model, _ = smoke
    A, _, _ = set_maps(model, boards)
    torch.testing.assert_close(model.predict([boards.test[3].image]).map[0], A[3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.predict(images).map, A, rtol=1e-3, atol=1e-3)


def test_sixteen_bits_have_the_same_answer_alone_and_in_a_set(smoke, tmp_path):
    values = torch.linspace(0, 65535, 64*64).view(64, 64).numpy().astype('uint16')
    for d in ('train/good', 'test/good'):
        (tmp_path/d).mkdir(parents=True); Image.fromarray(values if 'test' in d else values//2).save(tmp_path/d/'a.png')
    data = open_dataset(tmp_path)
    A = set_maps(smoke[0], data)[0]
    torch.testing.assert_close(smoke[0].predict([data.test[0].image]).map, A, rtol=1e-4, atol=1e-4)


def test_on_the_scale_of_a_test_set_thresholds_are_those_of_the_held_out_images_on_it(smoke, boards, images):
    model = DynAD.open(smoke[1], {'fusion.calibration': 'test'}, progress=False)
    e = evaluate(model, boards, n_boot=0, null_models=False, progress=False)
    scaled = model.on_scale_of(calibration_of_set(model.cached_walk(e.images)))
    held = scaled.all_maps(scaled.held_out)[0]
    assert e.result['decision']['image_threshold'] == pytest.approx(float(score(held).double().quantile(model.config.fusion.threshold_quantile)))
    assert e.result['decision']['image_threshold'] != model.decision.image_threshold
    with pytest.warns(UserWarning, match='maps and scores of another call are on another scale'): p = model.predict(images)
    assert torch.equal(p.anomalous, e.scores > e.result['decision']['image_threshold'])


@pytest.mark.parametrize('make, words', [
    (lambda: torch.rand(2, 3, 32, 32), r'images of shape \(2, 3, 32, 32\): expected \[B,3,64,64\]'),
    (lambda: torch.rand(1, 3, 64, 64)*255, r'expected finite values in \[0,1\]'),
    (lambda: torch.full((1, 3, 64, 64), float('nan')), r'expected finite values in \[0,1\]'),
])
def test_wrong_tensors_are_refused(smoke, make, words):
    with pytest.raises(ValueError, match=words): smoke[0].predict(make())


def test_an_unfitted_detector_says_so():
    with pytest.raises(RuntimeError, match='not fitted; call fit, open or from_pretrained'): DynAD(make_config('smoke')).predict(torch.rand(1, 3, 64, 64))


def test_pretrained_folder_holds_json_and_safetensors_and_answers_the_same(smoke, images, tmp_path):
    model, _ = smoke
    folder = model.save_pretrained(tmp_path/'model')
    assert {f.suffix for f in folder.rglob('*') if f.is_file()} == {'.json', '.safetensors'}
    again = DynAD.from_pretrained(folder)
    a, b = model.predict(images), again.predict(images)
    torch.testing.assert_close(a.map, b.map, rtol=1e-5, atol=1e-5)
    assert torch.equal(a.mask, b.mask) and torch.equal(a.anomalous, b.anomalous) and torch.equal(a.t_hat, b.t_hat)


@pytest.mark.parametrize('name, words', [('dic.safetensors', 'dic.safetensors'), ('calibration.json', 'calibration.json'), ('config.json', 'config.json')])
def test_a_pretrained_folder_with_a_file_missing_names_it(smoke, tmp_path, name, words):
    folder = smoke[0].save_pretrained(tmp_path/'model')
    (folder/name).unlink()
    with pytest.raises((StoreError, ConfigError), match=words): DynAD.from_pretrained(folder)


@pytest.mark.parametrize('overrides', [
    {'fusion.lam': .2}, {'fusion.sigma': 1.}, {'fusion.calibration': 'test'}, {'fusion.quantile': .9}, {'fusion.threshold_quantile': .9},
    {'reconstruction.severity': 'static', 'reconstruction.static_t': 80}, {'reconstruction.t_max': 80}, {'dic.bins': 5, 'dic.floor': .5}],
    ids=lambda o: ','.join(f'{k}={v}' for k, v in o.items()))
def test_no_denoiser_is_called_for_what_is_stored(smoke, boards, overrides):
    model, run = smoke
    staged, held = model.cached_walk(model.test_images(boards.test, boards)), model.held_out
    for T in range(10, 170, 10):  # the stored grid
        staged.raw_maps(torch.full((len(staged),), T)); held.raw_maps(torch.full((len(held),), T))
    before = model.parts.denoiser.calls
    assert before > 0
    other = DynAD.open(run, overrides, progress=False)
    A, _, _ = set_maps(other, boards)
    assert other.parts.denoiser.calls == 0 and model.parts.denoiser.calls == before
    B, _, _ = set_maps(model, boards)
    if 'fusion.threshold_quantile' not in overrides: assert not torch.allclose(A, B)
    else: assert other.decision.pixel_threshold < model.decision.pixel_threshold


def test_eta_and_omega_do_not_train_again(smoke, boards):
    _, run = smoke
    trained = {p: p.stat().st_mtime_ns for n in ('autoencoder', 'denoiser', 'phi') for p in (run/'stages'/n).rglob('*') if p.is_file()}
    for o in ({'reconstruction.eta': 2.}, {'reconstruction.omega': 1.}, {'reconstruction.steps': 'stride'}):
        other = DynAD.open(run, o, progress=False)
        set_maps(other, boards)
        assert other.parts.denoiser.calls > 0
    assert trained == {p: p.stat().st_mtime_ns for p in trained}


@pytest.mark.parametrize('overrides, words', [({'denoiser.lr': 1.}, 'denoiser: cannot be changed on a fitted run'), ({'seed': 5}, 'seed: cannot be changed'),
                                              ({'reconstruction.eta': -1}, 'reconstruction.eta = -1')])
def test_open_refuses_what_would_need_a_new_fit(smoke, overrides, words):
    with pytest.raises(ConfigError, match=words): DynAD.open(smoke[1], overrides)


def test_a_run_that_is_not_finished_says_so(smoke, tmp_path):
    shutil.copy(smoke[1]/'config.json', tmp_path/'config.json')
    with pytest.raises(StoreError, match='the run is not finished; run `dynad fit` with the same --out again'): DynAD.open(tmp_path)
    with pytest.raises(ConfigError, match='no such file'): DynAD.open(tmp_path/'none')


def test_the_same_seed_gives_the_same_result(smoke, boards, tmp_path):
    model, _ = smoke
    model.held_out.z_hat(model.held_out.t_hat.clone().fill_(int(model.held_out.t_hat.max()))) # more than an evaluation needs is stored
    again = DynAD(make_config('smoke', SMOKE)).fit(boards, tmp_path/'again', progress=False)
    assert again.parts.hashes == model.parts.hashes
    a, b = (json.loads(json.dumps(evaluate(m, boards, n_boot=50, progress=False).result)) for m in (model, again))
    for k in MEASURED: a.pop(k), b.pop(k)
    different = {k: (a[k], b.get(k)) for k in a if a[k] != b.get(k)}
    assert not different, different


def test_a_fit_that_is_stopped_goes_on_and_ends_the_same(smoke, boards, tmp_path):
    model, _ = smoke
    class Stop(BaseException): pass
    def stop(stage, step, loss):
        if stage == 'denoiser' and step >= 25: raise Stop
    with pytest.raises(Stop): DynAD(make_config('smoke', SMOKE)).fit(boards, tmp_path/'run', progress=False, callback=stop)
    seen = []
    again = DynAD(make_config('smoke', SMOKE)).fit(boards, tmp_path/'run', progress=False, callback=lambda stage, step, loss: seen.append((stage, step)))
    assert {s for s, _ in seen} == {'denoiser', 'phi'} and min(seen)[1] > 10 and again.parts.hashes == model.parts.hashes


def test_held_out_images_are_seen_by_no_training_stage(smoke, boards):
    _, run = smoke
    info = json.loads((run/'run.json').read_text())
    assert len(info['held_out']) == 5 and not set(info['fit']) & set(info['held_out'])
    assert set(info['fit']) | set(info['held_out']) == {s.name for s in boards.train}


def test_too_few_normal_images(boards, tmp_path):
    from dataclasses import replace
    few = replace(boards, samples=boards.train[:4] + boards.test)
    with pytest.raises(DataError, match='4 normal training images'): DynAD(make_config('smoke', SMOKE)).fit(few, tmp_path/'run', progress=False)
