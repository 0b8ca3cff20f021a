"What a folder holds: inputs that people really have, written here, and trees that hypothesis builds."
import csv
import io
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from typer.testing import CliRunner

from dynad.collector import EXTENSIONS, MARKER, bare_stem, collect, collect_places, list_images
from dynad.data import DataError, FindingWarning, open_dataset, open_folder
from dynad.output import images_of
from dynad.paths import printable

pytestmark = pytest.mark.filterwarnings('ignore::dynad.data.FindingWarning')
ODD = os.fsdecode(b'gr\xfcn.png') # u umlaut as one byte of Latin-1
posix = pytest.mark.skipif(os.name == 'nt', reason='links and names of bytes are those of Linux and macOS')


def put(path: Path, value=120, side=16, **kw) -> Path:
    "A small image; the value is its grey."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side), value, np.uint8)).convert('RGB').save(path, **kw)
    return path

def base(root: Path, good='test/good', bad='test/spot', masks='ground_truth/spot', mask='{:03}_mask.png', train='train/good') -> Path:
    "Twelve normal images for training, four normal and four anomalous ones with masks for the test."
    for i in range(12): put(root/train/f'{i:03}.png', i)
    for i in range(4):
        put(root/good/f'{i:03}.png', 50 + i)
        put(root/bad/f'{i:03}.png', 90 + i)
        if masks: put(root/masks/mask.format(i), 255)
    return root

def counts(data): return len(data.train), sum(not s.label for s in data.test), sum(s.label for s in data.test), sum(s.mask is not None for s in data.test)

def kinds(data): return sorted(f.kind for f in data.findings)

def silent(root):
    "The data set of a folder where nothing is to be said."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data = open_dataset(root, strict=True)
    return data

def masks_fit(data): return all(s.mask is None or bare_stem(s.mask.stem)[-3:] == s.image.stem for s in data.test)

# ---- masks are found wherever people keep them, and never judged

LAYOUTS = {
    'as MVTec': {}, 'flat': dict(masks='ground_truth'), 'named masks': dict(masks='masks/spot'), 'no suffix': dict(mask='{:03}.png'),
    'in capitals': dict(masks='GroundTruth/Spot', mask='{:03}_MASK.png'), 'gt': dict(masks='gt/spot', mask='{:03}_gt.png'),
    'label below': dict(masks='test/spot/label', mask='{:03}.png'), 'mask below': dict(masks='test/spot/mask', mask='{:03}-mask.png'),
    'beside the kinds': dict(masks='test/masks/spot'), 'annotations': dict(masks='annotations/spot', mask='{:03}_label.png'),
    'beside its image': dict(masks='test/spot'), 'beside, other form': dict(masks='test/spot', mask='{:03}.ground_truth.bmp'),
    'spot_masks': dict(masks='test/spot_masks', mask='{:03}.png'), 'test below': dict(masks='segmentation/test/spot', mask='{:03}.png'),
    'kind in the name': dict(masks='masks', mask='spot_{:03}_mask.png'), 'prefix': dict(masks='masks/spot', mask='mask_{:03}.png')}

@pytest.mark.parametrize('where', LAYOUTS)
def test_masks_are_found(tmp_path, where):
    data = silent(base(tmp_path, **LAYOUTS[where]))
    assert counts(data) == (12, 4, 4, 4) and masks_fit(data) and kinds(data) == []

@pytest.mark.parametrize('images', ['images', 'Imgs', 'rgb'])
def test_images_and_masks_side_by_side_below_each_kind(tmp_path, images):
    base(tmp_path, f'test/good/{images}', f'test/spot/{images}', 'test/spot/masks', '{:03}.png', f'train/good/{images}')
    data = silent(tmp_path)
    assert counts(data) == (12, 4, 4, 4) and {s.defect for s in data.test} == {'good', 'spot'} and masks_fit(data)

def test_a_kind_of_defect_called_label_is_no_folder_of_masks(tmp_path):
    data = silent(base(tmp_path, bad='test/label', masks='ground_truth/label'))
    assert counts(data) == (12, 4, 4, 4) and {s.defect for s in data.test} == {'good', 'label'}

