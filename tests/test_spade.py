"16c_spade: nearest images, nearest places, pyramid; the public program's figures; the method in a run."
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dynad.config import make_config
from dynad.method import open_run
from dynad.spade import SPADE, SPADEError, correspondence_map, nearest_images, nearest_places, pyramid_of

G = torch.Generator().manual_seed(0)


def test_nearest_images_is_a_mean_of_distances():
    f, normal = torch.randn(3, 7, generator=G), torch.randn(20, 7, generator=G)
    d = np.linalg.norm(f.numpy()[:, None] - normal.numpy(), axis=2)
    for K in (1, 5, 50):
        scores, rows = nearest_images(f, normal, K)
        order = np.argsort(d, 1)[:, :K]
        np.testing.assert_array_equal(rows.numpy(), order)
        np.testing.assert_allclose(scores.numpy(), np.take_along_axis(d, order, 1).mean(1), rtol=1e-5)
        np.testing.assert_allclose(nearest_images(f, normal, K, squared=True)[0].numpy(), np.take_along_axis(d**2, order, 1).mean(1), rtol=1e-5)
    with pytest.raises(SPADEError, match='no normal image'): nearest_images(f, normal[:0])


@pytest.mark.parametrize('offset', [0., 50.])
@pytest.mark.parametrize('chunk', [1, 13, 10_000])
def test_nearest_places_is_that_of_a_plain_loop(chunk, offset):
    x, gallery = torch.randn(5, 4, 6, generator=G) + offset, torch.randn(3, 5, 4, 6, generator=G) + offset
    bank = gallery.permute(0, 2, 3, 1).reshape(-1, 5).double()
    want = torch.stack([(bank - v).norm(dim=1).min() for v in x.flatten(1).T.double()]).view(4, 6)
    got = nearest_places(x, gallery, chunk)
    assert torch.allclose(got.double(), want, atol=1e-5 if not offset else .05) # |x|² = 2500·5 rounds the order of close seconds
    assert nearest_places(gallery[1], gallery, chunk).max() == 0


def test_a_part_that_moved_is_found_again():
    x = torch.randn(5, 8, 8, generator=G)
    assert nearest_places(x.roll((3, 2), (1, 2)), x[None]).max() == 0


def test_pyramid_and_map():
    f = {1: torch.randn(2, 3, 8, 8, generator=G), 2: torch.randn(2, 4, 4, 4, generator=G)}
    assert [m.shape[1] for m in pyramid_of(f, (1, 2))] == [3, 4] and pyramid_of(f, (1, 2), 'concatenated')[0].shape == (2, 7, 8, 8)
    with pytest.raises(SPADEError, match=r'layers \[3\]'): pyramid_of(f)
    levels, galleries = [m[0] for m in pyramid_of(f, (1, 2))], [m[1:] for m in pyramid_of(f, (1, 2))]
    up = [torch.nn.functional.interpolate(nearest_places(x, g)[None, None], (32, 32), mode='bilinear')[0] for x, g in zip(levels, galleries)]
    assert torch.allclose(correspondence_map(levels, galleries, (32, 32), sigma=0), (up[0] + up[1])/2)


@pytest.fixture(scope='module')
def public(): return load_file(Path(__file__).parent/'fixtures'/'spade.safetensors')


def predicted(public, K, last=None):
    "Scores and maps of `SPADE` for the features that the public program was given; `last`: images in the gallery of layer 3, in their order of nearness."
    features = {j: public[f'features.{k}'] for j, k in enumerate(('layer1', 'layer2', 'layer3', 'avgpool'), 1)}
    train, test = ({j: f[rows] for j, f in features.items()} for rows in (slice(0, 6), slice(6, 8)))
    method = SPADE(make_config('smoke', {'options': {'K': K, 'sigma': 4*256/224}})) # σ = 4 at 224², as there
    method.normal, method.levels, method.phi = train[4].mean((2, 3)), pyramid_of(train), lambda _: test
    if last: method.levels[2] = Cut(method.levels[2], last)
    p = method.predict_batch(torch.zeros(2, 3, 224, 224), [0, 1])
    return p.score, p.map[:, 0, ::8, ::8]


class Cut:
    "A gallery of which only the nearest images are taken."
    def __init__(self, level, n): self.level, self.n = level, n
    def __getitem__(self, rows): return self.level[rows[:self.n]]


def test_public_code_gives_the_same_scores_and_maps(public):
    score, maps = predicted(public, 4)
    assert torch.allclose(score, public['K4.score'], atol=1e-5, rtol=0)
    off = (maps - public['K4.map']).abs()
    assert off[:, 2:-2, 2:-2].max() < 1e-5 # further than 4σ = 16 pixels from the border
    assert 1e-4 < off.max() < .005         # at the border a Gaussian of SciPy repeats the edge pixel


def test_public_code_leaves_out_what_is_no_full_hundred_of_places(public):
    "At K = 5, 25 of the 125 places of layer 3: those of the fifth image; the method compares all."
    score, maps = predicted(public, 5)
    assert torch.allclose(score, public['K5.score'], atol=1e-5, rtol=0)
    inner = lambda m: m[:, 2:-2, 2:-2]
    assert (inner(maps) - inner(public['K5.map'])).abs().max() > .05 and (inner(maps) <= inner(public['K5.map']) + 1e-5).all()
    assert (inner(predicted(public, 5, last=4)[1]) - inner(public['K5.map'])).abs().max() < 1e-5


@pytest.mark.parametrize('pyramid', ['layers', 'concatenated'])
def test_a_run_fits_opens_and_predicts(pyramid, boards, tmp_path):
    config = make_config('smoke', {'options': {'K': 4, 'pyramid': pyramid}})
    method = SPADE(config).fit(boards, tmp_path/'run', progress=False)
    files = [s.image for s in boards.test]
    p, q = method.predict(files), open_run(tmp_path/'run', progress=False).predict(files)
    assert torch.equal(p.map, q.map) and torch.equal(p.score, q.score) and p.map.shape == (len(files), 1, 64, 64)
    labels = torch.tensor([s.label for s in boards.test])
    assert p.map[labels == 1].flatten(1).amax(1).mean() > p.map[labels == 0].flatten(1).amax(1).mean()


def test_fewer_normal_images_than_K_are_said(boards, tmp_path):
    with pytest.warns(UserWarning, match=r'options.K = 50, but there are \d+ normal images'):
        SPADE(make_config('smoke')).fit(boards, tmp_path/'run', progress=False)
