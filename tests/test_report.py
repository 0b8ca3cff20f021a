"The results page: what it shows, what it escapes, what it refuses to overwrite."
import copy, dataclasses, json, re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from dynad.method import above
from dynad.paths import PathError
from dynad.report import ReportError, choose, is_report, report_data, scale_of_maps, write_report

# the choice of images

@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=60), st.floats(-5, 5), st.integers(0, 20))
@settings(deadline=None)
def test_choice(images, threshold, n):
    scores, labels = torch.tensor([p[0] for p in images], dtype=torch.float64), torch.tensor([int(p[1]) for p in images])
    c = choose(scores, labels, threshold, n)
    every = sum(c.values(), [])
    assert len(every) == len(set(every)) == min(n, len(images))
    for i in c['wrong']: assert bool(above(scores[i], threshold)) != bool(labels[i])
    for i in c['found']: assert above(scores[i], threshold) and labels[i] == 1
    for i in c['normal']: assert not above(scores[i], threshold) and labels[i] == 0
    for rows in c.values(): assert [float(scores[i]) for i in rows] == sorted((float(scores[i]) for i in rows), reverse=True)

def test_the_worst_mistakes_come_in_first():
    scores = torch.tensor([0., .9, 1.1, 9., 2., 3.])
    labels = torch.tensor([1, 1, 0, 0, 1, 1])
    assert set(choose(scores, labels, 1., 6)['wrong']) == {0, 1, 2, 3}
    assert choose(scores, labels, 1., 3) == {'wrong': [3, 0], 'found': [5], 'normal': []}

# maps

def test_scale_is_at_least_one():
    assert scale_of_maps(torch.zeros(2, 1, 8, 8)) == 1
    assert scale_of_maps(torch.full((2, 1, 8, 8), 7.)) == 7

# the page

@pytest.fixture(scope='module')
def e(smoke, boards):
    from dynad.evaluate import evaluate, fitted_baseline
    baseline = fitted_baseline(smoke[0], 'patchcore', boards, progress=False)
    return evaluate(smoke[0], boards, n_boot=20, baselines=[baseline], progress=False)

class Page(HTMLParser):
    VOID = {'meta', 'img', 'br', 'link'}
    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.links, self.words, self.open, self.wrong = [], [], [], [], []
        self.feed(path.read_text(encoding='utf-8'))
    def handle_startendtag(self, tag, attrs): self.tags.append(tag)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ('src', 'href')]
        if tag not in self.VOID: self.open.append(tag)
    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.wrong.append(tag)
    def handle_data(self, data):
        if 'style' not in self.open: self.words.append(data)
    @property
    def text(self): return re.sub(r'\s+', ' ', ' '.join(self.words))

def test_page(e, tmp_path):
    path = write_report(e, tmp_path/'report', n=6)
    page = Page(path)
    assert path == tmp_path/'report'/'index.html' and is_report(path.parent)
    assert not page.wrong and not page.open, "tags are not balanced"
    assert page.tags.count('article') == 6 and page.tags.count('img') == 2*6*7 and page.tags.count('svg') == 6
    for word in ('synthetic images', 'smoke preset: a test of the machinery, not a result', 'preset smoke', 'seed 0', 'null: untrained denoiser', 'baseline: PatchCore', 'How to read this'): assert word in page.text
    for k in ('i_auroc', 'p_auroc', 'pro'): assert f"{e.result[k]['value']:.3f}" in page.text
    text = path.read_text(encoding='utf-8')
    assert all(f'id="{l[1:]}"' in text if l.startswith('#') else (path.parent/l).is_file() for l in page.links), "a link leads nowhere"
    assert json.loads((path.parent/'result.json').read_text(encoding='utf-8')) == json.loads(json.dumps(e.result))

def test_nothing_is_asked_of_a_server(e, tmp_path):
    text = write_report(e, tmp_path/'report', n=3).read_text(encoding='utf-8')
    assert not re.search(r'https?:|//[a-z]|@import|url\(|<script|<link', text.replace('<!doctype', ''))

def test_images_are_those_of_the_evaluation(e, tmp_path):
    from PIL import Image
    from dynad.show import to_uint8
    folder = write_report(e, tmp_path/'report', n=40).parent
    for i in range(len(e.samples)):
        assert (np.asarray(Image.open(folder/'images'/f'{i:05d}_input.png')) == to_uint8(e.images.images[i])).all()

