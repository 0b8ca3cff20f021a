"The runner on small notebooks of its own: real kernels, real kills, a real dask scheduler."
import json, os, platform, re, shutil, signal, socket, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from dynad.cli import app
from dynad import jobs as running, provenance, runner
from dynad.experiments import EXPERIMENTS, TARGETS, notebook_parameters
from dynad.jobs import run_job, run_jobs
from dynad.runner import (
    PROFILES, RunnerError, find_target, folder_stamp, plan, source_hash, syntax_key, variants)

FIVE = """data: str = 'synthetic:board'  # images
preset: str = 'smoke'          # settings
seeds: list = [0]              # one run each
n_boot: int = 200              # resamples
out: str = ''                  # folder"""
WORK = """import json, os, time
from pathlib import Path
time.sleep({wait})
target = {target!r}
Path(out, target + '.json').write_text(json.dumps(dict(target=target, n_boot=n_boot, seeds=seeds, cwd=os.getcwd(), threads=os.environ.get('OMP_NUM_THREADS'), root=os.environ.get('DYNAD_DATA'))))"""

def notebook(folder, name, wait=0, cells=None, tagged=True, parameters=FIVE):
    "A notebook of a few cells."
    code = [WORK.format(wait=wait, target=name)] if cells is None else cells
    tag = dict(metadata={'tags': ['parameters']}) if tagged else {}
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f'# The sum of {name}'), nbformat.v4.new_code_cell(parameters, **tag), *map(nbformat.v4.new_code_cell, code)])
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, folder/f'{name}.ipynb')
    return str(folder/f'{name}.ipynb')

def real_set(root, folder='btad', categories=('01',), images=1):
    "Folders that are found as a set of the paper; their images are never read."
    for c in categories:
        (root/folder/c).mkdir(parents=True)
        for i in range(images): (root/folder/c/f'{i}.png').write_bytes(b'x')
    return root

def events(root, profile='smoke'):
    log = root/profile/'log.jsonl'
    return [json.loads(l) for l in log.read_text().splitlines()] if log.exists() else []

@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.setenv('DYNAD_POOL', str(tmp_path/'pool'))

def test_targets_name_every_table_and_figure():
    names = [n for e in EXPERIMENTS for n in e.names]
    assert len(set(names)) == len(names)
    assert {f'table{i}' for i in range(1, 10)} | {f'fig{i}' for i in range(1, 16)} == {n for n in names if re.match(r'(table|fig)\d', n)}
    assert {p.stem for p in (Path(__file__).parents[1]/'nbs'/'papers').glob('*.ipynb')} == set(TARGETS) # one entry, one notebook
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
    why = runner.why_not(Path(nb), dict(data='auto', preset='paper', seeds=[0]), PROFILES['paper'], ('visa',))
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
    assert provenance._imported('%matplotlib inline\nimport dynad.store\ndef f():\n    from dynad.config import x\nfrom dynad import show, __version__') == {'store', 'config', 'show', '__version__'}
    assert source_hash('import json') == source_hash('x = 1') != source_hash('import dynad.config') != source_hash('from dynad.store import Store') # store rests on config

def test_another_package_on_a_worker_is_refused(tmp_path):
    job, = plan([notebook(tmp_path/'nbs', 'one')], root=tmp_path/'runs')
    assert 'install the same version on every machine' in run_job(replace(job, sources='0'*16, home='/elsewhere/dynad/__init__.py')).error
    Path(job.notebook).unlink()
    assert 'one.ipynb: no such notebook; every worker must see the same files' in run_job(job).error

def test_a_notebook_edited_since_the_batch_began_counts_as_what_it_is_now(tmp_path):
    old, = plan([notebook(tmp_path/'nbs', 'one')], root=tmp_path/'runs')
    notebook(tmp_path/'nbs', 'one', wait=.01)
    assert run_job(old).status == 'done' and not old.done and plan([old.notebook], root=tmp_path/'runs')[0].done

