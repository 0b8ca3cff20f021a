"What a killed process was writing is gone after the next one has written into the same place; what somebody else writes now is left."
import json, os, shutil, tarfile, time
from pathlib import Path

import pytest

from dynad import files
from dynad.archives import unpack
from dynad.book import write_book
from dynad.exports import MARKER, export_to
from dynad.files import AT_REST, atomic_write, left_behind, replacing, temporary_folder
from dynad.marks import mark_images
from dynad.output import open_for_prediction, write_predictions
from dynad.report import write_report
from dynad.synthetic import write_synthetic
from dynad.task import Task, run_here
from dynad.watch import Watch, WatchError

def left(place, name, age=0., folder=False):
    "What a kill leaves of a file or folder of that name."
    p = Path(place)/f'.{name}.k1ll3d_8.tmp'
    p.parent.mkdir(parents=True, exist_ok=True)
    if folder: (p/'below').mkdir(parents=True); (p/'below'/'half.png').write_bytes(b'half')
    else: p.write_bytes(b'half')
    when = time.time() - age
    for q in (*p.rglob('*'), p): os.utime(q, (when, when))
    return p

OLD = 2*AT_REST

# files

def test_the_next_write_of_a_file_removes_what_is_at_rest_and_nothing_else(tmp_path):
    gone = left(tmp_path, 'a.json', OLD)
    kept = [left(tmp_path, 'b.json', OLD), left(tmp_path, 'a.json.x', OLD), tmp_path/'.a.json.mine.tmp', tmp_path/'a.json.k1ll3d_8.tmp']
    for p in kept[2:]: p.write_text('mine'); os.utime(p, (0, 0))
    atomic_write(tmp_path/'a.json', '{}')
    assert not gone.exists() and all(p.exists() for p in kept)

def test_what_may_be_written_now_is_left(tmp_path):
    young = left(tmp_path, 'a.json', AT_REST/2)
    atomic_write(tmp_path/'a.json', '{}')
    assert young.exists()
    with replacing(tmp_path/'b.json') as tmp:
        tmp.write_text('slow'); left_behind.cache_clear()
        atomic_write(tmp_path/'b.json', 'quick')
        assert tmp.exists()

@pytest.mark.parametrize('name', ['x'*200 + '.json', 'ᾱ ü.json', '.hidden'])
def test_names_of_all_kinds(name, tmp_path):
    with replacing(tmp_path/name) as tmp: rest = tmp.name
    (tmp_path/rest).write_bytes(b'half'); os.utime(tmp_path/rest, (0, 0))
    left_behind.cache_clear()
    atomic_write(tmp_path/name, b'whole')
    assert [p.name for p in tmp_path.iterdir()] == [name]

def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    looked = []
    iterdir = Path.iterdir
    monkeypatch.setattr(files.Path, 'iterdir', lambda p: looked.append(p) or iterdir(p))
    for k in range(5): atomic_write(tmp_path/f'{k}.json', '{}')
    assert looked == [tmp_path]

# folders

def test_a_folder_at_rest_goes_and_one_in_which_a_file_grows_stays(tmp_path):
    gone, kept = left(tmp_path, 'set', OLD, folder=True), left(tmp_path, 'other', OLD, folder=True)
    os.utime(kept/'below'/'half.png')                                       # only the file below is young
    a, b = temporary_folder(tmp_path/'set'), temporary_folder(tmp_path/'other')
    assert not gone.exists() and kept.exists() and a.is_dir() and b.is_dir()

def test_links_are_not_ours(tmp_path):
    (tmp_path/'real').mkdir(); (tmp_path/'real'/'x').write_text('mine')
    link = tmp_path/'.a.json.k1ll3d_8.tmp'
    link.symlink_to(tmp_path/'real')
    for p in (tmp_path/'real'/'x', tmp_path/'real'): os.utime(p, (0, 0))
    os.utime(link, (0, 0), follow_symlinks=False)
    atomic_write(tmp_path/'a.json', '{}')
    assert link.is_symlink() and (tmp_path/'real'/'x').read_text() == 'mine'

