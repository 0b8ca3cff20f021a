"Modules images, layouts and data, on files written here and on real data sets where they are available."
import importlib.util
import os
import re
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from dynad.config import DataSettings
from dynad.collector import EXTENSIONS, list_images
from dynad.data import (LAYOUTS, AnomalyDataset, DataError, Sample, contact_sheet, images_key, load_images,
                        load_masks, open_dataset, open_folder, read_image, read_mask, split_normal, to_float)
from dynad.store import content_key

real = pytest.mark.skipif(not os.environ.get('DYNAD_DATA'), reason='DYNAD_DATA is not set')
RAMP = np.tile(np.linspace(0, 1, 16, dtype=np.float32), (16, 1))


def put(path: Path, a=None, **kw) -> Path:
    "Write an array (default: a grey ramp of 8 bits) as an image."
    path.parent.mkdir(parents=True, exist_ok=True)
    im = a if isinstance(a, Image.Image) else Image.fromarray((RAMP*255).round().astype('uint8') if a is None else a)
    im.save(path, **kw)
    return path

def tree(root: Path, n=8, good=2, bad=2, side=16) -> Path:
    "A folder in MVTec's layout; every image differs."
    k = 0
    def image(p):
        nonlocal k; k += 1
        put(root/p, np.full((side, side), k, np.uint8) + np.linspace(0, 100, side).astype('uint8'))
    for i in range(n): image(f'train/good/{i:03}.png')
    for i in range(good): image(f'test/good/{i:03}.png')
    for i in range(bad):
        image(f'test/crack/{i:03}.png')
        m = np.zeros((side, side), np.uint8); m[2:9, 3:6 + i] = 255
        put(root/f'ground_truth/crack/{i:03}_mask.png', m)
    return root

# ---- list_images

def test_images_are_listed_by_extension_without_hidden_ones_and_folders(tmp_path):
    for name in ('b.png', 'a.JPG', 'deep/er/c.tif', '.d.png', '.hidden/e.png', 'f.txt', 'g.png/h.bmp'): put_bytes(tmp_path/name)
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == ['a.JPG', 'b.png', 'deep/er/c.tif', 'g.png/h.bmp']
    assert list_images(str(tmp_path/'.hidden')) == [tmp_path/'.hidden/e.png'] and list_images(tmp_path/'none') == [] # hidden below the folder only

def put_bytes(path): path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(b'x')

# ---- read_image: every kind of file

def kinds(tmp):
    g8, g16 = (RAMP*255).round().astype('uint8'), (RAMP*65535).round().astype('uint16')
    rgba = np.dstack([g8]*3 + [np.full_like(g8, 255)])
    yield put(tmp/'grey.png', g8)
    yield put(tmp/'rgb.png', np.dstack([g8]*3))
    yield put(tmp/'rgba.png', rgba)
    yield put(tmp/'la.png', Image.fromarray(rgba).convert('LA'))
    yield put(tmp/'palette.png', Image.fromarray(g8).convert('P'))
    yield put(tmp/'grey.BMP', g8)
    yield put(tmp/'jpeg.JPG', g8, quality=100)
    yield put(tmp/'cmyk.jpg', Image.fromarray(np.dstack([g8]*3)).convert('CMYK'), quality=100)
    yield put(tmp/'sixteen.png', g16)
    yield put(tmp/'sixteen.tif', g16)
    yield put(tmp/'big_endian.tif', Image.frombytes('I;16B', (16, 16), g16.astype('>u2').tobytes()))
    yield put(tmp/'thirtytwo.tiff', g16.astype('int32'))
    yield put(tmp/'float.tiff', RAMP)
    yield put(tmp/'web.webp', Image.fromarray(np.dstack([g8]*3)), lossless=True)
    yield put(tmp/'portable.pgm', g8)

def test_every_kind_of_file_gives_the_same_image(tmp_path):
    want = torch.from_numpy(RAMP).expand(3, -1, -1)
    for p in kinds(tmp_path):
        assert p.suffix.lower() in EXTENSIONS
        x = read_image(p, 16)
        assert x.shape == (3, 16, 16) and x.dtype == torch.float32 and x.is_contiguous()
        assert (x - want).abs().max() <= (4 if 'jp' in p.suffix.lower() else .51)/255, p.name

def test_sixteen_bits_keep_their_fine_steps(tmp_path):
    a = (30000 + np.arange(256).reshape(16, 16)).astype('uint16')
    assert len(read_image(put(tmp_path/'a.png', a), 16)[0].unique()) > 250

def test_one_bit_and_palette_colours(tmp_path):
    checks = np.indices((16, 16)).sum(0) % 2 > 0
    assert torch.equal(read_image(put(tmp_path/'bit.png', checks), 16)[0] > .5, torch.from_numpy(checks))
    im = Image.fromarray(checks.astype('uint8')).convert('P'); im.putpalette([0, 114, 178, 230, 159, 0] + [0]*762)
    x = read_image(put(tmp_path/'two.png', im), 16)
    assert (x[:, 0, 1]*255).round().tolist() == [230, 159, 0] and (x[:, 0, 0]*255).round().tolist() == [0, 114, 178]

