"Room 13a: the bank, both backends, coreset, files, errors."
import builtins

import pytest
import torch
from hypothesis import given, settings, strategies as st

from dynad.metrics import image_metrics, pixel_metrics
from dynad.patchcore import PatchBank, greedy_coreset, nearest, patches


def features(n, seed=0, size=16, shift=0.):
    g = torch.Generator().manual_seed(seed)
    return {j: torch.randn(n, c, size//2**(j - 1), size//2**(j - 1), generator=g) + shift for j, c in ((1, 5), (2, 7), (3, 9))}


def rows(f, i, j): return {k: v[i:j] for k, v in f.items()}


# patches

def test_patches_are_3x3_means_and_bilinear():
    f = {1: torch.arange(16.).view(1, 1, 4, 4), 2: torch.tensor([[[[0., 4.], [8., 12.]]]])}
    p = patches(f, (1, 2))
    assert p.shape == (1, 2, 4, 4)
    assert p[0, 0, 1, 1] == f[1][0, 0, :3, :3].mean() and p[0, 0, 0, 0] == f[1][0, 0, :2, :2].mean()
    assert torch.allclose(p[0, 1], torch.full((4, 4), 6.))       # every 3×3 window of a 2×2 map sees all of it
    assert patches(features(2), (2, 3)).shape == (2, 16, 8, 8)


# nearest neighbours

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 60), st.integers(1, 9), st.sampled_from([0., 100.]))
def test_faiss_and_torch_and_the_definition_agree(seed, n, m, d, offset):
    pytest.importorskip('faiss')
    g = torch.Generator().manual_seed(seed)
    x, bank = (torch.randn(k, d, generator=g) + offset for k in (n, m))
    want = (x[:, None].double() - bank.double()).norm(dim=2).amin(1)
    tol = 1e-5 if offset == 0 else .1 # |x|² = 10⁴ leaves some 10⁻³ of a squared distance in float32: the row found may be a close second
    for backend in ('faiss', 'torch'):
        got, i = nearest(x, bank, backend, chunk=7)
        assert torch.allclose(got.double(), want, atol=tol) and torch.allclose((x - bank[i]).norm(dim=1), got)


def test_known_patches_have_distance_zero_with_both():
    pytest.importorskip('faiss')
    bank = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))*20 + 50
    for backend in ('faiss', 'torch'): assert nearest(bank, bank, backend)[0].max() == 0


def test_without_faiss_torch_steps_in(monkeypatch):
    real = builtins.__import__
    def fake(name, *args, **kwargs):
        if name == 'faiss': raise ImportError(name)
        return real(name, *args, **kwargs)
    x = torch.randn(5, 3); bank = torch.randn(9, 3)
    want = nearest(x, bank, 'torch')
    monkeypatch.setattr(builtins, '__import__', fake)
    assert torch.equal(nearest(x, bank)[0], want[0])
    with pytest.raises(ImportError, match='pip install faiss-cpu'): nearest(x, bank, 'faiss')


# the bank

def test_bank_does_not_depend_on_the_batches_and_follows_the_seed():
    f = features(12)
    whole = PatchBank(n=300).fit([f]).bank
    parts = PatchBank(n=300).fit(rows(f, i, i + 5) for i in (0, 5, 10)).bank
    assert whole.shape == (300, 12) and torch.equal(whole, parts)
    assert not torch.equal(whole, PatchBank(n=300, seed=1).fit([f]).bank)


