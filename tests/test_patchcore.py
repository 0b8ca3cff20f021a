"16a_patchcore: features, neighbours, coreset, score, map, bank, errors; and parity with anomalib."
import builtins, importlib.util, json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from dynad.fusion import smooth
from dynad.metrics import image_metrics, pixel_metrics
from dynad.coreset import PatchCoreError, greedy_coreset, nearest, projected_dims, sample_rows, sparse_projection
from dynad.patchcore import PatchBank, PatchCoreOptions, distance_map, reweighted_score
from dynad.spatial_dic import SpatialDICError, k_centre, patch_features
from pydantic import ValidationError


def features(n, seed=0, size=16, shift=0.):
    g = torch.Generator().manual_seed(seed)
    return {j: torch.randn(n, c, size//2**(j - 1), size//2**(j - 1), generator=g) + shift for j, c in ((1, 5), (2, 7), (3, 9))}


def rows(f, i, j): return {k: v[i:j] for k, v in f.items()}


# every patch is kept, so that distances of the training patches are 0
ALL = PatchCoreOptions(coreset=1, max_patches=None)


# patch features

def test_patch_features_are_3x3_means_with_zero_padding():
    f = {2: torch.arange(16.).view(1, 1, 4, 4), 3: torch.tensor([[[[0., 4.], [8., 12.]]]])}
    p = patch_features(f, (2, 3))
    assert p.shape == (1, 2, 4, 4)
    assert torch.isclose(p[0, 0, 1, 1], f[2][0, 0, :3, :3].mean()) and torch.isclose(p[0, 0, 0, 0], f[2][0, 0, :2, :2].sum()/9)
    assert torch.allclose(p[0, 1], torch.full((4, 4), 24/9))     # every 3×3 window of a 2×2 map sees all of it
    assert patch_features(features(2)).shape == (2, 16, 8, 8)


def test_the_coarser_map_is_upsampled_bilinearly_to_the_finest_grid():
    f = features(1)
    p, q = patch_features(f, (2, 3)), patch_features(f, (3, 2))
    coarse = torch.nn.functional.avg_pool2d(f[3], 3, 1, 1)
    assert torch.equal(p[:, 7:], torch.nn.functional.interpolate(coarse, (8, 8), mode='bilinear', align_corners=False))
    assert torch.equal(p, torch.cat([q[:, 9:], q[:, :9]], 1))     # the order of the layers is that of the channels, nothing else


# nearest neighbours

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.sampled_from([0., 100.]))
def test_faiss_and_torch_and_the_definition_agree(seed, n, m, d, k, offset):
    pytest.importorskip('faiss')
    g = torch.Generator().manual_seed(seed)
    x, bank = (torch.randn(k, d, generator=g) + offset for k in (n, m))
    k = min(k, m)
    want = (x[:, None].double() - bank.double()).norm(dim=2).topk(k, largest=False).values
    tol = 1e-5 if offset == 0 else .1 # |x|² = 10⁴ leaves some 10⁻³ of a squared distance in float32: the row found may be a close second
    for backend in ('faiss', 'torch'):
        got, i = nearest(x, bank, k, backend, chunk=7)
        assert got.shape == i.shape == (n, k) and (got.diff(dim=1) >= 0).all()
        assert torch.allclose(got.double(), want, atol=tol) and torch.allclose((x[:, None] - bank[i]).norm(dim=2), got)


def test_known_patches_have_distance_zero_with_both():
    pytest.importorskip('faiss')
    bank = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))*20 + 50
    for backend in ('faiss', 'torch'): assert nearest(bank, bank, backend=backend)[0].max() == 0


def test_without_faiss_torch_steps_in(monkeypatch):
    real = builtins.__import__
    def fake(name, *args, **kwargs):
        if name == 'faiss': raise ImportError(name)
        return real(name, *args, **kwargs)
    x = torch.randn(5, 3); bank = torch.randn(9, 3)
    want = nearest(x, bank, backend='torch')
    monkeypatch.setattr(builtins, '__import__', fake)
    assert torch.equal(nearest(x, bank)[0], want[0])
    with pytest.raises(ImportError, match='pip install faiss-cpu'): nearest(x, bank, backend='faiss')


