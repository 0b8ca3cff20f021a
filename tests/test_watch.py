"Files that grow, vanish, return and cannot be read; restarts; real kills."
import json, os, shutil, subprocess, sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch

from dynad.arrivals import Arrivals, Journal
from dynad.output import open_for_prediction, write_predictions
from dynad.paths import PathError
from dynad.store import StoreError
from dynad.watch import TRIES, Watch, WatchError, check_watch, predicted

@pytest.fixture(scope='module')
def method(smoke): return open_for_prediction(smoke[1], {'batch': 4})

@pytest.fixture(scope='module')
def images(boards): return [s.image for s in boards.test]

@pytest.fixture
def place(tmp_path):
    (tmp_path/'line').mkdir()
    return tmp_path/'line', tmp_path/'out'

def watched(method, place, n=1, **how):
    w = Watch(method, *place, settle=0, **how)
    try: return w, [w.step() for _ in range(n)]
    finally: w.close()

def rows(out): return [json.loads(line) for line in (out/'scores.jsonl').read_text().splitlines()]

# arrival

def test_a_file_that_grows_is_left_alone(place):
    now = [0.]
    a = Arrivals(place[0], 1., lambda: now[0])
    f = place[0]/'x.png'
    for k in range(5):
        f.write_bytes(b'x'*(k + 1)); now[0] += .9
        assert a.poll() == ({}, [f])
    now[0] += 1
    assert list(a.poll()[0]) == [f]

@pytest.mark.parametrize('temporary', ['x.png.part', '.x.png', 'x.tmp'])
def test_a_rename_of_a_file_at_rest_is_an_arrival(place, temporary):
    now = [0.]
    a = Arrivals(place[0], 1., lambda: now[0])
    (place[0]/temporary).write_bytes(b'whole')
    assert a.poll() == ({}, [])
    now[0] = 2.
    (place[0]/temporary).rename(place[0]/'x.png')
    assert list(a.poll()[0]) == [place[0]/'x.png']

def test_a_file_that_is_replaced_begins_anew(place):
    now = [0.]
    a = Arrivals(place[0], 1., lambda: now[0])
    (place[0]/'x.png').write_bytes(b'old'); a.poll(); now[0] = 2.
    assert list(a.poll()[0])
    (place[0]/'y').write_bytes(b'new'); os.replace(place[0]/'y', place[0]/'x.png')
    assert not a.poll()[0]

# results

def test_rows_are_those_of_predict(method, images, place, tmp_path):
    for k, f in enumerate(images[:5]): shutil.copy(f, place[0]/f'{k}.png')
    w, _ = watched(method, place)
    want = write_predictions(method, [place[0]/f'{k}.png' for k in range(5)], tmp_path/'predicted')
    got = sorted(rows(place[1]), key=lambda r: r['name'])
    assert list(got[0])[:len(want[0])] == list(want[0]) and list(got[0])[len(want[0]):] == ['name', 'sha256', 'judged', 'look']
    for a, b in zip(got, want):
        assert a['image'] == b['image'] and a['anomalous'] == b['anomalous'] and a['score'] == pytest.approx(b['score'], abs=1e-4)
    table = pd.read_csv(place[1]/'scores.csv')
    assert list(table.columns) == [k for k in got[0] if k != 'look'] and sorted(table.name) == [f'{k}.png' for k in range(5)]
    drawn = {p.name for p in (place[1]/'pictures').iterdir()}
    assert drawn == {f"{r['files']}_{k}.png" for r in got if r['anomalous'] for k in ('map', 'overlay', 'reconstruction')} and all(bool(r['files']) == r['anomalous'] for r in got)

def test_a_name_that_is_used_again_is_judged_again_and_a_copy_back_is_not(method, images, place):
    f = place[0]/'same.png'
    shutil.copy(images[0], f); watched(method, place)
    shutil.copy(images[-1], f); watched(method, place)
    shutil.copy(images[0], f); _, n = watched(method, place)
    assert n == [0] and len({r['sha256'] for r in rows(place[1])}) == len(rows(place[1])) == 2

