import importlib.util
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.neighbors import NearestNeighbors

from dynad.config import DICSettings
from dynad.dic import DIC, bin_edges, lookup, neighbours, pooled, t_grid, t_hat

vectors = hnp.arrays(np.float32, st.tuples(st.integers(4, 12), st.integers(1, 6)), elements=st.floats(-50, 50, width=16))


@pytest.mark.parametrize('backend', ['torch', pytest.param('faiss', marks=pytest.mark.skipif(not importlib.util.find_spec('faiss'), reason='faiss is not installed'))])
@pytest.mark.parametrize('own', [False, True])
def test_back_ends_agree_with_sklearn(backend, own):
    g = torch.Generator().manual_seed(0)
    bank = torch.rand(60, 300, generator=g)
    query = bank if own else torch.rand(17, 300, generator=g)
    d, i = neighbours(query, bank, 5, own=own, backend=backend)
    nn = NearestNeighbors(n_neighbors=5, metric='manhattan', algorithm='brute').fit(bank.numpy())
    want, rows = nn.kneighbors(None if own else query.numpy())
    np.testing.assert_allclose(d, want, rtol=1e-4); np.testing.assert_array_equal(i, rows)


@settings(deadline=None)
@given(vectors, st.integers(1, 3))
def test_own_neighbours_never_are_the_image_itself(x, K):
    x = torch.from_numpy(x)
    d, i = neighbours(x, x, K, own=True, backend='torch')
    assert not (i == torch.arange(len(x))[:, None]).any() or len(torch.unique(x, dim=0)) < len(x)
    assert d.shape == (len(x), K) and (d.diff(dim=1) >= -1e-5).all()


@given(hnp.arrays(np.float64, st.integers(2, 40), elements=st.integers(0, 10**4)), st.integers(2, 20))
def test_edges_and_lookup_are_numpys(train, bins):
    edges = bin_edges(torch.from_numpy(train), bins)
    if train.min() == train.max(): return # a case of its own, see test_company.py
    np.testing.assert_array_equal(edges, np.histogram(train, bins)[1])
    on_edge = (np.abs(train[:, None] - edges.numpy()) < 1e-4*np.ptp(train)).any(1)
    b = lookup(torch.from_numpy(train), edges)
    np.testing.assert_array_equal(b[~on_edge], np.clip(np.digitize(train, edges.numpy(), right=True), 0, bins)[~on_edge])
    assert lookup(edges[-1:] + 1, edges) == bins and lookup(edges[:1] - 1, edges) == 0


@given(st.integers(10, 1000), st.integers(2, 20), st.integers(1, 10), st.floats(0, 1))
def test_t_hat_rises_with_the_bin_is_a_multiple_of_S_and_near_its_share(t_max, bins, S, floor):
    T = t_hat(torch.arange(bins + 1), t_max, bins, S, floor)
    assert (T.diff() >= 0).all() and (T % S == 0).all() and (T >= S).all()
    raw = torch.clamp(torch.arange(bins + 1)/bins, min=floor)*t_max
    assert ((T - raw).abs() <= S/2 + 1e-3).logical_or(T == S).all()
    assert set(T.tolist()) == set(t_grid(t_max, bins, S, floor))


def test_the_floor_is_a_severity_not_a_bin():
    assert t_hat(torch.tensor([0, 1, 4]), t_max=100, bins=20).tolist() == [20, 20, 20]


def test_k_is_capped_with_a_warning():
    x = torch.rand(5, 3)
    with pytest.warns(UserWarning, match='K = 20 neighbours asked for, 4 normal images to choose from: K = 4'): d, _ = neighbours(x, x, 20, own=True)
    assert d.shape == (5, 4)


def test_too_few_good_images():
    with pytest.raises(ValueError, match=r'1 normal image\(s\) in the bank: at least 2'): neighbours(torch.ones(1, 2), torch.ones(1, 2), 1, own=True)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_features_that_are_not_finite_are_named(value):
    x = torch.rand(6, 3); x[4, 1] = value
    with pytest.raises(ValueError, match='normal image 4: its features are not finite'): DIC.fit(x, DICSettings(K=2))
    with pytest.raises(ValueError, match='image 0: its features are not finite'): DIC.fit(torch.rand(6, 3), DICSettings(K=2)).severity(x[4:5])


def test_equal_images_have_defined_bins():
    d = DIC.fit(torch.ones(8, 3), DICSettings(K=3))
    distance, b, rows = d.severity(torch.ones(1, 3))
    assert distance == 0 and int(b) == 0 and rows.shape == (1, 3)
    assert int(d.severity(torch.full((1, 3), 9.))[1]) == 10


def test_counting_oneself_narrows_the_histogram():
    x = torch.rand(40, 30, generator=torch.Generator().manual_seed(0))
    a, b = (DIC.fit(x, DICSettings(K=5, self_match=s)) for s in ('exclude', 'include'))
    assert b.train_distance.mean() < a.train_distance.mean()
    torch.testing.assert_close(b.train_distance*5/4, DIC.fit(x, DICSettings(K=4)).train_distance, rtol=1e-4, atol=1e-5)


def test_pool_larger_than_the_map_takes_the_map():
    f = torch.rand(2, 3, 8, 8)
    assert torch.equal(pooled(f, 16), f.flatten(1)) and pooled(f, 4).shape == (2, 48)


def test_state_round_trip():
    d = DIC.fit(torch.rand(9, 4), DICSettings(K=2))
    e = DIC.from_state(d.state(), d.settings)
    q = torch.rand(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(d.severity(q)[0], e.severity(q)[0])
