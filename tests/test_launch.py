"Where a training runs: precision and device renewed, trackers, torch.compile, and `accelerate launch` with two processes."
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState

from dynad.config import ConfigError, DenoiserSettings, DiffusionSettings, make_config
from dynad.denoiser import DenoiserError, make_unet, set_compiled, train_denoiser
from dynad.detector import DynAD
from dynad.diffusion import make_schedule
from dynad.launch import accelerator, check_trackers, processes, run_collectively
from dynad.method import trained_settings
from dynad.store import Store, load_tensors

TINY = DenoiserSettings(widths=(16,), attention=(), heads=4, layers_per_block=1, epochs=None, steps=3, batch=4, lr=2e-3, ema=.9)
LATENTS = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))
def build(): return make_unet(TINY, 2, 8)
def train(unet, workdir=None, settings=TINY, **kw): return train_denoiser(unet, LATENTS, make_schedule(DiffusionSettings()), settings, 0, workdir, device='cpu', progress=False, **kw)

def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return [(e.step, e.value) for e in EventAccumulator(str(folder)).Reload().Scalars(tag)]

# state

def test_precision_is_renewed_and_the_processes_are_kept():
    before = processes('cpu')
    assert [accelerator(p, 'cpu').mixed_precision for p in ('no', 'bf16', 'no')] == ['no', 'bf16', 'no']
    assert (PartialState().num_processes, PartialState().device) == (before.num_processes, before.device) == (1, torch.device('cpu'))

def test_one_process_makes_a_stage_as_ever(tmp_path):
    store, calls = Store(tmp_path), []
    def make(work): calls.append(work); return {'x': torch.ones(2)}
    assert run_collectively(store, 's', {'a': 1}, make) == run_collectively(store, 's', {'a': 1}, make) == store.path('s', {'a': 1})
    assert len(calls) == 1

# trackers

def test_tensorboard_keeps_loss_and_rate_of_every_step(tmp_path):
    u = build(); log = train(u, tmp_path/'work', trackers=('tensorboard',), logs=tmp_path/'logs')
    got = scalars(tmp_path/'logs'/'denoiser', 'loss')
    assert [s for s, _ in got] == [0, 1, 2] and [v for _, v in got] == pytest.approx(log.losses, rel=1e-6)
    assert [v for _, v in scalars(tmp_path/'logs'/'denoiser', 'learning rate')] == pytest.approx([2e-3]*3)
    v = build(); train(v)
    assert v.weights_hash == u.weights_hash # a log changes nothing

def test_no_tracker_writes_nothing(tmp_path):
    train(build(), trackers=(), logs=tmp_path/'logs')
    assert not list(tmp_path.iterdir())

def test_a_missing_or_unknown_tracker_is_named(tmp_path):
    for name in ('mlflow', 'wandb'):
        try: __import__(name)
        except ImportError:
            with pytest.raises(ConfigError, match=f'trackers: {name} is asked for, but its package is not installed: pip install {name}'): train(build(), tmp_path, trackers=(name,), logs=tmp_path/'logs')
    with pytest.raises(ConfigError, match="'neptune' is not known; allowed: tensorboard, mlflow, wandb"): check_trackers(('neptune',))
    with pytest.raises(ConfigError, match=r'trackers.0 = .neptune.'): make_config('smoke', trackers=('neptune',))
    with pytest.raises(DenoiserError, match='need a folder: give logs'): train(build(), trackers=('tensorboard',))
    assert not list(tmp_path.iterdir())

def test_trackers_and_compile_are_in_no_key_and_in_the_file():
    plain, more = make_config('smoke'), make_config('smoke', {'denoiser.compile': True}, trackers=('tensorboard',))
    assert trained_settings(DynAD, plain) == trained_settings(DynAD, more)
    from dynad.config import dump_config, parse_config
    assert parse_config(json.loads(dump_config(more))) == more and more.trackers == ('tensorboard',)

