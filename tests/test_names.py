"Names as people have them: bytes that are not UTF-8, 255 bytes, other systems' rules, two files of one name, ~ after =."
import csv
import io
import json
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from typer.testing import CliRunner

from dynad.cli import app
from dynad.config import make_config
from dynad.data import open_dataset
from dynad.detector import DynAD
from dynad.exports import MARKER, check_export, export_to, listed_files
from dynad.inspection import save_uploads
from dynad.output import TABLES, result_stems, write_predictions
from dynad.paths import LONGEST_NAME, RESERVED, PathError, expanded, file_name, name_key, numbered, printable
from dynad.store import StoreError, WriteError, atomic_write, load_json

CUT = {'data.image_size': 32, 'data.min_holdout': 3, 'denoiser.steps': 4, 'denoiser.batch': 4, 'denoiser.widths': [32, 32], 'denoiser.attention': [], 'denoiser.heads': 2, 'latents.finetune_steps': 2,
       'latents.finetune_batch': 4, 'adaptation.gamma': 1, 'adaptation.batch': 4, 'reconstruction.S': 2, 'dic.bins': 2, 'dic.pool': 4} # every stage, none of it long
bytes_as_names = pytest.mark.skipif(sys.platform in ('darwin', 'win32'), reason='this system keeps names as Unicode')
GREEN = os.fsdecode(b'gr\xfcn') # Latin-1, as an old Windows share leaves it

def part(i, spot=False):
    r, (y, x) = np.random.default_rng(i), np.mgrid[:64, :64]
    a = 120 + 40*np.sin((x + r.uniform(0, 3))/4) + r.normal(0, 3, (64, 64))
    if spot: a[20:32, 24:38] = 15
    return Image.fromarray(a.clip(0, 255).astype('uint8')).convert('RGB')

def save(im, path): path.parent.mkdir(parents=True, exist_ok=True); im.save(path); return path

# ---- the functions

@given(st.text(max_size=300))
def test_a_file_name_is_one_that_every_system_takes(text):
    name = file_name(text)
    assert 0 < len(name.encode()) <= 130 and not set(name) & set('<>:"/\\|?*\0\n') and name == name.strip().rstrip('.') and name.split('.')[0].upper() not in RESERVED
    assert file_name(text) == name and (name == text or name[-9] == '_')

@given(st.lists(st.text(max_size=20), unique=True, max_size=6))
def test_results_of_different_images_never_share_a_name(names):
    stems = result_stems([Path(f'{n}.png') for n in names if '/' not in n and '\0' not in n])
    assert len({name_key(s) for s in stems}) == len(stems)

@given(st.binary(min_size=1, max_size=40).filter(lambda b: b'\0' not in b and b'/' not in b))
def test_a_printable_name_can_be_written_anywhere(b):
    name = printable(os.fsdecode(b))
    assert name.encode() and len(name.splitlines()) == 1 and name.isprintable() or not name.isascii()
    assert printable(name) == name

def test_printable():
    assert [printable(n) for n in (GREEN, 'grün', 'a\nb', '\ud800', 'a\u2028b')] == ['gr\\xfcn', 'grün', 'a\\nb', '\\ud800', 'a\\u2028b']

def test_numbered_names_count_the_other_spelling_too():
    assert numbered('A.PNG', {name_key('a')}) == 'A (2).PNG'
    assert numbered(unicodedata.normalize('NFD', 'ä.png'), {name_key('ä')}).endswith(' (2).png')

# ---- ~

@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path/'home').mkdir(); (tmp_path/'here').mkdir()
    monkeypatch.setenv('HOME', str(tmp_path/'home')); monkeypatch.setenv('USERPROFILE', str(tmp_path/'home')); monkeypatch.chdir(tmp_path/'here')
    return tmp_path/'home'

def test_the_home_folder_in_every_path_of_the_command_line(home):
    "Each option and argument of each command that takes a path is of the one type that knows ~."
    from typing import get_args, get_type_hints
    from dynad.commands import data_place, place
    found = set()
    for command in app.registered_commands:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            info = next((m for m in getattr(hint, '__metadata__', ()) if hasattr(m, 'parser')), None)
            if info is None or not ('Path' in str(get_args(hint)[0]) or name == 'data'): continue
            found.add(name)
            assert info.parser is (data_place if name == 'data' else place), f'{command.callback.__name__} {name}'
    assert found == {'out', 'run', 'runs', 'images', 'data', 'json_file', 'save_maps', 'report', 'table', 'file', 'html', 'roi', 'what', 'keep', 'fit', 'folder', 'against'}
    assert place('~/x') == home/'x' and data_place('~/x') == str(home/'x') and data_place('elpv') == 'elpv'
    out = CliRunner().invoke(app, ['fit', '--data=~/none', '--out=~/x'])
    assert out.exit_code == 2 and f"{home/'none'}: no such folder" in out.output and [*Path.cwd().iterdir()] == []

