"16h_anomalib_models and 16l_anomalib_more: φ in other widths, seeds, what is said without anomalib; and with it, each model once."
from importlib.util import find_spec

import pytest
import torch

from dynad.anomalib_models import AnomalibError, NamedFeatures, UnavailableError, from_anomalib, isometry
from dynad.config import make_config
from dynad.data import to_float
from dynad.features import load_features
from dynad.method import import_methods, method_named, open_run
from dynad.store import TrainingStopped

RUN = ('stfpm', 'rd4ad', 'fastflow', 'cfa', 'draem', 'supersimplenet', 'ganomaly')
WEIGHTS = ('uninet', 'dinomaly')
here = pytest.mark.skipif(find_spec('anomalib') is None, reason="anomalib is not installed: pip install 'dynad[baselines]'")
away = pytest.mark.skipif(find_spec('anomalib') is not None, reason="anomalib is installed")


def config(name): return make_config('smoke', {'data.image_size': 128, 'options': {'steps': 2, 'batch': 4}})


def test_the_models_are_registered_without_anomalib(): assert {*RUN, *WEIGHTS} <= set(import_methods())


@away
@pytest.mark.parametrize('name', [*RUN, *WEIGHTS])
def test_without_anomalib_the_cure_is_named(name, boards, tmp_path):
    with pytest.raises(UnavailableError, match=r"anomalib cannot be imported.*pip install 'dynad\[baselines\]'"):
        method_named(name)(config(name)).fit(boards, tmp_path/name, progress=False)
    assert not (tmp_path/name/'run.json').exists()


def test_an_isometry_keeps_distances_and_angles():
    Q, x = isometry(24, 64), torch.randn(10, 24)
    assert torch.equal(Q, isometry(24, 64)) and torch.equal(isometry(5, 5), torch.eye(5))
    assert torch.allclose(torch.pdist(x), torch.pdist(x @ Q.T), atol=1e-4)
    with pytest.raises(AnomalibError, match='φ has 65 channels where the model takes at most 64'): isometry(65, 64)


def test_phi_is_frozen_and_its_statistics_stay(boards):
    phi = load_features(make_config('smoke').features, layers=(1, 2, 3))
    before, named = phi.weights_hash, NamedFeatures(phi, widths=(64, 128, 256))
    named.train()
    out = named(torch.rand(2, 3, 64, 64))
    assert [v.shape[1] for v in out.values()] == [64, 128, 256] and not any(v.requires_grad for v in out.values())
    assert phi.weights_hash == before and not named.training and not phi.training


@here
@pytest.mark.parametrize('name', RUN)
def test_a_model_fits_opens_and_predicts(name, boards, tmp_path):
    state, told = torch.get_rng_state(), []
    method = method_named(name)(config(name)).fit(boards, tmp_path/'run', progress=False, callback=lambda stage, k, loss: told.append(stage))
    assert told == [name, name] and torch.equal(torch.get_rng_state(), state)
    files = [s.image for s in boards.test][:4]
    p, q = method.predict(files), open_run(tmp_path/'run', progress=False).predict(files)
    assert torch.equal(p.score, q.score) and torch.isfinite(p.score).all()
    if name == 'ganomaly': assert p.map is None
    else: assert torch.equal(p.map, q.map) and p.map.shape == (4, 1, 128, 128)


def test_draem_is_offered_as_one_that_reconstructs():
    assert [n for n in (*RUN, *WEIGHTS) if method_named(n).reconstructs] == ['draem']


@here
def test_reconstructions_of_draem_are_those_of_its_network(boards, tmp_path):
    method = method_named('draem')(config('draem')).fit(boards, tmp_path/'run', progress=False)
    images, rows = method.test_images(boards.test, boards), [5, 0, 2]
    back = method.reconstructions(images, rows)
    assert back.shape == (3, 3, 128, 128) and 0 <= back.min() and back.max() <= 1
    with torch.no_grad(): own = method.net.reconstructive_subnetwork(to_float(images.images[rows]))
    torch.testing.assert_close(back, own.clamp(0, 1))


@here
def test_a_seed_is_a_result_and_a_stop_is_a_stop(boards, tmp_path):
    fit = lambda folder, seed=0, **more: method_named('stfpm')(make_config('smoke', {'options': {'steps': 2, 'batch': 4}}, seed=seed)).fit(
        boards, tmp_path/folder, progress=False, **more)
    a, b, c = fit('a'), fit('b'), fit('c', seed=1)
    files = [s.image for s in boards.test][:2]
    assert torch.equal(a.predict(files).map, b.predict(files).map) and not torch.equal(a.predict(files).map, c.predict(files).map)
    with pytest.raises(TrainingStopped, match='stopped after step 0'): fit('d', should_stop=lambda: True)


@here
def test_images_too_small_for_its_noise_are_named(boards, tmp_path):
    with pytest.raises(AnomalibError, match='data.image_size = 64.*at least 128×128'):
        method_named('supersimplenet')(make_config('smoke')).fit(boards, tmp_path/'run', progress=False)


@here
def test_stfpm_scores_as_anomalib_would():
    "A teacher against a copy of itself with other weights: the map is the product of anomalib's own layer maps."
    generator = from_anomalib('models.image.stfpm.anomaly_map', 'AnomalyMapGenerator')()
    teacher = {f'layer{j}': torch.randn(2, 4, 8, 8) for j in (1, 2)}
    assert generator(teacher_features=teacher, student_features=teacher, image_size=(16, 16)).abs().max() < 1e-6
