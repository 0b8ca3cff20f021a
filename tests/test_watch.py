"Files that grow, vanish, return and cannot be read; restarts; real kills."
import copy, ctypes, json, os, re, shutil, subprocess, sys, tracemalloc
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dynad.arrivals import SLOWEST, Arrivals, Failures, Journal, Known, Look
from dynad.output import open_for_prediction, write_predictions
from dynad.paths import PathError
from dynad.regions import ROI
from dynad.store import StoreError, WriteError
from dynad.threshold import choose_now
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

def band(first, last=None): # columns of 256 that count
    return ROI((np.arange(256)[None] >= first).repeat(256, 0) & (np.arange(256)[None] <= (first if last is None else last)))

@contextmanager
def closed(path):
    "The file cannot be opened, though nothing of its look has changed; nor by root, who is denied his privilege here."
    look = Look.at(path)
    mode, root = path.stat().st_mode, os.geteuid() == 0
    head, caps = (ctypes.c_uint32*2)(0x20080522, 0), (ctypes.c_uint32*6)() # of the kernel's capget
    libc = ctypes.CDLL(None)
    def privileged(on):
        if not root: return
        libc.capget(head, caps)
        caps[0] = caps[0] | 6 if on else caps[0] & ~6 # reading what others have closed
        assert libc.capset(head, caps) == 0
    path.chmod(0); privileged(False)
    try: yield
    finally: privileged(True); path.chmod(mode); assert Look.at(path) == look

can_close = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs permissions of a file, and the capabilities of Linux')

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
    monkeypatch.setattr('dynad.watch.time.sleep', lambda s: None)
    monkeypatch.setattr(w.arrivals, 'poll', lambda p=w.arrivals.poll: ((p() and {}), [place[0]/'x.png']))
    assert w.run(once=True)['left'] == ['x.png'] and 'still being written: x.png' in capsys.readouterr().out
    w.close()

@can_close
def test_a_file_that_cannot_be_opened_is_tried_until_it_can(method, images, place, capsys):
    "However long that takes, across restarts, and said once; a file whose bytes are there and are no image is a dead letter all the same."
    for k in (0, 1): shutil.copy(images[k], place[0]/f'{k}.png')
    (place[0]/'torn.png').write_bytes(b'no image')
    now = [0.]
    w = Watch(method, *place, settle=0)
    w.closed = Failures(lambda: now[0])
    with closed(place[0]/'1.png'):
        n = [w.step() for now[0] in range(0, 600, 10)]
        assert n[:TRIES] == [1, 0, 1] and sum(n) == 2 and w.left == ['1.png']         # judged: 0, dead: torn
        assert capsys.readouterr().out.count('1.png: cannot be read (Permission denied)') == 1
        w.run(stop=lambda: True)
        assert json.loads((place[1]/'state.json').read_text())['unreadable'] == ['1.png'] and '1.png: cannot be read' in (place[1]/'index.html').read_text()
        w.close()
        assert watched(method, place, TRIES + 1)[1] == [0]*(TRIES + 1)
    w, n = watched(method, place)
    assert n == [1] and not w.left and sorted(r['name'] for r in rows(place[1])) == ['0.png', '1.png'] and [r['name'] for r in w.letters] == ['torn.png']
    assert watched(method, place, TRIES)[1] == [0]*TRIES

@can_close
def test_the_same_watch_judges_it_within_a_minute(method, images, place):
    shutil.copy(images[0], place[0]/'a.png')
    now = [0.]
    w = Watch(method, *place, settle=0)
    w.closed = Failures(lambda: now[0])
    with closed(place[0]/'a.png'):
        for now[0] in range(1000): w.step()
    assert w.closed.of['a.png'][1] < 30                                    # it was tried ever more slowly
    now[0] += SLOWEST
    assert w.step() == 1 and not w.closed.waits('a.png', Look.at(place[0]/'a.png'))
    w.close()

