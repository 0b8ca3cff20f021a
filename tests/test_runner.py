"The runner on small notebooks of its own: real kernels, real kills, a real dask scheduler."
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from dynad.cli import app
from dynad.runner import PROFILES, TARGETS, RunnerError, find_target, notebook_parameters, plan, run_job, run_jobs, source_hash, variants

FIVE = """data: str = 'synthetic:board'  # pictures
preset: str = 'smoke'          # settings
seeds: list = [0]              # one run each
n_boot: int = 200              # resamples
out: str = ''                  # folder"""
WORK = """import json, os, time
from pathlib import Path
time.sleep({wait})
target = {target!r}
Path(out, target + '.json').write_text(json.dumps(dict(target=target, n_boot=n_boot, seeds=seeds, cwd=os.getcwd(), threads=os.environ.get('OMP_NUM_THREADS'))))"""

def notebook(folder, name, wait=0, cells=None, tagged=True, parameters=FIVE):
    "A notebook of a few cells."
    code = [WORK.format(wait=wait, target=name)] if cells is None else cells
    tag = dict(metadata={'tags': ['parameters']}) if tagged else {}
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f'# The sum of {name}'), nbformat.v4.new_code_cell(parameters, **tag), *map(nbformat.v4.new_code_cell, code)])
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, folder/f'{name}.ipynb')
    return str(folder/f'{name}.ipynb')

def events(root, profile='smoke'):
    log = root/profile/'log.jsonl'
    return [json.loads(l) for l in log.read_text().splitlines()] if log.exists() else []

@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.setenv('DYNAD_POOL', str(tmp_path/'pool'))

def test_targets_name_every_table_and_figure():
    names = {n for t in TARGETS.values() for n in (t.name, *t.aliases)}
    assert {f'table{i}' for i in range(1, 10)} | {f'fig{i}' for i in range(1, 16)} | {'scale', 'spaces', 'sensitivity', 'attribution', 'severity', 'speed', 'parity'} == names
    assert {p.stem for p in (Path(__file__).parents[1]/'nbs'/'papers').glob('*.ipynb')} <= set(TARGETS) # no notebook without a name
    assert find_target('table7') is find_target('table3') and find_target('fig11').name == 'fig10'
    with pytest.raises(RunnerError, match=r"'tabel5' is no table or figure, did you mean table5"): find_target('tabel5')

def test_profile_small_takes_the_real_sets_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv('DYNAD_DATA', str(tmp_path))
    assert variants(PROFILES['small'], {}) == {'': dict(data='synthetic:board', preset='small', seeds=[0])}
    for d in ('cookies', 'magnetic_tile'): (tmp_path/d).mkdir()
    assert variants(PROFILES['small'], {'n_boot': 9}) == {'-cookies': dict(data='cookies', preset='small', seeds=[0, 1, 2], n_boot=9), '-magnetic_tile': dict(data='magnetic_tile', preset='small', seeds=[0], n_boot=9)}
    assert list(variants(PROFILES['small'], {'data': 'elpv'})) == ['']

def test_a_notebook_runs_with_its_parameters_in_its_own_folder(tmp_path):
    nb = notebook(tmp_path/'nbs', 'one')
    before = Path(nb).read_bytes()
    job, = plan([nb], parameters={'n_boot': 7, 'seeds': [3, 4]}, root=tmp_path/'runs')
    assert job.title == 'The sum of one' and job.reason is None and not job.done
    assert run_job(job).status == 'done' and job.done and Path(nb).read_bytes() == before
    found = json.loads((Path(job.out)/'one.json').read_text())
    assert found['n_boot'] == 7 and found['seeds'] == [3, 4] and found['cwd'] == str(tmp_path/'nbs')
    executed = nbformat.read(Path(job.out)/'one.ipynb', 4)
    assert any('injected-parameters' in c.metadata.get('tags', []) and 'n_boot = 7' in c.source for c in executed.cells)
    assert run_job(job).status == 'already done'
    assert [e['event'] for e in events(tmp_path/'runs')] == ['started', 'finished']
    assert sorted(p.name for p in Path(job.out).parent.iterdir() if not p.name.endswith('.lock')) == ['log.jsonl', 'one']

