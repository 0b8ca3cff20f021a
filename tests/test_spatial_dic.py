import pytest
import torch

from dynad.patchcore import PatchBank, PatchCoreOptions, patch_features
from dynad.spatial_dic import SpatialDIC, SpatialDICError, nearest_distance, neighbourhoods, spread_out


@pytest.fixture
def features():
    torch.manual_seed(0)
    return {1: torch.rand(4, 6, 16, 16), 2: torch.rand(4, 8, 8, 8), 3: torch.rand(4, 12, 4, 4)}


@pytest.mark.parametrize('layers', [(1, 2), (2, 3), (1, 2, 3), (3,), (2, 1)])
def test_patches_are_those_of_patchcore(features, layers):
    assert torch.equal(neighbourhoods(features, layers), patch_features(features, layers).permute(0, 2, 3, 1))


def test_alone_it_is_the_map_of_patchcore(features):
    new = {j: f + .3*torch.randn_like(f) for j, f in features.items()}
    ours = SpatialDIC.fit([features], (2, 3), share=1.)
    theirs = PatchBank(PatchCoreOptions(coreset=1., max_patches=None)).fit([features])
    assert torch.allclose(ours(new), theirs.distances(new), atol=1e-5)


def test_what_is_in_the_bank_has_distance_zero_and_the_rest_has_not(features):
    d = SpatialDIC.fit([features], (1, 2), share=1.)
    assert d(features).max() < 1e-6
    assert d({j: f + 1 for j, f in features.items()}).min() > .1


def test_the_greedy_choice_covers_better_than_chance():
    torch.manual_seed(0)
    x = torch.randn(2000, 8)
    far = lambda rows: nearest_distance(x, x[rows]).max()
    assert far(spread_out(x, 100)) < .9*far(torch.randperm(2000)[:100])
    assert len(set(spread_out(x, 300).tolist())) == 300


def test_equal_patches_and_more_wanted_than_there_are():
    assert sorted(spread_out(torch.ones(5, 3), 9).tolist()) == [0, 1, 2, 3, 4]


def test_same_seed_same_bank_and_batches_do_not_matter(features):
    whole = SpatialDIC.fit([features], (1, 2), candidates=300)
    parts = SpatialDIC.fit([{j: f[:1] for j, f in features.items()}, {j: f[1:] for j, f in features.items()}],
                           (1, 2), candidates=300)
    assert torch.equal(whole.bank, parts.bank) and len(whole.bank) == 30
    assert not torch.equal(whole.bank, SpatialDIC.fit([features], (1, 2), candidates=300, seed=1).bank)


def test_state(features):
    d = SpatialDIC.fit([features], (1, 2))
    again = SpatialDIC.from_state(d.state())
    assert again.layers == (1, 2) and torch.equal(again(features), d(features))


def test_errors(features):
    with pytest.raises(SpatialDICError, match=r'layers \[4\]'): neighbourhoods(features, (1, 4))
    with pytest.raises(SpatialDICError, match='not finite'):
        SpatialDIC.fit([features | {2: torch.full((4, 8, 8, 8), torch.nan)}], (1, 2))
    with pytest.raises(SpatialDICError, match='channels'): SpatialDIC.fit([features], (1, 2))(features | {2: features[3]})
    with pytest.raises(SpatialDICError, match='cannot keep'): spread_out(torch.zeros(0, 3), 2)
