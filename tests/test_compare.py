"17g_compare: tasks in processes of their own, rows that fail, a comparison that is cut off and goes on, JSON, grid, page, command."
import json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dynad import compare as C, task
from dynad.cli import app
from dynad.cli_compare import seeds_of, settings_of
from dynad.config import ConfigError
from dynad.jobs import map_on_cluster
from dynad.machine import own_gpu
from dynad.metrics import StreamingPixelMetrics

TOYS = '''
"""Methods of a user's own."""
import os, time
from pathlib import Path
import torch
from dynad.data import to_float
from dynad.method import Method, Prediction, register
from dynad.store import load_tensors

@register
class Deviation(Method):
    name, title = 'deviation', 'pixel deviation (toy)'
    def train(self, hooks):
        make = lambda work: {'mean': to_float(self.training_set.images).mean(0)}
        stages = {'mean': self.training_set.store.stage('mean', dict(images=self.training_set.key), make)}
        self.load(stages)
        return stages
    def load(self, stages): self.mean = load_tensors(stages['mean']/'data.safetensors')['mean']
    def predict_batch(self, images, rows):
        m = (images - self.mean).abs().mean(1, keepdim=True)
        return Prediction(m.flatten(1).amax(1), m)

@register
class Scores(Deviation):
    name, title = 'scores', 'scores without a map (toy)'
    def predict_batch(self, images, rows): return Prediction(super().predict_batch(images, rows).score)

@register
class Wrong(Deviation):
    name, title = 'wrong', 'wrong (toy)'
    def predict_batch(self, images, rows): raise ZeroDivisionError('a bug')

@register
class Dies(Deviation):
    name, title = 'dies', 'dies (toy)'
    def train(self, hooks): os._exit(9)

@register
class Slow(Deviation):
    name, title = 'slow', 'slow (toy)'
    def train(self, hooks):
        if (gate := os.environ.get('TOY_GATE')) and not Path(gate).exists():
            Path(gate + '.waiting').touch()
            time.sleep(600)
        return super().train(hooks)
'''

@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toys')
    (folder/'toy_methods.py').write_text(TOYS)
    old = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = os.pathsep.join([str(folder), *([old] if old else [])])
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    os.environ.pop('PYTHONPATH') if old is None else os.environ.__setitem__('PYTHONPATH', old)
    from dynad.method import METHODS
    for n in ('deviation', 'scores', 'wrong', 'dies', 'slow'): METHODS.pop(n, None)

def toy(*names): return tuple(f'toy_methods:{n}' for n in names)

def comparison(boards, out, methods, seeds=(0,), **more):
    return C.Comparison(str(boards.root), methods, seeds, out, preset='smoke', n_boot=20, images=4, **more)

@pytest.fixture(scope='module')
def finished(toys, boards, tmp_path_factory):
    "Two seeds in this process, with a method that fails, one without maps and one that is not here."
    c = comparison(boards, tmp_path_factory.mktemp('out'), (*toy('deviation', 'scores', 'wrong'), 'padim', 'glad'), (0, 1), overrides={'padim': {'options.dims': 20}})
    lines = []
    return c, C.compare(c, run=C.in_this_process, report=lines.append), lines

def test_a_failure_is_a_row_and_the_others_finish(finished):
    c, result, lines = finished
    status = {(r['title'], r['seed']): r['status'] for r in result['rows']}
    assert {s for (t, _), s in status.items() if t in ('pixel deviation (toy)', 'scores without a map (toy)', 'PaDiM')} == {'done'}
    assert status['wrong (toy)', 0] == status['wrong (toy)', 1] == 'failed' and status['GLAD', 0] == 'not run'
    wrong = next(r for r in result['rows'] if r['title'] == 'wrong (toy)')
    assert wrong['reason'] == 'ZeroDivisionError: a bug' and 'predict_batch' in wrong['traceback']
    assert len(lines) == 10 and sum('failed' in l for l in lines) == 2