def test_the_key_follows_source_parameters_and_data_but_not_outputs(tmp_path):
    nb = notebook(tmp_path/'nbs', 'one')
    key = lambda **p: plan([nb], parameters=p, root=tmp_path/'runs')[0].key
    first = key()
    assert first == key() != key(n_boot=9)
    node = nbformat.read(nb, 4)
    node.cells[-1].outputs = [nbformat.v4.new_output('stream', text='seen')]
    nbformat.write(node, nb)
    assert key() == first
    (tmp_path/'mine'/'train'/'good').mkdir(parents=True)
    some = key(data=str(tmp_path/'mine'))
    (tmp_path/'mine'/'train'/'good'/'a.png').write_bytes(b'x')
    assert key(data=str(tmp_path/'mine')) != some
    node.cells[-1].source += '\n1'
    nbformat.write(node, nb)
    assert key() != first

def test_refused_before_anything_runs(tmp_path):
    bare, odd = notebook(tmp_path/'nbs', 'bare', tagged=False), notebook(tmp_path/'nbs', 'odd', parameters=FIVE.replace('n_boot', 'resamples'))
    reason = lambda nb, **p: plan([nb], parameters=p, root=tmp_path/'runs')[0].reason
    assert 'bare.ipynb: no cell is tagged `parameters`, so that papermill would silently run the notebook\'s own defaults' in reason(bare)
    assert "odd.ipynb: has no parameter 'n_boot'" in reason(odd, n_boot=5) and 'resamples' in reason(odd, n_boot=5)
    good = notebook(tmp_path/'nbs', 'good')
    assert "has no parameter 'sedes', did you mean 'seeds'?" in reason(good, sedes=[1])
    assert "parameter seeds = 3 is of another kind than its default [0]" in reason(good, seeds=3)
    assert "parameter n_boot = 'many' is of another kind than its default 200" in reason(good, n_boot='many')
    assert "data = 'nowhere': no such folder" in reason(good, data='nowhere')
    assert reason(good, n_boot=5) is None
    (tmp_path/'broken.ipynb').write_text('{')
    with pytest.raises(RunnerError, match='broken.ipynb: not a notebook'): plan([str(tmp_path/'broken.ipynb')])
    with pytest.raises(RunnerError, match='absent.ipynb: no such notebook'): plan([str(tmp_path/'absent.ipynb')])
    with pytest.raises(RunnerError, match="-p out: the runner sets this one"): plan([good], parameters={'out': 'x'})
    with pytest.raises(RunnerError, match="profile = 'big' does not exist; allowed: smoke, small, paper"): plan([good], 'big')
    assert [o.status for o in run_jobs(plan([bare], root=tmp_path/'runs'), workers=0)] == ['not run'] and not events(tmp_path/'runs')

def test_a_notebook_without_a_kernel_name_is_read(tmp_path):
    assert list(notebook_parameters(notebook(tmp_path, 'plain'))) == ['data', 'preset', 'seeds', 'n_boot', 'out']

def test_comments_cannot_hide_a_parameter(tmp_path):
    cell = FIVE.replace('# folder', "# folder; '' = nbs/_runs") + "\nshares: list = [25, 50,\n    75]\nlam = .5"
    assert notebook_parameters(notebook(tmp_path, 'odd', parameters=cell)) == dict(data="'synthetic:board'", preset="'smoke'", seeds='[0]', n_boot='200', out="''", shares='[25, 50, 75]', lam='0.5')
    with pytest.raises(RunnerError, match='bad.ipynb: the cell tagged `parameters` is not Python'): notebook_parameters(notebook(tmp_path, 'bad', parameters='a = ='))

def test_paper_profile_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv('DYNAD_DATA', str(tmp_path)); monkeypatch.delenv('DYNAD_WEIGHTS', raising=False)
    nb = notebook(tmp_path/'nbs', 'own')
    job, = plan([nb], 'paper', root=tmp_path/'runs')
    assert job.parameters['preset'] == 'paper' and 'the weights of KL-f8 are not here' in job.reason
    assert plan([nb], 'paper', {'preset': 'smoke'}, tmp_path/'runs')[0].reason is None
    from dynad import runner
    why = runner._why_not(Path(nb), dict(data='auto', preset='paper', seeds=[0]), PROFILES['paper'], 'visa')
    assert why == ('—', 'VisA is not here: set DYNAD_DATA to a folder that holds it as visa or VisA or VisA_20220922')