def test_masks_without_an_image_are_counted_and_named(tmp_path):
    base(tmp_path)
    for i in range(8): put(tmp_path/f'ground_truth/new/{i}.png', 255)
    data = open_dataset(tmp_path)
    assert counts(data) == (12, 4, 4, 4) and 'not used: 8 masks that belong to no image (first ground_truth/new/0.png)' in data.line()
    with pytest.raises(DataError, match='refused because of strict.*8 masks that belong to no image'): open_dataset(tmp_path, strict=True)
    with pytest.warns(FindingWarning, match='8 masks'): open_dataset(tmp_path)

def test_a_name_that_two_kinds_share_is_not_guessed(tmp_path):
    base(tmp_path, masks='ground_truth'); put(tmp_path/'test/cut/000.png')
    data = open_dataset(tmp_path)
    assert counts(data) == (12, 4, 5, 3) and 'not used: 1 mask that fit several images (ground_truth/000_mask.png)' in data.line()

def test_masks_of_normal_images_are_no_images(tmp_path):
    base(tmp_path); put(tmp_path/'test/good/000_mask.png', 0); put(tmp_path/'train/good/masks/000.png', 0); put(tmp_path/'ground_truth/good/001.png', 0)
    data = open_dataset(tmp_path)
    assert counts(data) == (12, 4, 4, 4) and kinds(data) == ['normal masks'] and '3 masks of normal images' in data.line()

def test_depth_beside_colour_is_no_image(tmp_path):
    base(tmp_path, 'test/good/rgb', 'test/spot/rgb', 'test/spot/gt', '{:03}.png', 'train/good/rgb'); put(tmp_path/'test/spot/xyz/000.tiff')
    data = open_dataset(tmp_path)
    assert counts(data) == (12, 4, 4, 4) and '1 image of test/spot/xyz' in data.line()

# ---- normal images by whatever name

@pytest.mark.parametrize('name', ['Good', 'OK', 'ok', 'okay', 'normal', 'Nominal', 'PASSED', 'no_defect', 'free of defects', 'defect-free'])
def test_normal_images_by_another_name(tmp_path, name):
    data = silent(base(tmp_path, good=f'test/{name}', bad='test/NG', masks='ground_truth/NG', train=f'train/{name}'))
    assert counts(data) == (12, 4, 4, 4) and {s.defect for s in data.test} == {'good', 'NG'}

def test_good_and_ok_are_read_together_and_said(tmp_path):
    base(tmp_path); put(tmp_path/'train/OK/000.png', 99); put(tmp_path/'test/OK/000.png', 98)
    data = silent(tmp_path)
    assert counts(data) == (13, 5, 4, 4) and 'the folders OK and good of train are both read as normal images' in data.line()

def test_no_normal_test_image_is_said(tmp_path):
    data = open_dataset(base(tmp_path, good='test/reference'))
    assert counts(data)[1:3] == (0, 8) and 'no normal test image (kinds: reference, spot): image-level figures are undefined' in data.line()
    with pytest.raises(DataError, match='no normal test image'): open_dataset(tmp_path, strict=True)

@pytest.mark.parametrize('name', ['clean', 'healthy', '00_OK', 'good_images', 'normals'])
def test_a_kind_that_sounds_normal_is_asked_about(tmp_path, name):
    base(tmp_path); put(tmp_path/'test'/name/'000.png', 97)
    data = open_dataset(tmp_path)
    assert counts(data) == (12, 4, 5, 4) and f'{name} counts as a kind of defect (1 image): if its images are normal, name the folder good' in data.line()
    with pytest.raises(DataError, match=f'refused because of strict; {name} counts'): open_dataset(tmp_path, strict=True)

@pytest.mark.parametrize('entry', ['thumbnails/000.png', 'Thumbs/000.jpg', '~$000.png'])
def test_thumbnails_and_lock_files_are_no_images(tmp_path, entry):
    base(tmp_path); put(tmp_path/'train/good'/entry); put(tmp_path/'test/spot'/entry)
    data = silent(tmp_path)
    assert counts(data) == (12, 4, 4, 4) and '2 hidden or system entries' in data.line()

def test_folders_in_capitals_and_other_words(tmp_path):
    data = silent(base(tmp_path, 'Testing/Good', 'Testing/spot', train='Training/Good'))
    assert counts(data) == (12, 4, 4, 4)