def test_the_home_folder_in_the_library(home):
    assert atomic_write('~/a.json', '{"x": 1}') == home/'a.json' and load_json('~/a.json') == {'x': 1}
    for i in range(3): save(part(i), home/f'd/train/good/{i}.png')
    assert len(open_dataset('~/d').train) == 3
    with export_to('~/e') as work: (work/'1.txt').write_text('1')
    assert (home/'e/1.txt').exists() and [*Path.cwd().iterdir()] == []

@pytest.mark.parametrize('bad, said', [('x'*256, 'has 256 bytes'), ('ä'*128, 'has 256 bytes'), ('a\0b', 'zero byte')])
def test_a_path_that_no_system_has(bad, said):
    with pytest.raises(PathError, match=said): expanded(bad)
    with pytest.raises(PathError, match=said): atomic_write(bad, 'x')

def test_a_name_of_255_bytes_can_be_written(tmp_path):
    p = tmp_path/('ä'*126 + '.n') # 254 bytes
    assert atomic_write(p, 'x').read_text() == 'x' and [*tmp_path.iterdir()] == [p]

# ---- text with such names

@bytes_as_names
def test_a_path_that_is_not_utf8_survives_json_and_a_console(tmp_path):
    p = atomic_write(tmp_path/'a.json', json.dumps({'root': f'/x/{GREEN}'}, ensure_ascii=False))
    assert load_json(p)['root'] == f'/x/{GREEN}'
    p.read_bytes().decode('utf-8')
    out = CliRunner().invoke(app, ['predict', str(tmp_path/'run'), str(tmp_path/f'{GREEN}.png'), '--out', str(tmp_path/'o')])
    assert out.exit_code == 2 and 'gr\\xfcn.png: no such file' in out.output

@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    "Fitted on images whose names are of every kind that this system takes."
    root = tmp_path_factory.mktemp('names')
    odd = ['grün', 'a b', "it's", 'n'*251, 'ä'*125, 'line\nbreak', 'CON', '#1', '%20', '=1+1', '🙂', '-x']
    if sys.platform.startswith('linux'): odd += [GREEN, 'x:y', 'end.', 'back\\slash', '"quoted"']
    for i, n in enumerate(odd): save(part(i), root/'0.png').rename(root/f'tmp{i}'); (root/'data/train/good').mkdir(parents=True, exist_ok=True); os.rename(root/f'tmp{i}', root/f'data/train/good/{n}.png')
    for i, n in enumerate(odd[-3:]):
        for kind in ('good', 'spot'):
            (root/f'data/test/{kind}').mkdir(parents=True, exist_ok=True); save(part(50 + i, kind == 'spot'), root/'0.png').rename(root/f'data/test/{kind}/{n}.png')
    data = open_dataset(root/'data')
    return root, odd, DynAD(make_config('smoke', CUT | {'trackers': ['tensorboard']})).fit(data, root/'run', progress=False), data

def test_fit_and_evaluate_and_predict_take_names_of_every_kind(fitted, tmp_path):
    root, odd, model, data = fitted
    assert len(data.train) == len(odd)
    info = load_json(root/'run/run.json')
    assert {n.split('/')[-1] for n in info['fit'] + info['held_out']} == {printable(f'{n}.png') for n in odd}
    call = lambda *words: CliRunner().invoke(app, [str(w) for w in words])
    out = call('evaluate', root/'run', '--data', root/'data', '--json', tmp_path/'r.json', '--save-maps', tmp_path/'maps', '--report', tmp_path/'page', '--table', tmp_path/'t.parquet', '--n-boot', 5, '--baselines', '', '--no-null-models')
    assert out.exit_code == 0, out.output
    json.loads((tmp_path/'r.json').read_text(encoding='utf-8'))
    assert sorted(pd.read_parquet(tmp_path/'t.parquet').image) == sorted(s.name for s in data.test) == sorted(pd.read_csv(tmp_path/'maps/index.csv').image)
    (tmp_path/'page/index.html').read_text(encoding='utf-8')
    for i in range(2):
        out = call('predict', root/'run', root/'data/train/good', '--out', tmp_path/'judged')
        assert out.exit_code == 0, out.output
    rows = [*csv.DictReader(io.StringIO((tmp_path/'judged/scores.csv').read_text(encoding='utf-8'), newline=''))]
    assert len(rows) == len(odd) and {r['image'] for r in rows} == {printable(root/f'data/train/good/{n}.png') for n in odd}
    for r in rows:
        for kind in ('map', 'overlay', 'reconstruction'): assert (tmp_path/f"judged/{r['files']}_{kind}.png").is_file()