def test_failures_are_reported_and_stop_nothing_else(tmp_path):
    "An error in the middle, a cell without end, a kernel that dies, no result: and then one that works."
    f = tmp_path/'nbs'
    nbs = [notebook(f, 'middle', cells=['a = 1', 'def deep(): return a/0\ndeep()', 'never = 1']), notebook(f, 'endless', cells=['a = 1', 'import time; time.sleep(300)']),
           notebook(f, 'dead', cells=['import os; os.kill(os.getpid(), 9)']), notebook(f, 'silent', cells=['1']), notebook(f, 'works')]
    said = []
    jobs = plan(nbs, root=tmp_path/'runs', timeout=6)
    got = {o.name: o for o in run_jobs(jobs, workers=0, report=said.append)}
    assert {n: o.status for n, o in got.items()} == dict(middle='failed', endless='failed', dead='failed', silent='failed', works='done')
    m = got['middle']
    executed = nbformat.read(tmp_path/'runs'/'smoke'/'middle.failed'/'middle.ipynb', 4)
    assert next(c for c in executed.cells if c.get('execution_count') == m.cell).source.startswith('def deep()')
    assert m.error == 'ZeroDivisionError: division by zero' and 'deep()' in m.traceback and '\x1b' not in m.traceback
    assert f'middle: failed in cell {m.cell}: ZeroDivisionError' in said[0]
    assert got['endless'].error == 'still running after 6 s; allow more with --timeout' and next(c for c in nbformat.read(tmp_path/'runs'/'smoke'/'endless.failed'/'endless.ipynb', 4).cells if 'sleep' in c.source) is not None
    assert got['endless'].cell == m.cell and 'the kernel died' in got['dead'].error and got['dead'].cell == m.cell - 1
    assert 'silent.ipynb ran to its end but wrote no silent.json' in got['silent'].error
    assert jobs[0].failure['error'] == m.error and jobs[0].note is None and not jobs[0].done
    notebook(f, 'middle')                              # mended
    job, = plan([nbs[0]], root=tmp_path/'runs')
    assert run_job(job).status == 'done' and job.failure is None

def test_a_failure_keeps_the_last_good_result(tmp_path):
    nb = notebook(tmp_path/'nbs', 'one')
    run_job(plan([nb], root=tmp_path/'runs')[0])
    notebook(tmp_path/'nbs', 'one', cells=['1/0'])
    job, = plan([nb], root=tmp_path/'runs')
    assert run_job(job).status == 'failed' and not job.done and job.failure['error'].startswith('ZeroDivisionError')
    assert (Path(job.out)/'one.json').exists()

def test_the_key_follows_the_modules_that_a_notebook_rests_on(tmp_path):
    from dynad import runner
    assert runner._imported('%matplotlib inline\nimport dynad.store\ndef f():\n    from dynad.config import x\nfrom dynad import show, __version__') == {'store', 'config', 'show', '__version__'}
    assert source_hash('import json') == source_hash('x = 1') != source_hash('import dynad.config') != source_hash('from dynad.store import Store') # store rests on config

def test_another_package_on_a_worker_is_refused(tmp_path):
    from dataclasses import replace
    job, = plan([notebook(tmp_path/'nbs', 'one')], root=tmp_path/'runs')
    assert 'install the same version on every machine' in run_job(replace(job, sources='0'*16, home='/elsewhere/dynad/__init__.py')).error
    Path(job.notebook).unlink()
    assert 'one.ipynb: no such notebook; every worker must see the same files' in run_job(job).error

def test_a_notebook_edited_since_the_batch_began_counts_as_what_it_is_now(tmp_path):
    old, = plan([notebook(tmp_path/'nbs', 'one')], root=tmp_path/'runs')
    notebook(tmp_path/'nbs', 'one', wait=.01)
    assert run_job(old).status == 'done' and not old.done and plan([old.notebook], root=tmp_path/'runs')[0].done

# by the command

def dynad(*words, **env): return [sys.executable, '-c', 'from dynad.cli import app; app()', *map(str, words)]

