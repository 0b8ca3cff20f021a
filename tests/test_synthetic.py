"Modules scene, products and synthetic: the synthetic set."
import json, subprocess, sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from scipy.stats import spearmanr

from dynad.config import FeatureSettings
from dynad.data import load_masks, open_dataset, to_float
from dynad.features import load_features
from dynad.patchcore import PatchBank, PatchCoreOptions
from dynad.synthetic import (CHANGED, KINDS, PRODUCTS, SMALLEST, SyntheticError, add_defect, anomalous, make_scene, nominal, nominal_batch, image_rng,
                             scale_of, write_synthetic)

ALL = [(p, k) for p in PRODUCTS for k in KINDS[p]]

def files(root): return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file()}

@pytest.mark.parametrize('product', PRODUCTS)
def test_same_seed_same_bytes(tmp_path, product):
    a, b, c = (files(write_synthetic(tmp_path/name, product, 2, 1, 8, 64, seed)) for name, seed in (('a', 3), ('b', 3), ('c', 4)))
    assert a == b
    assert all(a[k] != c[k] for k in a if k.endswith('00.png') and 'ground_truth' not in k)

def test_image_does_not_depend_on_how_many(tmp_path):
    few, many = (files(write_synthetic(tmp_path/str(n), 'gear', n, n, 3*n, 64)) for n in (2, 3))
    assert all(many[k] == v for k, v in few.items() if k.endswith('.png'))

def test_parts_share_no_image(tmp_path):
    got = files(write_synthetic(tmp_path/'w', 'weave', 5, 5, 0, 64))
    images = [v for k, v in got.items() if k.endswith('.png')]
    assert len(set(images)) == 10

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(ALL), st.floats(.005, 1.), st.integers(0, 10**6), st.sampled_from([64, 128]))
def test_mask_is_the_change(which, scale, seed, size):
    product, kind = which
    rng = np.random.default_rng(seed)
    scene = make_scene(product, rng, size)
    image, mask, bad = add_defect(scene, kind, scale, rng)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8 and mask.shape == (size, size) and mask.dtype == bool
    assert mask.any()
    assert np.array_equal(mask, np.abs(image.astype(int) - scene.render().astype(int)).max(-1) >= CHANGED)
    assert np.array_equal(bad.render(), image) and bad.defect.kind == kind and bad.defect.scale == scale

def test_a_scale_at_which_nothing_would_be_seen():
    rng = np.random.default_rng(0)
    with pytest.raises(SyntheticError, match='gear, tooth, scale 0.001: no visible change in 40 attempts; choose a larger scale'): add_defect(make_scene('gear', rng, 64), 'tooth', .001, rng)

@pytest.mark.parametrize('product,kind', ALL)
def test_area_grows_with_scale(product, kind):
    scales = np.geomspace(.05, 1, 6)
    area = [[add_defect(make_scene(product, np.random.default_rng(n), 96), kind, s, np.random.default_rng([n, 7]))[1].sum() for s in scales] for n in range(3)]
    assert spearmanr(scales, np.mean(area, 0)).statistic > .8     # components come in a few sizes: ties are in order

def test_smallest_and_largest():
    rng = np.random.default_rng(0)
    small = [add_defect(make_scene('gear', rng, 256), 'scratch', .001, rng)[1].sum() for _ in range(4)]
    assert max(small) <= 30                                 # three pixels long, with the blur of the lens
    scene = make_scene('board', np.random.default_rng(1), 256)
    mask = add_defect(scene, 'missing', 1., np.random.default_rng(2))[1]
    assert mask.sum() > .8*(.25*256)**2                     # the largest chip, whole

def test_scales_are_stratified():
    for n in (20, 40, 84):
        u = np.sort(np.log([scale_of(i) for i in range(n)])/np.log(SMALLEST))
        assert np.abs(u - (np.arange(n) + .5)/n).max() < 2.5/n
    for k, _ in enumerate(KINDS['board']):                  # and within a kind
        u = np.sort(np.log([scale_of(i) for i in range(k, 84, 7)])/np.log(SMALLEST))
        assert np.diff(u, prepend=0, append=1).max() < .35

def test_layout(tmp_path):
    root = write_synthetic(tmp_path/'board', 'board', n_train=4, n_good=3, n_defect=9, size=64, seed=1)
    data = open_dataset(root)
    assert data.layout == 'mvtec' and len(data.train) == 4 and len(data.test) == 12
    assert {s.defect for s in data.test} == {'good', *KINDS['board']}
    masks, has = load_masks(data.test, 64)
    assert has.all() and all(m.any() == bool(s.label) for m, s in zip(masks, data.test))
    note = json.loads((root/'synthetic.json').read_text())
    assert 'synthetic' in note['note'] and note['changed'] == CHANGED
    rows = {r['image']: r for r in note['images']}
    for s, m in zip(data.test, masks):
        row = rows[s.name]
        assert row['area'] == int(m.sum()) and row['kind'] == s.defect
        assert (0 < row['scale'] <= 1 and row['contrast'] >= CHANGED/255) if s.label else row['scale'] == 0
    assert set(np.unique(np.asarray(Image.open(root/'ground_truth/scratch/000_mask.png')))) == {0, 255}
    assert [p.name for p in tmp_path.iterdir()] == ['board']                                      # nothing temporary is left