# coreset

def test_coreset_covers_better_than_chance_and_is_seeded():
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(2000, 8, generator=g), torch.randn(5, 8, generator=g) + 20])    # a rare kind
    i = greedy_coreset(x, 40, seed=3)
    assert len(set(i.tolist())) == 40 and (i >= 2000).any() and torch.equal(i, greedy_coreset(x, 40, seed=3))
    random = torch.randperm(len(x), generator=g)[:40]
    assert nearest(x, x[i])[0].max() < nearest(x, x[random])[0].max()
    assert len(greedy_coreset(x[:7], 40)) == 7
    wide = torch.randn(300, 400, generator=g)
    assert projected_dims(300) < 400 and len(set(greedy_coreset(wide, 30).tolist())) == 30


@pytest.mark.parametrize('offset', [0., 1000.])
def test_coreset_is_the_definition_of_k_centre(offset):
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(1)) + offset
    i = k_centre(x, 30, first=5).tolist()
    assert i[0] == 5
    for n in range(1, 30):
        far = (x[:, None] - x[i[:n]]).norm(dim=2).amin(1)
        assert far[i[n]] >= far.max() - (1e-3 if offset else 1e-5)


def test_copies_of_one_patch_are_chosen_once_each():
    i = greedy_coreset(torch.ones(20, 3), 20)
    assert sorted(i.tolist()) == list(range(20))


def test_projection_keeps_distances():
    g = torch.Generator().manual_seed(0)
    p = sparse_projection(400, 4000, g)
    assert p.shape == (400, 4000) and set((p*(4000**.5/400**.25)).round(decimals=3).unique().tolist()) == {-1., 0., 1.}
    assert (p != 0).float().mean().item() == pytest.approx(400**-.5, rel=.05)
    x = torch.randn(50, 400, generator=g)
    assert torch.allclose(torch.pdist(x @ p), torch.pdist(x), rtol=.1)
    assert projected_dims(20_000) == 244 and projected_dims(1) > 0    # anomalib's number for 20 000 patches at eps = 0.9


# candidates

def test_sample_does_not_depend_on_the_batches_and_follows_the_seed():
    f = features(12)
    fit = lambda batches, seed=0: PatchBank(PatchCoreOptions(max_patches=300, coreset=.5), seed).fit(batches).bank
    whole = fit([f])
    assert whole.shape == (150, 16) and torch.equal(whole, fit(rows(f, i, i + 5) for i in (0, 5, 10)))
    assert not torch.equal(whole, fit([f], 1))