def test_table_mean_and_deviation(finished):
    _, result, _ = finished
    t = C.table_of(result['summary'])
    assert list(t.index) == ['pixel deviation (toy)', 'scores without a map (toy)', 'wrong (toy)', 'PaDiM', 'GLAD']
    values = [r['pro']['value'] for r in result['rows'] if r['title'] == 'PaDiM']
    want = f"{100*sum(values)/2:.1f} ± {100*torch.tensor(values, dtype=torch.float64).std().item():.1f}"
    assert t.loc['PaDiM', 'PRO'] == want and t.loc['PaDiM', 'seeds'] == '0, 1' and '±' in t.loc['PaDiM', 'images/s']
    assert t.loc['scores without a map (toy)', 'PRO'] == '—' != t.loc['scores without a map (toy)', 'I-AUROC']
    assert t.loc['wrong (toy)', 'PRO'] == '—' and t.loc['wrong (toy)', 'note'] == 'failed: ZeroDivisionError: a bug'
    assert t.loc['GLAD', 'note'].startswith('not run: ') and t.loc['GLAD', 'seeds'] == '—'
    assert float(t.loc['PaDiM', 'memory, MB'].split()[0]) > 100

def test_differences_are_paired_with_the_first(finished):
    _, result, _ = finished
    d = {(x['method'], x['seed']): x for x in result['differences']}
    assert {m for m, _ in d} == {'toy_methods:scores', 'padim'} # the finished ones
    value = {(r['method'], r['seed']): r for r in result['rows']}
    for (m, s), x in d.items():
        for k in ('i_auroc', *(['pro'] if m == 'padim' else [])):
            off = value[m, s][k]['value'] - value['toy_methods:deviation', s][k]['value']
            assert x[k]['value'] == pytest.approx(off, abs=2e-4) and x[k]['low'] <= x[k]['value'] <= x[k]['high']
    assert 'pro' not in d['toy_methods:scores', 0] and d['toy_methods:scores', 0]['i_auroc']['value'] == 0

def test_grid_is_written_and_shows_whoever_has_a_map(finished):
    c, result, _ = finished
    image = Image.open(Path(c.out)/'grid.png')
    assert image.size[0] > 300 and image.size[1] > 300
    titles = [ax.get_title() for ax in c.grid(result['rows']).axes[:4]]
    assert titles == ['image', 'truth', 'pixel deviation (toy)', 'PaDiM']
    rows = C.chosen_rows(c.dataset, 4)
    assert [c.dataset.test[i].label for i in rows] == [1, 1, 1, 0] and C.chosen_rows(c.dataset, 0) == ()

def test_nothing_that_is_done_runs_again(finished):
    c, result, _ = finished
    def run(tasks):
        for t in tasks:
            yield t, task.run_here(replace(t, method='no.such:method') if t.name in ('deviation', 'padim') else t) # not looked at
    again = C.compare(c, run=run, report=lambda line: None)
    for a, b in zip(result['rows'], again['rows']): assert a.get('fit_minutes') == b.get('fit_minutes') and a['status'] == b['status']

def test_json_is_whole_after_every_row(toys, boards, tmp_path, monkeypatch):
    c, seen, replaced = comparison(boards, tmp_path/'out', toy('deviation', 'wrong')), [], []
    real = C.atomic_write
    def watched(path, content):
        if Path(path).name == 'copy.json': replaced.append(json.loads(content))
        return real(path, content)
    monkeypatch.setattr(C, 'atomic_write', watched)
    C.compare(c, tmp_path/'copy.json', C.in_this_process, lambda line: seen.append(json.loads((tmp_path/'copy.json').read_text())))
    assert [[r['status'] for r in s['rows']] for s in replaced] == [['waiting']*2, ['done', 'waiting'], ['done', 'failed'], ['done', 'failed']]
    assert [s['finished'] for s in seen] == [False, True]
    assert json.loads((tmp_path/'copy.json').read_text()) == json.loads((tmp_path/'out'/'compare.json').read_text())

