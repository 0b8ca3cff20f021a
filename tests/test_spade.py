"16c_spade: nearest images, nearest places, pyramid; the method in a run."
import numpy as np
import pytest
import torch

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
