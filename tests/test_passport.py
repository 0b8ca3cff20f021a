"Graded defects: how they are made, counted, kept and shown."
import dataclasses, json, shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from dynad import passport as P, trials as T
from dynad.collector import DataError
from dynad.data import open_dataset
from dynad.defects import DEFECTS

EVERYWHERE = np.ones((9, 9), bool)

def picture(seed=0, shape=(90, 140)): return np.random.default_rng(seed).integers(60, 190, (*shape, 3), dtype=np.uint8)

@pytest.mark.parametrize('kind', DEFECTS)
@pytest.mark.parametrize('size', (1, 7, 60))
def test_a_defect_has_its_contrast_and_changes_nothing_else(kind, size):
    x = picture()
    a, b = (T.make_defect(x, EVERYWHERE, T.Trial(0, kind, size, .2, 5, 11)) for _ in range(2))
    assert (a.image == b.image).all() and (a.image[~a.mask] == x[~a.mask]).all()
    if a.ok: assert a.mask.any() and .15 < a.contrast < .26
    rows, columns = np.nonzero(a.mask)
    if len(rows) and size < 10: assert 28 <= rows.mean() < 62 and columns.mean() > 88 # the middle right of the image

def test_what_cannot_be_had_does_not_count():
    white = np.full((80, 80, 3), 128, np.uint8)
    assert not T.make_defect(white, EVERYWHERE, T.Trial(0, 'missing', 10, .2, 4, 0)).ok # nothing is there to be missing
    corner = np.zeros((9, 9), bool); corner[:3, :3] = True
    assert not T.make_defect(white, corner, T.Trial(0, 'blob', 10, .2, 8, 0)).ok        # background

def test_area_is_the_wanted_one():
    for kind in ('blob', 'scratch'):
        areas = [T.make_defect(picture(1, (256, 256)), EVERYWHERE, T.Trial(0, kind, 20, .3, 4, s)).mask.sum()**.5 for s in range(12)]
        assert 14 < np.median(areas) < 27, (kind, areas)

def test_the_design_is_balanced():
    d = T.Design((4., 8.), (.1, .3), trials=63)
    t = [t for t in d.all_trials(6) if t.kind]
    count = lambda f: np.unique([f(x) for x in t], return_counts=True)[1]
    assert (count(lambda x: x.place) == 28).all() and (count(lambda x: x.kind) == 36).all() and (count(lambda x: x.image) == 42).all()
    assert len({(x.place, x.kind) for x in t}) == 63

def made(found, ok=None, alarms=()):
    "A passport of made-up results."
    d = T.Design((2., 4., 8.), (.2,), ('blob',), trials=len(found)//3)
    trials = d.all_trials(3)
    score, it = [], iter(found)
    score = [float(t.image in alarms) if not t.kind else float(found[t.seed]) for t in trials]
    results = dict(score=np.array(score), located=np.zeros(len(trials), bool), contrast=np.full(len(trials), .2), ok=np.ones(len(trials), bool) if ok is None else ok)
    return P.Passport(d, trials, results, .5, dict(method='m', data='d', rule='r', held_out=3, synthetic=False, preset='paper', chosen=False, image_size=8))

def test_counting():
    p = made([0]*9 + [1]*8 + [0] + [1]*9)
    assert [s.found for s in p.curve()] == [0, 8, 9] and p.smallest() == 8 and p.smallest(.5) == 4
    assert made([0]*27).smallest() is None and made([1]*27).smallest() == 2
    json.dumps(p.to_json(), allow_nan=False)
    assert np.allclose(P.rising([P.Share(3, 4), P.Share(1, 4), P.Share(4, 4)]), [.5, .5, 1])

def test_a_false_alarm_does_not_count_as_found():
    p = made([1]*27, alarms=(1,))
    assert p.left_out == {1} and p.share().n < 27 and all(p.trials[k].image != 1 for k in np.flatnonzero(p.counts))
    assert '1 of 3 held-out images are at or above the threshold' in ' '.join(p.cautions())
    assert dataclasses.replace(p, threshold=1.).left_out == {1}                              # the threshold lies at it

def test_share_interval():
    from scipy.stats import binomtest
    for k, n in ((0, 5), (3, 9), (9, 9)):
        want = binomtest(k, n).proportion_ci(.95, 'exact')
        assert np.allclose(P.Share(k, n).interval, (want.low, want.high))

SMALL = T.Design((8., 40.), (.15, .5), trials=4)

@pytest.fixture(scope='module')
def run(smoke, tmp_path_factory):
    from dynad.method import open_run
    place = tmp_path_factory.mktemp('passport')/'run'
    shutil.copytree(smoke[1], place)
    return open_run(place, progress=False)

def test_made_once_and_kept(run, boards, monkeypatch):
    first = P.passport(run, boards, SMALL, progress=False)
    assert len(first.results['score']) == len(run.held_out_set) + 16
    clean = [s for t, s in zip(first.trials, first.results['score']) if not t.kind]
    held = run.held_out_prediction().score
    assert np.allclose(clean, held.double().numpy(), atol=2e-2, rtol=2e-2)  # the same images, by the same way
    monkeypatch.setattr(type(run), 'predict_batch', lambda *a: pytest.fail('computed again'))
    assert P.passport(run, boards, SMALL, 1.5, progress=False).to_json()['grid'] == first.to_json()['grid']

def test_other_images_are_refused(run, tmp_path):
    from dynad.synthetic import write_synthetic
    other = open_dataset(write_synthetic(tmp_path/'o', 'board', n_train=24, n_good=2, n_defect=2, size=64, seed=5))
    with pytest.raises(DataError, match='not the images that the run was fitted on'): P.passport(run, other, SMALL)

def test_wrong_designs_are_refused():
    for bad in (dict(sizes=()), dict(sizes=(-1.,)), dict(sizes=(1.,), contrasts=(2.,)), dict(sizes=(1.,), kinds=('hole',)), dict(sizes=(1.,), trials=0)):
        with pytest.raises(T.PassportError): T.Design(**bad)

def test_at_the_command_line_and_in_the_report(run, boards, tmp_path):
    from dynad.cli import app
    root = run.training_set.store.root
    call = lambda *w: CliRunner().invoke(app, list(map(str, w)))
    words = ('passport', root, '--data', boards.root, '--sizes', '8,40', '--contrasts', '.15,.5', '--trials', 4, '--mm-per-pixel', .02)
    said = call(*words, '--html', tmp_path/'page', '--json', tmp_path/'p.json')
    assert said.exit_code == 0 and 'mm)' in said.output, said.output
    assert json.loads((tmp_path/'p.json').read_text())['mm_per_pixel'] == .02 and (tmp_path/'page/index.html').is_file()
    said = call('evaluate', root, '--data', boards.root, '--json', tmp_path/'r.json', '--report', tmp_path/'report', '--baselines', '', '--no-null-models', '--n-boot', 0)
    assert said.exit_code == 0 and 'What size of defect is found' in (tmp_path/'report/index.html').read_text(), said.output
    for wrong, text in ((('--sizes', 'a'), 'numbers with commas'), (('--contrasts', '3'), 'at most 1'), (('--mm-per-pixel', 'nan'), 'above 0')):
        refused = call('passport', root, '--data', boards.root, *wrong)
        assert refused.exit_code == 2 and text in refused.output