def test_processes_of_their_own_and_one_that_dies(toys, boards, tmp_path):
    c = comparison(boards, tmp_path/'out', toy('dies', 'deviation'))
    result = C.compare(c, run=C.one_after_another, report=lambda line: None)
    assert [r['status'] for r in result['rows']] == ['failed', 'done']
    assert 'ended with exit status 9' in result['rows'][0]['reason'] and (Path(c.out)/result['rows'][0]['folder']/'log.txt').exists()
    assert result['rows'][1]['peak_memory_mb'] > 100

def test_killed_and_resumed(toys, boards, tmp_path, monkeypatch):
    "The command is killed while its second method is fitted; the next one finds the first method's row, and ends."
    gate, out = tmp_path/'gate', tmp_path/'out'
    words = ['compare', '--data', str(boards.root), '--methods', ','.join(toy('deviation', 'slow')), '--seeds', '1', '--preset', 'smoke', '--n-boot', '0',
             '--out', str(out), '--json', str(tmp_path/'r.json'), '--workers', '0']
    p = subprocess.Popen([sys.executable, '-m', 'dynad.cli', *words], env=os.environ | {'TOY_GATE': str(gate)}, start_new_session=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 240
    while not Path(f'{gate}.waiting').exists():
        assert p.poll() is None, p.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(.2)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    before = json.loads((tmp_path/'r.json').read_text())
    assert [r['status'] for r in before['rows']] == ['done', 'waiting'] and not before['finished']
    gate.touch()
    said = CliRunner().invoke(app, [*words, '--html', str(tmp_path/'page')])
    assert said.exit_code == 0, said.output
    after = json.loads((tmp_path/'r.json').read_text())
    assert [r['status'] for r in after['rows']] == ['done', 'done'] and after['finished']
    assert after['rows'][0]['fit_minutes'] == before['rows'][0]['fit_minutes'] and after['rows'][1]['resumed']
    d = after['differences'][0]['pro']
    assert d['value'] == 0 and d['low'] is d['high'] is None # the same method, and --n-boot 0
    assert '≥' in C.table_of(after['summary']).loc['slow (toy)', 'fit, min']
    page = (tmp_path/'page'/'index.html').read_text(encoding='utf-8')
    assert 'slow (toy)' in page and 'src="grid.png"' in page and 'slow (toy) less pixel deviation (toy)' in said.output

def test_what_a_method_warns_of_stands_in_its_row(boards, tmp_path, recwarn):
    c = comparison(boards, tmp_path, ('spade',))
    result = C.compare(c, run=C.in_this_process, report=lambda line: None)
    said = 'SPADE: options.K = 50, but there are 19 normal images: all 19 are taken'
    assert result['rows'][0]['warnings'] == [said] and C.table_of(result['summary']).loc['SPADE', 'note'] == said and not [w for w in recwarn if 'SPADE' in str(w.message)]

def test_another_setting_never_meets_an_old_result(boards, tmp_path):
    folders = [comparison(boards, tmp_path, ('padim',), overrides=o).tasks()[0].folder for o in ({}, {'': {'options.dims': 20}}, {'padim': {'options.dims': 30}})]
    assert len(set(folders)) == 3 and comparison(boards, tmp_path, ('padim',)).tasks()[0].folder == folders[0]

@pytest.mark.parametrize('more, said', [
    (dict(methods=('padimm',)), 'padimm.*is not known.*there are .*padim'),
    (dict(methods=('no_such_package:thing',)), 'no_such_package cannot be imported'),
    (dict(methods=('dynad.padim:thing',)), "dynad.padim registers no method 'thing'"),
    (dict(methods=()), 'at least one of each'),
    (dict(methods=('padim',), overrides={'spade': {'options.K': 3}}), 'settings for spade, which is not among the methods padim')])
def test_a_typo_is_answered_before_any_work(more, said, boards, tmp_path):
    with pytest.raises(ConfigError, match=said): comparison(boards, tmp_path, **more)

def test_a_setting_that_a_method_refuses_is_its_row(boards, tmp_path):
    c = comparison(boards, tmp_path, ('padim',), overrides={'': {'options.K': 3}})
    r, = C.compare(c, run=C.in_this_process, report=lambda line: None)['rows']
    assert r['status'] == 'not run' and 'options.K = 3' in r['reason']

@pytest.mark.parametrize('words, said', [(['--seeds', 'x'], "--seeds 'x'"), (['--seeds', '0'], '--seeds 0'), (['--methods', 'padimm'], 'padimm'), (['--set', 'a'], "--set 'a'")])
def test_the_command_refuses_in_one_line(words, said, boards):
    out = CliRunner().invoke(app, ['compare', '--data', str(boards.root), '--methods', 'padim', *words])
    assert out.exit_code == 2 and out.output.startswith('dynad: ') and said in out.output and len(out.output.strip().splitlines()) == 1

def test_words_of_the_command():
    assert seeds_of(' 2 ') == (0, 1) and seeds_of('4,2') == (4, 2)
    assert settings_of(['a.b=1', 'spade:options.x=a:b', 'c=x:y']) == {'': {'a.b': 1, 'c': 'x:y'}, 'spade': {'options.x': 'a:b'}}

def test_condensed_pixels_survive_a_file(tmp_path):
    from dynad.store import load_tensors, save_tensors
    masks = torch.zeros(11, 1, 16, 16, dtype=torch.bool)
    masks[3:, :, 2:7, 3:9] = True
    m = StreamingPixelMetrics().update(torch.rand(11, 1, 16, 16) + .3*masks, masks)
    save_tensors(tmp_path/'m.safetensors', task.packed(m))
    again = task.unpacked(load_tensors(tmp_path/'m.safetensors'))
    assert again.compute() == m.compute() and again.bootstrap(20, 0) == m.bootstrap(20, 0)

def test_a_task_sees_the_gpu_of_its_worker_alone(boards, tmp_path, monkeypatch):
    "On a local cluster with GPUs: each worker's tasks get one, in turn, of those that are visible."
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5')
    dask = pytest.importorskip('distributed')
    with dask.LocalCluster(n_workers=3, threads_per_worker=1, processes=False, dashboard_address=None, resources={'GPU': 1}) as c, dask.Client(c) as client:
        names = {w['name']: address for address, w in client.scheduler_info(n_workers=-1)['workers'].items()}
        seen = {n: client.submit(own_gpu, workers=[a], pure=False).result() for n, a in names.items()}
    assert seen == {0: '3', 1: '5', 2: '3'} and own_gpu() is None
    (tmp_path/'gpu_toy.py').write_text("import os\nfrom dynad.config import ConfigError\nfrom dynad.method import Method, register\n\n@register\n"
        "class Gpu(Method):\n    name = 'gpu_toy'\n    def __init__(self, config): raise ConfigError(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "    train = load = predict_batch = None\n")
    monkeypatch.setenv('PYTHONPATH', f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(task, 'own_gpu', lambda: '5')
    row = task.run_apart(task.Task('gpu_toy:gpu_toy', 0, str(boards.root), str(tmp_path/'row'), preset='smoke'))
    assert (row['status'], row['reason']) == ('not run', '5')

def test_a_fit_that_was_cut_off_is_no_part_of_the_mean_of_whole_ones():
    row = lambda seed, minutes, resumed: {'method': 'a', 'title': 'A', 'seed': seed, 'status': 'done', 'fit_minutes': minutes, 'resumed': resumed}
    [s] = C.summary_of([row(0, .1, True), row(1, 20., False), row(2, 22., False)])
    assert (s['fit_minutes']['mean'], s['resumed']) == (21., False)
    table = C.table_of([s])
    assert table.loc['A', 'fit, min'] == '21.0 ± 1.4' and 'fit, min of 2 of 3 seeds' in table.loc['A', 'note']
    assert C.table_of(C.summary_of([row(0, .1, True)])).loc['A', 'fit, min'] == '≥ 0.1' # nothing better is known

@pytest.mark.parametrize('order', [1, -1])
def test_a_method_with_settings_of_its_own_is_another_row(finished, order):
    _, result, _ = finished # PaDiM has a setting of its own there
    both = C.joined([result, {**result, 'overrides': {}}][::order])
    titles = [s['title'] for s in both['summary']]
    assert len(titles) == len(result['methods']) + 1 and {'PaDiM', 'PaDiM, options.dims=20'} < set(titles)
    assert {d['method'] for d in both['differences']} >= {'padim', 'padim, options.dims=20'}
    assert sum(l.startswith('PaDiM, options.dims=20 less') for l in C.difference_lines(both)) == 2

def test_tasks_on_a_scheduler_by_its_address(toys, boards, tmp_path):
    "As `--scheduler ADDRESS`: the worker is a thread of this process, each task still a process of its own."
    dask = pytest.importorskip('distributed')
    from dynad.cli_compare import runner_of
    lines = []
    with dask.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as c:
        run = runner_of(c.scheduler_address, None)
        result = C.compare(comparison(boards, tmp_path/'out', (*toy('deviation', 'dies'), 'glad')), run=run, report=lines.append)
        assert dict(map_on_cluster(abs, [-3, -4], c.scheduler_address)) == {-3: 3, -4: 4}
        assert [type(e) for _, e in map_on_cluster(len, [3], c.scheduler_address)] == [TypeError]
    assert [r['status'] for r in result['rows']] == ['done', 'failed', 'not run'] and len(lines) == 3
    done, died, _ = result['rows']
    assert done['i_auroc']['value'] > 0 and 'exit status 9' in died['reason']

@pytest.mark.skipif('DYNAD_SLOW' not in os.environ, reason='starts a dask cluster of two processes; set DYNAD_SLOW')
def test_tasks_on_a_cluster(toys, boards, tmp_path):
    pytest.importorskip('distributed')
    from dynad.cli_compare import runner_of
    result = C.compare(comparison(boards, tmp_path/'out', toy('deviation', 'dies', 'scores')), run=runner_of(None, 2), report=lambda line: None)
    assert [r['status'] for r in result['rows']] == ['done', 'failed', 'done']
    assert dict(map_on_cluster(abs, [-3, -4])) == {-3: 3, -4: 4}

def test_what_rows_train_alike_is_trained_once(boards, tmp_path):
    "Static conditioning takes over DynAD's autoencoder and UNet, says so, counts their minutes, and finds what it finds alone."
    quick = {'': {'denoiser.steps': 5, 'latents.finetune_steps': 1, 'adaptation.gamma': 0, 'reconstruction.average': 1, 'fusion.choice': 'fixed'}}
    c = comparison(boards, tmp_path/'both', ('dynad', 'static'), overrides=quick)
    first, second = C.compare(c, run=C.in_this_process, report=lambda _: None)['rows']
    alone = C.compare(comparison(boards, tmp_path/'alone', ('static',), overrides=quick), run=C.in_this_process, report=lambda _: None)['rows'][0]
    assert not first['taken_over'] and not alone['taken_over'] and {'autoencoder', 'denoiser'} <= set(second['taken_over'])
    stage = lambda where, row: next((tmp_path/where/row['folder']/'run'/'stages'/'denoiser').glob('*/stage.json'))
    made, copied, again = (json.loads(stage(*k).read_text()) for k in (('both', first), ('both', second), ('alone', alone)))
    assert made == copied and made['parts'] == again['parts'] and made['seconds'] != again['seconds']
    assert second['fit_minutes'] > made['seconds']/60
    scores = lambda where, row: C.load_tensors(tmp_path/where/row['folder']/'predictions.safetensors')['scores']
    assert torch.equal(scores('both', second), scores('alone', alone))
    note = C.table_of(C.summary_of([first, second]))['note']
    assert note.iloc[0] == '' and 'denoiser' in note.iloc[1] and 'with another row' in note.iloc[1]
