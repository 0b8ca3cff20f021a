"What stands beside a training (pictures, progress bars, trackers, callbacks, state files) fails, and the model is the same."
import io, os, sys, threading, time, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from PIL import Image

from dynad.config import make_config
from dynad.data import open_folder
from dynad.detector import DynAD
from dynad.inspection import losses_figure
from dynad.guard import Aside, Console, SkippedWarning, Stop, aside, tqdm
from dynad.launch import accelerator
from dynad.live import Background
from dynad.own_images import OwnImages
from dynad.store import TrainingStopped
from dynad.training import train
from dynad.view import StateFile
from test_training import same, state, training

TINY = {'latents.finetune_steps': 2, 'denoiser.steps': 4, 'adaptation.gamma': 1, 'adaptation.batch': 4}

def parts(folder, n=12):
    "Small pictures of a striped part."
    folder.mkdir(parents=True)
    for i in range(n):
        r = np.random.default_rng(i)
        x = 120 + 40*np.sin((np.mgrid[:64, :64][1] + r.uniform(0, 3))/4) + r.normal(0, 3, (64, 64))
        Image.fromarray(x.clip(0, 255).astype('uint8')).save(folder/f'{i}.png')
    return folder


def test_an_error_is_told_once_and_only_stop_and_interrupts_pass():
    call = Aside('the curve', tries=2)
    seen = []
    def fails(e): seen.append(e); raise e
    with pytest.warns(SkippedWarning, match=r'the curve failed and is left out \(OSError: full\); the work goes on') as told:
        for _ in range(3): assert call(fails, OSError('full')) is None
        call(fails, KeyError('x'))
    assert len(told) == 2 and len(seen) == 8
    for e in (KeyboardInterrupt(), Stop('enough'), TrainingStopped('enough')):
        with pytest.raises(type(e)): call(fails, e)

def test_warnings_that_are_errors_do_not_end_the_work_either():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert aside('the note')(int)('x') is None

def test_a_warning_that_goes_to_a_closed_console(monkeypatch):
    closed = io.StringIO(); closed.close()
    monkeypatch.setattr(sys, 'stderr', closed)
    def shown(*a, **k): sys.stderr.write('x')
    monkeypatch.setattr(warnings, 'showwarning', shown)
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        assert Aside('the note')(int, 'x') is None

def closed(): s = io.StringIO(); s.close(); return s
def ascii_only(): return io.TextIOWrapper(io.BytesIO(), 'ascii', write_through=True)
def full(): return open('/dev/full', 'w', buffering=1)

@pytest.mark.parametrize('stream', [closed, ascii_only, full, lambda: None], ids=['closed', 'ascii', 'full', 'none'])
def test_a_training_does_not_need_its_console(stream, monkeypatch):
    if stream is full and not Path('/dev/full').exists(): pytest.skip('no /dev/full here')
    want, t = training(), training()
    t.name = 'φ' # a letter that an ASCII console lacks
    train(want, progress=False)
    out = stream()
    monkeypatch.setattr(sys, 'stderr', out)
    train(t)
    bars = [list(tqdm(range(3), desc='φ → x')) for _ in range(2)]
    monkeypatch.undo()
    assert same(state(want), state(t)) and bars == [[0, 1, 2]]*2
    if stream is ascii_only: assert b'10/10' in out.buffer.getvalue() and b'?' in out.buffer.getvalue()
    if stream is full: Console(out).flush(); os.close(out.fileno()) # closing it would try to write once more

def test_errors_of_the_loop_itself_pass_the_bar():
    def items(): yield 1; raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): list(tqdm(items(), disable=True))

class Failing(GeneralTracker):
    "A tracker whose disk is full from step 3."
    name, requires_logging_directory, tracker = 'failing', False, None
    def __init__(self): super().__init__(); self.kept = []
    def store_init_configuration(self, values): pass
    def log(self, values, step, **kwargs):
        if step >= 3: raise OSError(28, 'No space left on device')
        self.kept.append(step)
    def finish(self): raise ValueError('I/O operation on closed file')

