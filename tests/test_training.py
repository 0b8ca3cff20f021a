"The training loop: streams, schedules, checkpoints, resume, stop and errors."
import pytest
import torch
from torch import nn

from dynad.store import StoreError, TrainingStopped, load_tensors, save_tensors
from dynad.training import CHECKPOINT, EMA, Training, TrainingError, one_cycle, rows_of_step, stream, train, warmup_cosine


class Net(nn.Module):
    "A line behind a BatchNorm: weights and buffers."
    def __init__(self):
        super().__init__()
        self.norm, self.line = nn.BatchNorm1d(3), nn.Linear(3, 1)
        self.register_buffer('scratch', torch.zeros(1), persistent=False)
    def forward(self, x): return self.line(self.norm(x))

def training(seed=0, steps=10, lr=.05, ema=None, clip=None, every=4, loss=None):
    torch.manual_seed(3)
    net = Net()
    def objective(module, k):
        x = torch.randn(6, 3, generator=stream('x', seed, k)) + 1
        return (module(x) - x.sum(1, keepdim=True)).square().mean()
    return Training('line', 'the line', net, torch.optim.AdamW(net.parameters()), loss or objective, steps, lambda k: one_cycle(k, steps, lr),
                    lambda: {'seed': seed, 'steps': steps, 'lr': lr}, ema=EMA(net, ema) if ema is not None else None, clip=clip, checkpoint_every=every)

def state(t): return {k: v.clone() for k, v in t.module.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

class Cut(BaseException): pass # as Ctrl-C: other errors of a callback do not end a training
def cut_after(k):
    def callback(step, loss):
        if step == k: raise Cut
    return callback


def test_streams_are_functions_of_their_key():
    draw = lambda *key: torch.rand(4, generator=stream(*key)).tolist()
    assert draw('a', 0, 1) == draw('a', 0, 1)
    assert len({tuple(draw(*key)) for key in (('a', 0, 1), ('a', 1, 0), ('b', 0, 1), ('a', 0, 2), ('a', 0))}) == 5

@pytest.mark.parametrize('seed, first', [(0, stream('step', 0, 0).initial_seed()), (2**70, stream('step', 2**70, 0).initial_seed())])
def test_any_seed_fits(seed, first): assert 0 <= first < 2**56 and stream('step', seed, 0).initial_seed() == first

def test_rows_repeat_in_rounds():
    rows = torch.cat([rows_of_step(k, 5, 4, seed=2) for k in range(5)])
    assert all(sorted(rows[i:i + 5].tolist()) == list(range(5)) for i in range(0, 20, 5))

def test_schedules_end_near_zero():
    assert one_cycle(99, 100, 1.) < 1e-5 and warmup_cosine(99, 100) < 1e-5 and max(warmup_cosine(k, 100) for k in range(100)) == 1

@pytest.mark.parametrize('ema, clip', [(None, None), (.9, 1.)])
@pytest.mark.parametrize('k, resumed', [(1, 0), (3, 4), (8, 8)])
def test_resume_is_exact_with_buffers(tmp_path, ema, clip, k, resumed):
    whole, cut, again = (training(ema=ema, clip=clip) for _ in range(3))
    log = train(whole, tmp_path/'whole.safetensors', progress=False)
    with pytest.raises(Cut): train(cut, tmp_path/'cut.safetensors', progress=False, callback=cut_after(k))
    with torch.no_grad(): again.module.line.weight.fill_(7)
    if resumed:
        out = train(again, tmp_path/'cut.safetensors', progress=False)
        assert (out.resumed_at, out.losses) == (resumed, log.losses) and same(state(again), state(whole))
        assert same(load_tensors(tmp_path/'whole.safetensors'), load_tensors(tmp_path/'cut.safetensors'))
    else: assert not (tmp_path/'cut.safetensors').exists()

def test_what_a_checkpoint_holds(tmp_path):
    train(training(), tmp_path/CHECKPOINT, progress=False)
    kinds = {n.split('.')[0] for n in load_tensors(tmp_path/CHECKPOINT)}
    assert kinds == {'losses', 'weights', 'buffers', 'step', 'exp_avg', 'exp_avg_sq'} and 'buffers.scratch' not in load_tensors(tmp_path/CHECKPOINT)

def test_result_is_the_average_only_when_asked(tmp_path):
    plain, averaged = training(), training(ema=.9)
    train(plain, progress=False); train(averaged, progress=False)
    assert not torch.equal(plain.module.line.weight, averaged.module.line.weight)
    assert torch.equal(averaged.module.line.weight, averaged.ema.shadow['line.weight'])

def test_stop_writes_a_checkpoint_also_after_the_last_step(tmp_path):
    with pytest.raises(TrainingStopped, match='training of the line stopped after step 0 of 10; .*lets the next run go on'):
        train(training(), tmp_path/CHECKPOINT, progress=False, should_stop=lambda: True)
    assert train(training(), tmp_path/CHECKPOINT, progress=False).resumed_at == 1
    with pytest.raises(TrainingStopped, match='stopped after step 0 of 10$'): train(training(), progress=False, should_stop=lambda: True)
    with pytest.raises(TrainingStopped, match='stopped after step 0 of 1; '): train(training(steps=1), tmp_path/'one.safetensors', progress=False, should_stop=lambda: True)
    assert train(training(steps=1), tmp_path/'one.safetensors', progress=False, should_stop=lambda: True).resumed_at == 1

@pytest.mark.parametrize('change, text', [(dict(seed=1), 'seed = 0, now 1'), (dict(lr=.1), 'lr = 0.05, now 0.1'), (dict(steps=12), 'steps = 10, now 12')])
def test_checkpoint_of_another_training(tmp_path, change, text):
    train(training(), tmp_path/CHECKPOINT, progress=False)
    with pytest.raises(TrainingError, match=f'{CHECKPOINT}: a checkpoint of another training .{text}.*delete it'): train(training(**change), tmp_path/CHECKPOINT, progress=False)

def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path/CHECKPOINT).write_bytes(b'torn')
    with pytest.raises(StoreError, match='not a whole safetensors file'): train(training(), tmp_path/CHECKPOINT, progress=False)
    save_tensors(tmp_path/CHECKPOINT, {'x': torch.ones(1)})
    with pytest.raises(TrainingError, match="no checkpoint of the line's training; delete it and run again"): train(training(), tmp_path/CHECKPOINT, progress=False)

def test_nan_ends_it_and_keeps_the_last_checkpoint(tmp_path):
    t = training(); good = t.loss
    t.loss = lambda module, k: good(module, k)*(float('nan') if k == 6 else 1)
    with pytest.raises(TrainingError, match=r'training of the line: the loss is nan at step 6 of 10, learning rate .*; lower the learning rate \(the last checkpoint is kept in'):
        train(t, tmp_path/CHECKPOINT, progress=False)
    assert len(load_tensors(tmp_path/CHECKPOINT)['losses']) == 4

def test_large_identities_are_computed_once(tmp_path):
    t, calls = training(), []
    t = Training(**{**vars(t), 'identity': lambda: calls.append(1) or {'a': 1}})
    train(t, tmp_path/CHECKPOINT, progress=False)
    assert calls == [1]
    train(training(), progress=False)

def test_the_gradient_is_clipped():
    t, norms = training(clip=.01, steps=1), []
    t.optimizer.register_step_pre_hook(lambda *a: norms.append(torch.stack([p.grad.norm() for p in t.module.parameters()]).norm().item()))
    train(t, progress=False)
    assert norms[0] <= .0101