def test_transparent_pixels_are_black_whatever_hides_under_them(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    a[:8, :, 3], a[8:, :, 3] = 0, 255
    x = read_image(put(tmp_path/'a.png', a), 16)
    assert (x[:, :8] == 0).all() and torch.equal(x[:, 8:], torch.from_numpy(a[8:, :, :3].copy()).permute(2, 0, 1)/255)
    grey = read_image(put(tmp_path/'b.png', np.full((4, 4), 9, np.uint8), transparency=9), 4) # a PNG's transparent grey value
    assert (grey == 0).all()

@pytest.mark.parametrize('turn', range(1, 9))
def test_exif_orientation_is_applied(tmp_path, turn):
    upright = np.zeros((24, 16, 3), np.uint8); upright[:8, :6] = 255            # white in the upper left corner
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
            6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}[turn]
    exif = Image.Exif(); exif[0x0112] = turn
    for name in ('a.jpg', 'a.png', 'a.tif'):
        x = read_image(put(tmp_path/name, np.ascontiguousarray(undo(upright)), exif=exif, **(dict(quality=95) if 'jpg' in name else {})), 16)
        assert x[:, :3, :3].min() > .9 and x[:, -4:].max() < .1 and x[:, :, -4:].max() < .1, name

def test_other_shapes_are_squeezed_and_fine_patterns_average_out(tmp_path):
    fine = (np.indices((64, 128)).sum(0) % 2*255).astype('uint8')
    for a, name in ((fine, 'a.png'), (fine.astype('uint16')*257, 'b.png')):
        x = read_image(put(tmp_path/name, a), 16)
        assert x.shape == (3, 16, 16) and (x - .5).abs().max() < .02 # without antialiasing: stripes of 0 and 1

def test_the_first_page_counts(tmp_path):
    pages = [Image.new('L', (8, 8), v) for v in (50, 200)]
    pages[0].save(tmp_path/'a.tif', save_all=True, append_images=pages[1:])
    assert (read_image(tmp_path/'a.tif', 8)*255).round().unique().tolist() == [50]

@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(0, 255))
def test_a_flat_image_stays_flat_at_any_size(tmp_path, h, w, size, value):
    x = read_image(put(tmp_path/'a.png', np.full((h, w), value, np.uint8)), size)
    assert x.shape == (3, size, size) and torch.equal(x, torch.full_like(x, value/255))

# ---- read_image: what cannot be read