def test_a_run_can_be_opened_compiled(smoke):
    model, run = smoke
    assert DynAD.open(run, {'denoiser.compile': True}, progress=False).parts.hashes == model.parts.hashes
    with pytest.raises(ConfigError, match='denoiser: cannot be changed on a fitted run'): DynAD.open(run, {'denoiser.lr': .5})

# torch.compile

def test_compiling_renames_no_weight_and_changes_no_answer():
    u, v, t = build(), set_compiled(build(), backend='aot_eager'), torch.tensor([0, 5, 79, 500, 999])
    assert list(u.state_dict()) == list(v.state_dict()) and u.weights_hash == v.weights_hash
    with torch.no_grad(): assert torch.allclose(u(LATENTS, t), v(LATENTS, t), atol=1e-6)
    assert (v.calls, v.samples) == (1, 5)
    assert v.unet._compiled_call_impl is not None and set_compiled(v, False).unet._compiled_call_impl is None

slow = pytest.mark.skipif(os.environ.get('DYNAD_SLOW') != '1', reason='takes a minute and more; DYNAD_SLOW=1 runs it')

@slow
def test_training_with_inductor(tmp_path):
    u, v = build(), build()
    a, b = train(u, tmp_path/'a'), train(v, tmp_path/'b', TINY.model_copy(update={'compile': True}))
    assert b.losses == pytest.approx(a.losses, rel=1e-4) and list(v.state_dict()) == list(u.state_dict())
    assert load_tensors(tmp_path/'a'/'checkpoint.safetensors').keys() == load_tensors(tmp_path/'b'/'checkpoint.safetensors').keys()

@slow
def test_no_compiler_is_named(tmp_path):
    code = '''
import sys
sys.path.insert(0, sys.argv[1])
import test_launch as t
try: t.train(t.build(), settings=t.TINY.model_copy(update={'compile': True}))
except t.DenoiserError as e: print(e)
'''
    if torch.cuda.is_available(): pytest.skip('this machine has a GPU, where triton compiles')
    env = {**os.environ, 'CXX': str(tmp_path/'no-such-compiler'), 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path/'cache')}
    done = subprocess.run([sys.executable, '-c', code, str(Path(__file__).parent)], capture_output=True, text=True, env=env, timeout=300)
    assert 'denoiser.compile = true, but torch.compile fails here' in done.stdout and 'set denoiser.compile = false' in done.stdout, done.stdout + done.stderr[-2000:]

# gradient checkpointing

def test_gradients_with_and_without_checkpointing_are_equal():
    t, noise, abar = torch.tensor([0, 5, 79, 500, 999]), torch.ones_like(LATENTS), make_schedule(DiffusionSettings()).abar
    from dynad.denoiser import eps_loss
    out = []
    for on in (False, True):
        u = build().train()
        if on: u.unet.enable_gradient_checkpointing()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = eps_loss(u, LATENTS, t, noise, abar).mean()
        loss.backward()
        out.append((loss.detach(), [p.grad for p in u.parameters()], sum(kept)))
    (la, ga, ka), (lb, gb, kb) = out
    assert torch.equal(la, lb) and all(torch.equal(a, b) for a, b in zip(ga, gb))
    assert kb < ka # and less is kept for the way back

# several processes

JOB = '''
import os, sys
from pathlib import Path
if __name__ == '__main__':
    data, run, cut, precision = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    rank, written = int(os.environ['RANK']), []
    def watch(event, args): # every file opened for writing, every rename, below the run
        if event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+') or event == 'os.rename':
            if str(args[0]).startswith(run): written.append((event, str(args[0])))
    sys.addaudithook(watch)
    from conftest import SMOKE
    from dynad.config import make_config
    from dynad.data import open_dataset
    from dynad.detector import DynAD
    from dynad.launch import processes
    steps = []
    def callback(stage, k, loss):
        steps.append(k)
        if k == cut: os._exit(9)
    cfg = make_config('smoke', SMOKE, device='cpu', precision=precision, trackers=('tensorboard',))
    model = DynAD(cfg).fit(open_dataset(data), run, callback=callback)
    (Path(run).parent/f'rank{rank}.txt').write_text(f"{processes('cpu').num_processes}|{steps[0]}|{steps[-1]}|{model.parts.hashes['denoiser']}|{model.decision.pixel_threshold!r}|{written if rank else len(written)}")
'''