def test_bank_is_a_uniform_sample_without_repetition():
    f = {1: torch.arange(1000.).view(10, 1, 10, 10), 2: torch.zeros(10, 1, 5, 5)}
    image = lambda bank: (bank[:, 0]//100).long().clamp(0, 9)
    counts = sum(torch.bincount(image(PatchBank(n=100, seed=s).fit([f]).bank), minlength=10) for s in range(50))
    assert counts.sum() == 5000 and (counts > 400).all() and (counts < 600).all()     # 500 ± 21 expected
    centres = f[1][:, :, 1:-1, 1:-1]                                                  # where the 3×3 mean is the value itself
    kept = PatchBank(n=1000).fit([f]).bank[:, 0]
    assert len(kept) == 1000 and torch.isin(centres.flatten(), kept).all()


def test_few_patches_are_all_kept():
    f = features(1, size=4)
    bank = PatchBank().fit([f])
    assert bank.bank.shape == (16, 12) and bank.score(f, 16)[1].item() == 0


def test_score_is_the_unsmoothed_maximum_and_the_map_is_bilinear():
    f, odd = features(6), features(2, seed=9, shift=1.)
    bank = PatchBank().fit([f])
    maps, scores = bank.score(odd, 64, sigma=0.)
    flat, again = bank.score(odd, 64, sigma=4.)
    d = nearest(patches(odd).permute(0, 2, 3, 1).reshape(-1, 12), bank.bank)[0].view(2, 1, 16, 16)
    assert maps.shape == (2, 1, 64, 64) and torch.equal(scores, d.flatten(1).amax(1)) and torch.equal(scores, again)
    assert torch.allclose(maps, torch.nn.functional.interpolate(d, (64, 64), mode='bilinear')) and maps.amax() <= scores.max() + 1e-5
    assert flat.std() < maps.std() and flat.mean() == pytest.approx(maps.mean().item(), rel=.05)
    assert bank.score(odd, (48, 32), sigma=2.)[0].shape == (2, 1, 48, 32)
    assert torch.allclose(bank.score(rows(odd, 1, 2), 64)[1], scores[1:])                # images do not touch each other


@pytest.mark.parametrize('backend', ['torch', 'faiss'])
def test_finds_a_planted_defect(backend):
    if backend == 'faiss': pytest.importorskip('faiss')
    bank = PatchBank(layers=(1, 2), backend=backend).fit(rows(features(20), i, i + 4) for i in range(0, 20, 4))
    test = features(10, seed=5)
    masks = torch.zeros(10, 1, 64, 64, dtype=torch.bool)
    for i in range(5):
        test[1][i, :, 4:8, 6:10] += 4; masks[i, :, 16:32, 24:40] = True
    maps, scores = bank.score(test, 64, sigma=2)
    assert image_metrics(scores, masks.flatten(1).any(1).int(), 0)['i_auroc'].value == 1
    assert pixel_metrics(maps, masks, n_boot=0)['pro'].value > .9


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
    assert len(set(greedy_coreset(wide, 30, project=16).tolist())) == 30
    bank = PatchBank(n=400, coreset=50).fit([features(4)])
    assert bank.bank.shape == (50, 12)


# files

def test_save_and_load(tmp_path):
    bank = PatchBank(layers=(2, 3), n=50, seed=4).fit([features(4)])
    again = PatchBank.load(bank.save(tmp_path/'bank.safetensors'))
    test = features(3, seed=2)
    assert again.layers == (2, 3) and again.seed == 4 and all(torch.equal(a, b) for a, b in zip(bank.score(test, 32, 1.), again.score(test, 32, 1.)))
    from dynad.store import StoreError, save_tensors
    save_tensors(tmp_path/'other.safetensors', {'x': torch.ones(1)})
    with pytest.raises(KeyError, match='other.safetensors: not a patch bank: bank, layers, seed missing'): PatchBank.load(tmp_path/'other.safetensors')
    with pytest.raises(StoreError, match='no such file'): PatchBank.load(tmp_path/'none.safetensors')


# errors by their text

def broken(seed=0):
    f = features(2, seed); f[1][1, 0, 0, 0] = float('nan'); return f


FITTED = PatchBank(n=20).fit([features(1)])


@pytest.mark.parametrize('call,kind,text', [
    (lambda: PatchBank().fit([]), ValueError, 'no training features'),
    (lambda: PatchBank().fit([broken()]), ValueError, 'training features hold values that are not finite'),
    (lambda: PatchBank(layers=()), ValueError, 'layers is empty'),
    (lambda: PatchBank(n=0), ValueError, 'n = 0'),
    (lambda: PatchBank(layers=(1, 4)).fit([features(1)]), KeyError, r'layers \[4\] are not among the features \[1, 2, 3\]'),
    (lambda: PatchBank().fit([features(1), {1: torch.zeros(1, 3, 8, 8), 2: torch.zeros(1, 3, 4, 4)}]), ValueError, 'patches of 6 channels follow ones of 12'),
    (lambda: PatchBank().score(features(1), 32), RuntimeError, 'call fit'),
    (lambda: PatchBank().state_dict(), RuntimeError, 'call fit before saving'),
    (lambda: FITTED.score({1: torch.zeros(1, 3, 8, 8), 2: torch.zeros(1, 3, 4, 4)}, 32), ValueError, 'patches have 6 channels, the bank has 12'),
    (lambda: FITTED.score(broken(), 32), ValueError, 'image 1 of the batch has features that are not finite'),
    (lambda: nearest(torch.zeros(1, 2), torch.zeros(1, 2), 'annoy'), ValueError, "backend = 'annoy'"),
])
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text): call()


def test_repr_says_what_it_is():
    assert repr(PatchBank()) == 'PatchBank(layers=(1, 2), not fitted)' and repr(FITTED) == 'PatchBank(layers=(1, 2), 20 × 12)'


# on the real φ, images of the synthetic set

def test_on_the_shipped_backbone(tmp_path):
    from dynad.config import FeatureSettings
    from dynad.data import load_images, load_masks, open_dataset, to_float
    from dynad.features import load_features
    from dynad.synthetic import write_synthetic
    ds = open_dataset(write_synthetic(tmp_path/'set', 'gear', n_train=12, n_good=6, n_defect=10, size=128))
    phi = load_features(FeatureSettings(backbone='efficientnet_lite0'))
    with torch.no_grad(): train, test = (phi(to_float(load_images(s, 128))) for s in (ds.train, ds.test))
    bank = PatchBank(n=3000).fit([train])
    maps, scores = bank.score(test, 128, sigma=2)
    got = pixel_metrics(maps, *load_masks(ds.test, 128), n_boot=0)
    assert got['p_auroc'].value > .75
    assert bank.score(train, 128)[1].mean() < scores[[s.label == 1 for s in ds.test]].mean()