def test_reuse_and_refusal(tmp_path):
    root = write_synthetic(tmp_path/'w', 'weave', 2, 1, 1, 64)
    before = (root/'synthetic.json').stat().st_mtime_ns
    assert write_synthetic(root, 'weave', 2, 1, 1, 64) == root and (root/'synthetic.json').stat().st_mtime_ns == before
    with pytest.raises(SyntheticError, match=r"w: holds a synthetic set with other settings \(seed is 0, wanted 5\); remove it"): write_synthetic(root, 'weave', 2, 1, 1, 64, 5)
    (root/'train/good/001.png').unlink()
    with pytest.raises(SyntheticError, match=r"001.png: .*missing; remove the folder"): write_synthetic(root, 'weave', 2, 1, 1, 64)
    other = tmp_path/'other'; other.mkdir(); (other/'mine.txt').write_text('x')
    with pytest.raises(SyntheticError, match='other: exists and is not a whole synthetic set'): write_synthetic(other, 'weave', 2, 1, 1, 64)
    assert (other/'mine.txt').exists()
    (empty := tmp_path/'empty').mkdir()
    assert (write_synthetic(empty, 'weave', 1, 0, 0, 64)/'train/good/000.png').exists()

def test_nothing_half_written(tmp_path, monkeypatch):
    import dynad.synthetic as m
    def broken(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(m, 'anomalous', broken)
    with pytest.raises(KeyboardInterrupt): write_synthetic(tmp_path/'w', 'weave', 1, 0, 1, 64)
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize('call,text', [
    (lambda p: nominal('wheel', np.random.default_rng(0)), "product = 'wheel' does not exist; allowed: weave, gear, board"),
    (lambda p: nominal('gear', np.random.default_rng(0), 8), "size = 8 pixels; allowed: 32 … 1024"),
    (lambda p: add_defect(make_scene('gear', np.random.default_rng(0), 64), 'bridge', .5, np.random.default_rng(0)), "kind = 'bridge' does not exist for gear; allowed: scratch, rust"),
    (lambda p: add_defect(make_scene('gear', np.random.default_rng(0), 64), 'rust', 0., np.random.default_rng(0)), "scale = 0.0; allowed: 0 < scale <= 1"),
    (lambda p: add_defect(make_scene('gear', np.random.default_rng(0), 64), 'rust', 1.5, np.random.default_rng(0)), "scale = 1.5"),
    (lambda p: write_synthetic(p/'x', 'wheel'), "product = 'wheel'"),
    (lambda p: write_synthetic(p/'x', 'gear', n_train=-1), "n_train = -1"),
    (lambda p: write_synthetic(p/'x', 'gear', 0, 0, 0), "together at least 1")])
def test_errors(tmp_path, call, text):
    with pytest.raises(SyntheticError) as e: call(tmp_path)
    assert text in str(e.value) and list(tmp_path.iterdir()) == []

def test_nominal_batch():
    x = nominal_batch(4, 64, seed=2)
    assert x.shape == (4, 3, 64, 64) and x.dtype == torch.uint8 and torch.equal(x[:2], nominal_batch(2, 64, seed=2))
    assert nominal_batch(0, 64).shape == (0, 3, 64, 64)

@pytest.mark.parametrize('product', PRODUCTS)
def test_difficulty(product):
    "The patch baseline finds between 30 % and 90 % of the smallest quartile of defects at 5 % false positives, at 128²."
    phi, size, seed = load_features(FeatureSettings(backbone='efficientnet_lite0')), 128, 0
    def features(images):
        with torch.no_grad():
            for b in torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).split(32): yield phi(to_float(b))
    draw = lambda part, n: [nominal(product, image_rng(product, part, i, seed), size) for i in range(n)]
    bank = PatchBank(PatchCoreOptions(layers=(1, 2)), seed).fit(features(draw('train', 80)))
    score = lambda images: torch.cat([bank.score(f, size)[1] for f in features(images)])
    limit = torch.quantile(score(draw('test', 40)), .95)
    bad = sorted((anomalous(product, i, size, seed)[:2] for i in range(56)), key=lambda b: int(b[1].sum()))[:14]
    found = (score([image for image, _ in bad]) > limit).float().mean().item()
    assert .3 <= found <= .9

def test_two_processes_write_one_set(tmp_path):
    "Whoever comes second finds the first one's images, and leaves nothing of its own."
    code = "import sys; from dynad.synthetic import write_synthetic; print('ready', flush=True); sys.stdin.readline(); write_synthetic(sys.argv[1], 'board', n_train=6, n_good=2, n_defect=4, size=64)"
    both = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'set')], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for p in both: assert p.stdout.readline() == 'ready\n'
    for p in both: p.stdin.write('go\n'); p.stdin.flush()
    for p in both: assert p.wait(60) == 0, p.stderr.read()
    assert [f.name for f in tmp_path.iterdir()] == ['set'] and len(list((tmp_path/'set'/'train'/'good').iterdir())) == 6