def test_sets_archives_reports_and_books(smoke, boards, tmp_path):
    def synthetic(p): write_synthetic(p, 'gear', n_train=2, n_good=1, n_defect=1, size=64)
    def archive(p):
        (tmp_path/'source').mkdir(); (tmp_path/'source'/'x.txt').write_text('x')
        with tarfile.open(tmp_path/'a.tar', 'w') as t: t.add(tmp_path/'source', 'source')
        unpack(tmp_path/'a.tar', p, progress=False)
    def report(p):
        from dynad.evaluate import evaluate
        e = evaluate(smoke[0], boards, n_boot=5, null_models=False, progress=False)
        for _ in range(2): write_report(e, p, n=2)
    def book(p): write_book(p.parent)
    for make, name in ((synthetic, 'set'), (archive, 'unpacked'), (report, 'report'), (book, 'book')):
        place = tmp_path/make.__name__
        rest = left(place, name, OLD, folder=True)
        make(place/name)
        assert (place/name).is_dir() and not rest.exists() and not [*place.glob('.*.tmp')], name

# with a lock, at once

@pytest.mark.parametrize('part', ['pictures', 'dead_letters'])
def test_a_watch_that_was_killed_as_soon_as_it_had_begun(part, smoke, tmp_path, monkeypatch):
    "Whatever it has made by then, the next one goes on there."
    (tmp_path/'line').mkdir()
    def kill(p):
        if p.name == part: raise KeyboardInterrupt
        return files.make_folder(p)
    method = open_for_prediction(smoke[1], {})
    with monkeypatch.context() as m:
        m.setattr('dynad.watch.make_folder', kill)
        with pytest.raises(KeyboardInterrupt): Watch(method, tmp_path/'line', tmp_path/'out', settle=0)
    Watch(method, tmp_path/'line', tmp_path/'out', settle=0).close()

def test_an_export_removes_what_it_knows_to_be_its_own(tmp_path):
    own, other = left(tmp_path, MARKER), left(tmp_path, 'somebody.txt')
    below = left(tmp_path/'below', MARKER)
    half = left(tmp_path/'.dynad-output.part', '1.png')
    with export_to(tmp_path) as work: (work/'1.png').write_bytes(b'1')
    assert not own.exists() and not half.exists() and other.exists() and below.exists()

def test_predictions_into_the_folder_of_killed_ones(smoke, boards, tmp_path):
    method = open_for_prediction(smoke[1], {})
    image = boards.test[0].image
    left(tmp_path/'out'/'.dynad-output.part', '0_board_map.png'); left(tmp_path/'out', MARKER)
    write_predictions(method, [image], tmp_path/'out')
    assert not [*(tmp_path/'out').rglob('.*')] and (tmp_path/'out'/'scores.csv').exists()

def test_a_watch_removes_what_a_killed_one_was_writing(smoke, boards, tmp_path):
    (tmp_path/'line').mkdir()
    shutil.copy(boards.test[-1].image, tmp_path/'line'/'08.png')
    out, method = tmp_path/'out', open_for_prediction(smoke[1], {})
    Watch(method, tmp_path/'line', out, settle=0).close()
    rest = [left(out/'pictures', '08_0a1b2c3d_reconstruction.png'), left(out/'dead_letters', 'x.png'), left(out, 'state.json')]
    w = Watch(method, tmp_path/'line', out, settle=0)
    try:
        assert not any(p.exists() for p in rest)
        mine = left(out, 'index.html')                                  # the watch that holds the lock is writing this
        with pytest.raises(WatchError): Watch(method, tmp_path/'line', out, settle=0)
        assert mine.exists()
    finally: w.close()

def test_a_row_of_a_comparison(tmp_path):
    task = Task('patchcore', 0, str(tmp_path/'set'), folder=str(tmp_path/'row'))
    rest, run = left(tmp_path/'row', 'result.json'), left(tmp_path/'row'/'run', 'config.json')
    (tmp_path/'row'/'result.json').write_text(json.dumps({'status': 'done'}))
    assert run_here(task) == {'status': 'done'} and not rest.exists() and run.exists()

def test_a_marked_image(smoke, boards, tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    f = boards.test[-1].image
    [mark] = mark_images(run, [f], 'normal', 64)
    kept = run/mark.kept
    rest = left(kept.parent, kept.name, OLD)
    left_behind.cache_clear()
    mark_images(run, [f], 'anomalous', 64)
    assert kept.exists() and not rest.exists()