def test_the_times_between_two_tries_do_not_end():
    now, f = [0.], Failures(lambda: now[0])
    for _ in range(5000): now[0] += 60; f.add('a', Look(1, 1, 1))          # three and a half days
    assert f.of['a'][2] == now[0] + SLOWEST

@can_close
def test_a_file_that_is_closed_while_it_is_judged_is_no_dead_letter(method, images, place, monkeypatch):
    "A lock of another program comes between the hash and the pixels, at every look."
    shutil.copy(images[0], place[0]/'a.png')
    w = Watch(method, *place, settle=0)
    predict, block = method.predict, []
    def late(files): block.append(closed(files[0])); block[-1].__enter__(); return predict(files)
    refuse = w.refuse
    with monkeypatch.context() as m:
        m.setattr(method, 'predict', late)
        for _ in range(2*TRIES):
            w.closed.of.clear()
            assert w.step() == 0 and w.left == ['a.png']
            while block: block.pop().__exit__(None, None, None)
    assert not [*w.letters] and w.step() == 1 and [r['name'] for r in rows(place[1])] == ['a.png']
    w.close()

@can_close
def test_once_names_what_cannot_be_read(method, images, place, capsys, monkeypatch):
    for k in (0, 1): shutil.copy(images[k], place[0]/f'{k}.png')
    w = Watch(method, *place, settle=.01)
    monkeypatch.setattr('dynad.watch.time.sleep', lambda s: None)
    with closed(place[0]/'1.png'): assert w.run(once=True)['left'] == ['1.png']
    assert 'left, cannot be read: 1.png' in capsys.readouterr().out and [r['name'] for r in rows(place[1])] == ['0.png']
    w.close()

def test_a_dead_letter_of_a_file_that_was_never_read_is_judged(method, images, place):
    "As an earlier version wrote them."
    shutil.copy(images[0], place[0]/'a.png'); watched(method, place)
    shutil.copy(images[1], place[0]/'b.png')
    look = Look.at(place[0]/'b.png')
    Journal(place[1]/'dead_letters'/'reasons.jsonl').add([{'name': 'b.png', 'sha256': None, 'judged': '', 'look': [look.size, look.mtime_ns, look.inode], 'reason': 'cannot be read', 'copy': ''}])
    assert watched(method, place)[1] == [1]

# what cannot be judged

@pytest.mark.parametrize('pictures', ['all', 'none'])
def test_an_image_of_which_nothing_is_left_does_not_end_the_watch(method, images, place, pictures):
    for k in (0, 1, 2): shutil.copy(images[k], place[0]/f'{k}.png')
    Image.open(images[0]).resize((24, 24)).save(place[0]/'1_thumbnail.png')
    narrow = method.with_roi(band(130, 131))                                # of 24 columns it hits none
    w, n = watched(narrow, place, TRIES, pictures=pictures)
    assert n == [3] + [0]*(TRIES - 2) + [1] and sorted(r['name'] for r in rows(place[1])) == ['0.png', '1.png', '2.png']
    [letter] = w.letters
    assert letter['name'] == '1_thumbnail.png' and re.match(r'.*1_thumbnail.png: the white of the region of interest is lost at 24×24', letter['reason'])
    assert watched(narrow, place, TRIES, pictures=pictures)[1] == [0]*TRIES

def test_an_error_of_the_method_about_one_image_is_its_own(method, images, monkeypatch):
    from dynad.config import ConfigError
    def predict(files):
        if images[1] in files: raise ConfigError('the region of interest is lost')
        return real(files)
    real = method.predict
    monkeypatch.setattr(method, 'predict', predict)
    done, failed = predicted(method, images[:3])
    assert list(done) == [images[0], images[2]] and failed == {images[1]: f'{images[1]}: the region of interest is lost'}

def test_a_disk_that_takes_nothing_ends_the_watch_and_blames_no_image(method, images, place):
    shutil.copy(images[-1], place[0]/'a.png')
    w = Watch(method, *place, settle=0, pictures='all')
    shutil.rmtree(place[1]/'pictures'); (place[1]/'pictures').write_text('')
    with pytest.raises(WriteError, match='pictures'): [w.step() for _ in range(TRIES)]
    w.close()
    assert not [*w.letters] and not [*w.scores]
    (place[1]/'pictures').unlink()
    assert watched(method, place, pictures='all')[1] == [1]

