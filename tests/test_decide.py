"What a person decides about a run: the threshold, marks, and learning from them; and the verdict in words."
import json, os, shutil, signal, time, warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dynad import learning, marks, threshold
from dynad.cli import app
from dynad.config import ConfigError, make_config
from dynad.detector import DynAD
from dynad.evaluate import evaluate
from dynad.explorer import Explorer
from dynad.method import NotFittedError, open_run
from dynad.patchcore import PatchCore
from dynad.report import write_report
from dynad.store import StoreError
from dynad.threshold import Chosen, ThresholdError
from dynad.verdict import SEVERITIES, verdict

@pytest.fixture
def run(smoke, tmp_path):
    "A copy of the fitted run that may be written into."
    shutil.copytree(smoke[1], tmp_path/'run')
    return tmp_path/'run'

@pytest.fixture(scope='module')
def patchcore(boards, tmp_path_factory):
    run = tmp_path_factory.mktemp('patchcore')/'run'
    PatchCore(make_config('smoke', {'options': {'max_patches': 1000}})).fit(boards, run, progress=False)
    return run

def opened(run, overrides=None):
    "And what was said."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        method = open_run(run, overrides, progress=False)
    return method, [str(w.message) for w in said if 'threshold' in str(w.message) or 'taken' in str(w.message)]

# the threshold

