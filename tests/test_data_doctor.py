"What is wrong with a folder of images, and what is not."
import io, json, shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dynad.checks import duplicates
from dynad.config import make_config
from dynad.data import open_dataset
from dynad import data_doctor as D

SMOKE = make_config('smoke')

@pytest.fixture
def place(boards, tmp_path): return shutil.copytree(boards.root, tmp_path/'set')

def put(image, path): path.parent.mkdir(parents=True, exist_ok=True); image.save(path)

def test_copies_are_found_in_every_guise_and_nothing_else(place):
    train = [Image.open(s.image).convert('RGB') for s in open_dataset(place).train]
    put(train[0], place/'test/good/jpeg.jpg')
    put(train[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT), place/'test/good/mirrored.png')
    put(train[2].transpose(Image.Transpose.ROTATE_90), place/'test/good/turned.png')
    put(train[3].point(lambda v: v*.93), place/'test/good/darker.png')
    put(train[4].point(lambda v: v*.93), place/'train/good/darker.png')
    d = D.diagnose(open_dataset(place), SMOKE, progress=False)
    name = lambda i: d.looked.samples[i].name
    assert {(name(p.a), name(p.b), p.turn) for p in d.pairs} == {
        ('test/good/jpeg.jpg', 'train/good/000.png', ''), ('test/good/mirrored.png', 'train/good/001.png', 'mirrored'),
        ('test/good/turned.png', 'train/good/002.png', d.pairs[[name(p.a) for p in d.pairs].index('test/good/turned.png')].turn),
        ('test/good/darker.png', 'train/good/003.png', ''), ('train/good/darker.png', 'train/good/004.png', '')}
    assert next(p.turn for p in d.pairs if name(p.a) == 'test/good/turned.png').startswith('turned by')
    said = {f.kind: f for f in d.findings}
    assert 'mirrored.png ≈ train/good/001.png (mirrored)' in said['near-duplicates in training and test'].text
    assert len(said['near-duplicates in training'].files) == 2 and said['near-duplicates in training'] in d.faults
    again = D.diagnose(open_dataset(place), SMOKE, progress=False)
    drop = lambda j: {k: v for k, v in j.items() if k != 'seconds'}
    assert drop(again.to_json()) == drop(d.to_json())

def test_images_in_another_position_are_no_copies_of_each_other(place):
    for p in sorted((place/'test').rglob('*.png')): Image.open(p).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(p)
    looked = D.look(open_dataset(place).samples)
    assert D.near_pairs(looked) == []

def test_copies_byte_by_byte_are_said_once(place):
    shutil.copy(place/'train/good/000.png', place/'test/good/same.png')
    d = D.diagnose(open_dataset(place), SMOKE, progress=False)
    assert [p.by for p in d.pairs] == ['bytes'] and [f.kind for f in d.findings if 'duplicates' in f.kind] == ['duplicates in training']

@pytest.mark.parametrize('n', (1, 3, 12))
def test_equal_and_few_images_make_a_report(tmp_path, n):
    for i in range(n): put(Image.new('RGB', (40, 40), 'grey'), tmp_path/f'{i}.png')
    d = D.diagnose(open_dataset(tmp_path), SMOKE, progress=False)
    json.dumps(d.to_json(), allow_nan=False)
    assert d.curve is None and not [o for o in d.odd if o.z > D.ODD]
    assert ('too few normal images' in [f.kind for f in d.findings]) == (n < 7)

def test_a_file_that_cannot_be_read_does_not_end_it(place):
    (place/'train/good/broken.png').write_bytes(b'no image'); (place/'ground_truth').rename(place/'elsewhere')
    d = D.diagnose(open_dataset(place), SMOKE, progress=False)
    said = {f.kind for f in d.faults}
    assert 'unusable images' in said and len(d.looked.samples) == len(d.dataset.samples) - 1

def test_masks(place):
    masks = sorted((place/'ground_truth').rglob('*.png'))
    def paint(p, m): Image.fromarray(m.astype('uint8')*255).save(p)
    some = np.zeros((128, 128), bool); some[5:8, 5:8] = True
    paint(masks[0], np.zeros((128, 128), bool)); paint(masks[1], ~some); paint(masks[2], some)
    found = {f.kind: f for f in D.diagnose(open_dataset(place), SMOKE, progress=False).findings}
    assert found['empty masks'].files == (masks[0],) and masks[2] in found['tiny defects'].files
    assert masks[1] in {**found}.get('large masks', found.get('inverted masks')).files

def test_a_grey_image_and_an_odd_one(place):
    Image.open(place/'train/good/003.png').convert('L').save(place/'train/good/003.png')
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)).save(place/'train/good/005.png')
    d = D.diagnose(open_dataset(place), SMOKE, progress=False)
    found = {f.kind: f for f in d.findings}
    assert [p.name for p in found['grey and colour'].files] == ['003.png']
    assert {'005.png'} <= {p.name for p in found['odd normal training images'].files} and d.looked.samples[d.odd[0].row].name == 'train/good/005.png'

def test_expected_distance_of_a_subset():
    from itertools import combinations
    d = np.sort(np.random.default_rng(1).uniform(size=(3, 7)))
    for n in (1, 3, 6, 7):
        assert np.allclose(D.nearest_of(d, n), np.mean([d[:, list(c)].min(1) for c in combinations(range(7), n)], 0))

def test_without_features_the_rest_is_said(boards, monkeypatch):
    from dynad.features import FeatureError
    def missing(*a, **k): raise FeatureError('the package is missing: pip install it')
    monkeypatch.setattr('dynad.near_duplicates.load_features', missing)
    d = D.diagnose(boards, SMOKE, progress=False)
    assert 'pip install it' in ' '.join(d.lines()) and d.promise is not None and d.pairs == []

def test_at_the_command_line(place, tmp_path):
    from dynad.cli import app
    run = lambda *w: CliRunner().invoke(app, ['doctor', *map(str, w)])
    put(Image.open(place/'train/good/000.png').convert('RGB'), place/'test/good/again.jpg')
    page = tmp_path/'page'
    for _ in range(2):
        said = run('--data', place, '--preset', 'smoke', '--html', page)
        assert said.exit_code == 0 and 'again.jpg ≈ train/good/000.png' in said.output, said.output
    text = (page/'index.html').read_text()
    assert text.count('data:image/jpeg') > 10 and json.loads((page/'diagnosis.json').read_text())['pairs']
    assert not [f for f in open_dataset(place).findings if f.kind != 'document'] # nothing was written among the data
    refused = run('--data', place, '--strict', '--preset', 'smoke')
    assert refused.exit_code == 2 and 'near-duplicates' in refused.output or 'refused because of strict' in refused.output
    (tmp_path/'mine').mkdir(); (tmp_path/'mine/index.html').write_text('mine')
    assert 'not written by dynad' in run('--data', place, '--html', tmp_path/'mine').output
    for words in (['--html', page], ['--preset', 'small'], ['--set', 'seed=1']): assert 'only with --data' in run(*words).output
