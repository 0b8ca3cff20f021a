"16b_padim: place vectors, channels, Gaussians, distance, map; the method in a run; and the comparison with anomalib."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dynad.config import make_config
from dynad.method import open_run
from dynad.padim import PaDiM, PaDiMError, mahalanobis, padim_map, place_vectors, principal_directions, random_channels, reduced
from dynad.places import PlaceError, PlaceGaussians

RECORD = Path(__file__).parents[1]/'nbs'/'results'/'padim_anomalib.json'


def features(n, seed=0, size=8):
    g = torch.Generator().manual_seed(seed)
    return {j: torch.randn(n, c, size//2**(j - 1), size//2**(j - 1), generator=g) for j, c in ((1, 3), (2, 4), (3, 5))}


def test_place_vectors_repeat_the_coarser_maps():
    f = features(2)
    v = place_vectors(f)
    assert v.shape == (2, 12, 8, 8)
    for y, x in ((0, 0), (5, 2), (7, 7)):
        assert torch.equal(v[:, :, y, x], torch.cat([f[1][:, :, y, x], f[2][:, :, y//2, x//2], f[3][:, :, y//4, x//4]], 1))
    with pytest.raises(PlaceError, match=r'layers \[3\] are not among the features \[1, 2\]'): place_vectors({1: f[1], 2: f[2]}, (1, 3))


def test_channels_are_drawn_by_the_seed():
    a, b, c = (random_channels(50, 20, s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.sum() == 20 and a.sum(1).max() == 1
    with pytest.raises(PaDiMError, match=r'options.dims = 51: φ has 50 channels.*give 1…50'): random_channels(50, 51)


def test_distance_and_map_are_those_of_a_plain_loop():
    "The whole of PaDiM once more, place by place in numpy's double precision."
    train, test, ridge = place_vectors(features(9)), place_vectors(features(3, 1)), .01
    U = random_channels(12, 6, 3)
    fitted = PlaceGaussians().add(reduced(train[:4], U)).add(reduced(train[4:5], U)).add(reduced(train[5:], U)).fitted(ridge)
    maps, scores = padim_map(mahalanobis(reduced(test, U), *fitted).view(3, 8, 8), (32, 32), 16.)
    kept = np.flatnonzero(U.sum(1).numpy())
    order = U.argmax(0).numpy()
    assert sorted(order) == list(kept)
    want = np.zeros((3, 8, 8))
    for y in range(8):
        for x in range(8):
            rows = train[:, order, y, x].double().numpy()
            inverse = np.linalg.inv(np.cov(rows, rowvar=False) + ridge*np.eye(6))
            for b in range(3):
                d = test[b, order, y, x].double().numpy() - rows.mean(0)
                want[b, y, x] = np.sqrt(d @ inverse @ d)
    up = torch.nn.functional.interpolate(torch.from_numpy(want)[:, None], (32, 32), mode='bilinear')[:, 0].numpy()
    smoothed = np.stack([gaussian_filter(m, 2., mode='mirror', truncate=4) for m in up]) # σ = 16 at 256² is 2 at 32²
    np.testing.assert_allclose(maps[:, 0].numpy(), smoothed, rtol=1e-4)
    np.testing.assert_allclose(scores.numpy(), smoothed.reshape(3, -1).max(1), rtol=1e-4)


def test_a_shift_or_a_batch_size_changes_nothing():
    x = torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(0))
    one = PlaceGaussians().add(x).fitted()
    many = PlaceGaussians()
    for b in (x + 1000).split(3): many.add(b)
    mean, inverse = many.fitted()
    assert torch.allclose(mean - 1000, one[0], atol=1e-3) and torch.allclose(inverse, one[1], rtol=1e-2)
    with pytest.raises(PlaceError, match='1 normal images.*at least 2'): PlaceGaussians().add(x[:1]).fitted()


def test_pca_keeps_what_varies_most():
    x = torch.randn(30, 5, 4, 4, generator=torch.Generator().manual_seed(0))*torch.tensor([.1, 5, .1, 3, .1]).view(1, 5, 1, 1)
    U = principal_directions(x.split(7), 2)
    assert torch.allclose(U.T @ U, torch.eye(2), atol=1e-5) and U[[1, 3]].square().sum() > 1.99
    with pytest.raises(PaDiMError, match='at least one normal image'): principal_directions([], 2)


@pytest.mark.parametrize('reduction', ['random', 'pca'])
def test_a_run_fits_opens_and_predicts(reduction, boards, tmp_path):
    config = make_config('smoke', {'options': {'dims': 30, 'reduction': reduction}})
    method = PaDiM(config).fit(boards, tmp_path/'run', progress=False)
    files = [s.image for s in boards.test]
    p, q = method.predict(files), open_run(tmp_path/'run', progress=False).predict(files)
    assert torch.equal(p.map, q.map) and p.map.shape == (len(files), 1, 64, 64)
    assert torch.equal(p.score, p.map.flatten(1).amax(1))
    labels = torch.tensor([s.label for s in boards.test])
    assert p.score[labels == 1].mean() > p.score[labels == 0].mean()


def test_too_many_channels_are_named(boards, tmp_path):
    with pytest.raises(PaDiMError, match='options.dims = 177: φ has 176 channels'):
        PaDiM(make_config('smoke', {'options': {'dims': 177}})).fit(boards, tmp_path/'run', progress=False)


# anomalib 2.7.0: tests/anomalib_padim.py, run beside the project, has written the file

def test_maps_agree_with_those_of_anomalib():
    rows = json.loads(RECORD.read_text(encoding='utf-8'))['rows']
    assert {r['set'] for r in rows} == {'cookies', 'magnetic_tile'}
    for r in rows:
        assert r['map_difference'] < 1e-4 and r['score_difference'] < 1e-4, r
        assert r['float64']['dynad'] < 1e-5 and r['float64']['dynad'] < r['float64']['anomalib']
        for k in ('i_auroc', 'p_auroc', 'pro'): assert abs(r['anomalib'][k] - r['dynad'][k]) < 1e-4


def test_maps_agree_with_those_of_anomalib_here():
    pytest.importorskip('anomalib', reason="anomalib is not installed: pip install 'dynad[baselines]'")
    from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator
    from anomalib.models.components import MultiVariateGaussian
    train, test = place_vectors(features(9)), place_vectors(features(3, 1))
    mean, inverse = MultiVariateGaussian().fit(train)
    theirs = AnomalyMapGenerator(sigma=2)(embedding=test, mean=mean, inv_covariance=inverse, image_size=(64, 64))
    fitted = PlaceGaussians().add(train.flatten(2)).fitted(.01 + 1e-5)
    ours, _ = padim_map(mahalanobis(test.flatten(2), *fitted).view(3, 8, 8), (64, 64), 8.)
    assert (ours - theirs).abs().max() < 1e-4*theirs.abs().max()