def test_a_choice_decides_everywhere(run, boards, tmp_path):
    method = open_run(run, progress=False)
    learned, files = method.decision.image_threshold, [s.image for s in boards.test]
    scores = method.predict(files).score
    at = float(scores.sort().values[len(files)//2])
    method.keep_choice(threshold.choose_now(at=at, why='because'))
    again, said = opened(run)
    assert again.decision.image_threshold == at and said == [] and again.learned_decision.image_threshold == learned
    p = again.predict(files)
    assert torch.equal(p.anomalous, threshold.above(p.score, at)) and 0 < int(p.anomalous.sum()) < len(files)
    e = evaluate(again, boards, n_boot=0, null_models=False)
    d = e.result['decision']
    assert d['image_threshold'] == at and d['learned_threshold'] == learned and d['chosen']['why'] == 'because' and 'because' in d['rule'] and 'because' in e.result['protocol']['threshold']
    assert d['true_positives'] + d['false_negatives'] == sum(s.label for s in boards.test)
    saved = DynAD.from_pretrained(again.save_pretrained(tmp_path/'saved'))
    assert saved.decision.image_threshold == at and saved.learned_decision.image_threshold == pytest.approx(learned)
    page = write_report(e, tmp_path/'report').read_text()
    assert 'What this run is good for' in page and 'because' in page and 'an oracle. New images cost more' in page
    again.keep_choice(None)
    assert opened(run)[0].decision.image_threshold == learned and not (run/threshold.FILE).exists()
    again.save_pretrained(tmp_path/'saved')
    assert DynAD.from_pretrained(tmp_path/'saved').decision.chosen is None # none left over from before

def test_a_value_belongs_to_its_scores_and_a_rate_to_all(run):
    method = open_run(run, progress=False)
    method.keep_choice(Chosen(at=123.))
    other, said = opened(run, {'fusion.lam': .9})
    assert other.decision.chosen is None and len(said) == 1 and '123' in said[0] and 'other settings' in said[0]
    assert other.with_settings({'fusion.lam': method.config.fusion.lam}).decision.image_threshold == 123.
    method.keep_choice(Chosen(false_alarms=.4))
    other, said = opened(run, {'fusion.lam': .9})
    n = len(other.decision.normal_scores)
    k = threshold.outcome(other.decision.image_threshold, other.decision.normal_scores, [])
    assert said == [] and other.decision.guarantee.wanted == .4 and k.false_alarms <= .4*(n + 1)

def test_a_choice_that_cannot_be_used_is_named(run, smoke):
    (run/threshold.FILE).write_text('{"at": "high"}')
    with pytest.raises(StoreError, match='decision.json: holds no chosen threshold.*--reset'): open_run(run, progress=False)
    (run/threshold.FILE).write_text('{"at": 1')
    with pytest.raises(StoreError, match='decision.json'): open_run(run, progress=False)
    with pytest.raises(NotFittedError, match='kept nowhere'): DynAD(make_config('smoke')).keep_choice(Chosen(at=1.))
    (run/threshold.FILE).unlink()
    method = open_run(run, {'fusion.calibration': 'test'}, progress=False)
    with pytest.raises(ConfigError, match='choose a share'): method.keep_choice(Chosen(at=1.))

def test_every_threshold_is_among_the_outcomes():
    rng = np.random.default_rng(3)
    normal, bad = rng.integers(0, 6, 30)/3, rng.integers(2, 9, 20)/3 # many ties
    every = threshold.outcomes(normal, bad)
    assert {(o.missed, o.false_alarms) for o in every} == {(threshold.outcome(t, normal, bad).missed, threshold.outcome(t, normal, bad).false_alarms) for t in np.linspace(-1, 4, 400)}
    for c in (.1, 1, 7): assert threshold.least_cost(normal, bad, c).cost(c) == min(o.cost(c) for o in every)
    with pytest.raises(ThresholdError, match='needs both kinds'): threshold.least_cost(normal, [], 1)
    assert threshold.reachable(normal, bad, 0).false_alarms == 0

# marks

def test_the_log_survives_a_kill(tmp_path):
    "Whole lines only, whatever the moment; and the next process goes on."
    if not hasattr(os, 'fork'): pytest.skip('no fork on this system')
    line = json.dumps(dict(what='normal', file='x'*3000, sha256='', pixels='', kept=''))
    for wait in (.02, .05, .11):
        child = os.fork()
        if not child:
            k = 0
            while True: k += 1; marks.append_line(tmp_path/marks.FILE, line.replace('"pixels": ""', f'"pixels": "{child}-{k}"'))
        time.sleep(wait)
        os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    marks.append_line(tmp_path/marks.FILE, line.replace('"pixels": ""', '"pixels": "last"'))
    with warnings.catch_warnings(): warnings.simplefilter('error'); found = marks.read_marks(tmp_path)
    assert len(found) > 3 and found[-1].pixels == 'last'

def test_marked_images_are_no_test_images(run, boards, tmp_path):
    method, c = open_run(run, progress=False), make_config('smoke').data
    good = [s for s in boards.test if not s.label][:2]
    copy = tmp_path/'other name.png' # the same image somewhere else
    shutil.copy(good[0].image, copy)
    marks.mark_images(run, [copy], 'normal', c.image_size)
    e = evaluate(open_run(run, progress=False), boards, n_boot=0, null_models=False)
    assert e.result['protocol']['left_out'] == [good[0].name] and len(e.samples) == len(boards.test) - 1
    assert any('do not count' in v['claim'] for v in e.result['verdict'])
    more = marks.with_marks(boards, run, c.image_size)
    assert len(more.train) == len(boards.train) + 1 and good[0].name not in [s.name for s in more.test] and more.fingerprint != boards.fingerprint
    (run/marks.read_marks(run)[0].kept).unlink()
    with pytest.raises(StoreError, match='is gone; put it back'): learning.relearn(method, boards, defects=0)

def test_flips_come_within_seconds_and_the_recall_after_them(run, boards, monkeypatch):
    "Of a run that was evaluated: from three marks to the flipped verdicts, without a defect being looked at. 1.9 s on two cores at load 8."
    method = open_run(run, progress=False)
    images = method.test_images(boards.test, boards)
    learning.called(method, images)                                    # stored, as after `dynad evaluate` or in a view
    good = [s.image for s in boards.test if not s.label][:3]
    marks.mark_images(run, good, 'normal', method.config.data.image_size)
    monkeypatch.setattr(learning, 'synthetic_set', None)               # nothing drawn is needed for the flips
    cpu, (after, found) = time.process_time(), learning.relearn(method, boards, images=images, whole=False)
    cpu = time.process_time() - cpu
    assert found.recall is None and found.shown == 0 and cpu < 4       # its own processor time: other work does not count
    monkeypatch.undo()
    assert learning.with_recall(found, method, after, 9, alive=lambda: False) is None
    assert list(learning.follow(found, method, after, boards, images, 9, alive=lambda: False)) == []
    rest, other, recall, whole = learning.follow(found, method, after, boards, images, 9)
    assert rest.shown == len(boards.test) and rest.recall is None and other.other.recall is None and recall.other.recall is None
    again = learning.relearn(method, boards, defects=9)[1]
    assert whole.defects == 9 and whole.recall == again.recall and whole.flips == again.flips and 'recall on 9 ' in learning.recall_line(whole)
    assert 'the other way, ' in learning.learned_lines(whole)[-1] and 'recall on synthetic defects' in learning.other_line(whole.other)

@pytest.mark.parametrize('which', ['dynad', 'patchcore'])
def test_marks_join_the_bank_or_the_threshold_too(which, run, patchcore, boards, tmp_path):
    "Proposed is the one that misses less, of those after which the fewest marked images are called anomalous; the promise of the bank alone is that of before."
    if which == 'patchcore': run = tmp_path/'patches'; shutil.copytree(patchcore, run)
    method = open_run(run, progress=False)
    worst = [s.image for s in boards.test if s.label][:3] # far out: as false alarms that nothing explains
    marks.mark_images(run, worst, 'normal', method.config.data.image_size)
    ways = {into: learning.relearn(method, boards, defects=9, into=into) for into in learning.INTO}
    (bank, a), (both, b) = ways['bank'], ways['both']
    assert bank.decision.marked == 0 and len(bank.decision.normal_scores) == len(method.decision.normal_scores) and both.decision.marked == 3
    assert b.threshold[1] >= a.threshold[1] and b.recall[1] <= a.recall[1] and b.found[1] <= a.found[1] and b.still == 0
    after, chosen = learning.relearn(method, boards)
    assert chosen.into == ('both' if b.still < a.still else 'bank')
    for into, (m, _) in ways.items():
        m.keep_normals(learning.normal_marks(run))
        again = open_run(run, progress=False)
        assert again.into == into and again.decision.image_threshold == pytest.approx(m.decision.image_threshold)
    (run/'learned.json').write_text((run/'learned.json').read_text().replace('both', 'all'))
    with pytest.raises(StoreError, match="into = 'all'; allowed: bank, both"): open_run(run, progress=False)
    with pytest.raises(learning.MarkError, match="into = 'x'"): learning.relearn(method, boards, into='x')

def test_the_mark_bar_shows_flips_before_the_recall(run, boards):
    "And who goes back meanwhile is not told what it would have cost."
    import threading
    from dynad.marking import MarkBar, Target
    method, go, seen = open_run(run, progress=False), threading.Event(), []
    good = next(s.image for s in boards.test if not s.label)
    def recall(after, found, alive):
        go.wait(60)
        yield from learning.follow(found, method, after, boards, method.test_images(boards.test, boards), 4, alive=alive)
    bar = MarkBar(lambda: Target(good, run, method.config.data.image_size), lambda: learning.relearn(method, boards, whole=False), seen.append, recall)
    try:
        for undo in (True, False):
            go.clear()
            bar.normal.click(); bar.try_it.click()
            end = time.monotonic() + 120
            while 'being measured' not in bar.changes.value and time.monotonic() < end: time.sleep(.01)
            assert 'still called anomalous' in bar.changes.value and 'verdicts flip' not in bar.changes.value and not bar.undo.disabled and bar.way.layout.display == 'none'
            if undo: bar.undo.click()
            go.set()
            assert bar.thread.wait(60)
            assert bar.message.value == '' and ('as before' in bar.changes.value if undo else 'recall on 4 synthetic' in bar.changes.value)
        assert len(seen) == 3 and seen[1] is None and seen[2].joined == (0,)
        assert 'verdicts flip' in bar.changes.value and 'being measured' not in bar.changes.value and bar.way.layout.display is None and bar.way.value == bar.after.into
        other = 'both' if bar.after.into == 'bank' else 'bank'
        bar.found.other.method.learn_decision = lambda: 1/0            # it is known by now: no model is called in the callback
        bar.way.value = other                                          # the other way: shown, and what would be kept
        assert seen[3].into == other and bar.after is seen[3] is bar.found.other.method and bar.after.decision and not bar.message.value and bar.changes.value.splitlines() and ('the threshold' in bar.changes.value.split('<br>')[0]) == (other == 'both')
        bar.learn, bar.try_it.disabled = lambda: 1/0, False
        bar.try_it.click(); bar.thread.wait(60)
        assert 'division by zero' in bar.message.value and not bar.try_it.disabled and 'learning' not in bar.changes.value
    finally: bar.thread.close()

@pytest.mark.parametrize('which', ['dynad', 'patchcore'])
def test_learning_from_a_false_alarm(which, run, patchcore, boards, tmp_path):
    if which == 'patchcore': run = tmp_path/'patches'; shutil.copytree(patchcore, run)
    method = open_run(run, progress=False)
    good = [s for s in boards.test if not s.label]
    s = method.predict([x.image for x in good]).score
    method.keep_choice(Chosen(at=float(s.sort(descending=True).values[2])*.999)) # three false alarms
    worst = [good[i].image for i in s.topk(3).indices]
    assert method.predict(worst).anomalous.all()
    method.keep_choice(None)
    marks.mark_images(run, worst, 'normal', method.config.data.image_size, why='dust')
    after, found = learning.relearn(method, boards, defects=7)
    assert found.normals == 3 and found.seconds < 60 and 0 <= found.recall[1] <= 1 and set(f.after for f in found.flips) <= {True, False}
    assert found.still == 0 and not after.predict(worst).anomalous.any() # whatever their scores do
    if which == 'patchcore': assert (after.predict(worst).score < method.predict(worst).score).all()
    assert method.joined == () and len(after.joined_into('both').decision.normal_scores) == len(method.decision.normal_scores) + 3
    after.keep_normals(learning.normal_marks(run))
    again = open_run(run, progress=False)
    assert again.decision.image_threshold == pytest.approx(after.decision.image_threshold) and torch.allclose(again.predict(worst).score, after.predict(worst).score)
    assert torch.allclose(torch.cat([p.score for _, p in again.predict_set(again.normals)]).float(), again.predict(worst).score.float(), atol=1e-4) # stored apart from those of before
    if which == 'dynad':
        moved = again.with_settings({'fusion.lam': .9})
        assert moved.joined == again.joined and len(moved.decision.normal_scores) == len(again.decision.normal_scores)
        assert DynAD.from_pretrained(again.save_pretrained(tmp_path/'saved')).predict(worst).score == pytest.approx(again.predict(worst).score, abs=1e-4)
    marks.mark_images(run, worst[:1], 'withdrawn', method.config.data.image_size)
    back, said = opened(run)
    assert back.joined == () and any('taken back' in t for t in said) and back.decision == method.decision

def test_commands(run, boards):
    def dynad(*args, code=0):
        r = CliRunner().invoke(app, list(map(str, args)))
        assert r.exit_code == code, r.output
        return r.output
    root = boards.root
    assert 'threshold for images' in dynad('threshold', run)
    assert 'chosen by hand: 99' in dynad('threshold', run, '--at', 99, '--why', 'a try') and json.loads((run/threshold.FILE).read_text())['why'] == 'a try'
    assert 'at most 1 normal image in' in dynad('threshold', run, '--false-alarms', '1/5')
    dynad('threshold', run, '--reset')
    assert not (run/threshold.FILE).exists()
    for wrong in (['--at', 'nan'], ['--false-alarms', '2'], ['--at', 1, '--reset']): dynad('threshold', run, *wrong, code=2)
    good = next(s.image for s in boards.test if not s.label)
    assert 'learn from them' in dynad('mark', run, good, '--normal')
    assert 'without training' in dynad('learn', run, '--data', root, '--defects', 0, '--dry') and open_run(run, progress=False).joined == ()
    said = dynad('learn', run, '--data', root, '--defects', 0)
    assert 'kept' in said and 'the other way, ' in said and '; take it with --into ' in said and open_run(run, progress=False).joined == (0,)
    assert 'allowed: bank, both' in dynad('learn', run, '--data', root, '--into', 'x', code=2)
    dynad('learn', run, '--data', root, '--defects', 0, '--into', 'both')
    assert open_run(run, progress=False).into == 'both'
    dynad('learn', run, '--data', root, '--forget')
    assert open_run(run, progress=False).joined == ()
    assert 'nothing to take back' in dynad('mark', run, boards.test[-1].image, '--withdraw', code=2)

# in words

def test_a_verdict_of_a_real_result(smoke, boards):
    e = evaluate(smoke[0], boards, n_boot=50)
    found = e.result['verdict']
    assert found and all(v['evidence'] and v['severity'] in SEVERITIES for v in found) and found == verdict(json.loads(json.dumps(e.result)))
    assert any('test of the machinery' in v['claim'] for v in found) and any('threshold rests on' in v['claim'] for v in found)
    d = e.result['differences']['null_models']['t_hat_0']['i_auroc']
    assert d['value'] == pytest.approx(e.result['i_auroc']['value'] - e.result['null_models']['t_hat_0']['i_auroc']['value']) and d['low'] <= d['high']
    assert all(v > 0 for v in e.result['normal_reconstruction'].values())

# the bench in the Explorer

def test_the_bench_decides_in_the_explorer(run):
    x = Explorer(run, prefetch=False)
    try:
        x.wait(300)
        b, labels = x.bench, x.model.labels
        assert b.ui.layout.display is None and b.bench.now.anomalous == int(labels.sum())
        before = x.facts.value
        b.cost.value = 1000
        assert b.bench.now.missed == 0 and x.facts.value != before and 'being tried below' in x.facts.value
        x.wait(60)
        assert not (x.model.wrong & labels).any() # no defect is missed, and the thumbnails know
        kept = b.bench.threshold
        b.why.value = 'none may be missed'; b.save.click()
        assert b.message.value == '' and open_run(run, progress=False).decision.image_threshold == kept and 'none may be missed' in b.kept.value
        x.lam.value = .5 if x.lam.value != .5 else .4
        x.wait(120)
        b.value.value = 1.
        b.save.click()
        assert 'put the sliders back' in b.message.value and open_run(run, progress=False).decision.image_threshold == kept
        b.set_rate.click(); b.save.click()
        assert b.message.value == '' and open_run(run, progress=False).decision.guarantee is not None
        b.reset.click()
        assert open_run(run, progress=False).decision.chosen is None
    finally: x.close()

def test_the_verdict_in_the_explorer(run):
    "Made when somebody looks; claims, severity and evidence are those of `evaluate`; again after another threshold."
    x = Explorer(run, prefetch=False)
    try:
        x.wait(300)
        assert x.verdict.found is None and x.verdict.text.value == ''
        x.tabs.selected_index = next(k for k, w in enumerate(x.tabs.children) if w is x.verdict.ui)
        x.wait(300)
        e = evaluate(open_run(run, progress=False), x.session.dataset, n_boot=200, null_models=False)
        assert x.verdict.message.value == '' and x.verdict.found == e.result['verdict'] and len(x.verdict.found) > 2
        for c in x.verdict.found: assert c['claim'].replace("'", '&#x27;') in x.verdict.text.value and f'class="dynad-is-{c["severity"]}"' in x.verdict.text.value
        x.session.model.keep_choice(Chosen(at=1e6))                      # nothing is found any more
        x.verdict.again.click(); x.wait(300)
        assert any('misses most defects' in c['claim'] for c in x.verdict.found)
    finally: x.close()

def test_marks_in_the_explorer(run):
    x = Explorer(run, prefetch=False)
    try:
        x.wait(300)
        x.image.value = next(k for k, y in enumerate(x.model.labels) if not y)
        x.marking.normal.click()
        assert '<b>normal</b>' in x.marking.said.value
        x.marking.try_it.click()
        assert not x.marking.try_it.disabled or 'learning' in x.marking.changes.value
        x.wait(300)
        said = x.marking.changes.value
        assert x.marking.message.value == '' and 'without training' in said and 'recall on 56 synthetic defects' in said and 'being measured' not in said
        assert x.session.model.joined == (0,) and x.message.value == ''
        x.marking.keep.click()
        assert open_run(run, progress=False).joined == (0,) and '<b>kept</b>' in x.marking.changes.value and x.marking.keep.disabled
    finally: x.close()