def test_validation_and_other_folders_are_named(tmp_path):
    base(tmp_path)
    for i in range(3): put(tmp_path/f'validation/good/{i}.png')
    put(tmp_path/'train/spot/0.png'); put(tmp_path/'loose.png')
    data = open_dataset(tmp_path)
    assert counts(data) == (12, 4, 4, 4)
    assert 'not used: 3 images of validation/good, 1 image of the folder itself, 1 image of train/spot (first loose.png)' in data.line()

# ---- a flat folder

def test_a_flat_folder_is_a_set_of_normal_images(tmp_path):
    for i in range(12): put(tmp_path/f'{i}.png', i)
    data = silent(tmp_path)
    assert (data.layout, counts(data)) == ('folder', (12, 0, 0, 0)) and 'every image is taken as a normal one' in data.line()
    put(tmp_path/'OK/1.png'); assert counts(open_dataset(tmp_path)) == (13, 0, 0, 0)
    put(tmp_path/'scratch/1.png')
    with pytest.raises(DataError, match=r'no known layout \(found OK, scratch\).*name the layout folder'): open_dataset(tmp_path)
    assert 'scratch beside one of normal images are taken for normal too' in open_folder(tmp_path).line()

def test_images_directly_in_train(tmp_path):
    data = silent(base(tmp_path, train='train'))
    assert counts(data) == (12, 4, 4, 4) and 'the images directly in train are read as normal ones' in data.line()

# ---- what systems and tools put there

def test_thumbnails_of_a_network_disk(tmp_path):
    base(tmp_path)
    for p in [*tmp_path.glob('t*/*/*.png')]:
        for size in ('SM', 'M'): put(p.parent/'@eaDir'/p.name/f'SYNOPHOTO_THUMB_{size}.jpg')
    data = silent(tmp_path)
    assert counts(data) == (12, 4, 4, 4) and len(images_of([tmp_path/'test'])) == 8
    assert '3 hidden or system entries (first test/good/@eaDir)' in data.line()

@pytest.mark.parametrize('name', ['@eaDir', '.DS_Store', 'Thumbs.db', '._000.png', '__MACOSX', '.ipynb_checkpoints', '#recycle', '@Recycle', '$RECYCLE.BIN',
                                  'System Volume Information', 'lost+found', 'desktop.ini', '.hidden', '__pycache__', '@Recently-Snapshot'])
def test_what_systems_leave(tmp_path, name):
    base(tmp_path)
    for folder in ('', 'train/good', 'test/spot', 'ground_truth/spot'):
        if '.' in name[1:] and name != '$RECYCLE.BIN': (tmp_path/folder/name).write_bytes(b'x')
        else: put(tmp_path/folder/name/'000.png')
    data = silent(tmp_path)
    assert counts(data) == (12, 4, 4, 4) and kinds(data) == ['system'] and len(data.findings[0].files) == 4

def test_the_root_may_be_hidden_itself(tmp_path):
    assert counts(silent(base(tmp_path/'.cache'/'masks'))) == (12, 4, 4, 4)

# ---- own output

def test_predict_twice_judges_the_same_images(tmp_path, smoke):
    from dynad.cli import app
    for i in range(3): put(tmp_path/f'{i}.png', 60*i, 64)
    for out in ('judged', 'judged', '.'):       # below the folder, again, and in the folder itself
        r = CliRunner().invoke(app, ['predict', str(smoke[1]), str(tmp_path), '--out', str(tmp_path/out), '--strict'])
        assert r.exit_code == 0, r.output
        assert [Path(row['image']).name for row in csv.DictReader(io.StringIO((tmp_path/out/'scores.csv').read_text()))] == ['0.png', '1.png', '2.png']
    assert '3 images; not used: ' in r.output and "files of dynad's own output (first judged/" in r.output
    assert [p.name for p in collect_places([tmp_path]).files] == [p.name for p in open_folder(tmp_path).samples and list_images(tmp_path)] == ['0.png', '1.png', '2.png']
    assert counts(open_dataset(tmp_path)) == (3, 0, 0, 0)