def launch(tmp_path, boards, cut=-1, precision='no'):
    (tmp_path/'job.py').write_text(JOB)
    # `accelerate launch --cpu` starts several processes through mpirun only; its launcher for several GPUs is torchrun, which the variable turns to the CPU
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true', 'PYTHONPATH': str(Path(__file__).parent)}
    command = [str(Path(sys.executable).parent/'accelerate'), 'launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
    done = subprocess.run([*command, str(tmp_path/'job.py'), str(boards.root), str(tmp_path/'run'), str(cut), precision], capture_output=True, text=True, env=env, timeout=600)
    return done

@slow
def test_accelerate_launch_fits_as_one_process_does_and_resumes(tmp_path, boards, smoke):
    cut = launch(tmp_path, boards, cut=24)
    assert cut.returncode != 0 and not (tmp_path/'run'/'run.json').exists() and not (tmp_path/'rank0.txt').exists(), cut.stderr[-4000:]
    (checkpoint,) = (tmp_path/'run'/'stages'/'denoiser').glob('*.part/checkpoint.safetensors') if (tmp_path/'run').exists() else pytest.fail(cut.stderr[-4000:])
    assert len(load_tensors(checkpoint)['losses']) == 20
    done = launch(tmp_path, boards)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [(tmp_path/f'rank{r}.txt').read_text().split('|') for r in (0, 1)]
    for world, first, last, *_ in ranks: assert (world, first, last) == ('2', '20', '39') # goes on at the checkpoint
    assert ranks[0][3:5] == ranks[1][3:5]                                                 # both end with the same detector
    assert int(ranks[0][5]) > 0 and ranks[1][5] == '[]'                                   # only the first has written
    assert [s for s, _ in scalars(tmp_path/'run'/'logs'/'denoiser', 'loss')][-20:] == list(range(20, 40))
    # the batch of a step is split, not doubled: one process gives the same, up to rounding that AdamW blows up (see test_denoiser)
    one, run = smoke
    two = DynAD.open(tmp_path/'run', progress=False)
    (a,), (b,) = ([load_tensors(f)['losses'] for f in (r/'stages'/'denoiser').glob('*/data.safetensors')] for r in (run, tmp_path/'run'))
    assert len(a) == len(b) == 40 and torch.allclose(a, b, rtol=5e-3)
    z, t = one.training.z0[:4], torch.tensor([5, 79, 300, 900])
    with torch.no_grad(): assert (one.parts.denoiser(z, t) - two.parts.denoiser(z, t)).abs().mean() < .02
    for p, q in zip(one.parts.denoiser.parameters(), two.parts.denoiser.parameters()): assert (p - q).abs().mean() < .02
    assert [p.name for p in (tmp_path/'run'/'stages'/'denoiser').iterdir() if p.suffix == '.part'] == []

@slow
def test_precision_between_two_processes(tmp_path, boards):
    done = launch(tmp_path, boards, precision='bf16')
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path/'rank0.txt').read_text().split('|')[3] == (tmp_path/'rank1.txt').read_text().split('|')[3]

def test_a_folder_named_like_a_tracker_is_none(tmp_path, monkeypatch):
    "W&B leaves a folder `wandb` in the working directory, which Python would import as a namespace."
    if importlib.util.find_spec('wandb'): pytest.skip('wandb is installed')
    (tmp_path/'wandb').mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec('wandb')
    with pytest.raises(ConfigError, match='wandb is asked for, but its package is not installed'): check_trackers(('wandb',))