def test_sample_is_uniform_and_without_repetition():
    x = torch.arange(1000.)[:, None]
    counts = sum(torch.bincount((sample_rows(x.split(300), 100, s)[:, 0]//100).long(), minlength=10) for s in range(50))
    assert counts.sum() == 5000 and (counts > 400).all() and (counts < 600).all()     # 500 ± 21 expected
    for n in (1000, 5000, None): assert torch.equal(sample_rows(x.split(300), n).sort(0).values, x)
    assert len(set(sample_rows(x.split(300), 400)[:, 0].tolist())) == 400


# the score and the map

def test_reweighted_score_is_equation_7():
    g = torch.Generator().manual_seed(0)
    bank, x = torch.randn(60, 5, generator=g), torch.randn(3, 20, 5, generator=g)
    d, i = (t.view(3, 20) for t in nearest(x.flatten(0, 1), bank))
    got = reweighted_score(x, d, i, bank, neighbours=4)
    for b in range(3):
        p = int(d[b].argmax()); m = bank[i[b, p]]
        around = bank[(bank - m).norm(dim=1).argsort()[:4]]                            # m itself is the first of them
        e = (x[b, p] - around).norm(dim=1).double()
        assert torch.isclose(got[b].double(), (1 - e[0].exp()/e.exp().sum())*d[b, p], atol=1e-5)
    assert torch.equal(reweighted_score(x, d, i, bank, neighbours=1), d.amax(1))
    far = reweighted_score(x*1e4, d*1e4, i, bank*1e4)                                   # exp of such distances overflows
    assert torch.isfinite(far).all() and (far >= 0).all()


def test_a_bank_of_one_patch_gives_the_distance():
    bank = PatchBank(PatchCoreOptions(max_patches=1)).fit([features(1)])
    test = features(2, seed=1)
    assert len(bank.bank) == 1 and torch.equal(bank.score(test, 16)[1], bank.distances(test).flatten(1).amax(1))


def test_the_map_is_bilinear_and_its_smoothing_scales_with_the_image():
    d = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    up = torch.nn.functional.interpolate(d, (64, 64), mode='bilinear', align_corners=False)
    assert torch.equal(distance_map(d, 64, 0.), up) and torch.equal(distance_map(d, 64), smooth(up, 1., scale=False))
    assert distance_map(d, (48, 32)).shape == (2, 1, 48, 32)


# the bank

def test_few_patches_are_all_kept():
    f = features(1, size=8)
    bank = PatchBank(PatchCoreOptions(coreset=1)).fit([f])
    assert bank.bank.shape == (16, 16) and bank.score(f, 16)[1].item() == 0


def test_score_comes_before_the_map_is_smoothed_and_images_are_independent():
    f, odd = features(6), features(2, seed=9, shift=1.)
    bank = PatchBank(ALL).fit([f])
    sharp = PatchBank(ALL.model_copy(update=dict(sigma=0.))).fit([f])
    maps, scores = sharp.score(odd, 64)
    flat, again = bank.score(odd, 64)
    d = nearest(patch_features(odd).permute(0, 2, 3, 1).reshape(-1, 16), bank.bank)[0].view(2, 1, 8, 8)
    assert maps.shape == (2, 1, 64, 64) and torch.equal(scores, again) and torch.equal(bank.distances(odd), d)
    assert torch.allclose(maps, torch.nn.functional.interpolate(d, (64, 64), mode='bilinear')) and (scores <= d.flatten(1).amax(1)).all()
    assert flat.std() < maps.std() and flat.mean() == pytest.approx(maps.mean().item(), rel=.05)
    assert torch.allclose(bank.score(rows(odd, 1, 2), 64)[1], scores[1:])                # images do not touch each other


@pytest.mark.parametrize('backend', ['torch', 'faiss'])
def test_finds_a_planted_defect(backend):
    if backend == 'faiss': pytest.importorskip('faiss')
    bank = PatchBank(backend=backend).fit(rows(features(20), i, i + 4) for i in range(0, 20, 4))
    test = features(10, seed=5)
    masks = torch.zeros(10, 1, 64, 64, dtype=torch.bool)
    for i in range(5):
        test[2][i, :, 2:5, 4:7] += 4; masks[i, :, 16:40, 32:56] = True
    maps, scores = bank.score(test, 64)
    assert image_metrics(scores, masks.flatten(1).any(1).int(), 0)['i_auroc'].value == 1
    assert pixel_metrics(maps, masks, n_boot=0)['pro'].value > .9


@pytest.mark.parametrize('options', [PatchCoreOptions(), PatchCoreOptions(layers=(1, 3), coreset=.3, neighbours=2, sigma=1.7, max_patches=None)])
def test_state_dict(tmp_path, options):
    from dynad.store import load_tensors, save_tensors
    bank = PatchBank(options, seed=4).fit([features(4)])
    save_tensors(tmp_path/'bank.safetensors', bank.state_dict())
    again = PatchBank.from_state_dict(load_tensors(tmp_path/'bank.safetensors'))
    test = features(3, seed=2)
    assert again.options == options and again.seed == 4
    assert all(torch.equal(a, b) for a, b in zip(bank.score(test, 32), again.score(test, 32)))


# errors by their text

def broken(seed=0):
    f = features(2, seed); f[2][1, 0, 0, 0] = float('nan'); return f


FITTED = PatchBank(PatchCoreOptions(max_patches=20, coreset=1)).fit([features(1)])
OTHER = {2: torch.zeros(1, 3, 8, 8), 3: torch.zeros(1, 3, 4, 4)}


@pytest.mark.parametrize('call,kind,text', [
    (lambda: PatchBank().fit([]), PatchCoreError, 'no training features'),
    (lambda: PatchBank().fit([broken()]), PatchCoreError, 'training features hold values that are not finite'),
    (lambda: PatchCoreOptions(layers=()), ValidationError, 'layers'),
    (lambda: PatchCoreOptions(layers=(2, 4)), ValidationError, 'layers.1'),
    (lambda: PatchCoreOptions(max_patches=0), ValidationError, 'max_patches'),
    (lambda: PatchCoreOptions(coreset=1.5), ValidationError, 'coreset'),
    (lambda: PatchBank().fit([{2: torch.zeros(1, 3, 8, 8)}]), SpatialDICError, r'layers \[3\] are not among the features \[2\]'),
    (lambda: PatchBank().fit([features(1), OTHER]), PatchCoreError, 'patches of 6 channels follow patches of 16'),
    (lambda: PatchBank().score(features(1), 32), PatchCoreError, 'call fit'),
    (lambda: PatchBank().state_dict(), PatchCoreError, 'call fit before saving'),
    (lambda: PatchBank.from_state_dict({'x': torch.ones(1)}), PatchCoreError, 'not a patch bank: bank, layers, seed missing'),
    (lambda: FITTED.score(OTHER, 32), PatchCoreError, 'patches have 6 channels, the bank has 16'),
    (lambda: FITTED.score(broken(), 32), PatchCoreError, 'image 1 of the batch has features that are not finite'),
    (lambda: nearest(torch.zeros(1, 2), torch.zeros(1, 2), backend='annoy'), PatchCoreError, "backend = 'annoy'"),
    (lambda: nearest(torch.zeros(1, 2), torch.zeros(3, 2), 4), PatchCoreError, 'k = 4 neighbours of a bank with 3 patches'),
    (lambda: greedy_coreset(torch.zeros(5, 2), 0), PatchCoreError, 'cannot choose 0 of 5 patches'),
])
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text): call()


def test_repr_says_what_it_is():
    assert repr(PatchBank()) == 'PatchBank(layers=(2, 3), not fitted)' and repr(FITTED) == 'PatchBank(layers=(2, 3), 20 × 16)'


# on the real φ, images of the synthetic set

def test_on_the_shipped_backbone(tmp_path):
    from dynad.config import FeatureSettings
    from dynad.data import load_images, load_masks, open_dataset, to_float
    from dynad.features import load_features
    from dynad.synthetic import write_synthetic
    ds = open_dataset(write_synthetic(tmp_path/'set', 'gear', n_train=12, n_good=6, n_defect=10, size=128))
    phi = load_features(FeatureSettings(backbone='efficientnet_lite0'))
    with torch.no_grad(): train, test = (phi(to_float(load_images(s, 128))) for s in (ds.train, ds.test))
    bank = PatchBank().fit([train])
    maps, scores = bank.score(test, 128)
    got = pixel_metrics(maps, *load_masks(ds.test, 128), n_boot=0)
    assert got['p_auroc'].value > .75
    assert bank.score(train, 128)[1].mean() < scores[[s.label == 1 for s in ds.test]].mean()


# parity with anomalib 2.7.0

RECORD = json.loads((Path(__file__).parents[1]/'nbs/results/patchcore_anomalib.json').read_text(encoding='utf-8'))
METRICS = ('i_auroc', 'p_auroc', 'pro')
ROWS = pytest.mark.parametrize(
    'row', RECORD['rows'], ids=lambda r: f"{r['set']}-{r['size']}-{r['coreset_ratio']:g}-{r['sigma_pixels']:g}")
NEEDS_ANOMALIB = pytest.mark.skipif(
    importlib.util.find_spec('anomalib') is None,
    reason='anomalib is not installed: pip install anomalib==2.7.0 (in an environment of its own)')


def test_record_covers_both_sets_and_sizes_and_both_coresets_are_equally_large():
    assert {(r['set'], r['size']) for r in RECORD['rows']} == {(s, n) for s in ('cookies', 'magnetic_tile') for n in (128, 256)}
    assert all(min(r['seeds'], r['seeds_anomalib']) >= (5 if r['size'] == 128 else 3) for r in RECORD['rows'])
    for g in RECORD['groups']:
        assert len({r['seed'] for r in g['runs']}) == len(g['runs'])
        sizes = {r[k] for r in g['runs'] for k in ('coreset', 'coreset_anomalib') if k in r}
        assert sizes == {int(g['coreset_ratio']*g['patches'])}


def test_recorded_options_are_the_defaults_with_all_patches_as_candidates():
    assert RECORD['options'] == PatchCoreOptions(max_patches=None).model_dump(mode='json', exclude={'coreset'})


@ROWS
def test_recorded_metrics_with_the_same_bank_are_within_half_a_point_of_anomalib(row):
    "In every run. Only the map differs: anomalib repeats the nearest value, dynad interpolates as the authors do."
    for m in METRICS: assert abs(row[m]['same_bank_largest']) <= .005, m
    assert abs(row['i_auroc']['same_bank_largest']) <= 1e-3     # the score does not depend on the map


def test_recorded_coresets_from_the_same_draws_are_the_same():
    "On real images: from anomalib's projection and first patch dynad chooses anomalib's patches, and so its metrics."
    repeated = [(g, r) for g in RECORD['groups'] for r in g['runs'] if 'shared' in r]
    assert {(g['set'], g['size']) for g, _ in repeated} == {(s, n) for s in ('cookies', 'magnetic_tile') for n in (128, 256)}
    assert all(r['shared'] == g['coreset'] for g, r in repeated)
    for row in RECORD['rows']:
        if row['same_draws']: assert all(abs(row[m]['same_draws_largest']) <= .005 for m in METRICS)


@ROWS
def test_recorded_means_with_separately_drawn_coresets_agree_within_half_a_point_or_their_standard_error(row):
    "Chance decides which patches a coreset holds: where seeds scatter by more, half a point cannot be told from none."
    for m in METRICS:
        r = row[m]
        if abs(r['difference']) <= .005: continue
        assert max(r['anomalib_std'], r['dynad_std']) > .005 and abs(r['difference']) <= 2*r['standard_error'], m


@NEEDS_ANOMALIB
@pytest.mark.parametrize('neighbours', [1, 9])
def test_same_embedding_distances_and_score_as_anomalib(neighbours):
    from anomalib_patchcore import reference
    f = {j: v for j, v in features(4, size=32).items() if j > 1}
    options = PatchCoreOptions(neighbours=neighbours, coreset=.25)
    model = reference(lambda images: f, options).train()
    embedding = model(torch.zeros(4, 3, 64, 64))
    assert torch.allclose(patch_features(f).permute(0, 2, 3, 1).reshape(-1, 16), embedding, atol=1e-6)
    bank = PatchBank(options).fit([f])
    model.memory_bank, f = bank.bank, {j: v for j, v in features(3, seed=7, size=32, shift=.5).items() if j > 1}
    with torch.no_grad(): out = model.eval()(torch.zeros(3, 3, 64, 64))
    maps, scores = bank.score(f, 64)
    assert torch.allclose(scores, out.pred_score, atol=1e-4)
    theirs = model.nearest_neighbors(patch_features(f).permute(0, 2, 3, 1).reshape(-1, 16), 1)[0]
    assert torch.allclose(bank.distances(f).flatten(), theirs, atol=1e-4)
    repeated = torch.nn.functional.interpolate(bank.distances(f), (64, 64), mode='nearest')   # all that differs
    assert torch.allclose(smooth(repeated, 4., scale=False), out.anomaly_map, atol=1e-3)


@NEEDS_ANOMALIB
@pytest.mark.parametrize('d', [40, 400])    # fewer and more dimensions than the projection has
def test_same_projection_and_first_patch_give_the_same_coreset_as_anomalib(d, monkeypatch):
    from anomalib.models.components import KCenterGreedy
    x = torch.randn(600, d, generator=torch.Generator().manual_seed(0))
    sampler = KCenterGreedy(x, .2)
    monkeypatch.setattr(torch, 'randint', lambda *args, **kwargs: torch.tensor([17]))             # the first patch
    want = sampler.select_coreset_idxs()
    monkeypatch.setattr('dynad.coreset.sparse_projection', lambda *args: sampler.model.sparse_random_matrix.T)
    assert greedy_coreset(x, 120).tolist() == want and projected_dims(600) == sampler.model.n_components
