import numpy as np
import pytest
import torch

from dynad.defects import AREAS, CHANGED, DEFECTS, DefectError, defect_set, likely_places, put_defect
from dynad.synthetic import PRODUCTS, nominal


@pytest.fixture(scope='module')
def normals():
    rng = np.random.default_rng(3)
    images = [nominal(p, rng, 64) for p in PRODUCTS]
    flat = np.full((64, 64, 3), 120, np.uint8)  # nothing to cut from: every kind must still show
    return torch.from_numpy(np.stack([*images, flat])).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize('kind', DEFECTS)
@pytest.mark.parametrize('area', [.0004, .01, .2, .5])
def test_outside_of_the_mask_nothing_changes_and_inside_half_does(normals, kind, area):
    for i, image in enumerate(normals):
        x = image.float()/255
        bad, mask = put_defect(x, kind, area, .2, np.random.default_rng(i))
        changed = ((bad - x).abs().amax(0, keepdim=True)*255).round()
        assert mask.any() and not changed[~mask].any()
        assert (changed[mask] >= CHANGED).float().mean() >= .5
        assert 0 <= bad.min() and bad.max() <= 1 and torch.isfinite(bad).all()


def test_area_and_contrast_are_those_asked_for(normals):
    x = normals[0].float()/255
    for area in (.01, .05, .2):
        shares = [put_defect(x, 'blob', area, .3, np.random.default_rng(i))[1].float().mean() for i in range(30)]
        assert .5*area < np.mean(shares) < 1.3*area  # some of it lies beyond the border
    def change(c):
        out = []
        for i in range(20):
            bad, mask = put_defect(x, 'stain', .05, c, np.random.default_rng(i))
            out.append((bad - x).abs().amax(0, keepdim=True)[mask].mean())
        return np.mean(out)
    assert change(.06) < change(.2) < change(.45)


def test_an_image_depends_on_seed_and_number_alone(normals):
    a, b, other = defect_set(normals, 9), defect_set(normals, 20), defect_set(normals, 9, seed=1)
    assert torch.equal(a.images, b.images[:9]) and torch.equal(a.masks, b.masks[:9])
    assert a.kind == b.kind[:9] and a.source == b.source[:9] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert not torch.equal(a.images, other.images)


def test_one_normal_image_is_enough_and_all_kinds_and_sizes_appear(normals):
    one = defect_set(normals[:1], 28)
    assert set(one.kind) == set(DEFECTS)
    shares = one.masks.flatten(1).float().mean(1)
    assert shares.min() < 3*AREAS[0] + 2/64**2 and shares.max() > AREAS[1]/3
    assert len({m.numpy().tobytes() for m in one.masks}) == 28


def test_the_source_image_is_named_truly(normals):
    s = defect_set(normals, 8)
    for image, mask, i in zip(s.images, s.masks, s.source):
        assert torch.equal(image*~mask, normals[i]*~mask)


def test_grey_and_non_square_images():
    x = torch.rand(1, 40, 56).expand(3, 40, 56).contiguous()
    bad, mask = put_defect(x, 'dent', .05, .3, np.random.default_rng(0))
    assert bad.shape == x.shape and mask.shape == (1, 40, 56)


def test_places_are_on_the_object():
    image = np.zeros((50, 50, 3), np.float32)
    image[15:35, 15:35] = .8
    assert likely_places(image)[20, 20] and not likely_places(image)[3, 3]


@pytest.mark.parametrize('wrong, words', [
    (dict(kind='crack'), "kind = 'crack'"), (dict(area=0.), 'area = 0.0'), (dict(area=.8), 'area = 0.8'),
    (dict(contrast=0.), 'contrast = 0.0'), (dict(contrast=2.), 'contrast = 2.0')])
def test_errors_name_the_value(normals, wrong, words):
    with pytest.raises(DefectError, match=words):
        put_defect(normals[0]/255, **(dict(kind='blob', area=.1, contrast=.2) | wrong), rng=np.random.default_rng(0))


def test_no_normal_image():
    with pytest.raises(DefectError, match='at least one'): defect_set(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), 3)