def test_a_restart_repeats_nothing_and_has_the_same_state(method, images, place):
    for k, f in enumerate(images): shutil.copy(f, place[0]/f'{k}.png')
    a, n = watched(method, place, drift_every=5)
    b, again = watched(method, place, drift_every=5)
    assert n == [len(images)] and again == [0] and a.monitor.history == b.monitor.history and a.monitor.warnings == b.monitor.warnings
    assert a.counts == b.counts and list(a.recent) == list(b.recent)

def test_the_table_is_repaired(method, images, place):
    shutil.copy(images[0], place[0]/'a.png'); watched(method, place)
    text = (place[1]/'scores.csv').read_text()
    (place[1]/'scores.csv').write_text('torn')
    watched(method, place)
    assert (place[1]/'scores.csv').read_text() == text

# what cannot be read

def test_dead_letters_and_their_return(method, images, place):
    shutil.copy(images[0], place[0]/'good.png')
    (place[0]/'bad.png').write_bytes(images[1].read_bytes()[:300])
    (place[0]/'notes.txt').write_text('no image')
    w, n = watched(method, place, TRIES + 1)
    assert n == [1] + [0]*(TRIES - 2) + [1, 0]
    [letter] = w.letters
    assert letter['name'] == 'bad.png' and 'bad.png' in letter['reason'] and (place[1]/'dead_letters'/letter['copy']).read_bytes() == (place[0]/'bad.png').read_bytes()
    assert watched(method, place, TRIES)[1] == [0]*TRIES                  # a restart does not try it again
    shutil.copy(images[1], place[0]/'bad.png')
    assert watched(method, place)[1] == [1]                               # the right file under that name is judged
    (place[0]/'worse.png').write_bytes(b'?')
    shutil.rmtree(place[1]/'dead_letters')
    assert watched(method, place, TRIES)[1][-1] == 1 and {p.name for p in place[0].iterdir()} == {'good.png', 'bad.png', 'worse.png', 'notes.txt'}

def test_one_bad_file_does_not_take_its_batch_along(method, images, place):
    (place[0]/'bad.png').write_bytes(b'x')
    done, failed = predicted(method, [*images[:2], place[0]/'bad.png', *images[2:4]])
    assert list(done) == images[:4] and list(failed) == [place[0]/'bad.png']
    whole = method.predict(images[:4]).score
    assert torch.allclose(torch.stack([p.score[i] for p, i in done.values()]), whole, atol=1e-4)

def test_a_file_that_changes_while_it_is_read_is_left_for_later(method, images, place, monkeypatch):
    f = place[0]/'a.png'
    shutil.copy(images[0], f)
    w = Watch(method, *place, settle=0)
    predict = method.predict
    def slow(files):
        p = predict(files)
        with open(f, 'ab') as g: g.write(b' ')
        return p
    monkeypatch.setattr(method, 'predict', slow)
    assert w.step() == 0 and not rows(place[1])
    monkeypatch.undo()
    assert w.step() == 1 and len(rows(place[1])) == 1
    w.close()

def test_a_share_that_is_away_for_a_while(method, images, place, capsys):
    shutil.copy(images[0], place[0]/'a.png')
    w = Watch(method, *place, settle=0)
    w.step(); place[0].rename(place[0].with_name('away'))
    assert [w.step(), w.step()] == [0, 0] and capsys.readouterr().out.count('cannot be reached') == 1
    place[0].with_name('away').rename(place[0])
    shutil.copy(images[1], place[0]/'b.png')
    assert w.step() == 1 and Counter(r['name'] for r in rows(place[1])) == {'a.png': 1, 'b.png': 1}
    w.close()

def test_once_ends_although_a_file_never_rests(method, place, monkeypatch, capsys):
    w = Watch(method, *place, settle=.01)
    monkeypatch.setattr('dynad.watch.time.monotonic', iter(range(0, 10**6, 5)).__next__)
    monkeypatch.setattr(w.arrivals, 'poll', lambda p=w.arrivals.poll: ((p() and {}), [place[0]/'x.png']))
    assert w.run(once=True)['left'] == ['x.png'] and 'still being written: x.png' in capsys.readouterr().out
    w.close()

# refusals

