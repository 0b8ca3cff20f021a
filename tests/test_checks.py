"What a data set loses is said before anything is fitted, with the cure; nothing else is said."
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from dynad.checks import DataWarning, data_findings, data_warnings, keeping_size
from dynad.config import DataSettings
from dynad.data import open_dataset
from dynad.evaluate import evaluate, metrics_table
from dynad.images import nearest


def part(i, spot=False, shape=(64, 64)):
    a = 120 + np.random.default_rng(i).normal(0, 10, shape)
    if spot: a[shape[0]//2:shape[0]//2 + 12, shape[1]//2:shape[1]//2 + 12] = 15
    return a.clip(0, 255).astype('uint8')

def put(a, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)

def spot_mask(shape=(64, 64), value=255):
    m = np.zeros(shape, np.uint8); m[shape[0]//2:shape[0]//2 + 12, shape[1]//2:shape[1]//2 + 12] = value
    return m

def tree(root: Path, shape=(64, 64), mask=spot_mask, n=4) -> Path:
    for i in range(8): put(part(i, shape=shape), root/f'train/good/{i}.png')
    for i in range(n):
        put(part(100 + i, shape=shape), root/f'test/good/{i}.png'); put(part(200 + i, True, shape), root/f'test/spot/{i}.png')
        if mask: put(mask(shape), root/f'ground_truth/spot/{i}_mask.png')
    return root

def found(root, **kw): return {f.kind: f for f in data_findings(open_dataset(root), DataSettings(**kw))}

def test_nothing_is_said_of_an_ordinary_set(tmp_path):
    assert found(tree(tmp_path/'a'), image_size=64) == {}

@pytest.mark.parametrize('shape', [(5000, 200), (200, 5000)])
def test_strips_of_a_line_scan(tmp_path, shape):
    f = found(tree(tmp_path/'a', shape, n=2), image_size=64)
    h, w = shape
    assert set(f) == {'elongated images', 'vanishing masks'}
    assert f['elongated images'].text.startswith(f'12 images of 12 are elongated (up to {w}×{h}, 25:1) and are squeezed to a square of 64, in which one pixel stands for {round(w/64)}×{round(h/64)} of theirs')
    assert 'Cut them into nearly square parts' in f['elongated images'].text and len(f['elongated images'].files) == 12
    assert f['vanishing masks'].text == (f'2 masks of 2 vanish at data.image_size = 64 (2 of 2 spot); the smallest marks 144 pixels (12×12) of {w}×{h}: ground_truth/spot/0_mask.png. '
                                         'Their images count at image level only; data.image_size=448 keeps them')
    assert 'vanishing masks' not in found(tmp_path/'a', image_size=448)

def test_what_vanishes_is_counted_by_kind_of_defect(tmp_path):
    root = tree(tmp_path/'a', (640, 640), n=2)
    for i in range(3):
        m = np.zeros((640, 640), np.uint8); m[101, 101] = 255
        put(part(300 + i, shape=(640, 640)), root/f'test/dot/{i}.png'); put(m, root/f'ground_truth/dot/{i}.png')
    f = found(root, image_size=64)
    assert '3 masks of 5 vanish at data.image_size = 64 (3 of 3 dot); the smallest marks 1 pixel (1×1) of 640×640' in f['vanishing masks'].text
    assert 'data.image_size=640 keeps them' in f['vanishing masks'].text
    assert f['large images'].text.startswith('15 images of 15') and 'a defect below 10×10 of their pixels' in f['large images'].text
    assert 'large images' not in found(root, image_size=224)

@settings(deadline=None, max_examples=200)
@given(st.integers(1, 600), st.integers(1, 600), st.data())
def test_the_size_that_keeps_a_defect_keeps_it(h, w, data):
    m = np.zeros((h, w), bool)
    for _ in range(data.draw(st.integers(1, 3))):                              # boxes anywhere, or a thin diagonal
        bh, bw = data.draw(st.integers(1, h)), data.draw(st.integers(1, w))
        y, x = data.draw(st.integers(0, h - bh)), data.draw(st.integers(0, w - bw))
        if data.draw(st.booleans()): m[y:y + bh, x:x + bw] = True
        else: n = min(bh, bw); m[y + np.arange(n), x + np.arange(n)] = True
    size = keeping_size(m)
    if size is None: assert not nearest(m, 1024).any() or max(h, w) > 992
    else: assert 32 <= size <= 1024 and size % 32 == 0 and nearest(m, size).any()

def test_a_box_is_kept_wherever_it_lies():
    m = np.zeros((500, 300), bool); m[7:19, 100:112] = True
    size = keeping_size(m)
    assert size == 64 and all(nearest(np.roll(m, (i, j), (0, 1)), size).any() for i in range(0, 480, 7) for j in range(0, 190, 7))

def test_defects_that_no_size_keeps(tmp_path):
    m = np.zeros((5000, 200), bool); m[1, 1] = True
    assert keeping_size(m) is None
    corners = np.zeros((5000, 200), bool); corners[[1, 4998], [1, 198]] = True # far apart, and each of one pixel
    assert keeping_size(corners) is None

@pytest.mark.parametrize('mode', ['L', '1', 'RGB', 'P'])
def test_inverted_masks(tmp_path, mode):
    root = tree(tmp_path/'a')
    for p in (root/'ground_truth').rglob('*.png'): Image.fromarray(255 - spot_mask()).convert(mode).save(p)
    f = found(root, image_size=64)
    assert set(f) == {'inverted masks'} and len(f['inverted masks'].files) == 4
    assert f['inverted masks'].text.startswith('in 4 of 4 masks of spot more than half of the pixels are marked (96% on average): ground_truth/spot/0_mask.png and 3 more.') and 'used as they are' in f['inverted masks'].text
    put(spot_mask(), root/'ground_truth/spot/0_mask.png'); put(spot_mask(), root/'ground_truth/spot/1_mask.png')
    assert found(root, image_size=64) == {}                                    # two large defects of four

def two_levels(shape=(64, 64)):
    m = spot_mask(shape, 240); m[4:16, 8:20] = 80
    return m

def test_grey_levels_of_which_some_are_dropped(tmp_path):
    root = tree(tmp_path/'a', mask=two_levels)
    f = found(root, image_size=64)
    assert set(f) == {'grey levels'}
    assert f['grey levels'].text.startswith('4 masks of 4 hold several values (80, 240), of which 80 (576 pixels) count as normal under data.mask_rule = half: ground_truth/spot/0_mask.png')
    assert '--set data.mask_rule=nonzero' in f['grey levels'].text
    assert found(root, image_size=64, mask_rule='nonzero') == {}

def test_soft_borders_are_no_grey_levels(tmp_path):
    soft = lambda shape: np.asarray(Image.fromarray(spot_mask(shape)).resize((32, 32), Image.Resampling.BILINEAR).resize(shape[::-1], Image.Resampling.BICUBIC))
    assert found(tree(tmp_path/'a', mask=soft), image_size=64) == {}

def test_more_levels_than_a_few(tmp_path):
    def many(shape):
        m = np.zeros(shape, np.uint8)
        for i in range(12): m[5*i:5*i + 3, 5*i:5*i + 3] = 20*(i + 1)           # twelve kinds of defect, six below half
        return m
    f = found(tree(tmp_path/'a', mask=many), image_size=64)
    assert set(f) == {'grey levels'} and '(20, 40, 60, 80, 100, 120, 140, 160 and 4 more), of which 20, 40, 60, 80, 100, 120 (216 pixels)' in f['grey levels'].text

def test_specks_are_no_levels(tmp_path):
    def specks(shape): m = spot_mask(shape); m[3, 3], m[9, 50] = 80, 40; return m
    assert found(tree(tmp_path/'a', mask=specks), image_size=64) == {}

def test_masks_of_nothing_but_small_numbers(tmp_path):
    root = tree(tmp_path/'a', mask=lambda s: spot_mask(s, 2))
    f = found(root, image_size=64)
    assert set(f) == {'unusable masks'} and f['unusable masks'].text.startswith('4 masks cannot be used: ') and '--set data.mask_rule=nonzero' in f['unusable masks'].text
    assert found(root, image_size=64, mask_rule='nonzero') == {}

def test_copies(tmp_path):
    root = tree(tmp_path/'a')
    copy = lambda a, b: shutil.copy(root/a, root/b)
    for i in range(3): copy(f'train/good/{i}.png', f'test/good/{i}.png')
    copy('train/good/5.png', 'train/good/6.png'); copy('test/good/3.png', 'test/spot/copy.png'); copy('test/spot/0.png', 'test/spot/1.png')
    f = found(root, image_size=64)
    assert {k: len(v.files) for k, v in f.items()} == {'duplicates in training': 3, 'duplicates twice in training': 1, 'duplicates two labels': 1, 'duplicates twice in test': 1}
    assert f['duplicates in training'].text.startswith('3 of 9 test images are also in the training: test/good/0.png = train/good/0.png, test/good/1.png = train/good/1.png, test/good/2.png = train/good/2.png. ')
    assert f['duplicates two labels'].text.startswith('1 test image is both normal and anomalous: test/spot/copy.png = test/good/3.png')
    assert f['duplicates twice in training'].text.startswith('1 training image is there more than once: train/good/6.png = train/good/5.png')

def test_sizes_that_differ(tmp_path):
    root = tree(tmp_path/'a')
    put(part(1, shape=(64, 128)), root/'train/good/wide.png')
    f = found(root, image_size=64)
    assert set(f) == {'mixed sizes'} and '2 sizes and different proportions (64×64 (16), 128×64 (1))' in f['mixed sizes'].text
    put(part(1, shape=(128, 128)), root/'train/good/wide.png')
    assert found(root, image_size=64) == {}                                    # the same proportions

def test_files_that_will_be_refused_are_said_before(tmp_path):
    root = tree(tmp_path/'a')
    (root/'test/good/0.png').write_bytes(b'no image')
    f = found(root, image_size=64, max_pixels=4000)
    assert set(f) == {'unusable images', 'unusable masks', 'too many pixels'} and 'not an image' in f['unusable images'].text
    assert '--set data.max_pixels=4096' in f['too many pixels'].text and '15 images of more than 4000 pixels will be refused' in f['too many pixels'].text

def test_odd_metadata_and_mask_sizes_are_findings(tmp_path):
    root = tree(tmp_path/'a', mask=lambda s: spot_mask((32, 32)))
    Image.fromarray(part(0)).save(root/'train/good/0.png', exif=b'Exif\0\0no such thing')
    f = found(root, image_size=64)
    assert set(f) == {'metadata', 'mask size'} and f['metadata'].text.startswith('train/good/0.png: metadata that cannot be read is left out')
    assert f['mask size'].text.startswith('ground_truth/spot/0_mask.png: a mask of another size')

def test_files_are_read_again_when_they_have_changed(tmp_path):
    root = tree(tmp_path/'a')
    assert found(root, image_size=64) == {}
    for p in (root/'ground_truth').rglob('*.png'): put(255 - spot_mask(), p)
    assert set(found(root, image_size=64)) == {'inverted masks'}

def test_warnings_can_be_errors(tmp_path):
    data = open_dataset(tree(tmp_path/'a', mask=two_levels))
    with pytest.warns(DataWarning, match='a: 4 masks of 4 hold several values'): assert len(data_warnings(data, DataSettings(image_size=64))) == 1
    with warnings.catch_warnings(), pytest.raises(DataWarning):
        warnings.simplefilter('error', DataWarning); data_warnings(data, DataSettings(image_size=64))

# ---- in an evaluation

def evaluated(smoke, root, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return evaluate(smoke[0], open_dataset(root), n_boot=0, null_models=False, progress=False, **kw)

def test_reasons_stand_in_the_table(smoke, tmp_path):
    root = tree(tmp_path/'a', n=1)
    shutil.rmtree(root/'test/good')
    r = evaluated(smoke, root).result
    t = metrics_table(r).loc['DynAD']
    assert t['I-AUROC'] == '— (no normal image)' and t['P-AUROC'][0] != '—' and r['i_auroc']['reason'] == 'no normal image'
    shutil.rmtree(root/'ground_truth')
    t = metrics_table(evaluated(smoke, root).result).loc['DynAD']
    assert t['PRO'] == t['P-AUROC'] == '— (no mask of an anomalous test image)'

def test_masks_lost_to_resizing_stand_in_the_protocol_and_on_the_page(smoke, tmp_path):
    from dynad.report import write_report
    def dot(shape): m = np.zeros((1000, 1000), np.uint8); m[1, 1] = 255; return m
    e = evaluated(smoke, tree(tmp_path/'a', (1000, 1000), dot, n=2))
    p = e.result['protocol']
    assert p['masks_lost_to_resizing'] == 2 == p['image_level_only'] and any('vanish at data.image_size = 64' in w for w in p['warnings'])
    assert metrics_table(e.result).loc['DynAD', 'PRO'] == '— (all 2 masks are empty at 64 pixels)'
    page = write_report(e, tmp_path/'page', n=2).read_text(encoding='utf-8')
    assert 'What to know of these images' in page and 'vanish at data.image_size = 64' in page and 'all 2 masks are empty at 64 pixels' in page

def test_mask_rule_changes_an_evaluation_of_the_same_run(smoke, tmp_path):
    from dynad.method import open_run
    root = tree(tmp_path/'a', mask=two_levels, n=2)
    run = smoke[0].training_set.store.root
    pixels = {}
    for rule in (None, 'half', 'nonzero'):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            e = evaluate(open_run(run, {'data.mask_rule': rule, 'data.max_pixels': 10**8}, progress=False), open_dataset(root), n_boot=0, null_models=False, progress=False)
        pixels[rule] = int(e.masks.sum()), e.result['data']['fingerprint'], e.result['protocol']['masks'], e.scores.tolist()
    assert pixels[None][0] == pixels['half'][0] == 288 and pixels['nonzero'][0] == 576
    assert pixels['nonzero'][2] == 'every value but 0, resized to the nearest pixel' and pixels['half'][3] == pixels['nonzero'][3] and pixels['half'][1] == pixels['nonzero'][1]