# ---- two of one name

def test_images_whose_names_differ_in_case_or_folder_have_results_of_their_own(fitted, tmp_path):
    model, files = fitted[2], []
    for i, n in enumerate(('1/a.png', '2/a.png', '3/A.png', '4/a.jpg')): files.append(save(part(60 + i), tmp_path/n))
    rows = write_predictions(model, files, tmp_path/'out')
    names = [p.name for p in (tmp_path/'out').iterdir()]
    assert len({name_key(n) for n in names}) == len(names) == 4*4 + 5 and len({r['files'].casefold() for r in rows}) == 4

def drop(name, value):
    b = io.BytesIO(); Image.fromarray(np.full((16, 16), value, 'uint8')).save(b, 'PNG')
    return dict(name=name, content=memoryview(b.getvalue()))

def test_uploads_of_one_name_are_all_kept(tmp_path):
    names = lambda files: [f.name for f in files]
    assert names(save_uploads([drop('image.jpg', 20*i) for i in range(4)], tmp_path)) == ['image.jpg', 'image (2).jpg', 'image (3).jpg', 'image (4).jpg']
    assert names(save_uploads([drop('image.jpg', 200), drop('Image.png', 210)], tmp_path)) == ['image (5).jpg', 'Image (6).png']
    assert names(save_uploads([drop('image.jpg', 20), drop('new.jpg', 5), drop('new.jpg', 5)], tmp_path)) == ['image (2).jpg', 'new.jpg']   # the same images again
    assert names(save_uploads([drop('C:\\x\\CON.png', 77), drop('a:b.png', 78), drop('n'*300 + '.png', 79)], tmp_path))[0].startswith('_CON_')
    assert len([*tmp_path.iterdir()]) == 10 and all(len(os.fsencode(p.name)) <= LONGEST_NAME for p in tmp_path.iterdir())

# ---- a second export

def test_a_second_export_leaves_nothing_of_the_first_and_all_of_others(fitted, tmp_path):
    model = fitted[2]
    files = [save(part(70 + i), tmp_path/f'{i}.png') for i in range(3)]
    write_predictions(model, files, tmp_path/'out')
    (tmp_path/'out/0_notes_map.png').write_text('of somebody')
    rows = write_predictions(model, files[:1], tmp_path/'out')
    assert {p.name for p in (tmp_path/'out').iterdir()} == {MARKER, *TABLES, '0_notes_map.png', *(f"{rows[0]['files']}_{k}.png" for k in ('map', 'mask', 'overlay', 'reconstruction'))}
    assert set(listed_files(tmp_path/'out')) == {p.name for p in (tmp_path/'out').iterdir()} - {MARKER, '0_notes_map.png'}

def test_an_export_that_fails_leaves_the_first_whole(tmp_path):
    with export_to(tmp_path/'e') as work: (work/'1.txt').write_text('1')
    with pytest.raises(WriteError, match='cannot be written'):
        with export_to(tmp_path/'e') as work: (work/'2.txt').write_text('2'); raise OSError(28, 'No space left on device')
    assert (tmp_path/'e/1.txt').read_text() == '1' and sorted(p.name for p in (tmp_path/'e').iterdir()) == ['1.txt', MARKER]
    with export_to(tmp_path/'e'):
        with pytest.raises(StoreError, match='another dynad is writing there now'):
            with export_to(tmp_path/'e'): pass
    assert sorted(p.name for p in (tmp_path/'e').iterdir()) == [MARKER]

def test_a_list_that_leads_out_of_the_folder_removes_nothing(tmp_path):
    (tmp_path/'mine.txt').write_text('1'); (tmp_path/'e/sub').mkdir(parents=True); (tmp_path/'e/sub/x').touch()
    (tmp_path/'e'/MARKER).write_text(json.dumps({'files': ['../mine.txt', str(tmp_path/'mine.txt'), 'sub/x', '..', '', 3, None, 'sub']}))
    with export_to(tmp_path/'e') as work: (work/'1.txt').touch()
    assert (tmp_path/'mine.txt').exists() and (tmp_path/'e/sub/x').exists()
    with pytest.raises(StoreError, match='was not written by dynad'): check_export(tmp_path/'e', ['sub'])