@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 1), (2, 3), (17, 1000)])
def test_images_of_odd_sizes_are_judged_or_dead_letters(method, images, place, size):
    Image.open(images[-1]).resize(size).save(place[0]/'a.png')
    for k, m in enumerate((method, method.with_roi(band(0, 100)))):
        assert sum(watched(m, (place[0], place[1]/f'{k}'), TRIES, pictures='all')[1]) == 1

def test_once_does_not_end_before_a_file_that_changed_while_it_was_read(method, images, place, monkeypatch):
    f, predict = place[0]/'a.png', method.predict
    shutil.copy(images[0], f)
    def slow(files):
        monkeypatch.undo()
        p = predict(files)
        with open(f, 'ab') as g: g.write(b' ')
        return p
    monkeypatch.setattr(method, 'predict', slow)
    w = Watch(method, *place, settle=0); w.run(once=True); w.close()
    assert [r['name'] for r in rows(place[1])] == ['a.png'] and not w.left

def test_once_waits_for_a_file_and_not_while_others_are_judged(method, place, monkeypatch):
    "A look that takes minutes is no time for which a file went on changing."
    (place[0]/'torn.png').write_bytes(b'?')
    w = Watch(method, *place, settle=0)
    monkeypatch.setattr('dynad.watch.time.monotonic', iter(range(0, 10**6, 100)).__next__)
    assert w.run(once=True)['dead'] == 1 and not w.left
    w.close()

# one table, one threshold and one region of interest

@pytest.fixture
def other(method, tmp_path):
    "The same run, with a choice of its own."
    (tmp_path/'run').mkdir()
    out = copy.copy(method)
    out.root = tmp_path/'run'
    return out

def test_another_threshold_is_refused_and_the_error_says_what_to_do(method, other, images, place):
    shutil.copy(images[0], place[0]/'a.png'); watched(method, place)
    learned = method.decision.image_threshold
    other.keep_choice(choose_now(at=learned*1.25, why='too many'))
    with pytest.raises(StoreError) as e: Watch(other, *place)
    said = str(e.value)
    assert f'threshold {learned:.6g}, and {learned*1.25:.6g} is in force' in said and 'because: too many' in said
    assert 'choose another --out' in said and said.endswith(f'dynad threshold {other.root} --reset')
    shutil.copy(images[1], place[0]/'b.png')
    assert watched(other, (place[0], place[1].with_name('new')))[1] == [2]        # the one way
    assert {r['threshold'] for r in rows(place[1].with_name('new'))} == {learned*1.25}
    with pytest.raises(StoreError) as e: Watch(method, place[0], place[1].with_name('new'))
    other.keep_choice(choose_now(at=float(re.search(r'--at (\S+)$', str(e.value))[1])))     # as it says
    assert watched(other, (place[0], place[1].with_name('new')))[1] == [0]
    other.keep_choice(None)
    assert watched(other, place)[1] == [1] and {r['threshold'] for r in rows(place[1])} == {learned}  # the other way

def test_a_threshold_that_is_chosen_while_it_runs_is_said_once(method, other, images, place, capsys):
    w = Watch(other, *place, settle=0)
    other.keep_choice(choose_now(at=3.)); other.choice = None
    w.step(); w.step()
    assert capsys.readouterr().out.count(f'another threshold is in force there; this watch stays at {method.decision.image_threshold:.6g}') == 1
    other.keep_choice(None); w.step()
    assert not w.told & {'chosen'}
    w.close()