def test_listed_output_is_left_out_and_all_else_in_the_folder_is_not(tmp_path):
    for n in ('0_a_map.png', '0_a_overlay.png', 'mine.png'): put(tmp_path/'judged'/n)
    (tmp_path/'judged'/MARKER).write_text(json.dumps(dict(files=['0_a_map.png', '0_a_overlay.png'])))
    assert [p.name for p in list_images(tmp_path)] == ['mine.png']
    (tmp_path/'judged'/MARKER).write_text('{"files": 3}'); assert len(list_images(tmp_path)) == 3

def test_reports_runs_and_executed_notebooks_are_output(tmp_path, smoke):
    put(tmp_path/'a.png')
    put(tmp_path/'page/images/x.png'); (tmp_path/'page/index.html').write_text('<meta name="generator" content="dynad report">')
    shutil.copy(smoke[1]/'config.json', (tmp_path/'run').mkdir() or tmp_path/'run'); put(tmp_path/'run/stages/x.png')
    put(tmp_path/'fig1/one.png'); (tmp_path/'fig1/run.json').write_text(json.dumps(dict(notebook='fig1.ipynb', target='fig1')))
    assert [p.name for p in list_images(tmp_path)] == ['a.png']
    with pytest.raises(DataError, match=r"no image in there .*not used: 2 files of dynad's own output"): images_of([tmp_path/'page'])

# ---- file formats

def test_formats_are_those_of_pillow_and_the_rest_is_named(tmp_path):
    base(tmp_path)
    if '.avif' in EXTENSIONS:
        for i in range(4): put(tmp_path/f'train/good/new_{i}.avif')
    for i in range(40): (tmp_path/f'train/good/IMG_{i:04}.DNG').write_bytes(b'x')
    for i in range(5): (tmp_path/f'train/good/{i}.txt').write_bytes(b'x')
    for n in ('readme.txt', 'LICENSE', 'remark.txt'): (tmp_path/n).write_text('x')
    data = open_dataset(tmp_path)
    assert len(data.train) == 12 + 4*('.avif' in EXTENSIONS)
    assert '45 files of other formats (.dng 40, .txt 5; first train/good/0.txt; convert .dng to TIFF or PNG)' in data.line()
    assert any('45 files of other formats' in f.text for f in collect_places([tmp_path]).findings)

@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.jp2', '.webp', '.tif', '.bmp', '.gif', '.tga', '.ppm', '.pcx'])
def test_what_is_listed_can_be_read(tmp_path, suffix):
    from dynad.data import read_image
    assert suffix in EXTENSIONS and read_image(put(tmp_path/f'a{suffix}', 120, 8), 8).shape == (3, 8, 8)

def test_heic_is_read_with_its_plugin_and_named_without(tmp_path, monkeypatch):
    import dynad.collector as c
    (tmp_path/'a.HEIC').write_bytes(b'\0\0\0\x18ftypheic' + bytes(200)); put(tmp_path/'b.png')
    if '.heic' in EXTENSIONS: assert [p.name for p in list_images(tmp_path)] == ['a.HEIC', 'b.png']
    monkeypatch.setattr(c, 'EXTENSIONS', EXTENSIONS - {'.heic'}) # as without the plugin
    assert '1 file of other formats (.heic 1; a.HEIC; install pillow-heif to read .heic)' in collect(tmp_path).findings[0].text

def test_names_in_capitals_and_extensions(tmp_path):
    base(tmp_path); put(tmp_path/'train/good/000.jpg'); put(tmp_path/'test/good/000.bmp')
    assert counts(silent(tmp_path)) == (13, 5, 4, 4)                       # where no mask must be told apart, both are read
    (tmp_path/'x').mkdir(); (tmp_path/'x/a').touch()
    if (tmp_path/'x/A').exists(): pytest.skip('this file system does not tell capitals apart')
    put(tmp_path/'train/good/A.png'); put(tmp_path/'train/good/a.PNG')
    assert '2 names differ from each other in capitals only' in open_dataset(tmp_path).line()
    put(tmp_path/'test/spot/X.png', 77); put(tmp_path/'ground_truth/spot/x_mask.png', 255)
    assert counts(open_dataset(tmp_path))[3] == 5

# ---- links