def test_unreadable_files_are_named_with_a_cure(tmp_path):
    def fails(p, *texts):
        with pytest.raises(DataError) as e: read_image(p, 16)
        assert str(e.value).startswith(str(p)) and all(t in str(e.value) for t in texts), e.value
    fails(tmp_path/'no.png', 'no such file')
    fails(tmp_path, 'a folder, not an image')
    (tmp_path/'empty.png').write_bytes(b''); fails(tmp_path/'empty.png', 'the file is empty (0 bytes)', 'copy it again')
    (tmp_path/'text.png').write_text('hello, I am no image'); fails(tmp_path/'text.png', 'not an image', '20 bytes', 'convert it')
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ('a.png', 'a.jpg', 'a.bmp', 'a.tif'):
        p = put(tmp_path/name, noise); p.write_bytes(p.read_bytes()[:p.stat().st_size//2])
        fails(p, 'damaged or cut off' if name != 'a.tif' else 'a.tif')
    p = put(tmp_path/'flip.png', noise); b = bytearray(p.read_bytes()); b[len(b)//2] ^= 255; p.write_bytes(b)
    fails(p, 'damaged or cut off', 'copy it again')

def test_values_without_a_defined_range(tmp_path):
    a = RAMP.copy(); a[3, 4] = np.nan; a[5, 6] = np.inf
    with pytest.raises(DataError, match=r'a\.tif: 2 of 256 values are NaN or infinite; repair'): read_image(put(tmp_path/'a.tif', a), 16)
    with pytest.raises(DataError, match=r'b\.tif: float values from 0 to 255, only 0 to 1 is defined; scale'): read_image(put(tmp_path/'b.tif', RAMP*255), 16)
    with pytest.raises(DataError, match=r'c\.tif: integer values from -5 to 70000'): read_image(put(tmp_path/'c.tif', np.int32([[-5, 70000]])), 16)

def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    p = put(tmp_path/'bomb.png', np.zeros((40, 40), np.uint8))
    for allowed in (1000, 500): # PIL itself warns above the first and fails above twice of it
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', allowed)
        for action in ('ignore', 'error'):
            with warnings.catch_warnings(), pytest.raises(DataError, match=r'bomb\.png: too large to be decoded safely \(40×40 pixels, and .* are allowed\).*--set data\.max_pixels=2000'):
                warnings.simplefilter(action); read_image(p, 16)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert read_image(p, 16).max() == 0

@pytest.mark.parametrize('size', [0, -3, 2.5])
def test_impossible_sizes(tmp_path, size):
    with pytest.raises(DataError, match=f'size = {size}'): read_image(put(tmp_path/'a.png'), size)

# ---- read_mask

@pytest.mark.parametrize('a', [np.uint8([[0, 127, 128, 255]]*4), np.uint16([[0, 32767, 32896, 65535]]*4), np.float32([[0, .49, .51, 1]]*4),
                               np.uint8([[[0]*3, [127]*3, [200, 0, 0], [0, 0, 255]]]*4), np.array([[False, False, True, True]]*4)])
def test_masks_are_cut_at_half_of_the_full_range(tmp_path, a):
    m = read_mask(put(tmp_path/'m.tif', a), 4)
    assert m.dtype == torch.bool and m.shape == (1, 4, 4) and m[0].tolist() == [[False, False, True, True]]*4

@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_masks_are_resized_by_nearest_neighbour(tmp_path, n, size, seed):
    a = np.random.default_rng(seed).integers(0, 2, (n, n)).astype('uint8')*255
    i = [min(range(n), key=lambda j: (abs(Fraction(2*k + 1, 2*size) - Fraction(2*j + 1, 2*n)), -j)) for k in range(size)] # the nearest centre
    assert (read_mask(put(tmp_path/'m.png', a), size)[0].numpy() == (a[i][:, i] > 0)).all()

def test_masks_in_small_numbers_are_an_error_not_an_empty_mask(tmp_path):
    with pytest.raises(DataError, match=r'm\.png: mask values from 0 to 1 of 255, none above half.*write anomalous pixels as 255'):
        read_mask(put(tmp_path/'m.png', np.eye(4, dtype=np.uint8)), 4)
    assert not read_mask(put(tmp_path/'z.png', np.zeros((4, 4), np.uint8)), 4).any()

# ---- MVTec's layout

def test_mvtec_layout(tmp_path):
    data = open_dataset(tree(tmp_path/'nuts'))
    assert (data.name, data.layout, data.category) == ('nuts', 'mvtec', None)
    assert len(data.train) == 8 and [s.name for s in data.test] == ['test/crack/000.png', 'test/crack/001.png', 'test/good/000.png', 'test/good/001.png']
    assert [s.mask.name if s.mask else None for s in data.test] == ['000_mask.png', '001_mask.png', None, None]
    assert {(s.label, s.defect, s.split) for s in data.samples} == {(0, 'good', 'train'), (0, 'good', 'test'), (1, 'crack', 'test')}
    assert repr(data) == "AnomalyDataset 'nuts' (mvtec): 8 train, 2 normal + 2 anomalous test, 2 masks" and 'nuts' in data._repr_html_()
    assert data.summary()['images'].tolist() == [8, 2, 2] and data.summary()['masks'].sum() == 2

def test_ordinary_untidiness_is_taken_in_stride(tmp_path):
    root = tree(tmp_path/'a')
    for junk in ('.DS_Store', 'Thumbs.db', '._000.png', 'notes.txt'): (root/'train/good'/junk).write_bytes(b'junk')
    (root/'.ipynb_checkpoints').mkdir()
    put(root/'test/defect_nomask/x.JPEG'); put(root/'test/crack/deep/y.Tif'); put(root/'ground_truth/crack/deep/y.PNG', np.full((16, 16), 255, np.uint8))
    data = open_dataset(root)
    masks = {s.name: s.mask and s.mask.name for s in data.test if s.label}
    assert masks == {'test/crack/000.png': '000_mask.png', 'test/crack/001.png': '001_mask.png', 'test/crack/deep/y.Tif': 'y.PNG', 'test/defect_nomask/x.JPEG': None}
    assert len(data.train) == 8

def test_a_image_called_mask_keeps_its_own_mask(tmp_path):
    root = tree(tmp_path/'a', bad=0)
    put(root/'test/crack/x.png'); put(root/'test/crack/x_mask.png')
    put(root/'ground_truth/crack/x_mask_mask.png', np.full((16, 16), 255, np.uint8))
    assert {s.image.name: s.mask and s.mask.name for s in open_dataset(root).test if s.label} == {'x.png': None, 'x_mask.png': 'x_mask_mask.png'}

def test_training_images_alone_are_enough(tmp_path):
    for i in range(3): put(tmp_path/f'only/train/good/{i}.png')
    data = open_dataset(tmp_path/'only')
    assert len(data.train) == 3 and data.test == [] and 'train' in data._repr_html_()

def test_categories(tmp_path):
    for c in ('bolt', 'nut'): tree(tmp_path/'parts'/c)
    with pytest.raises(DataError, match='holds the categories bolt, nut; choose one'): open_dataset(tmp_path/'parts')
    with pytest.raises(DataError, match="no category 'screw'; found bolt, nut"): open_dataset(tmp_path/'parts', category='screw')
    data = open_dataset(tmp_path/'parts', category='nut')
    assert (data.name, data.category) == ('parts/nut', 'nut') and data.train[0].name == 'train/good/000.png'
    assert open_dataset(tmp_path/'parts/nut', category='nut').name == 'nut'
    with pytest.raises(DataError, match="is a category itself, but category = 'bolt'"): open_dataset(tmp_path/'parts/nut', category='bolt')
    tree(tmp_path/'single'/'nut')
    assert open_dataset(tmp_path/'single').category == 'nut'

def test_folders_that_hold_no_data_set(tmp_path):
    with pytest.raises(DataError, match='no such folder; give the folder'): open_dataset(tmp_path/'nowhere')
    with pytest.raises(DataError, match='a file, not a folder'): open_dataset(put(tmp_path/'a.png'))
    (tmp_path/'odd'/'stuff').mkdir(parents=True)
    with pytest.raises(DataError, match=r'no known layout \(found stuff\); expected one of mvtec: train/good and test/DEFECT; mtd'): open_dataset(tmp_path/'odd')
    with pytest.raises(DataError, match='not a folder of layout mvtec'): open_dataset(tmp_path/'odd', layout='mvtec')
    with pytest.raises(DataError, match='not a folder of layout mtd, which holds MT_Free'): open_dataset(tmp_path/'odd', layout='mtd')
    with pytest.raises(DataError, match="layout = 'coco' does not exist; allowed: auto, " + ', '.join(LAYOUTS)): open_dataset(tmp_path/'odd', layout='coco')

def test_no_good_training_image(tmp_path):
    put(tmp_path/'loose/train/cut/1.png')
    with pytest.raises(DataError, match=r'good: no normal training image \(found in .*train: cut\); put images of normal parts there'): open_dataset(tmp_path/'loose')
    (tmp_path/'b/train/good').mkdir(parents=True); (tmp_path/'b/train/good/a.dng').write_bytes(b'x')
    with pytest.raises(DataError, match=r'no normal training image.*\.png.*1 file of other formats \(\.dng 1; train/good/a\.dng; convert'): open_dataset(tmp_path/'b')
    with pytest.raises(DataError, match='no normal training image'): AnomalyDataset('x', tmp_path, 'mvtec', None, ())

def test_names_that_differ_in_the_extension_only(tmp_path):
    root = tree(tmp_path/'a'); put(root/'test/crack/000.bmp')
    with pytest.raises(DataError, match=r'000\.png: has the same name as 000\.bmp but for the extension.*rename or remove'): open_dataset(root)

def test_the_same_sample_twice(tmp_path):
    data = open_dataset(tree(tmp_path/'a'))
    with pytest.raises(DataError, match='the name train/good/000.png occurs 2 times'): replace(data, samples=data.samples + data.samples[:1])

def test_masks_that_do_not_fit(tmp_path):
    root = tree(tmp_path/'a'); p = put(root/'ground_truth/crack/001_mask.png', np.full((16, 32), 255, np.uint8))
    with pytest.raises(DataError, match=re.escape(f'{p}: the mask is 32×16 pixels, but its image 001.png is 16×16; make a mask')): open_dataset(root)
    root = tree(tmp_path/'b'); put(root/'ground_truth/crack/001.png', np.full((16, 16), 255, np.uint8))
    with pytest.raises(DataError, match=r'001_mask\.png: a second mask of 001\.png beside 001\.png'): open_dataset(root)
    root = tree(tmp_path/'c')
    for i in (0, 1): (root/f'ground_truth/crack/00{i}_mask.png').rename(root/f'ground_truth/crack/new{i}.png')
    with pytest.warns(UserWarning, match=r'2 masks that belong to no image \(first ground_truth/crack/new0\.png\)'): open_dataset(root)

def test_a_mask_is_compared_with_the_upright_image(tmp_path):
    root = tree(tmp_path/'a'); exif = Image.Exif(); exif[0x0112] = 6
    put(root/'test/crack/r.jpg', np.zeros((16, 32), np.uint8), exif=exif)                           # shown 16 wide, 32 high
    put(root/'ground_truth/crack/r.png', np.full((32, 16), 255, np.uint8))
    assert load_masks([s for s in open_dataset(root).test if s.image.name == 'r.jpg'], 8)[0].all()
    put(root/'ground_truth/crack/r.png', np.full((16, 32), 255, np.uint8))
    with pytest.raises(DataError, match=r'the mask is 32×16 pixels, but its image r\.jpg is 16×32'): open_dataset(root)

def test_what_will_not_be_used_is_said(tmp_path):
    root = tree(tmp_path/'a')
    put(root/'ground_truth/crack/zzz_mask.png')
    with pytest.warns(UserWarning, match=r'1 mask that belongs to no image \(ground_truth/crack/zzz_mask\.png\)'): open_dataset(root)
    root = tree(tmp_path/'b'); put(root/'train/crack/a.png'); put(root/'test/b.png')
    with pytest.warns(UserWarning) as w: open_dataset(root)
    assert len(w) == 1 and '1 image of test, 1 image of train/crack (first test/b.png)' in str(w[0].message) and w[0].filename == __file__
    with pytest.raises(DataError, match='b: refused because of strict; not used: 1 image of test'): open_dataset(root, strict=True)

def test_a_damaged_masked_image_is_found_on_opening(tmp_path):
    root = tree(tmp_path/'a'); (root/'test/crack/000.png').write_bytes(b'')
    with pytest.raises(DataError, match=r'000\.png: the file is empty'): open_dataset(root)

# ---- fingerprint, holdout, limited

def test_fingerprint_follows_content_not_place(tmp_path):
    root = tree(tmp_path/'a')
    first = open_dataset(root).fingerprint
    assert len(first) == 64 and first == open_dataset(tree(tmp_path/'elsewhere')).fingerprint
    mask = root/'ground_truth/crack/000_mask.png'; old = mask.read_bytes()
    put(mask, np.full((16, 16), 255, np.uint8)); assert open_dataset(root).fingerprint != first
    mask.write_bytes(old); assert open_dataset(root).fingerprint == first
    put(root/'train/good/000.png'); assert open_dataset(root).fingerprint != first

def test_fingerprint_covers_labels_splits_and_names(tmp_path):
    data = open_dataset(tree(tmp_path/'a')); last = data.samples[-1]
    for other in (replace(last, label=1 - last.label), replace(last, split='train'), replace(last, name='test/good/zzz.png')):
        assert replace(data, samples=data.samples[:-1] + (other,)).fingerprint != data.fingerprint
    assert replace(data, samples=data.samples[::-1]).fingerprint == data.fingerprint

def test_fingerprint_is_read_once_and_names_a_lost_file(tmp_path):
    root = tree(tmp_path/'a'); data = open_dataset(root); first = data.fingerprint
    (root/'train/good/000.png').unlink()
    assert data.fingerprint == first
    with pytest.raises(DataError, match=r'000\.png: cannot be read \(No such file'): replace(data).fingerprint

def numbered(n: int, bad: int = 0, good: int = 0) -> AnomalyDataset:
    s = [Sample(f'train/{i}', Path(f'{i}'), 0, 'good', 'train') for i in range(n)]
    s += [Sample(f'test/{l}/{i}', Path(f'{i}'), l, ('good', 'crack')[l], 'test') for l, k in ((0, good), (1, bad)) for i in range(k)]
    return AnomalyDataset('numbers', Path('somewhere'), 'mvtec', None, tuple(s))

@settings(deadline=None)
@given(st.integers(7, 300), st.integers(0, 99))
def test_holdout_is_a_fifth_but_at_least_five(n, seed):
    fit, held = numbered(n).holdout(seed=seed)
    assert len(held) == max(round(.2*n), 5) and sorted(fit + held, key=lambda s: int(s.image.name)) == numbered(n).train
    assert (fit, held) == numbered(n).holdout(seed=seed)

def test_holdout_depends_on_the_seed():
    assert len({tuple(s.name for s in numbered(50).holdout(seed=i)[1]) for i in range(5)}) == 5

@pytest.mark.parametrize('n, kw, text', [
    (3, {}, '3 normal training images, but 5 are held out for calibration and at least 2 must remain to learn from; add at least 4 normal images, or set data.min_holdout to 1 or less'),
    (6, {}, 'add at least 1 normal images, or set data.min_holdout to 4 or less'),
    (2, {}, '2 normal training images, but 5 .*; add at least 5 normal images$'),
    (1, {}, '1 normal training image, but 5 .*; add at least 6 normal images$'),
    (10, dict(fraction=.95), r'10 normal training images, but 10 are held out.*; lower data\.holdout = 0\.95')])
def test_too_few_to_hold_out(n, kw, text):
    with pytest.raises(DataError, match='somewhere: .*' + text if not text[0].isdigit() else 'somewhere: ' + text): numbered(n).holdout(**kw)

def test_what_the_error_advises_works():
    assert [len(x) for x in numbered(3).holdout(minimum=1)] == [2, 1] and [len(x) for x in numbered(6).holdout(minimum=4)] == [2, 4]

@pytest.mark.parametrize('n, most, want', [(50, 256, 10), (50, 3, 3), (50, 4, 4), (50, 7, 5)])
def test_split_normal_spreads_what_it_keeps(n, most, want):
    fit, held = numbered(n).holdout(.2, 5, seed=3)
    training, held_out = split_normal(numbered(n), DataSettings(max_calibration=most), 3)
    assert training == fit and len(held_out) == want and held_out == held[::-(-len(held)//most)]
    with pytest.raises(DataError, match='but 5 are held out'): split_normal(numbered(3), DataSettings(), 0)

def test_the_key_of_images_follows_data_names_and_size():
    s = numbered(3).train
    assert images_key(s, 'f', 64) == content_key(dict(data='f', names=['train/0', 'train/1', 'train/2'], size=64))
    assert len({images_key(*a) for a in ((s, 'f', 64), (s, 'g', 64), (s, 'f', 32), (s[:2], 'f', 64), (s[::-1], 'f', 64))}) == 5

@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20), st.integers(1, 25), st.integers(0, 45), st.integers(0, 9))
def test_limited_keeps_both_kinds(n, good, bad, n_train, n_test, seed):
    data = numbered(n, bad, good); few = data.limited(n_train, n_test, seed)
    k = min(n_test, good + bad); labels = [s.label for s in few.test]
    assert len(few.train) == min(n_train, n) and len(labels) == k
    if k >= 2 and good and bad: assert set(labels) == {0, 1}
    if good + bad: assert abs(sum(labels) - k*bad/(good + bad)) <= 1
    assert set(few.samples) <= set(data.samples) and few.samples == data.limited(n_train, n_test, seed).samples
    assert [*few.samples] == [s for s in data.samples if s in set(few.samples)]

def test_limited_says_so_and_refuses_nonsense():
    data = numbered(9, 4, 4)
    assert data.limited(3, 4, 7).name == 'numbers (3 of 9 train, 4 of 8 test, seed 7)' and data.limited(9, 8).name == 'numbers'
    with pytest.raises(DataError, match='n_train = 0'): data.limited(0, 3)

def test_samples_are_checked():
    with pytest.raises(DataError, match="a: split = 'val'; allowed: train, test"): Sample('a', Path('a'), 0, 'good', 'val')
    with pytest.raises(DataError, match='a: label = 2; allowed: 0'): Sample('a', Path('a'), 2, 'good', 'test')

# ---- into memory

def test_load_images_keeps_order_and_agrees_with_read_image(tmp_path):
    data = open_dataset(tree(tmp_path/'a', n=40))
    x = load_images(data.samples, 12)
    assert x.dtype == torch.uint8 and x.shape == (44, 3, 12, 12)
    assert torch.equal(to_float(x), torch.stack([read_image(s.image, 12) for s in data.samples]))
    assert load_images([], 12).shape == (0, 3, 12, 12)

def test_load_images_names_the_damaged_file_and_stops(tmp_path):
    root = tree(tmp_path/'a', n=40); data = open_dataset(root)
    (root/'train/good/017.png').write_bytes(b'broken')
    with pytest.raises(DataError, match=r'017\.png: not an image'): load_images(data.samples, 12, progress=True)

def test_a_bar_only_after_two_seconds(tmp_path, capfd, monkeypatch):
    import time, dynad.data as module, dynad.dataset as threads
    data = open_dataset(tree(tmp_path/'a', n=6))
    load_images(data.train, 8, progress=True)
    assert capfd.readouterr().err == ''
    monkeypatch.setattr(threads, '_pool', lambda: threads.ThreadPoolExecutor(1))
    slow = module.read_image
    monkeypatch.setattr(module, 'read_image', lambda *a: (time.sleep(.5), slow(*a))[1])
    load_images(data.train, 8, progress=True)
    assert 'images' in capfd.readouterr().err

def test_nearly_black_images_are_mentioned(tmp_path):
    p = put(tmp_path/'a/train/good/x.png', (RAMP*4095).astype('uint16'))
    with pytest.warns(UserWarning, match=r'x\.png: all 1 images are nearly black \(highest value 15 of 255\); 12-bit values'):
        load_images([Sample('x', p, 0, 'good', 'train')], 8)

def test_load_masks_judges_pixels_only_where_there_is_a_truth(tmp_path):
    root = tree(tmp_path/'a', side=64)
    put(root/'test/crack/none.png', np.zeros((64, 64), np.uint8))
    put(root/'test/crack/empty.png', np.zeros((64, 64), np.uint8)); put(root/'ground_truth/crack/empty.png', np.zeros((64, 64), np.uint8))
    dot = np.zeros((64, 64), np.uint8); dot[5, 5] = 255                        # between the sampled pixels at size 8
    put(root/'test/crack/dot.png', np.zeros((64, 64), np.uint8)); put(root/'ground_truth/crack/dot_mask.png', dot)
    data = open_dataset(root)
    for size, dots in ((64, 1), (8, 0)):
        masks, has = load_masks(data.test, size)
        assert masks.dtype == has.dtype == torch.bool and masks.shape == (7, 1, size, size)
        by = {s.image.name if s.label else f'good {s.image.name}': (h, int(m.sum())) for s, m, h in zip(data.test, masks, has.tolist())}
        assert by['none.png'] == by['empty.png'] == (False, 0) and by['dot.png'] == (bool(dots), dots) and by['good 000.png'] == (True, 0)
        assert by['000.png'][0] and by['000.png'][1] > 0
    assert load_masks([], 8)[0].shape == (0, 1, 8, 8) and load_masks([], 8)[1].shape == (0,)

def test_load_masks_checks_the_size_of_samples_made_by_hand(tmp_path):
    s = Sample('x', put(tmp_path/'x.png'), 1, 'crack', 'test', put(tmp_path/'m.png', np.full((4, 8), 255, np.uint8)))
    with pytest.raises(DataError, match='the mask is 8×4 pixels, but its image x.png is 16×16'): load_masks([s], 8)

def test_contact_sheet_spreads_over_the_samples(tmp_path):
    data = open_dataset(tree(tmp_path/'a'))
    fig = contact_sheet(data.samples, size=16, n=3)
    assert [ax.get_title() for ax in fig.axes if ax.images] == ['good', 'good', 'good'] and len(contact_sheet(data.test, size=16).axes) == 4
    with pytest.raises(DataError, match='no sample'): contact_sheet([])

# ---- a folder of normal images

def test_a_flat_folder_of_normal_images(tmp_path):
    for i in range(3): put(tmp_path/f'own/{i}.png')
    put(tmp_path/'own/more/x.JPG')
    data = open_dataset(tmp_path/'own', layout='folder')
    assert (data.name, data.layout, data.category, data.test) == ('own', 'folder', None, [])
    assert [s.name for s in data.train] == ['0.png', '1.png', '2.png', 'more/x.JPG'] and {(s.label, s.defect, s.split) for s in data.samples} == {(0, 'good', 'train')}
    assert open_folder(tmp_path/'own') == data and open_folder(tmp_path/'own').fingerprint == data.fingerprint
    with pytest.raises(DataError, match='no known layout .*folder: normal images only'): open_dataset(tmp_path/'own')
    with pytest.raises(DataError, match="category = 'x', but the layout folder has no categories"): open_dataset(tmp_path/'own', layout='folder', category='x')

def test_test_images_never_become_training_images_of_a_folder(tmp_path):
    root = tree(tmp_path/'a')
    for data in (open_folder(root), open_dataset(root, layout='folder')): assert data.layout == 'mvtec' and len(data.train) == 8 and len(data.test) == 4
    assert open_folder(root/'train').layout == 'folder' and len(open_folder(root/'train').train) == 8

def test_folders_without_images(tmp_path):
    with pytest.raises(DataError, match='no such folder; name the folder that holds your normal images'): open_folder(tmp_path/'none')
    with pytest.raises(DataError, match='a file, not a folder; name the folder'): open_folder(put(tmp_path/'a/a.png'))
    (tmp_path/'empty').mkdir()
    with pytest.raises(DataError, match=r'empty: no image in there \(\.png'): open_folder(tmp_path/'empty')

# ---- magnetic tiles

def tiles(root: Path, free=20, bad=3) -> Path:
    for d, k in (('Free', free), ('Blowhole', bad), ('Crack', bad)):
        for i in range(k):
            m = np.zeros((20, 12), np.uint8); m[4:9, 3:5], m[4:9, 5] = (255, 90) if d != 'Free' else (0, 0)
            put(root/f'MT_{d}/Imgs/exp1_num_{i}.jpg', np.full((20, 12), 40 + i, np.uint8)); put(root/f'MT_{d}/Imgs/exp1_num_{i}.png', m)
    return root

def test_mtd_layout(tmp_path):
    root = tiles(tmp_path/'t'); data = open_dataset(root)
    assert data.layout == 'mtd' and len(data.train) == 16 and [s.defect for s in data.test].count('good') == 4
    assert {s.defect for s in data.samples} == {'good', 'blowhole', 'crack'} and all((s.mask is None) == (s.label == 0) for s in data.samples)
    masks, has = load_masks(data.test, 20)
    assert has.all() and {int(m.sum()) for m, s in zip(masks, data.test) if s.label} == {5*3} # 2 of 12 columns become 3 of 20; the column of 90 is not defective
    again, other = open_dataset(root), open_dataset(root, seed=1)
    assert again.samples == data.samples and again.fingerprint == data.fingerprint != other.fingerprint

def test_mtd_errors(tmp_path):
    root = tiles(tmp_path/'t', free=2)
    with pytest.raises(DataError, match="category = 'x', but the layout mtd has no categories"): open_dataset(root, category='x')
    for p in (root/'MT_Free/Imgs').glob('*.jpg'): p.unlink()
    with pytest.raises(DataError, match='Imgs: no normal training image'): open_dataset(root)

# ---- solar cells

cells = pytest.mark.skipif(importlib.util.find_spec('elpv_dataset') is None, reason='elpv-dataset is not installed')

@cells
@pytest.mark.parametrize('category, good, likely, certain', [(None, 1508, 106, 715), ('mono', 588, 56, 313), ('poly', 920, 50, 402)])
def test_elpv_counts(category, good, likely, certain):
    data = open_dataset('elpv', category=category)
    assert data.name == ('elpv' if category is None else f'elpv/{category}') and data.layout == 'elpv'
    assert len(data.train) == good - round(.2*good)
    assert [sum(s.defect == d for s in data.test) for d in ('good', 'likely', 'certain')] == [round(.2*good), likely, certain]
    assert not load_masks(data.test[-3:], 8)[1].any()

@cells
def test_elpv_splits_by_seed_and_reads():
    a, b = open_dataset('elpv', category='mono'), open_dataset('elpv', category='mono', seed=1)
    assert {s.name for s in a.train} != {s.name for s in b.train} and {s.name for s in a.samples} == {s.name for s in b.samples}
    x = load_images(a.train[:4], 300)
    assert x.shape == (4, 3, 300, 300) and torch.equal(x[:, 0], x[:, 1]) and x.float().std() > 5

def test_elpv_from_a_folder_and_its_errors(tmp_path, monkeypatch):
    for n in 'abc': put(tmp_path/f'e/images/{n}.png')
    (tmp_path/'e/labels.csv').write_text('images/a.png 0.0 mono\nimages/b.png 0.3333333333333333 mono\n\nimages/c.png 1.0 poly\n')
    data = open_dataset(tmp_path/'e')
    assert [(s.name, s.label, s.split, s.defect) for s in data.samples] == [('images/a.png', 0, 'train', 'good'), ('images/c.png', 1, 'test', 'certain')]
    with pytest.raises(DataError, match="category = 'thin': solar cells are mono or poly"): open_dataset(tmp_path/'e', category='thin')
    with pytest.raises(DataError, match=r'no cell with probability 0 \(good\) and type poly'): open_dataset(tmp_path/'e', category='poly')
    (tmp_path/'e/labels.csv').write_text('images/a.png 0.0 mono\nimages/b.png many mono\n')
    with pytest.raises(DataError, match=r"labels\.csv: line 2 is 'images/b\.png many mono'"): open_dataset(tmp_path/'e')
    (tmp_path/'e/labels.csv').write_text('../secret.png 0.0 mono\n')
    with pytest.raises(DataError, match=r"labels\.csv: line 1: the path '\.\./secret\.png' leads out of the data set"): open_dataset(tmp_path/'e')
    (tmp_path/'e/labels.csv').write_bytes(b'images/a.png 0.0 m\xffno\n')
    with pytest.raises(DataError, match=r'labels\.csv: cannot be read as text'): open_dataset(tmp_path/'e')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(DataError, match='not installed; pip install elpv-dataset'): open_dataset('elpv')

# ---- real folders

@real
def test_cookies():
    data = open_dataset(Path(os.environ['DYNAD_DATA'])/'cookies')
    assert [len(data.train), sum(s.label == 0 for s in data.test), sum(s.defect == 'defect' for s in data.test), sum(s.defect == 'defect_nomask' for s in data.test)] == [31, 14, 32, 8]
    masks, has = load_masks(data.test, 128)
    assert has.tolist() == [s.defect != 'defect_nomask' for s in data.test] and masks[has].any()
    assert [len(x) for x in data.holdout()] == [25, 6]

@real
def test_magnetic_tiles():
    data = open_dataset(Path(os.environ['DYNAD_DATA'])/'magnetic_tile')
    counts = data.summary()['images'].droplevel([0, 1])
    assert counts.drop('good').to_dict() == dict(blowhole=115, **{'break': 85}, crack=57, fray=32, uneven=103) and len(data.train) == 762
    native = [s.name for s in data.test if s.label and not (np.asarray(Image.open(s.mask)) > 127).any()]
    lost = [s.name for s, ok in zip(data.test, load_masks(data.test, 128)[1]) if not ok]
    assert len(native) == 4 and set(native) <= set(lost) and all('Uneven' in n for n in native)

@real
def test_a_part_of_mvtec_with_masks_missing():
    with pytest.warns(UserWarning, match='7 masks that belong to no image'): data = open_dataset(Path(os.environ['DYNAD_DATA'])/'mvtec_leather_part')
    assert data.name == 'mvtec_leather_part/leather' and len(data.train) == 4 and len(data.test) == 24
    with pytest.raises(DataError, match='add at least 3 normal images, or set data.min_holdout to 2'): data.holdout()