def test_only_what_code_does_counts_for_its_key():
    plain = syntax_key('def f(x): return 2*x')
    assert plain == syntax_key('"""A module."""\n# %% auto\ndef f(x):\n    "Twice x."\n    return (2 *\n        x) # doubled') == syntax_key('%matplotlib inline\ndef f(x): return 2*x')
    assert len({plain, syntax_key('def f(x): return 3*x'), syntax_key('def f(x, /): return 2*x'), syntax_key('def f(x): return None'), syntax_key('def f(x): return')}) == 5
    assert syntax_key('no Python') == syntax_key('no Python') != syntax_key('nor this')

def test_the_printed_numbers_count_for_notebooks_that_read_them(tmp_path, monkeypatch):
    package = tmp_path/'dynad'
    shutil.copytree(Path(runner.dynad.__file__).parent, package, ignore=shutil.ignore_patterns('weights', '__pycache__'))
    monkeypatch.setattr(runner.dynad, '__file__', str(package/'__init__.py'))
    keys = lambda: [source_hash(f'from dynad.{m} import x') for m in ('record', 'store')]
    before = keys()
    (package/'store.py').write_text((package/'store.py').read_text() + '\n# a comment\n')
    assert keys() == before
    (package/'printed.csv').write_text('table\n')
    assert [a == b for a, b in zip(keys(), before)] == [False, True]
    (package/'store.py').write_text((package/'store.py').read_text() + '\nmore = 1\n')
    assert keys()[1] != before[1]

# what a target runs on, and what that costs

def test_wanted_sets_are_those_that_the_notebooks_open():
    for t in TARGETS.values():
        text = '\n'.join(c.source for c in runner.read_notebook(Path(__file__).parents[1]/'nbs'/'papers'/t.notebook) if c.kind == 'code')
        assert set(re.findall(r"subjects\(data, (?:wanted=)?'(\w+)'\)", text)) == {t.wanted[0]} and set(re.findall(r"subjects\('(\w+)'\)", text)) <= set(t.wanted[1:]), t.name
    assert {n: TARGETS[n].wanted for n in ('fig2', 'fig5', 'fig7', 'fig14', 'fig8', 'table2')} == dict(fig2=('visa', 'btad'), fig5=('visa', 'btad'), fig7=('visa', 'mvtec'), fig14=('visa', 'mvtec'), fig8=('mvtec',), table2=('btad',))
    assert TARGETS['fig8'].in_paper and TARGETS['table3'].in_paper and not TARGETS['scale'].in_paper and not TARGETS['spaces'].in_paper

@pytest.mark.parametrize('name, folder, category, said', [('fig2', 'btad', '01', 'BTAD 01'), ('fig9', 'btad', '01', 'BTAD 01'), ('fig15', 'btad', '01', 'BTAD 01'), ('fig7', 'mvtec', 'hazelnut', 'MVTec AD hazelnut'), ('fig14', 'mvtec', 'hazelnut', 'MVTec AD hazelnut')])
def test_the_second_set_of_a_figure_is_listed_and_counts(tmp_path, monkeypatch, name, folder, category, said):
    monkeypatch.setenv('DYNAD_DATA', str(tmp_path/'data'))
    job = lambda **p: plan([name], parameters=p, root=tmp_path/'runs')[0]
    alone, fixed = job(), job(data='synthetic:board')
    real_set(tmp_path/'data', folder, [category])
    both = job()
    assert alone.data == 'synthetic board (stand-in)' and both.data == f'synthetic board (stand-in); {said}' and alone.key != both.key and f'{folder}/{category}' in both.stamps['data']
    assert job(data='synthetic:board').key == fixed.key # what was named is what is taken
    real_set(tmp_path/'data', 'visa', ['candle', 'capsules', 'cashew', 'fryum'])
    assert job().data == f'VisA, 4 categories; {said}'

def test_a_notebook_of_ours_given_by_its_path_is_the_target(tmp_path, monkeypatch):
    monkeypatch.setenv('DYNAD_DATA', str(real_set(tmp_path/'data')))
    by_path, by_name = (plan([n], root=tmp_path/'runs')[0] for n in (str(Path(__file__).parents[1]/'nbs'/'papers'/'table2.ipynb'), 'table2'))
    assert by_path == by_name and by_name.data == 'BTAD 01'