def test_names_are_escaped(e, tmp_path):
    evil = '<img src=x onerror=alert(1)>&"\''
    samples = [dataclasses.replace(s, name=f'test/{evil}/{i}.png', defect=evil if s.label else s.defect) for i, s in enumerate(e.samples)]
    page = Page(write_report(dataclasses.replace(e, samples=samples), tmp_path/'report', title=evil, n=4))
    assert 'x' not in page.links and page.tags.count('img') == 2*4*7 and evil in page.text and not page.wrong

def test_without_null_models_and_masks(e, tmp_path):
    r = {k: v for k, v in e.result.items() if k not in ('null_models', 'baseline')} | {'p_auroc': None, 'pro': {'value': None, 'low': None, 'high': None}, 'images_per_second': None}
    page = Page(write_report(dataclasses.replace(e, result=r, has_mask=torch.zeros_like(e.has_mask)), tmp_path/'report', n=3))
    assert 'no mask shipped' in page.text and 'null:' not in page.text and 'not defined for these images' in page.text

def test_a_method_without_reconstruction_and_t_hat(e, tmp_path):
    "Columns, charts and sentences of what a method does not have are left out."
    r = copy.deepcopy(e.result)
    for k in ('reconstruction', 'dic'): r['settings'].pop(k)
    d = report_data(e)
    d = dataclasses.replace(d, result=r, reconstructions=None, t_hat=None, distances=None, maps=lambda rows: {'A_map': report_data(e).maps(rows)['A_map']})
    page = Page(write_report(d, tmp_path/'report', n=3))
    assert page.tags.count('svg') == 4 and page.tags.count('img') == 2*3*4 and not page.wrong and not page.open
    assert not re.search('T̂ [0-9]|DIC|reconstruct', page.text.split('How it was made')[0].split('Images')[1]) and 'How far an image' not in page.text

def test_what_leaks_is_said(e, tmp_path):
    r = copy.deepcopy(e.result)
    r['settings']['fusion']['calibration'] = 'test'
    r['settings']['reconstruction'] |= {'severity': 'static', 'omega': 1.}
    r['data']['synthetic'] = False
    text = Page(write_report(dataclasses.replace(e, result=r), tmp_path/'report', n=0)).text
    assert 'calibrated on the test images on which it is evaluated' in text and 'the same for all images' in text and 'a share ω = 1 of the noise' in text
    assert 'synthetic images' not in text and 'No image was asked for' in text

# where it is written

def test_an_older_report_is_replaced(e, tmp_path):
    write_report(e, tmp_path/'report', n=6)
    path = write_report(e, tmp_path/'report', n=1)
    assert len(list((path.parent/'images').iterdir())) == 7 and [p.name for p in tmp_path.iterdir()] == ['report']

def test_an_empty_folder_is_used(e, tmp_path):
    (tmp_path/'report').mkdir()
    assert write_report(e, tmp_path/'report', n=0).exists()

@pytest.mark.parametrize('where', ['notes.txt', 'report/notes.txt', 'report/images/mine.jpg'])
def test_foreign_files_are_kept(e, tmp_path, where):
    "A folder of the user's, and a report to which the user has added something."
    if where.startswith('report'): write_report(e, tmp_path/'report', n=1)
    target = tmp_path/('report' if where.startswith('report') else '.')
    (tmp_path/where).write_text('mine')
    with pytest.raises(ReportError, match='is not empty and holds something else than a report') as err: write_report(e, target)
    assert str(target) in str(err.value) and 'choose a new folder' in str(err.value) and (tmp_path/where).read_text() == 'mine'

def test_a_file_is_no_folder(e, tmp_path):
    (tmp_path/'page').write_text('mine')
    with pytest.raises(PathError, match='is a file; name a folder'): write_report(e, tmp_path/'page')

def test_a_failure_leaves_the_old_report(e, tmp_path):
    "Whole or not at all: nothing half-written, nothing lost."
    path = write_report(e, tmp_path/'report', n=1)
    before = path.read_bytes()
    def fail(*args, **kwargs): raise RuntimeError('cut off')
    broken = dataclasses.replace(report_data(e), reconstructions=fail)
    with pytest.raises(RuntimeError, match='cut off'): write_report(broken, tmp_path/'report', n=2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['report']