def test_another_region_of_interest_is_refused(method, images, place):
    shutil.copy(images[0], place[0]/'a.png'); watched(method, place)
    left, right = method.with_roi(band(0, 127)), method.with_roi(band(128, 255))
    with pytest.raises(StoreError, match=rf'in its rows all pixels count, and those of the region {left.roi.key} in those to come \(data.roi\).*another --out'): Watch(left, *place)
    within = place[0], place[1]/'left'
    assert watched(left, within)[1] == [1] and watched(method.with_roi(band(0, 127)), within)[1] == [0]
    for m in (right, method):
        with pytest.raises(StoreError, match='region of interest of before'): Watch(m, *within)
    file = place[1]/'left'/'watch.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'pixel_threshold': 0.}))
    with pytest.raises(StoreError, match='its pixels were judged at the threshold 0.0, and .* another --out'): Watch(left, *within)

def test_what_an_earlier_version_kept_of_a_watch_is_taken_over(method, other, images, place):
    shutil.copy(images[0], place[0]/'a.png'); watched(method, place)
    file = place[1]/'watch.json'
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in kept.items() if k not in ('roi', 'pixel_threshold')}))
    other.keep_choice(choose_now(at=3.))
    with pytest.raises(StoreError, match='3 is in force'): Watch(other, *place)
    assert watched(method, place)[1] == [0] and json.loads(file.read_text()) == kept

def test_a_rounding_of_the_threshold_is_no_other_and_does_not_add_up(method, images, place):
    watched(method, place)
    file = place[1]/'watch.json'
    kept = json.loads(file.read_text())
    kept['threshold'] *= 1 + 1e-7
    file.write_text(json.dumps(kept))
    watched(method, place)
    assert json.loads(file.read_text())['threshold'] == kept['threshold']

def test_a_saved_model_whose_threshold_was_chosen_is_refused_by_that_name(method, images, place, tmp_path):
    method.save_pretrained(tmp_path/'saved')
    saved = open_for_prediction(tmp_path/'saved', {})
    watched(saved, place)
    saved.keep_choice(choose_now(at=3.))
    with pytest.raises(StoreError, match='and 3 is in force'): Watch(saved, *place)

# months

def test_what_a_judged_file_leaves_in_memory(place):
    known = Known()
    known.listed({'a.png'})
    tracemalloc.start()
    try:
        for k in range(50_000): known.note(f'part_{k:08d}.png', 'ab'*32, Look(10**6, 10**18 + k, 10**7 + k))
        size = tracemalloc.get_traced_memory()[0]
    finally: tracemalloc.stop()
    assert size/50_000 < 120 and not known.looks
    assert known('part_00000007.png', Look(1, 1, 1), lambda: 'ab'*32)[0] and not known('part_00000007.png', Look(1, 1, 1), lambda: 'cd'*32)[0]

def test_files_that_leave_the_folder_are_forgotten_but_for_their_hash(method, images, place):
    for k in range(3): shutil.copy(images[k], place[0]/f'{k}.png')
    (place[0]/'torn.png').write_bytes(b'?')
    w = Watch(method, *place, settle=0)
    w.step()
    assert set(w.known.looks) == {'0.png', '1.png', '2.png'} and set(w.tries.of) == {'torn.png'}
    away = place[0].with_name('away'); away.mkdir()
    for f in place[0].iterdir():
        if f.name != '2.png': f.rename(away/f.name)
    w.step(); w.step()
    assert set(w.known.looks) == {'2.png'} and not w.tries.of
    (away/'0.png').rename(place[0]/'0.png')
    assert w.step() == 0 and len(rows(place[1])) == 3                         # moved back, and not judged again
    w.close()
    w, n = watched(method, place)
    assert n == [0] and set(w.known.looks) == {'0.png', '2.png'}              # a restart reads the others' looks and drops them
    (place[0]/'0.png').unlink(); (place[0]/'2.png').unlink()
    assert w.step() == 0 and set(w.known.looks) == {'0.png', '2.png'}         # empty: perhaps a share that is away

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
    kept, other = [], open_for_prediction(smoke[1], {'fusion.lam': .1})
    for _ in range(2): # one that was refused does not hold the folder, although its error is kept, as in a notebook
        with pytest.raises(StoreError, match='another model') as e: Watch(other, line, out)
        kept.append(e)
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
    time.sleep(rng.uniform(0, .4*seconds))
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
