"Metrics: edges, errors, properties, brute force, speed."
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from dynad.metrics import (IMAGE_KEYS, PIXEL_KEYS, Metric, StreamingPixelMetrics, best_f1_threshold, grouped_metrics, image_metrics, paired_bootstrap,
                           pixel_metrics, pro, pro_authors, pro_curve, rank_cuts, region_weights, resample_weights, sorted_metrics, step_area, youden_threshold)

quick = settings(max_examples=40, deadline=None)


def brute_pro(maps, masks, limit=.3):
    "The definition: every distinct value as a threshold, every region by itself, trapezoids, a cut by interpolation at the limit."
    maps, masks = maps[:, 0].astype(np.float64), masks[:, 0]
    regions = []
    for i, m in enumerate(masks):
        labels, n = ndimage.label(m, structure=np.ones((3, 3)))
        regions += [(i, labels == r) for r in range(1, n + 1)]
    fpr, over = [0.], [0.]
    for t in np.unique(maps)[::-1]:
        hit = maps >= t
        fpr.append((hit & ~masks).sum()/(~masks).sum())
        over.append(np.mean([hit[i][r].mean() for i, r in regions]))
    area = 0.
    for x0, x1, y0, y1 in zip(fpr[:-1], fpr[1:], over[:-1], over[1:]):
        if x0 >= limit: break
        if x1 > limit: y1 = y0 + (y1 - y0)*(limit - x0)/(x1 - x0); x1 = limit
        area += (x1 - x0)*(y0 + y1)/2
    return area/limit