def wait_for(what, seconds=300):
    end = time.time() + seconds
    while time.time() < end:
        if (r := what()): return r
        time.sleep(.1)
    raise AssertionError('waited in vain')

def test_killed_and_started_again_it_does_only_what_is_missing(tmp_path):
    nbs = [notebook(tmp_path/'nbs', f'n{i}', wait=[0, 60, 0][i]) for i in range(3)]
    runs = tmp_path/'runs'
    p = subprocess.Popen(dynad('reproduce', *nbs, '--workers', 0, '--out', runs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try: wait_for(lambda: [e for e in events(runs) if (e['event'], e['name']) == ('started', 'n1')])
    finally: p.send_signal(signal.SIGKILL); p.wait()
    assert [(e['event'], e['name']) for e in events(runs)] == [('started', 'n0'), ('finished', 'n0'), ('started', 'n1')]
    notebook(tmp_path/'nbs', 'n1')
    done = CliRunner().invoke(app, ['reproduce', *nbs, '--workers', '0', '--out', str(runs)])
    assert done.exit_code == 0 and 'n0: already done' in done.stdout and 'n1: done' in done.stdout and 'n2: done' in done.stdout, done.output
    assert sorted(e['name'] for e in events(runs) if e['event'] == 'finished') == ['n0', 'n1', 'n2']
    assert sorted(p.name for p in (runs/'smoke').iterdir() if p.is_dir()) == ['n0', 'n1', 'n2'] # nothing half-done is left

def test_commands(tmp_path):
    run = lambda *w: CliRunner().invoke(app, ['reproduce', *map(str, w)])
    good, bare = notebook(tmp_path/'nbs', 'good'), notebook(tmp_path/'nbs', 'bare', tagged=False)
    r = run(good, bare, '--list', '--json', '-p', 'n_boot', '50', '--out', tmp_path/'runs')
    rows = json.loads(r.stdout)
    assert [(x['name'], x['can_run'], x['done']) for x in rows] == [('good', True, False), ('bare', False, False)] and rows[0]['data'] == 'synthetic board (stand-in)'
    dry = run(good, '-p', 'n_boot', '50', '-p', 'seeds', '[0, 1]', '--dry-run', '--out', tmp_path/'runs')
    assert dry.exit_code == 0 and 'good' in dry.stdout and 'n_boot = 50' in dry.stdout and 'seeds = [0, 1]' in dry.stdout and not (tmp_path/'runs').exists()
    r = run(bare, '--workers', '0', '--out', tmp_path/'runs')
    assert r.exit_code == 1 and 'bare: not run' in r.stdout and 'no cell is tagged' in r.stdout
    r = run('tabel5')
    assert r.exit_code == 2 and 'did you mean table5' in r.stderr
    r = run(good, '-p', 'n_boot')
    assert r.exit_code == 2 and '-p n_boot: a name and a value are needed' in r.stderr
    assert run().exit_code == 2

def test_list_covers_every_target_without_a_data_set(tmp_path, monkeypatch):
    monkeypatch.delenv('DYNAD_DATA', raising=False); monkeypatch.delenv('DYNAD_WEIGHTS', raising=False)
    rows = {p: json.loads(CliRunner().invoke(app, ['reproduce', 'all', '--list', '--json', '--profile', p, '--out', str(tmp_path)]).stdout) for p in PROFILES}
    for p in PROFILES: assert [x['name'] for x in rows[p]] == list(TARGETS)
    assert not any(x['can_run'] for x in rows['paper']) and all(x['reason'] for x in rows['paper'])

REAL = ('fig5', 'table5') # more of them: the lead's choice, within CI's time

def test_real_targets_at_smoke_by_the_command(tmp_path, monkeypatch):
    "From the shared 64² run of nbs/_runs/pool, made here when it is not there; then the book."
    root = Path(__file__).parents[1]
    missing = [n for n in REAL if not (root/'nbs'/'papers'/f'{n}.ipynb').exists()]
    if missing: pytest.skip(f"nbs/papers has no {', '.join(missing)} yet")
    monkeypatch.delenv('DYNAD_POOL'); monkeypatch.delenv('DYNAD_DATA', raising=False); monkeypatch.chdir(root)
    call = lambda *w: CliRunner().invoke(app, ['reproduce', *w, '--out', str(tmp_path)])
    r = call(*REAL, '--workers', '0', '-p', 'n_boot', '20')
    assert r.exit_code == 0, r.output
    for n in REAL:
        found = json.loads((tmp_path/'smoke'/n/f'{n}.json').read_text())
        assert found['target'] == n and found['stand_in'] and found['parameters']['n_boot'] == 20 and found['data'][0]['name'] == 'synthetic_board'
        assert all(l['paper'] is None and l['difference'] is None for l in found['comparison'])
        assert all((tmp_path/'smoke'/n/f'{f}.{s}').stat().st_size > 500 for f in found['figures'] for s in ('png', 'pdf'))
    assert call(*REAL, '--workers', '0', '-p', 'n_boot', '20').output.count(": already done") == len(REAL)
    assert call('book').exit_code == 0
    assert (tmp_path/'book'/'index.html').read_text().count('<b>stand-in data</b>') == len(REAL)

# many machines

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def test_a_worker_is_killed_while_it_works_and_nothing_is_lost_or_counted_twice(tmp_path):
    "A real scheduler, two real workers; one gets SIGKILL in the middle of a notebook."
    pytest.importorskip('distributed')
    nbs = [notebook(tmp_path/'nbs', f'n{i}', wait=2.5) for i in range(4)]
    runs, address, quiet = tmp_path/'runs', f'tcp://127.0.0.1:{free_port()}', dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    processes = [subprocess.Popen([sys.executable, '-m', 'distributed.cli.dask_scheduler', '--host', address, '--no-dashboard'], **quiet)]
    try:
        worker = lambda n: subprocess.Popen([sys.executable, '-m', 'distributed.cli.dask_worker', address, '--name', n, '--nthreads', '1', '--no-nanny', '--no-dashboard', '--local-directory', str(tmp_path/n)], **quiet)
        workers = [worker('a'), worker('b')]
        processes += workers
        batch = subprocess.Popen(dynad('reproduce', *nbs, '--scheduler', address, '--out', runs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(batch)
        begun = lambda: [e for e in events(runs) if e['event'] == 'started' and e['pid'] == workers[0].pid]
        mine = wait_for(begun)[-1]['name']
        workers[0].send_signal(signal.SIGKILL); workers[0].wait()
        said, _ = batch.communicate(timeout=300)
        assert batch.returncode == 0, said
    finally:
        for p in processes[::-1]:
            if p.poll() is None: p.kill()
            p.wait()
    log = events(runs)
    assert sorted(e['name'] for e in log if e['event'] == 'finished') == [f'n{i}' for i in range(4)]      # each once
    assert sum(e['event'] == 'started' and e['name'] == mine for e in log) == 2                             # the killed one was taken up again
    assert {e['pid'] for e in log if e['event'] == 'finished' and e['name'] == mine} == {workers[1].pid}
    assert all((runs/'smoke'/f'n{i}'/f'n{i}.json').exists() for i in range(4)) and said.count(": done") == 4

def test_the_local_cluster_is_the_default_and_a_missing_scheduler_is_named(tmp_path, monkeypatch):
    pytest.importorskip('distributed')
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    threads = lambda name: int(json.loads((tmp_path/'runs'/'smoke'/name/f'{name}.json').read_text())['threads'])
    nbs = [notebook(tmp_path/'nbs', f'n{i}') for i in range(2)]
    assert [o.status for o in run_jobs(plan(nbs, root=tmp_path/'runs'), workers=2)] == ['done', 'done']
    assert len({e['pid'] for e in events(tmp_path/'runs') if e['event'] == 'finished'}) == 2
    assert threads('n0') == max(1, os.cpu_count()//2)
    alone = notebook(tmp_path/'nbs', 'alone')
    assert [o.status for o in run_jobs(plan([alone], root=tmp_path/'runs'), workers=1)] == ['done'] and threads('alone') == os.cpu_count() # dask alone would say 1
    jobs = plan(nbs, parameters={'n_boot': 3}, root=tmp_path/'runs')
    address = f'tcp://127.0.0.1:{free_port()}'
    with pytest.raises(RunnerError, match=f'--scheduler {address}: no scheduler answers there'): run_jobs(jobs, scheduler=address, report=lambda s: None)
