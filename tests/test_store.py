import json, multiprocessing, os, signal, time
from pathlib import Path

import pytest
import torch

from dynad.store import Shards, Store, StoreError, atomic_write, lent, load_tensors, replacing, save_tensors, state_hash


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = atomic_write(tmp_path/'x.txt', 'old')
    with pytest.raises(RuntimeError):
        with replacing(path) as tmp:
            tmp.write_text('half')
            raise RuntimeError
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['x.txt']


def test_truncated_and_foreign_files_are_named(tmp_path):
    path = save_tensors(tmp_path/'t.safetensors', {'x': torch.ones(100)})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StoreError, match='t.safetensors: not a whole safetensors file'): load_tensors(path)
    torch.save({'x': torch.ones(3)}, tmp_path/'pickle.safetensors')
    with pytest.raises(StoreError, match='not a whole safetensors file'): load_tensors(tmp_path/'pickle.safetensors')
    with pytest.raises(StoreError, match='no such file'): load_tensors(tmp_path/'none.safetensors')


def test_hash_tells_weights_apart():
    a = {'w': torch.arange(4.), 'b': torch.zeros(1)}
    assert state_hash(a) == state_hash({k: v.clone() for k, v in reversed(a.items())})
    assert state_hash(a) != state_hash({**a, 'w': torch.arange(4.).flip(0)})
    assert state_hash(a) != state_hash({**a, 'w': torch.arange(4.).double()})
    assert state_hash(a) != state_hash({**a, 'w': torch.arange(4.).view(2, 2)})


def _slow(root, out):
    store = Store(root)
    def make(work):
        with open(out, 'a') as f: f.write('made\n')
        time.sleep(1)
        return {'x': torch.ones(1)}
    store.tensors('s', {'a': 1}, make)


def test_two_processes_make_a_stage_once(tmp_path):
    ctx = multiprocessing.get_context('spawn')
    ps = [ctx.Process(target=_slow, args=(tmp_path/'run', tmp_path/'log')) for _ in range(2)]
    for p in ps: p.start()
    for p in ps: p.join()
    assert [p.exitcode for p in ps] == [0, 0] and (tmp_path/'log').read_text() == 'made\n'


def _hang(root, out):
    def make(work):
        save_tensors(work/'checkpoint.safetensors', {'step': torch.tensor(3)})
        Path(out).touch()
        time.sleep(60)
    Store(root).stage('s', {'a': 1}, make)


def test_a_killed_stage_is_not_done_and_resumes_from_its_checkpoint(tmp_path):
    p = multiprocessing.get_context('spawn').Process(target=_hang, args=(tmp_path/'run', tmp_path/'started'))
    p.start()
    for _ in range(600):
        if (tmp_path/'started').exists(): break
        time.sleep(.1)
    os.kill(p.pid, signal.SIGKILL); p.join()
    store = Store(tmp_path/'run')
    assert not store.done('s', {'a': 1})
    assert store.tensors('s', {'a': 1}, lambda work: load_tensors(work/'checkpoint.safetensors'))['step'] == 3
    assert store.done('s', {'a': 1}) and store.seconds('s', {'a': 1}) >= 0


def test_shards_make_each_row_once_whoever_asks(tmp_path):
    asked = []
    def make(rows): asked.extend(rows); return {'y': torch.tensor(rows).float()}
    a, b = (Shards(Store(tmp_path), 'n', {'k': 1}) for _ in range(2))
    assert a.get([4, 0, 4], make)['y'].tolist() == [4, 0, 4]
    assert b.get([0, 1, 4], make, chunk=1)['y'].tolist() == [0, 1, 4]
    assert a.get([1], make)['y'].tolist() == [1] and sorted(asked) == [0, 1, 4]
    assert a.seconds([0, 4]) >= 0


@pytest.mark.parametrize('hold', [True, False])
def test_shards_in_memory_and_on_disk(tmp_path, hold):
    "Rows of several files, out of order and twice; those on disk leave nothing behind in memory."
    s = Shards(Store(tmp_path), 'n', {'k': 1}, hold)
    make = lambda rows: {'y': torch.tensor(rows).float(), 'z': torch.tensor(rows)[:, None, None].expand(-1, 2, 3).contiguous()}
    s.fill([5, 1, 2], make, chunk=2)
    s.fill([2, 9], make)
    assert len(list(s.dir.glob('rows-*'))) == 3
    got = s.read([9, 1, 5, 1])
    assert got['y'].tolist() == [9, 1, 5, 1] and got['z'].shape == (4, 2, 3) and got['z'][0, 1, 2] == 9
    assert bool(s._held) == hold and s.read([]) == {}
    with pytest.raises(KeyError): s.read([7])


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(StoreError, match='cannot be made a run directory'): Store(tmp_path/'file'/'run')

def test_a_lent_stage_is_copied_whole_and_an_unfinished_one_is_not(tmp_path):
    lender, own, calls = Store(tmp_path/'lender'), Store(tmp_path/'own'), []
    def make(work): calls.append(work); (work/'part').mkdir(exist_ok=True); return {'x': torch.ones(3)}
    def cut_off(work): (work/'half').write_text('h'); raise KeyboardInterrupt
    lender.stage('whole', {'k': 1}, make)
    with pytest.raises(KeyboardInterrupt): lender.stage('half', {'k': 1}, cut_off)
    with pytest.raises(KeyboardInterrupt): own.stage('whole', {'k': 1}, cut_off)     # what was begun here gives way
    with lent([tmp_path/'lender']) as taken:
        folder = own.stage('whole', {'k': 1}, make)
        assert len(calls) == 1 and sorted(p.name for p in folder.iterdir()) == ['data.safetensors', 'part', 'stage.json']
        own.stage('half', {'k': 1}, make), own.stage('whole', {'k': 2}, make)
    assert len(calls) == 3 and [(s['name'], s['seconds'], s['resumed']) for s in taken] == [('whole', lender.seconds('whole', {'k': 1}), False)]
    assert not list((tmp_path/'own').rglob('*.part')) and not list((tmp_path/'own').rglob('*.tmp'))
    own.stage('other', {'k': 1}, make)
    assert len(calls) == 4 and load_tensors(folder/'data.safetensors')['x'].sum() == 3

def test_a_copy_that_fails_keeps_what_was_begun(tmp_path, monkeypatch):
    lender, own = Store(tmp_path/'lender'), Store(tmp_path/'own')
    def begins(work): save_tensors(work/'checkpoint.safetensors', {'step': torch.tensor(7)}); raise KeyboardInterrupt
    def no_room(source, to, **kw): raise OSError(28, 'No space left on device')
    lender.stage('net', {'k': 1}, lambda work: {'x': torch.ones(3)})
    with pytest.raises(KeyboardInterrupt): own.stage('net', {'k': 1}, begins)
    monkeypatch.setattr('shutil.copytree', no_room)
    with lent([tmp_path/'lender']), pytest.raises(StoreError, match='No space left'): own.stage('net', {'k': 1}, begins)
    folder = own.stage('net', {'k': 1}, lambda work: load_tensors(work/'checkpoint.safetensors'))
    assert load_tensors(folder/'data.safetensors')['step'] == 7
    assert json.loads((folder/'stage.json').read_text())['resumed'] and not list((tmp_path/'own').rglob('*.tmp'))