def test_a_folder_named_from_here_is_found_by_the_kernel(tmp_path, monkeypatch):
    (tmp_path/'mine'/'train').mkdir(parents=True); monkeypatch.chdir(tmp_path); monkeypatch.setenv('DYNAD_DATA', str(real_set(tmp_path/'data')))
    nb = notebook(tmp_path/'nbs', 'one')
    job = lambda data: plan([nb], parameters={'data': data}, root=tmp_path/'runs')[0]
    assert job('./mine, btad').parameters['data'] == f"{tmp_path/'mine'},btad" and job('mine').data == 'mine (stand-in)' and job('synthetic:board').parameters['data'] == 'synthetic:board'

def test_costs_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.delenv('DYNAD_DATA', raising=False); monkeypatch.delenv('DYNAD_WEIGHTS', raising=False)
    one = lambda name='fig13', profile='smoke', **p: plan([name], profile, p, tmp_path/'runs')[0]
    assert (one().minutes, one().cost, one().measured) == (.7, 'measured on 2 cores', False)
    assert one(seeds=[0, 1, 2]).minutes == pytest.approx(2.1) and one(seeds=[0, 1, 2]).cost == 'estimated'
    assert one(profile='small').cost == 'measured on 2 cores' and one('fig14', 'small').cost == 'estimated' and one('fig14', 'small').minutes > one('fig14').minutes
    assert one('table4', 'small').minutes > 10 # trains what no other target does
    assert (one(profile='paper').minutes, one(profile='paper').cost) == (None, 'days, needs a GPU')
    real_set(tmp_path/'data', categories=('01', '02', '03')); monkeypatch.setenv('DYNAD_DATA', str(tmp_path/'data'))
    assert one('table2').minutes == pytest.approx(1.2)
    from dynad.machine import machine
    out = tmp_path/'runs'/'smoke'/'fig13'
    out.mkdir(parents=True)
    (out/'run.json').write_text(json.dumps(dict(minutes=3.2, key='k', parameters=one().parameters)))
    for h, said in ((machine(), 'measured here'), (dict(cpu='other', cores=64, gpu=None), 'measured on 64 cores'), (dict(cpu='other', cores=64, gpu='H100'), 'measured on H100')):
        (out/'fig13.json').write_text(json.dumps(dict(hardware=h)))
        assert (one().minutes, one().cost, one().measured) == (3.2, said, True)
    assert one(seeds=[0, 1]).cost == 'estimated' # not what was measured
    own, = plan([notebook(tmp_path/'nbs', 'own')], root=tmp_path/'runs')
    assert own.minutes is None and own.cost == 'not known before it has run'
    text = CliRunner().invoke(app, ['reproduce', 'fig13', 'table2', '--list', '--out', str(tmp_path/'runs')]).stdout
    assert 'would run (3.2 min, measured on H100)' in text and 'would run (≈1.2 min, estimated)' in text and '2 would run, about 4 min one after another' in text

def test_no_cell_may_run_for_ever(tmp_path):
    limit = lambda profile, **p: plan(['table5'], profile, p, tmp_path)[0].timeout
    assert (limit('smoke'), limit('small'), limit('paper'), limit('smoke', preset='authors')) == (600, 4*3600, 7*24*3600, 7*24*3600)
    assert plan(['table5'], root=tmp_path, timeout=5)[0].timeout == 5
    said = ' '.join(re.sub('[│\\s]+', ' ', CliRunner().invoke(app, ['reproduce', '--help'], env={'COLUMNS': '200'}).stdout).split())
    assert '604800 (7 days) with paper and authors' in said