def blocks(rng, n, size):
    masks = np.zeros((n, 1, size, size), bool)
    for m in masks:
        for _ in range(rng.integers(0, 4)):
            (y, x), (h, w) = rng.integers(0, size, 2), rng.integers(1, max(2, size//3), 2)
            m[0, y:y + h, x:x + w] = True
    masks[0, 0, 0, 0], masks[0, 0, -1, -1] = True, False
    return masks


def case(seed, n=3, size=12, levels=None, strength=1.):
    rng = np.random.default_rng(seed)
    masks = blocks(rng, n, size)
    maps = rng.normal(size=masks.shape) + strength*masks
    if levels: maps = np.round(maps*levels)/levels
    return maps.astype(np.float32), masks


def large(n=100, size=256, seed=0, order='random'):
    rng = np.random.default_rng(seed)
    masks = np.concatenate([np.zeros((n//5, 1, size, size), bool), blocks(rng, n - n//5, size)])
    maps = ndimage.zoom(rng.normal(size=(n, 1, 16, 16)), (1, 1, size/16, size/16), order=1) + .3*rng.normal(size=masks.shape) + 2*masks*rng.gamma(2, .5, (n, 1, 1, 1))
    return maps.astype(np.float32), masks


# exact against definitions

@quick
@given(st.integers(0, 10**6), st.sampled_from([None, 1, 3, 20]), st.sampled_from([0., 1., 4.]), st.sampled_from([.05, .3, 1.]))
def test_pro_is_the_brute_force_definition(seed, levels, strength, limit):
    maps, masks = case(seed, levels=levels, strength=strength)
    assert pro(maps, masks, limit=limit) == pytest.approx(brute_pro(maps, masks, limit), abs=1e-6)


@quick
@given(st.integers(0, 10**6), st.sampled_from([None, 2, 10]))
def test_curve_has_the_area_of_pro(seed, levels):
    maps, masks = case(seed, levels=levels)
    fpr, over = pro_curve(maps, masks, points=None)
    assert (np.diff(fpr) >= 0).all() and (np.diff(over) >= -1e-12).all() and fpr[0] == 0 and fpr[-1] == pytest.approx(.3)
    assert np.trapezoid(over, fpr)/.3 == pytest.approx(pro(maps, masks), abs=1e-9)


def test_decimated_curve_keeps_ends_and_area():
    maps, masks = large(8, 128)
    fpr, over = pro_curve(maps, masks, points=300)
    assert len(fpr) <= 300 and fpr[0] == 0 and fpr[-1] == pytest.approx(.3)
    assert np.trapezoid(over, fpr)/.3 == pytest.approx(pro(maps, masks), abs=1e-3)


@quick
@given(st.integers(0, 10**6), st.sampled_from([None, 1, 5]))
def test_image_and_pixel_values_agree_with_sklearn_and_torchmetrics(seed, levels):
    maps, masks = case(seed, levels=levels)
    y, s = masks.ravel(), maps.ravel().astype(np.float64)
    got = pixel_metrics(maps, masks, n_boot=0)
    p, r, _ = precision_recall_curve(y, s)
    f1 = (2*p*r/np.maximum(p + r, 1e-12)).max()
    assert [got[k].value for k in ('p_auroc', 'p_ap', 'p_f1_max')] == pytest.approx([roc_auc_score(y, s), average_precision_score(y, s), f1], abs=1e-9)
    ranks = torch.from_numpy(np.unique(s, return_inverse=True)[1]/s.size)  # in [0,1]: torchmetrics sends other values through a sigmoid
    assert got['p_auroc'].value == pytest.approx(binary_auroc(ranks, torch.from_numpy(y).int()).item(), abs=1e-6)
    assert got['p_ap'].value == pytest.approx(binary_average_precision(ranks, torch.from_numpy(y).int()).item(), abs=1e-6)
    image = image_metrics(s, y, n_boot=0)
    assert [image[k].value for k in IMAGE_KEYS] == pytest.approx([got[k].value for k in PIXEL_KEYS[:3]], abs=1e-9)


@quick
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_two_kernels_agree_under_integer_weights(seed, levels):
    rng = np.random.default_rng(seed)
    neg, pos = (np.unique(np.round(rng.normal(m, 1, 15)*levels)/levels) for m in (0, 1))
    nw, pw, rw = rng.integers(1, 5, len(neg)), rng.integers(1, 5, len(pos)), rng.random(len(pos)) + .1
    groups = np.unique(np.r_[neg, pos])[::-1]
    table = lambda v, w: np.array([[w[v == g].sum() for g in groups]])
    one = sorted_metrics(neg, pos, rw, nw, pw)
    many = grouped_metrics(table(neg, nw), table(pos, pw), table(pos, rw))
    assert {k: v[0] for k, v in many.items()} == pytest.approx(one, abs=1e-9)


def test_step_area_by_hand():
    assert step_area(np.array([0., .3, .5, .2]), np.array([0., .3, .6, .4]), .3) == pytest.approx([.3, 0, 0, .1*.25])


def test_regions_are_eight_connected_and_empty_masks_have_none():
    m = np.eye(5, dtype=bool)
    assert region_weights(m)[1] == 1 and region_weights(np.zeros((3, 3), bool))[1] == 0
    m[1, 1] = False; m[2, 2] = False
    assert region_weights(m)[1] == 2 and region_weights(m)[0].sum() == pytest.approx(2)


# properties

@quick
@given(st.integers(0, 10**6), st.sampled_from([None, 2]), st.booleans())
def test_monotone_maps_change_nothing(seed, levels, exact):
    maps, masks = case(seed, size=16, levels=levels)
    maps = maps.astype(np.float64)
    one, two = (pixel_metrics(a.astype(np.float64), masks, exact=exact, n_boot=0) for a in (np.round(maps*64)/64, np.exp(np.round(maps*64)/64)*7 - 3))
    assert [one[k].value for k in PIXEL_KEYS] == pytest.approx([two[k].value for k in PIXEL_KEYS], abs=1e-9)


@quick
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 30))
def test_image_level_properties(seed, n, levels):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n); y[:2] = 0, 1
    s = np.round(rng.normal(size=n)*levels)/levels
    m, flip, order = image_metrics(s, y, n_boot=20), image_metrics(-s, y, n_boot=0), rng.permutation(n)
    assert m['i_auroc'].value == pytest.approx(1 - flip['i_auroc'].value)
    for k, v in m.items():
        assert 0 <= v.value <= 1 and (v.low is None or 0 <= v.low <= v.high <= 1)
        assert image_metrics(s[order], y[order], n_boot=0)[k].value == pytest.approx(v.value)
        assert image_metrics(3*s + 1, y, n_boot=20)[k].to_json() == pytest.approx(v.to_json())


@quick
@given(st.integers(0, 10**6), st.booleans())
def test_pixel_level_range_and_order_of_images(seed, exact):
    maps, masks = case(seed, n=5)
    order = np.random.default_rng(seed).permutation(5)
    one, two = (pixel_metrics(maps[o], masks[o], exact=exact, n_boot=0) for o in (np.arange(5), order))
    for k in PIXEL_KEYS: assert 0 <= one[k].value <= 1 and one[k].value == pytest.approx(two[k].value, abs=1e-9)


def test_perfect_reversed_and_constant_maps():
    _, masks = case(1, size=32)
    for exact in (True, False):
        v = {k: m.value for k, m in pixel_metrics(masks.astype(np.float32), masks, exact=exact, n_boot=0).items()}
        assert v == pytest.approx(dict.fromkeys(PIXEL_KEYS, 1.))
        v = {k: m.value for k, m in pixel_metrics(-masks.astype(np.float32), masks, exact=exact, n_boot=0).items()}
        assert v['pro'] == 0 and v['p_auroc'] == 0
        v = {k: m.value for k, m in pixel_metrics(np.zeros(masks.shape, np.float32), masks, exact=exact, n_boot=0).items()}
        assert v['p_auroc'] == pytest.approx(.5) and v['pro'] == pytest.approx(.15) and v['p_ap'] == pytest.approx(masks.mean())


# streaming

TAILS = {'plain': lambda a: a, 'exp': lambda a: np.exp(3*a), 'exp of exp': lambda a: np.exp(np.exp(np.clip(a, None, 4))), 'near one': lambda a: 1 - np.exp(-a - 8),
         'cauchy': lambda a: np.tan(np.arctan(a)*.999), 'ties': lambda a: np.round(a*5)/5, 'zero plateau': lambda a: np.maximum(a, 0)}


@pytest.mark.parametrize('tail', TAILS)
def test_streaming_is_within_1e_4_of_exact(tail):
    maps, masks = large(40, 256, seed=3)
    maps = TAILS[tail](maps.astype(np.float64)).astype(np.float32)
    stream = StreamingPixelMetrics()
    for i in range(0, 40, 7): stream.update(maps[i:i + 7], masks[i:i + 7])   # normal images first, as in a test folder
    got, want = stream.compute(), pixel_metrics(maps, masks, n_boot=0)
    for k in PIXEL_KEYS: assert got[k].value == pytest.approx(want[k].value, abs=5e-4 if k == 'p_f1_max' else 1e-4), k


@pytest.mark.parametrize('strength', [0., .5, 3., 6.])
def test_streaming_from_useless_to_near_perfect(strength):
    rng = np.random.default_rng(8)
    masks = blocks(rng, 12, 256)
    maps = (rng.standard_t(2, size=masks.shape) + strength*masks).astype(np.float32)
    got, want = (pixel_metrics(maps, masks, exact=e, n_boot=0) for e in (False, True))
    for k in PIXEL_KEYS: assert got[k].value == pytest.approx(want[k].value, abs=5e-4 if k == 'p_f1_max' else 1e-4), k


@quick
@given(st.integers(0, 10**6), st.sampled_from([None, 3]))
def test_streaming_small_images_is_exact(seed, levels):
    maps, masks = case(seed, n=4, size=20, levels=levels)
    got, want = (pixel_metrics(maps, masks, exact=e, n_boot=0) for e in (False, True))
    for k in PIXEL_KEYS: assert got[k].value == pytest.approx(want[k].value, abs=1e-6)


@pytest.mark.parametrize('n,tol', [(1, 5e-4), (10, 1e-4)])
def test_streaming_with_regions_of_one_pixel(n, tol):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        masks = blocks(rng, n, 256)
        masks[:, 0, 250, 250] = True
        maps = rng.standard_t(3, size=masks.shape) + (seed % 3)*masks
        if seed % 2: maps = ndimage.gaussian_filter(maps, (0, 0, 2, 2))
        got, want = (pixel_metrics(maps.astype(np.float32), masks, exact=e, n_boot=0)['pro'].value for e in (False, True))
        assert got == pytest.approx(want, abs=tol)


def test_streaming_memory_does_not_grow_with_pixels():
    rng = np.random.default_rng(0)
    sizes = []
    for size in (128, 512):
        masks = np.zeros((2, 1, size, size), bool); masks[..., :size//2, :] = True
        sizes.append(StreamingPixelMetrics(bins=500).update(rng.normal(size=masks.shape), masks).nbytes)
    assert sizes[1] < 1.2*sizes[0] and sizes[1] <= 2*500*32


def test_streaming_takes_mixed_sizes_and_torch():
    m1, k1 = case(1, size=20); m2, k2 = case(2, size=14)
    s = StreamingPixelMetrics().update(torch.from_numpy(m1), torch.from_numpy(k1)).update(m2, k2)
    flat = lambda a, b: np.concatenate([a.ravel(), b.ravel()])
    assert len(s) == 6 and s.compute()['p_auroc'].value == pytest.approx(roc_auc_score(flat(k1, k2), flat(m1, m2)), abs=1e-6)


def test_rank_cuts_cover_everything_once():
    for n, k in ((1, 10), (10, 10), (11, 10), (65536, 2000), (10**6, 50)):
        c = rank_cuts(n, k)
        assert c[0] == 0 and c[-1] == n and (np.diff(c) > 0).all() and len(c) <= max(k, n if n <= k else 0) + 2


# bootstrap

def test_bootstrap_is_seeded_ordered_and_contains_the_value():
    maps, masks = case(5, n=30, size=16)
    a, b, c = (pixel_metrics(maps, masks, n_boot=200, seed=s) for s in (0, 0, 1))
    assert a == b and a != c
    for k in PIXEL_KEYS: assert a[k].low <= a[k].value <= a[k].high
    rng = np.random.default_rng(0); y = np.arange(60) % 2; s = rng.normal(size=60) + y
    assert image_metrics(s, y, seed=1) == image_metrics(s, y, seed=1) != image_metrics(s, y, seed=2)


def test_bootstrap_draws_are_the_metric_of_the_drawn_images():
    maps, masks = case(6, n=8, size=40, levels=10)
    w = resample_weights(8, 6, seed=3)
    stream = StreamingPixelMetrics().update(maps, masks)
    draws = stream.draws(w)
    for i, row in enumerate(w):
        idx = np.repeat(np.arange(8), row)
        want = pixel_metrics(maps[idx], masks[idx], n_boot=0)
        for k in PIXEL_KEYS: assert draws[k][i] == pytest.approx(want[k].value, abs=2e-3), k


def test_image_interval_has_about_its_nominal_coverage():
    rng, hits, n = np.random.default_rng(0), 0, 120
    from scipy.stats import norm
    truth = norm.cdf(1/np.sqrt(2))
    for seed in range(n):
        y = np.arange(80) % 2
        m = image_metrics(rng.normal(size=80) + y, y, n_boot=300, seed=seed)['i_auroc']
        hits += m.low <= truth <= m.high
    assert .86 <= hits/n <= 1


def test_interval_is_none_when_most_resamples_lack_a_class():
    m = image_metrics([0., 1.], [0, 1])['i_auroc']     # half of the draws hold both
    assert m.value == 1.
    maps, masks = case(1, n=30, size=10)
    masks[1:] = False
    assert pixel_metrics(maps, masks)['pro'].low is not None     # 1 - (29/30)^30 = 64 % of the draws hold the one region
    m = image_metrics([1., 2., 3., 4.], [0, 1, 1, 1], n_boot=2000)['i_auroc']
    assert m.value == 1 and m.low == 1
    masks[:] = False; masks[0, 0, 0, 0] = True
    assert pixel_metrics(maps[:1], masks[:1])['p_auroc'].low is not None
    m = StreamingPixelMetrics().update(maps, masks)
    assert np.isnan(m.draws(np.eye(30, dtype=int)[1:3])['pro']).all()


def test_paired_difference_is_tighter_and_antisymmetric():
    rng = np.random.default_rng(2); y = np.arange(100) % 2
    hard = rng.normal(size=100); a, b = hard + 1.3*y, hard + 1.0*y
    ab, ba = paired_bootstrap(a, b, y), paired_bootstrap(b, a, y)
    assert ab['i_auroc'].value == pytest.approx(-ba['i_auroc'].value) and ab['i_auroc'].low > 0
    alone = image_metrics(a, y)['i_auroc']
    assert ab['i_auroc'].high - ab['i_auroc'].low < (alone.high - alone.low)/2
    maps, masks = case(3, n=20, size=20)
    one, two = StreamingPixelMetrics().update(maps + .5*masks, masks), StreamingPixelMetrics().update(maps, masks)
    d = paired_bootstrap(one, two)
    assert all(d[k].low > 0 for k in PIXEL_KEYS) and all(v.value == 0 == v.low == v.high for v in paired_bootstrap(one, one).values())
    with pytest.raises(ValueError, match='different images'): paired_bootstrap(one, StreamingPixelMetrics().update(maps[:5], masks[:5]))


# undefined, never made up

@pytest.mark.parametrize('labels,reason', [([0, 0, 0], 'no anomalous image'), ([1, 1, 1], 'no normal image'), ([], 'no image')])
def test_one_class_is_undefined_at_image_level(labels, reason):
    m = image_metrics(np.arange(len(labels), dtype=float), labels)
    assert set(m) == set(IMAGE_KEYS) and all(v == Metric(None, None, None, reason) for v in m.values())
    assert json.loads(json.dumps({k: v.to_json() for k, v in m.items()}))['i_ap']['value'] is None


@pytest.mark.parametrize('exact', [True, False])
def test_pixel_level_undefined(exact):
    maps, masks = case(0, n=3)
    call = lambda *a: {v.reason for v in pixel_metrics(*a, exact=exact).values() if v.value is None and v.low is None}
    assert call(maps, np.zeros_like(masks)) == {'no defective pixel'}
    assert call(maps, np.ones_like(masks)) == {'no normal pixel'}
    assert call(maps, masks, np.zeros(3, bool)) == {'no image with a mask'}
    assert call(maps[:0], masks[:0]) == {'no image with a mask'}
    assert pro(maps, np.zeros_like(masks)) is None
    with pytest.raises(ValueError, match='no PRO curve: no defective pixel'): pro_curve(maps, np.zeros_like(masks))


def test_defective_images_without_a_mask_do_not_count():
    maps, masks = case(4, n=4)
    has = np.array([True, False, True, True])
    maps[1], masks[1] = 1e6, False
    for exact in (True, False):
        assert pixel_metrics(maps, masks, has, exact=exact) == pixel_metrics(maps[has], masks[has], exact=exact)
    assert pro(maps, masks, has) == pro(maps[has], masks[has]) != pro(maps, masks)
    assert len(StreamingPixelMetrics().update(maps, masks, torch.from_numpy(has))) == 3


# errors by their text

@pytest.mark.parametrize('call,text', [
    (lambda: image_metrics([1., np.nan], [0, 1]), 'score 1 is nan'),
    (lambda: image_metrics([1., 2.], [0, 2]), r'labels hold \[2\]'),
    (lambda: image_metrics([1., 2.], [0]), '2 scores but 1 labels'),
    (lambda: pixel_metrics(np.zeros((2, 4, 4)), np.zeros((2, 4, 4), bool)), r'shape \[2, 4, 4\]: expected \[N,1,H,W\]'),
    (lambda: pixel_metrics(np.zeros((2, 1, 4, 4)), np.zeros((2, 1, 8, 8), bool)), 'resize the masks'),
    (lambda: pixel_metrics(np.full((2, 1, 4, 4), np.inf), np.zeros((2, 1, 4, 4), bool), np.array([False, True])), 'map 1 holds values that are not finite'),
    (lambda: pixel_metrics(np.zeros((2, 1, 4, 4)), np.zeros((2, 1, 4, 4), bool), [True]), 'has_mask has 1 entries for 2 maps'),
    (lambda: pro(np.zeros((2, 1, 4, 4)), np.zeros((2, 1, 4, 4), bool), limit=0), 'limit = 0'),
    (lambda: StreamingPixelMetrics(bins=3), 'bins = 3'),
    (lambda: StreamingPixelMetrics(limit=2), 'limit = 2'),
    (lambda: youden_threshold([1., 2.], [1, 1]), 'oracle Youden needs normal and anomalous samples; all 2 labels are 1'),
])
def test_errors(call, text):
    with pytest.raises(ValueError, match=text): call()


def test_masks_must_be_bool():
    with pytest.raises(TypeError, match='masks are float64: give bool'): pixel_metrics(np.zeros((1, 1, 4, 4)), np.zeros((1, 1, 4, 4)))


# thresholds

def test_oracle_thresholds():
    s, y = np.array([.1, .2, .3, .4, .5, .6]), np.array([0, 0, 1, 0, 1, 1])
    f, j = best_f1_threshold(s, y), youden_threshold(s, y)
    assert (f.threshold, f.rule) == (.3, 'oracle F1-max') and f.value == pytest.approx(6/7)
    assert j.value == pytest.approx(2/3) and j.rule.startswith('oracle') and ((s >= j.threshold) & (y == 1)).sum()/3 - ((s >= j.threshold) & (y == 0)).sum()/3 == pytest.approx(2/3)
    assert best_f1_threshold(s, y).value == pytest.approx(image_metrics(s, y, 0)['i_f1_max'].value)


# the public code

def fixture():
    path = Path(os.environ['DYNAD_FIXTURES'])/'authors.safetensors' if os.environ.get('DYNAD_FIXTURES') else Path(__file__).parent/'fixtures'/'authors.safetensors'
    if not path.exists(): pytest.skip(f'{path.name} is neither in tests/fixtures nor in DYNAD_FIXTURES')
    from safetensors.torch import load_file
    return load_file(path)


def test_pro_of_the_public_code():
    t = fixture()
    got = pro_authors(t['metrics.maps'], t['metrics.masks'])
    assert got == pytest.approx(t['metrics.pro_200_thresholds'].item(), abs=1e-5)
    assert abs(pro(t['metrics.maps'], t['metrics.masks'] > .5) - got) < .1


def test_pro_of_the_public_code_is_its_loop():
    maps, masks = case(9, n=4, size=16)
    low, high, fpr, over = maps.min(), maps.max(), [], []
    for t in np.arange(low, high, (high - low)/np.float32(200)):
        hit = maps > t
        parts = []
        for h, m in zip(hit[:, 0], masks[:, 0]):
            labels, n = ndimage.label(m, np.ones((3, 3)))
            parts += [h[labels == r].mean() for r in range(1, n + 1)]
        over.append(np.mean(parts)); fpr.append((hit & ~masks).sum()/(~masks).sum())
    fpr, over = np.array(fpr), np.array(over)
    over, fpr = over[fpr < .3], fpr[fpr < .3]
    assert pro_authors(maps, masks) == pytest.approx(abs(np.trapezoid(over, fpr/fpr.max())), abs=1e-9)
    assert pro_authors(np.zeros_like(maps), masks) is None and pro_authors(maps, np.zeros_like(masks)) is None


# speed: 0.15 s each, measured on two free cores

@pytest.mark.parametrize('exact', [True, False])
def test_hundred_maps_within_seconds(exact):
    maps, masks = large()
    assert len(maps) == 100
    run = (lambda: pro(maps, masks)) if exact else (lambda: StreamingPixelMetrics().update(maps, masks).compute())
    seconds = []
    for _ in range(3):
        start = time.process_time(); run(); seconds.append(time.process_time() - start)
    assert min(seconds) < 1