def test_places_that_cannot_be(method, smoke, images, place, tmp_path):
    line, out = place
    with pytest.raises(WatchError, match='no such folder'): check_watch(line/'none', out)
    with pytest.raises(PathError, match='lies in the folder'): check_watch(line, line/'out')
    with pytest.raises(PathError, match='lies in the folder'): check_watch(line, tmp_path)
    out.mkdir(); (out/'mine.txt').write_text('')
    with pytest.raises(PathError, match='holds no watch'): check_watch(line, out)
    (out/'mine.txt').unlink()
    w = Watch(method, line, out)
    with pytest.raises(WatchError, match='another watch'): Watch(method, line, out)
    w.close()
    with pytest.raises(StoreError, match='another model'): Watch(open_for_prediction(smoke[1], {'fusion.lam': .1}), line, out)
    with pytest.raises(WatchError, match='allowed: anomalous'): Watch(method, line, out, pictures='some')

def test_a_journal_that_is_damaged_is_named_by_line(tmp_path):
    (tmp_path/'j').write_text('{"a": 1}\nrubbish\n')
    with pytest.raises(StoreError, match='line 2 is not JSON'): list(Journal(tmp_path/'j'))

def test_page_escapes_names(method, images, place):
    shutil.copy(images[-1], place[0]/'<b>&.png')
    w = Watch(method, *place, settle=0, pictures='all'); w.run(once=True); w.close()
    page = (place[1]/'index.html').read_text(encoding='utf-8')
    assert '<b>&.png' not in page and json.loads((place[1]/'state.json').read_text())['judged'] == 1
    assert (place[1]/'scores.png').read_bytes()[:4] == b'\x89PNG'

# every method, and a saved model

def test_a_method_without_reconstructions(boards, images, place, tmp_path):
    from dynad.config import make_config
    from dynad.padim import PaDiM
    m = PaDiM(make_config('smoke')).fit(boards, tmp_path/'run', progress=False)
    shutil.copy(images[0], place[0]/'a.png')
    assert watched(m, place, pictures='all')[1] == [1] and {p.name.rsplit('_')[-1] for p in (place[1]/'pictures').iterdir()} == {'map.png', 'mask.png', 'overlay.png'}

def test_a_saved_model(method, images, place, tmp_path):
    saved = open_for_prediction(method.save_pretrained(tmp_path/'saved'), {})
    shutil.copy(images[0], place[0]/'a.png')
    assert watched(saved, place)[1] == [1] and watched(saved, place)[1] == [0]

# kills

KILLS = '''
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch; torch.set_num_threads(1)
from dynad.output import open_for_prediction
from dynad.watch import Watch
run, source, folder, out = map(Path, sys.argv[1:])
method, files = open_for_prediction(run, {'batch': 2}), sorted(source.iterdir())
def watch(out):
    if pid := os.fork(): return pid
    w = Watch(method, folder, out, settle=.05); w.run(once=True, poll=.05); os._exit(0)
for f in files[:10]: shutil.copy(f, folder)
start = time.perf_counter()
assert os.waitpid(watch(out.with_name('undisturbed')), 0)[1] == 0
seconds, rng, kills = time.perf_counter() - start, random.Random(0), 0
for f in files[10:]:
    pid = watch(out)
    time.sleep(rng.uniform(0, .8*seconds))
    shutil.copy(f, folder)
    os.kill(pid, signal.SIGKILL)
    kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
assert os.waitpid(watch(out), 0)[1] == 0
print(kills)
'''

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and SIGKILL')
def test_killed_at_random_moments_every_file_is_there_once(smoke, images, tmp_path):
    for k in ('source', 'line'): (tmp_path/k).mkdir()
    for k, f in enumerate(images): shutil.copy(f, tmp_path/'source'/f'{k:02d}.png')
    done = subprocess.run([sys.executable, '-c', KILLS, smoke[1], tmp_path/'source', tmp_path/'line', tmp_path/'out'], capture_output=True, text=True, timeout=300,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 3
    names = sorted(p.name for p in (tmp_path/'line').iterdir())
    got = rows(tmp_path/'out')
    assert sorted(r['name'] for r in got) == names and sorted(pd.read_csv(tmp_path/'out'/'scores.csv').name) == names
    want = {r['name']: r['score'] for r in rows(tmp_path/'undisturbed')}
    assert len(want) == 10 and all(r['score'] == pytest.approx(want[r['name']], abs=1e-4) for r in got if r['name'] in want)
    assert not [p for p in (tmp_path/'out').rglob('*.tmp')]