def test_outdated_names_what_has_changed(tmp_path, monkeypatch):
    monkeypatch.setenv('DYNAD_DATA', str(real_set(tmp_path/'data'))); monkeypatch.delenv('DYNAD_WEIGHTS', raising=False)
    nb = notebook(tmp_path/'nbs', 'one')
    job, = plan([nb], parameters={'n_boot': 3, 'data': 'btad'}, root=tmp_path/'runs')
    assert run_job(job).status == 'done'
    now, note = plan([nb], root=tmp_path/'runs')[0], job.note      # planned with other parameters: the run's own count
    assert runner.outdated(now, note) == '' and note['made']['stamps']['data'] == {'btad/01': folder_stamp(tmp_path/'data'/'btad'/'01')}
    assert runner.outdated(now, {k: v for k, v in note.items() if k != 'made'}) == '' and runner.outdated(now, dict({k: v for k, v in note.items() if k != 'made'}, key='k')) == 'notebook, package or data'
    monkeypatch.delenv('DYNAD_DATA')                               # images that are not here cannot tell
    assert runner.outdated(now, note) == ''
    monkeypatch.setenv('DYNAD_DATA', str(tmp_path/'data'))
    (tmp_path/'data'/'btad'/'01'/'new.png').write_bytes(b'y')
    assert runner.outdated(now, note) == 'data'
    notebook(tmp_path/'nbs', 'one', wait=.01)
    assert runner.outdated(now, note) == 'notebook and data'
    note['made']['package'] = 'another'
    assert runner.outdated(now, note) == 'notebook, package and data'

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

# many machines

def elsewhere(monkeypatch, **env):
    "The settings of another machine."
    for k in ('DYNAD_DATA', 'DYNAD_WEIGHTS'): monkeypatch.setenv(k, str(env[k])) if k in env else monkeypatch.delenv(k, raising=False)

def test_the_kernel_gets_the_folders_of_the_plan(tmp_path, monkeypatch):
    elsewhere(monkeypatch, DYNAD_DATA=tmp_path/'data', DYNAD_WEIGHTS=tmp_path/'none')
    real_set(tmp_path/'data')
    job, = plan([notebook(tmp_path/'nbs', 'one')], parameters={'data': 'btad'}, root=tmp_path/'runs')
    elsewhere(monkeypatch)
    assert run_job(job).status == 'done' and json.loads((Path(job.out)/'one.json').read_text())['root'] == str(tmp_path/'data') and 'DYNAD_DATA' not in os.environ

def test_a_worker_with_other_images_or_weights_refuses(tmp_path, monkeypatch):
    real_set(tmp_path/'data', images=3); (tmp_path/'weights'/'kl-f8').mkdir(parents=True); (tmp_path/'weights'/'kl-f8'/'a').write_bytes(b'xyz')
    elsewhere(monkeypatch, DYNAD_DATA=tmp_path/'data', DYNAD_WEIGHTS=tmp_path/'weights')
    job, = plan(['table2'], root=tmp_path/'runs', elsewhere=True)
    assert job.data == 'BTAD 01' and running.on_this_machine(job) == job
    shutil.copytree(tmp_path/'data', tmp_path/'copy'); shutil.move(tmp_path/'data', tmp_path/'away') # the worker does not see the folder
    for f in (tmp_path/'copy').rglob('*.png'): os.utime(f, (1, 1))
    elsewhere(monkeypatch, DYNAD_WEIGHTS=tmp_path/'weights')
    said = run_job(job)
    assert said.status == 'failed' and said.error.startswith(f'worker on {platform.node()}: other data than planned (btad/01: 3 files of 3 bytes where the batch was planned, nothing here') and f"mount {tmp_path/'data'} there" in said.error
    assert not Path(job.out).exists() and not job.done
    monkeypatch.setenv('DYNAD_DATA', str(tmp_path/'copy'))
    assert running.on_this_machine(job) == job                                                                 # its own copy, the same files at other times
    (tmp_path/'copy'/'btad'/'01'/'0.png').unlink()
    assert '3 files of 3 bytes where the batch was planned, 2 files of 2 bytes here' in run_job(job).error
    shutil.move(tmp_path/'away', tmp_path/'data'); shutil.rmtree(tmp_path/'weights'/'kl-f8')
    assert 'other weights than planned (the weights: 1 files of 3 bytes where the batch was planned, 0 files of 0 bytes here)' in run_job(job).error