@posix
def test_links_are_followed_once(tmp_path):
    pool = tmp_path/'pool'; base(pool)
    root = tmp_path/'set'; root.mkdir()
    for n in ('train', 'test', 'ground_truth'): os.symlink(pool/n, root/n)
    data = silent(root)
    assert counts(data) == (12, 4, 4, 4) and all(str(s.image).startswith(str(root)) for s in data.samples)
    assert data.fingerprint == open_dataset(pool).fingerprint
    files = tmp_path/'links'
    for p in pool.rglob('*.png'): (files/p.relative_to(pool)).parent.mkdir(parents=True, exist_ok=True); os.symlink(p, files/p.relative_to(pool))
    assert open_dataset(files).fingerprint == data.fingerprint

@posix
def test_loops_second_ways_and_broken_links_are_named(tmp_path):
    base(tmp_path/'set')
    os.symlink(tmp_path, tmp_path/'set/train/good/up'); os.symlink('.', tmp_path/'set/train/good/self')
    os.symlink(tmp_path/'set/test', tmp_path/'set/again'); os.symlink('nowhere.png', tmp_path/'set/train/good/gone.png')
    os.symlink('round', tmp_path/'set/round')
    data = open_dataset(tmp_path/'set')
    assert counts(data) == (12, 4, 4, 4)
    for text in ('2 links to a folder above them (first train/good/self)', '1 folder that is reached twice (again)', '2 links that lead nowhere'):
        assert text in data.line()

# ---- names that are not UTF-8

@posix
def test_names_of_any_bytes_are_read_and_printed(tmp_path):
    base(tmp_path)
    try: (tmp_path/'train/good/003.png').rename(tmp_path/'train/good'/ODD)
    except OSError: pytest.skip('this file system takes only UTF-8')
    (tmp_path/'train/good'/os.fsdecode(b'm\xfc.txt')).write_bytes(b'x')
    data = open_dataset(tmp_path)
    assert counts(data) == (12, 4, 4, 4) and len(data.fingerprint) == 64 and any(s.image.name == ODD and s.name == f'train/good/{printable(ODD)}' for s in data.train)
    assert r'train/good/m\xfc.txt' in data.line() and data.line().encode() and repr(data).encode() and data._repr_html_().encode()
    (tmp_path/'train/good'/ODD).write_bytes(b'')
    from dynad.data import load_images
    with pytest.raises(DataError, match=r'gr\\xfcn\.png: the file is empty') as e: load_images(data.train, 8)
    assert str(e.value).encode()

# ---- the command line

@posix
def test_fit_on_a_flat_folder_with_a_name_that_is_not_utf8(tmp_path):
    from dynad.cli import app
    for i in range(10): put(tmp_path/'own'/f'{i}.png', 20*i, 64)
    try: (tmp_path/'own/3.png').rename(tmp_path/'own'/ODD)
    except OSError: pytest.skip('this file system takes only UTF-8')
    (tmp_path/'own/clip.mp4').write_bytes(b'x')
    args = ['fit', '--data', str(tmp_path/'own'), '--out', str(tmp_path/'run'), '--preset', 'smoke', '--tracker', 'none',
            '--set', 'denoiser.steps=2', '--set', 'latents.finetune_steps=1', '--set', 'adaptation.gamma=0']
    refused = CliRunner().invoke(app, [*args, '--strict'])
    assert refused.exit_code == 2 and not (tmp_path/'run').exists()
    assert refused.output.count('\n') == 1 and 'refused because of strict; not used: 1 file of other formats (.mp4 1; clip.mp4)' in refused.output
    r = CliRunner().invoke(app, args)
    assert r.exit_code == 0, r.output
    assert '(folder): 10 normal training images' in r.output and 'a folder without train: every image is taken as a normal one' in r.output

def test_evaluate_and_predict_refuse_when_strict(tmp_path, smoke):
    from dynad.cli import app
    base(tmp_path/'set'); (tmp_path/'set/test/spot/x.mp4').write_bytes(b'x')
    for args in (['evaluate', str(smoke[1]), '--data', str(tmp_path/'set'), '--json', str(tmp_path/'r.json')],
                 ['predict', str(smoke[1]), str(tmp_path/'set/test'), '--out', str(tmp_path/'out')]):
        r = CliRunner().invoke(app, [*args, '--strict'])
        assert r.exit_code == 2 and r.output.count('\n') == 1 and '1 file of other formats (.mp4 1;' in r.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ['set']