def test_a_tracker_that_fails_in_the_middle(tmp_path):
    want, t, bad = training(), training(), Failing()
    train(want, progress=False)
    accelerator('no', 'cpu')
    acc = Accelerator(cpu=True, log_with=[bad], project_dir=str(tmp_path))
    with pytest.warns(SkippedWarning, match='the tracker failing of .* failed and is left out') as told: train(t, acc=acc, progress=False)
    assert same(state(want), state(t)) and bad.kept == [0, 1, 2] and len([w for w in told if w.category is SkippedWarning]) == 2

@pytest.mark.parametrize('name', ['tensorboard'])
def test_a_tracker_that_cannot_begin(tmp_path, name):
    pytest.importorskip(name)
    (tmp_path/'logs').write_text('a file')
    t = training()
    with pytest.warns(SkippedWarning, match='logs'): train(t, acc=accelerator('no', 'cpu', (name,), tmp_path/'logs'), progress=False)

def test_a_tensorboard_that_is_closed_in_the_middle(tmp_path):
    pytest.importorskip('tensorboard')
    want, t = training(), training()
    train(want, progress=False)
    acc = accelerator('no', 'cpu', ('tensorboard',), tmp_path/'logs')
    def close(k, loss):
        if k == 4: acc.trackers[0].writer.file_writer.event_writer._async_writer.close() # as when its thread has died of a full disk
    with pytest.warns(SkippedWarning, match='the tracker tensorboard'): train(t, acc=acc, progress=False, callback=close)
    assert same(state(want), state(t))

def test_a_callback_that_fails_in_every_stage_changes_nothing(tmp_path):
    data, seen = open_folder(parts(tmp_path/'good')), []
    def fails(stage, step, loss): seen.append(stage); raise RuntimeError('no picture')
    plain = DynAD(make_config('smoke', TINY)).fit(data, tmp_path/'a', progress=False)
    with pytest.warns(SkippedWarning) as told: other = DynAD(make_config('smoke', TINY)).fit(data, tmp_path/'b', progress=False, callback=fails)
    assert set(seen) == {'autoencoder', 'denoiser', 'phi'} and plain.parts.hashes == other.parts.hashes and plain.decision == other.decision
    assert {s for s in set(seen) for w in told if f'the callback of the stage {s} failed' in str(w.message)} == set(seen)
    def stops(stage, step, loss):
        if stage == 'denoiser': raise TrainingStopped('enough')
    with pytest.raises(TrainingStopped): DynAD(make_config('smoke', TINY)).fit(data, tmp_path/'c', progress=False, callback=stops)

def test_a_state_file_that_cannot_be_written(tmp_path):
    (tmp_path/'taken').write_text('a file')
    file = StateFile(tmp_path/'taken'/'view.json')
    with pytest.warns(SkippedWarning, match='keeping the view in .*taken.* failed'): file.write({'lam': .5})
    assert file.read()[0] == {}

def test_a_thread_survives_a_view_that_cannot_show_its_error():
    made = []
    def step(): made.append(1); raise ValueError('wrong')
    def failed(e): raise RuntimeError('the view is gone')
    b = Background(step, failed)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter('always')
        for _ in range(2): b.poke(); assert b.wait(10)
    b.close(); b.join(10)
    assert len(made) == 2


def user_draws(until, errors, at):
    "A notebook cell: figures with formulas and a logarithmic axis, without any lock."
    k = 0
    while not until():
        fig = Figure(figsize=(2, 2)); ax = fig.subplots(); k += 1
        ax.plot(np.arange(1, 50)); ax.set_yscale('log'); ax.set_title(rf'$\lambda_{{{k},{at}}}$ and $10^{{{k}}}$')
        try: fig.savefig(io.BytesIO(), dpi=30)
        except Exception as e: errors.append(e)
        time.sleep(.05)

def fit_while_drawing(folder, k):
    "Two widgets fit, each draws after every step, while two threads draw; returns the widgets and the errors of the threads."
    settings = TINY | {'seed': k, 'adaptation.gamma': 0}
    widgets = [OwnImages(folder/str(k)/str(j), normal=folder/'good', preset='smoke', overrides=settings) for j in range(2)]
    for w in widgets:
        def always(*step, w=w): w._drawn = 0; w.step_done(*step)
        w.model.step_done = always
        w.fit()
    errors, busy = [], lambda: any(w.busy('fit') for w in widgets)
    threads = [threading.Thread(target=user_draws, args=(lambda: not busy(), errors, j)) for j in range(2)]
    for t in threads: t.start()
    for w in widgets: w.wait(600)
    for t in threads: t.join(60)
    return widgets, errors