def test_a_machine_without_anything_leaves_the_judgement_to_the_workers(tmp_path, monkeypatch):
    elsewhere(monkeypatch)
    assert all(j.reason for j in plan(['all'], 'paper', root=tmp_path/'runs'))
    jobs = plan(['all'], 'paper', root=tmp_path/'runs', elsewhere=True)
    assert not any(j.reason for j in jobs) and {j.data for j in jobs} == {'what the worker finds'} and jobs[0].cost == 'the machine that runs it decides'
    job = next(j for j in jobs if j.name == 'table2')
    assert (o := run_job(job)).status == 'not run' and o.error.startswith(f'on {platform.node()}: BTAD is not here')
    elsewhere(monkeypatch, DYNAD_DATA=real_set(tmp_path/'data'))
    assert (o := run_job(job)).status == 'not run' and 'the weights of KL-f8 are not here' in o.error
    (tmp_path/'weights'/'kl-f8').mkdir(parents=True)
    elsewhere(monkeypatch, DYNAD_DATA=tmp_path/'data', DYNAD_WEIGHTS=tmp_path/'weights')
    monkeypatch.setattr(runner, 'gpu_count', lambda: 0)
    assert 'no GPU here' in run_job(job).error and 'no GPU here' in plan(['table2'], 'paper', root=tmp_path/'runs')[0].reason
    assert plan(['table2'], 'paper', root=tmp_path/'runs', elsewhere=True)[0].reason is None          # a machine that only plans needs none
    monkeypatch.setattr(runner, 'gpu_count', lambda: 1)
    here, there = plan(['table2'], 'paper', root=tmp_path/'runs')[0], running.on_this_machine(job)
    assert there.reason is None and (there.data, there.stamps) == (here.data, here.stamps) == ('BTAD 01', here.stamps)

def test_a_stand_in_is_not_filed_as_the_real_set(tmp_path, monkeypatch):
    elsewhere(monkeypatch, DYNAD_DATA=real_set(tmp_path/'data'))
    cell = "import json\nfrom pathlib import Path\nPath(out, 'table2.json').write_text(json.dumps(dict(data=[dict(name={!r}, label='what it was', real={!r})])))"
    job, = plan(['table2'], root=tmp_path/'runs')
    fake = lambda *d: runner.with_key(replace(job, notebook=notebook(tmp_path/'nbs', 'table2', cells=[cell.format(*d)])))
    o = run_job(fake('synthetic_board', None))
    assert o.status == 'failed' and 'ran on what it was instead of BTAD 01' in o.error and not Path(job.out).exists()
    assert run_job(fake('btad/01', 'btad')).status == 'done' and job.note['data'] == 'BTAD 01'

def test_what_a_notebook_names_beside_its_data_is_no_stand_in(tmp_path, monkeypatch):
    "Products of one network, of RAN: named by a parameter of their own."
    elsewhere(monkeypatch, DYNAD_DATA=real_set(tmp_path/'data'))
    of = lambda name, real: dict(name=name, label=name, real=real)
    cell = "import json\nfrom pathlib import Path\nPath(out, 'table2.json').write_text(json.dumps(dict(data={!r}, parameters=dict(unified={!r}))))"
    job, = plan(['table2'], root=tmp_path/'runs')
    fake = lambda *a: runner.with_key(replace(job, notebook=notebook(tmp_path/'nbs', 'table2', cells=[cell.format(*a)])))
    both = [of('btad/01', 'btad'), of('synthetic_gear', None)]
    assert run_job(fake(both, ['synthetic:gear'])).status == 'done'
    assert 'ran on synthetic_gear instead of BTAD 01' in run_job(fake(both, ['synthetic:board'])).error
    assert 'ran on synthetic_gear instead of BTAD 01' in run_job(fake(both[1:], ['synthetic:gear'])).error # the images have gone
    stamped = lambda **p: set(runner.data_stamps(dict(data='btad/01', **p), ('btad',))['data'])
    assert stamped() == stamped(unified=[]) == {'btad/01'} and stamped(unified=['synthetic:gear']) == {'btad/01', 'synthetic_gear'}

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
        batch = subprocess.Popen(dynad('reproduce', *nbs, '--scheduler', address, '--out', runs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {'DYNAD_DATA': str(tmp_path)})
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
    assert all(json.loads((runs/'smoke'/f'n{i}'/f'n{i}.json').read_text())['root'] == str(tmp_path) for i in range(4)) # the planning machine's, which the workers were not told of
    assert said.count(": done") == 4

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