def test_doctor_says_it_in_its_line(tmp_path, monkeypatch):
    from dynad.doctor import data
    base(tmp_path/'nuts'); put(tmp_path/'nuts/validation/good/0.png'); monkeypatch.setenv('DYNAD_DATA', str(tmp_path))
    row = next(f for f in data() if f.what == 'data: nuts')
    assert row.state == ('nuts (mvtec): 12 normal training images, 4 normal + 4 anomalous test images, 4 masks; '
                         'not used: 1 image of validation/good (validation/good/0.png)')

def test_doctor_on_one_folder_and_strict(tmp_path):
    base(tmp_path/'nuts'); put(tmp_path/'nuts/validation/good/0.png')
    def doctor(*words): return CliRunner().invoke(app, ['doctor', *map(str, words)])
    from dynad.cli import app
    line = ('nuts (mvtec): 12 normal training images, 4 normal + 4 anomalous test images, 4 masks; '
            'not used: 1 image of validation/good (validation/good/0.png)')
    said = doctor('--data', tmp_path/'nuts')
    assert said.exit_code == 0 and said.output.startswith(line + '\n')
    assert json.loads(doctor('--data', tmp_path/'nuts', '--json').stdout)['line'] == line
    for words in ([], ['--json']):
        refused = doctor('--data', tmp_path/'nuts', '--strict', *words)
        assert refused.exit_code == 2 and refused.output.count('\n') == 1 and 'refused because of strict; not used: 1 image' in refused.output
    (tmp_path/'nuts/validation/good/0.png').unlink()
    refused = doctor('--data', tmp_path/'nuts', '--strict') # the folder is in order now, its masks are white all over
    assert refused.exit_code == 2 and 'more than half of the pixels' in refused.output and 'validation' not in refused.output
    for words, cure in ((['--strict'], 'only with --data'), (['--data', tmp_path/'nut'], 'no such folder')):
        assert (r := doctor(*words)).exit_code == 2 and cure in r.output

def test_a_folder_says_a_remark_of_itself(tmp_path, smoke):
    from dynad.evaluate import evaluate
    base(tmp_path); (tmp_path/'remark.txt').write_text('Halved in size:\nno published figure applies.', encoding='utf-8')
    data = silent(tmp_path)
    assert data.remark == 'Halved in size: no published figure applies.' and data.line().endswith('; ' + data.remark)
    result = evaluate(smoke[0], data, n_boot=0, null_models=False, progress=False).result
    assert result['protocol']['note'].endswith(data.remark) and result['data']['remark'] == data.remark and result['data']['not_used'] == []

# ---- trees of any kind

FOLDERS = ['a', 'B', 'train', 'test', 'good', 'OK', 'spot', 'masks', 'label', 'ground_truth', 'images', '@eaDir', '.hidden', '__MACOSX', 'lost+found',
           os.fsdecode(b'f\xfc'), 'ü']
FILES = ['x.png', 'y.JPG', 'X.png', 'x_mask.png', 'x_gt.bmp', 'z.tif', 'note.txt', 'raw.dng', 'readme.txt', 'Thumbs.db', '._x.png', '.DS_Store', 'noext', ODD, 'ü.png']
entries = st.lists(st.tuples(st.lists(st.sampled_from(FOLDERS), max_size=3), st.sampled_from(FILES + ['link', 'file link', 'broken', 'up']), st.integers(0, 99)), max_size=14)
PIXELS = io.BytesIO(); Image.new('RGB', (4, 4), 99).save(PIXELS, format='PNG')

def build(root: Path, tree) -> None:
    "Files and links at random places; a link leads to a folder that is there, inside or outside of the root."
    outside = root.parent/f'{root.name}_outside'
    for i in range(2): (outside/'deep').mkdir(parents=True, exist_ok=True); (outside/'deep'/f'{i}.png').write_bytes(PIXELS.getvalue())
    for parts, what, k in tree:
        folder = root.joinpath(*parts)
        try: folder.mkdir(parents=True, exist_ok=True)
        except OSError: continue                        # a link is there
        there = [root, outside, outside/'deep', *sorted(p for p in root.rglob('*') if p.is_dir())]
        p = folder/(f'l{k % 7}' if what in ('link', 'up') else f'l{k % 7}.png' if what in ('file link', 'broken') else what)
        if os.path.lexists(p): continue
        if what == 'link': os.symlink(there[k % len(there)], p)
        elif what == 'up': os.symlink('..', p)
        elif what == 'file link': os.symlink(outside/'deep/0.png', p)
        elif what == 'broken': os.symlink('nowhere', p)
        else: p.write_bytes(PIXELS.getvalue())