def test_pictures_are_drawn_while_two_fits_run(tmp_path):
    "The widgets' own fits: ten times with DYNAD_SLOW=1, else once."
    parts(tmp_path/'good')
    for k in range(10 if os.environ.get('DYNAD_SLOW') == '1' else 1):
        widgets, errors = fit_while_drawing(tmp_path, k)
        assert errors == []
        for w in widgets:
            assert w.message.value == '' and w.model.detector is not None and w.loss_curve.value[:4] == b'\x89PNG', w.message.value
            assert {s: len(v) for s, v in w.model.progress.losses.items()} == {'autoencoder': 2, 'denoiser': 4, 'phi': 0}
            w.close()

def test_pictures_are_drawn_while_two_trainings_run():
    "Ten times: two trainings draw their curve after every step, two cells draw formulas meanwhile; no picture fails on either side."
    drawn, errors, results = [], [], []
    def work(t):
        losses = []
        def draws(k, loss):
            losses.append(loss)
            try: drawn.append(losses_figure({'denoiser': [*losses, loss]}).savefig(io.BytesIO(), dpi=30))
            except Exception as e: errors.append(e); raise
        train(t, progress=False, callback=draws)
        results.append(state(t))
    for k in range(10):
        workers = [threading.Thread(target=work, args=(training(steps=2),)) for _ in range(2)]
        cells = [threading.Thread(target=user_draws, args=(lambda: not any(w.is_alive() for w in workers), errors, j)) for j in range(2)]
        for t in workers + cells: t.start()
        for t in workers + cells: t.join(60)
    assert errors == [] and len(drawn) == 40 and len(results) == 20 and all(same(results[0], r) for r in results)

def test_threads_share_the_parser_of_formulas():
    "Many at once: without the lock most of these runs end in a ParseException."
    errors, n = [], [0]*6
    def draw(j):
        for i in range(12):
            try: MathTextParser('path').parse(rf'$\sqrt{{x_{{{i},{j}}}}} + \frac{{{i}}}{{{j} + 1}} \in 10^{{{i}}}$', 72, None)
            except Exception as e: errors.append(e)
            n[j] += 1
    threads = [threading.Thread(target=draw, args=(j,)) for j in range(6)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert errors == [] and n == [12]*6

def test_a_curve_that_cannot_be_drawn_is_left_out(tmp_path, monkeypatch):
    import dynad.own_images as room
    parts(tmp_path/'good')
    def broken(*args): raise ValueError('ParseException')
    monkeypatch.setattr(room, 'losses_figure', broken)
    w = OwnImages(tmp_path/'own', normal=tmp_path/'good', preset='smoke', overrides=TINY | {'adaptation.gamma': 0})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        w.fit().wait(120)
    assert w.model.detector is not None and w.message.value == '' and 'fitted on' in w.status.value
    w.close()

def test_networks_built_in_threads_have_the_weights_of_their_seed():
    "φ draws from the same generator of the process, before its own weights are loaded."
    from dynad.denoiser import make_unet
    from dynad.features import load_features
    from dynad.config import DenoiserSettings
    s = DenoiserSettings(widths=(32,), attention=(), layers_per_block=1, heads=4)
    build = lambda seed: make_unet(s, 4, 8, seed=seed).state_dict()
    alone, found, busy = {k: build(k) for k in range(3)}, {}, threading.Event()
    def others():
        while not busy.is_set(): load_features(make_config('smoke').features)
    def work(seed): found[seed] = [build(seed) for _ in range(6)]
    beside, workers = threading.Thread(target=others), [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for t in (beside, *workers): t.start()
    for t in workers: t.join(60)
    busy.set(); beside.join(60)
    assert all(torch.equal(alone[k][n], v) for k, many in found.items() for sd in many for n, v in sd.items()) and len(found) == 3