def missed(root: Path, used, findings) -> list[Path]:
    "What lies in the tree, links not followed, and is neither used nor named with a finding."
    named = {*used, *(p for f in findings for p in f.files)}
    above = lambda p: [p, *(q for q in p.parents if q.is_relative_to(root))]
    def known(p): return any(q in named for q in above(p)) or p.is_dir() and any(p in n.parents for n in named) or p.is_dir() and not any(p.iterdir())
    return [Path(b)/n for b, dirs, files in os.walk(root) for n in files + [d for d in dirs if (Path(b)/d).is_symlink()] if not known(Path(b)/n)]

@posix
@settings(max_examples=120, deadline=None)
@given(entries)
def test_every_file_is_used_or_named_and_every_command_sees_the_same(tree):
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp).resolve()/'root'; root.mkdir(); build(root, tree)
        listing = collect(root)
        assert listing == collect(root) and list(listing.files) == sorted({*listing.files}) and not {*listing.files} & {*listing.masks}
        assert all(os.path.isfile(p) and p.suffix.lower() in EXTENSIONS for p in listing.files + listing.masks)
        assert missed(root, listing.files + listing.masks, listing.findings) == []
        assert not any(part in ('@eaDir', '.hidden', '__MACOSX', 'lost+found') for p in listing.files for part in p.relative_to(root).parts)
        folders = {}                                    # a real folder is listed by one way only
        for p in listing.files: folders.setdefault(os.path.realpath(p.parent), set()).add(p.parent)
        assert all(len(ways) == 1 for ways in folders.values())
        if not listing.files:
            for read in (images_of, lambda r: open_folder(r[0])):
                with pytest.raises(DataError): read([root])
            return
        assert images_of([root]) == list(listing.files)
        try: data = open_folder(root)
        except DataError as e: assert 'no normal training image' in str(e) or 'a second mask' in str(e) or 'has the same name' in str(e); return
        used = [s.image for s in data.samples] + [s.mask for s in data.samples if s.mask]
        if data.layout == 'folder': assert [s.image for s in data.samples] == list(listing.files)
        assert {*used} <= {*listing.files, *listing.masks} and not {s.image for s in data.samples} & {*listing.masks}
        assert missed(root, used, data.findings) == [] and data.line().encode() and len(data.fingerprint) == 64
        if data.layout != 'folder': assert open_dataset(root).samples == data.samples

@posix
def test_the_widget_sees_what_the_commands_see(tmp_path, smoke):
    from dynad.own_images import OwnImages
    own = OwnImages(tmp_path/'own'); own.model.detector = smoke[0]
    base(tmp_path/'set', masks='test/spot/masks'); put(tmp_path/'set/@eaDir/x.png'); os.symlink('..', tmp_path/'set/up'); (tmp_path/'set/a.mp4').write_bytes(b'x')
    try:
        own.new.folder.value = str(tmp_path/'set')
        assert own._to_inspect() == list(collect(tmp_path/'set').files) == images_of([tmp_path/'set']) and len(own._to_inspect()) == 20
        for text in ('20 images', '4 masks, no images to judge', '1 file of other formats'): assert text in own.new.text.value
    finally: own.close()

@pytest.mark.parametrize('words', [['compare', '--methods', 'padim', '--data'], ['reproduce', 'table5', '--dry-run', '-p']])
def test_compare_and_reproduce_say_what_a_folder_holds_and_refuse_it_when_strict(words, tmp_path, monkeypatch):
    from dynad.cli import app
    monkeypatch.chdir(Path(__file__).parent.parent)
    root = base(tmp_path/'set')
    (root/'test/spot/x.xcf').write_text('x')
    given = [*words, str(root) if words[-1] == '--data' else f'data={root}']
    out = CliRunner().invoke(app, [*given, '--strict'])
    assert out.exit_code == 2 and '1 file of other formats (.xcf 1; test/spot/x.xcf)' in out.output and out.output.count('\n') == 1
    if words[0] == 'reproduce': assert 'not used: 1 file of other formats' in CliRunner().invoke(app, given).output
