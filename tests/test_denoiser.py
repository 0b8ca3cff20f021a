"The network, its objective and its training: resume, determinism, errors."
import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings as hsettings, strategies as st
from torch import nn

from dynad import denoiser as D
from dynad.config import DenoiserSettings, DiffusionSettings, make_config
from dynad.denoiser import (WEIGHTS, Denoiser, DenoiserError, count_parameters, draw_batch, eps_loss, learning_rate,
                            load_denoiser, make_unet, save_denoiser, train_denoiser)
from dynad.diffusion import make_schedule
from dynad.store import StoreError, TrainingStopped, load_tensors, save_tensors
from dynad.training import CHECKPOINT, EMA

SCHEDULE = make_schedule(DiffusionSettings())
BASE = dict(widths=(16, 32), attention=(1,), heads=4, layers_per_block=1, epochs=None, steps=6, batch=4, lr=2e-3, lr_schedule='one_cycle', ema=.9, checkpoint_every=2)
def tiny(**kw): return DenoiserSettings(**(BASE | kw))
def build(s=None, seed=0): return make_unet(s or tiny(), 2, 8, seed=seed)
def gen(seed=0): return torch.Generator().manual_seed(seed)
LATENTS = torch.randn(5, 2, 8, 8, generator=gen())
def train(unet, s, workdir, seed=0, latents=LATENTS, **kw): return train_denoiser(unet, latents, SCHEDULE, s, seed, workdir, device='cpu', progress=False, **kw)

class Cut(BaseException): pass # as Ctrl-C: other errors of a callback do not end a training
def cut_after(k):
    def callback(step, loss):
        if step == k: raise Cut
    return callback

# the network

def test_shapes_counters_and_eval_mode():
    u = build()
    assert not u.training and (u.calls, u.samples) == (0, 0)
    with torch.no_grad(): out = u(torch.zeros(3, 2, 8, 8), torch.tensor([0, 5, 999])); u(torch.zeros(1, 2, 8, 8), torch.tensor([3]))
    assert out.shape == (3, 2, 8, 8) and (u.calls, u.samples) == (2, 4)

def test_each_sample_has_its_own_step():
    u, z, t = build(), torch.randn(3, 2, 8, 8, generator=gen()), torch.tensor([0, 79, 900])
    with torch.no_grad():
        rows = torch.cat([u(z[i:i+1], t[i:i+1]) for i in range(3)])
        assert torch.allclose(u(z, t), rows, atol=1e-5)
        assert not torch.allclose(u(z, t), u(z, t.flip(0)), atol=1e-4)

def test_initial_weights_come_from_the_seed_alone():
    torch.manual_seed(1); a = build(seed=3); before = torch.rand(1)
    torch.manual_seed(1); after = torch.rand(1)
    assert torch.equal(before, after) # the global generator is left as it was
    assert a.weights_hash == build(seed=3).weights_hash != build(seed=4).weights_hash

def test_heads_are_equal_at_every_level():
    u = make_unet(tiny(widths=(16, 32, 64), attention=(0, 1, 2)), 2, 8)
    seen = {(m.heads, m.inner_dim) for m in u.modules() if isinstance(m, D.Attention)}
    assert seen == {(4, 16), (4, 32), (4, 64)}
    with torch.no_grad(): assert u(torch.zeros(1, 2, 8, 8), torch.tensor([1])).isfinite().all()

@pytest.mark.parametrize('preset,channels,size,million', [('small', 4, 16, 6.47), ('paper', 4, 32, 256.4)])
def test_sizes_of_the_presets(preset, channels, size, million):
    with torch.device('meta'): u = make_unet(make_config(preset).denoiser, channels, size)
    assert abs(count_parameters(u)/1e6 - million) < .02*million

@pytest.mark.parametrize('size', [6, 2, 7])
def test_latent_too_small(size):
    with pytest.raises(DenoiserError, match=f'3 levels and halves the latent 2 times, but its side is {size}, no multiple of 4: use fewer widths'):
        make_unet(tiny(widths=(16, 16, 32)), 2, size)

# patches

def test_patches_are_a_permutation():
    "One place of the network is a square of the latent, all its channels together, and nothing mixes before the network."
    u, z, t = make_unet(tiny(patch=2), 2, 8), LATENTS, torch.arange(5)
    assert (u.latent_channels, u.latent_size, u.unet.config.in_channels, u.unet.config.sample_size) == (2, 8, 8, 4)
    squares = torch.stack([z[:, c, i::2, j::2] for c in (0, 1) for i in (0, 1) for j in (0, 1)], 1)
    with torch.no_grad(): out, ref = u(z, t), u.unet(squares, t).sample
    for k, (c, i, j) in enumerate((c, i, j) for c in (0, 1) for i in (0, 1) for j in (0, 1)): assert torch.equal(out[:, c, i::2, j::2], ref[:, k])

def test_patches_are_trained_kept_and_resumed(tmp_path):
    s = tiny(patch=2, steps=6)
    whole = make_unet(s, 2, 8); train(whole, s, tmp_path/'whole')
    with pytest.raises(Cut): train(make_unet(s, 2, 8), s, tmp_path/'cut', callback=cut_after(3))
    again = make_unet(s, 2, 8); assert train(again, s, tmp_path/'cut').resumed_at == 4
    save_denoiser(again, tmp_path/'unet')
    v = load_denoiser(tmp_path/'unet')
    assert whole.weights_hash == again.weights_hash == v.weights_hash and v.patch == 2
    with torch.no_grad(): assert torch.equal(v(LATENTS, torch.arange(5)), whole(LATENTS, torch.arange(5)))
    train(build(), tiny(), tmp_path/'plain')
    with pytest.raises(DenoiserError, match='patch = None, now 2'): train(make_unet(s, 2, 8), s, tmp_path/'plain')
    (tmp_path/'unet'/'config.json').write_text((tmp_path/'unet'/'config.json').read_text().replace('"patch": 2', '"patch": 0'))
    with pytest.raises(DenoiserError, match='config.json: patch = 0; allowed: a whole number from 1'): load_denoiser(tmp_path/'unet')

def test_patches_that_do_not_fit():
    with pytest.raises(DenoiserError, match='denoiser.patch = 3 does not divide the side of the latent, 8: choose a divisor'): build(tiny(patch=3))
    with pytest.raises(DenoiserError, match=r'halves the latent 1 times, but its side is 1 \(in patches of 8\), no multiple of 2'): build(tiny(patch=8))

def test_without_patches_no_key_changes():
    "Stages and runs made before there was `patch` are found again."
    assert 'patch' not in tiny().model_dump() and 'patch' not in make_config('small').model_dump(mode='json')['denoiser'] and tiny(patch=2).model_dump()['patch'] == 2
    assert DenoiserSettings(**tiny(patch=4).model_dump()) == tiny(patch=4) and tiny().patch == 1

def test_bad_attention_heads_and_widths():
    with pytest.raises(DenoiserError, match=r'there is no level 2; denoiser.widths = \[16, 32\]'): build(tiny(attention=(2,)))
    with pytest.raises(DenoiserError, match='denoiser.heads = 5 does not divide the width 32 of level 1'): build(tiny(heads=5))
    with pytest.raises(DenoiserError, match='has no level'): build(tiny(widths=()))

# the objective

def test_loss_of_known_answers():
    z, eps = LATENTS, torch.randn(LATENTS.shape, generator=gen(1))
    t = torch.tensor([0, 1, 79, 500, 999])
    assert eps_loss(lambda z_t, t: eps, z, t, eps, SCHEDULE.abar).abs().max() == 0
    assert torch.allclose(eps_loss(lambda z_t, t: eps + 2, z, t, eps, SCHEDULE.abar), torch.full((5,), 4.))

def test_gradient_checkpointing_changes_nothing(tmp_path):
    hashes = []
    for on in (False, True):
        u = build(); log = train(u, tiny(gradient_checkpointing=on), None)
        hashes.append((u.weights_hash, tuple(log.losses)))
        assert not any(getattr(m, 'gradient_checkpointing', False) for m in u.modules())
    assert hashes[0] == hashes[1]

def test_gradient_checkpointing_is_really_on(monkeypatch):
    u, seen = build(), []
    train(u, tiny(gradient_checkpointing=True, steps=1), None, callback=lambda k, l: seen.append(any(getattr(m, 'gradient_checkpointing', False) for m in u.modules())))
    assert seen == [True]

# draws, rate, average

@hsettings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), batch=st.integers(1, 9), seed=st.integers(0, 9))
def test_each_latent_is_seen_equally_often(n, batch, seed):
    index = torch.cat([draw_batch(k, (n, 1, 1, 1), batch, 1000, seed)[0] for k in range(n)])
    assert torch.bincount(index, minlength=n).tolist() == [batch]*n

def test_draws_depend_on_seed_and_step_alone():
    shape = (7, 2, 4, 4)
    same = [draw_batch(3, shape, 5, 1000, 0) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*same))
    for k, seed in ((4, 0), (3, 1)): assert not torch.equal(draw_batch(k, shape, 5, 1000, seed)[2], same[0][2])
    t = torch.cat([draw_batch(k, shape, 64, 10, 0)[1] for k in range(20)])
    assert sorted(set(t.tolist())) == list(range(10)) # all of 0…T-1, nothing else

@pytest.mark.parametrize('steps', [5, 10, 37, 800])
def test_one_cycle_equals_torch(steps):
    s, opt = tiny(lr=4e-4), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    ref = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=4e-4, total_steps=steps, cycle_momentum=False)
    for k in range(steps):
        assert abs(learning_rate(k, steps, s) - opt.param_groups[0]['lr']) < 1e-12
        opt.step()
        if k + 1 < steps: ref.step()

def test_constant_rate(): assert {learning_rate(k, 9, tiny(lr_schedule='constant')) for k in range(9)} == {2e-3}

def test_average_formula():
    lin = nn.Linear(2, 2); ema = EMA(lin, .95); want = lin.weight.detach().clone()
    for k in range(300):
        with torch.no_grad(): lin.weight.add_(torch.randn(2, 2, generator=gen(k)))
        ema.update(lin, k)
        d = min(.95, (1 + k)/(10 + k))
        want = d*want + (1 - d)*lin.weight.detach()
    assert torch.allclose(ema.shadow['weight'], want, atol=1e-5) and ema.decay_at(299) == .95
    ema.copy_to(lin); assert torch.equal(lin.weight, ema.shadow['weight'])

def test_result_is_the_average_in_eval_mode(tmp_path):
    u = build(); train(u, tiny(), tmp_path)
    kept = load_tensors(tmp_path/CHECKPOINT)
    assert not u.training
    assert all(torch.equal(p, kept[f'ema.{n}']) for n, p in u.named_parameters())
    assert any(not torch.equal(p, kept[f'weights.{n}']) for n, p in u.named_parameters())

# training

def test_training_learns(tmp_path):
    s = tiny(steps=150, batch=8, lr=4e-3)
    log = train(build(s), s, None, latents=torch.ones(4, 2, 8, 8)*torch.tensor([1., -1.]).view(1, 2, 1, 1))
    assert sum(log.losses[:5])/5 > .8 and sum(log.losses[-20:])/20 < .35
    assert log.steps == len(log.losses) == 150 and log.seconds > 0 and log.resumed_at == 0

def test_same_seed_same_weights_other_seed_others():
    runs = []
    for seed in (0, 0, 1): u = build(); log = train(u, tiny(), None, seed=seed); runs.append((u.weights_hash, tuple(log.losses)))
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0]

@pytest.mark.parametrize('k,resumed', [(0, 0), (2, 2), (3, 4), (4, 4)])
def test_resume_is_bit_identical(tmp_path, k, resumed):
    u = build(); whole = train(u, tiny(), tmp_path/'whole')
    v = build()
    with pytest.raises(Cut): train(v, tiny(), tmp_path/'cut', callback=cut_after(k))
    w = build(); log = train(w, tiny(), tmp_path/'cut')
    assert log.resumed_at == resumed and log.losses == whole.losses and w.weights_hash == u.weights_hash
    a, b = load_tensors(tmp_path/'whole'/CHECKPOINT), load_tensors(tmp_path/'cut'/CHECKPOINT)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)

def test_resume_goes_on_with_the_same_object(tmp_path):
    u = build(); train(u, tiny(), tmp_path/'whole')
    v = build()
    with pytest.raises(Cut): train(v, tiny(), tmp_path/'cut', callback=cut_after(3))
    assert not v.training
    train(v, tiny(), tmp_path/'cut')
    assert v.weights_hash == u.weights_hash

def test_finished_training_is_not_run_again(tmp_path):
    u = build(); train(u, tiny(), tmp_path)
    v = build(seed=9); log = train(v, tiny(), tmp_path)
    assert log.resumed_at == log.steps == 6 and v.calls == 0 and v.weights_hash == u.weights_hash

def test_one_checkpoint_file_is_replaced_in_place(tmp_path):
    train(build(), tiny(), tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [CHECKPOINT]

def test_should_stop_writes_a_checkpoint(tmp_path):
    n = []
    with pytest.raises(TrainingStopped, match=r'stopped after step 2 of 6; .*checkpoint.safetensors lets the next run go on'):
        train(build(), tiny(checkpoint_every=100), tmp_path, should_stop=lambda: n.append(1) or len(n) == 3)
    u, v = build(), build()
    assert train(u, tiny(), tmp_path).resumed_at == 3
    train(v, tiny(), None); assert u.weights_hash == v.weights_hash

@pytest.mark.parametrize('change,text', [(dict(lr=1e-3), 'lr = 0.002, now 0.001'), (dict(steps=8), 'steps = 6, now 8'), (dict(ema=.5), 'ema = 0.9, now 0.5')])
def test_checkpoint_of_other_settings(tmp_path, change, text):
    train(build(), tiny(), tmp_path)
    with pytest.raises(DenoiserError, match=f'a checkpoint of another training .*{text}.*use another folder or delete it'): train(build(), tiny(**change), tmp_path)

def test_checkpoint_of_other_latents_seed_or_network(tmp_path):
    train(build(), tiny(), tmp_path)
    with pytest.raises(DenoiserError, match='latents = '): train(build(), tiny(), tmp_path, latents=LATENTS + 1)
    with pytest.raises(DenoiserError, match='seed = 0, now 1'): train(build(), tiny(), tmp_path, seed=1)
    with pytest.raises(DenoiserError, match=r'widths = \[16, 32\], now \[32, 32\]'): train(build(tiny(widths=(32, 32))), tiny(widths=(32, 32)), tmp_path)

def test_where_to_checkpoint_is_no_other_training(tmp_path):
    with pytest.raises(Cut): train(build(), tiny(), tmp_path, callback=cut_after(3))
    assert train(build(), tiny(checkpoint_every=5, gradient_checkpointing=True), tmp_path).resumed_at == 4

def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path/CHECKPOINT).write_bytes(b'torn')
    with pytest.raises(StoreError, match='checkpoint.safetensors: not a whole safetensors file'): train(build(), tiny(), tmp_path)
    save_tensors(tmp_path/CHECKPOINT, {'x': torch.ones(1)})
    with pytest.raises(DenoiserError, match="checkpoint.safetensors: no checkpoint of the denoiser's training; delete it"): train(build(), tiny(), tmp_path)

def poisoned(u, at):
    "The network answers with NaN from call `at` on."
    def hook(module, args, out): return out*float('nan') if u.calls > at else out
    u.register_forward_hook(hook); return u

def test_nan_loss_ends_the_training_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(DenoiserError, match=r'the loss is nan at step 3 of 6, learning rate 0\.00\d+; lower denoiser.lr = 0.002 \(the last checkpoint is kept in'):
        train(poisoned(build(), 3), tiny(), tmp_path)
    u, v = build(), build()
    assert train(u, tiny(), tmp_path).resumed_at == 2
    train(v, tiny(), None); assert u.weights_hash == v.weights_hash

def test_nan_loss_before_any_checkpoint(tmp_path):
    with pytest.raises(DenoiserError, match='there is no checkpoint yet'): train(poisoned(build(), 0), tiny(), tmp_path)
    assert not list(tmp_path.iterdir())

def test_weights_that_are_not_finite_are_never_written(tmp_path):
    u = build()
    def ruin(k, loss):
        if k == 2:
            with torch.no_grad(): next(u.parameters()).fill_(float('inf'))
    with pytest.raises(DenoiserError): train(u, tiny(), tmp_path, callback=ruin)
    assert all(v.isfinite().all() for v in load_tensors(tmp_path/CHECKPOINT).values())

@pytest.mark.parametrize('latents,text', [
    (torch.zeros(0, 2, 8, 8), r'shape \[0, 2, 8, 8\]'), (torch.zeros(3, 4, 8, 8), r'built for \[N,2,8,8\]'), (torch.zeros(3, 2, 16, 16), r'built for \[N,2,8,8\]'), (torch.zeros(2, 8, 8), 'shape'),
    (torch.zeros(3, 2, 8, 8, dtype=torch.long), 'int64'), (torch.full((3, 2, 8, 8), float('nan')), 'in 3 of 3 rows, first 0')])
def test_latents_that_cannot_be_used(latents, text):
    with pytest.raises(DenoiserError, match=text): train(build(), tiny(), None, latents=latents)

def test_epochs_count_latents(): # 3 rounds of 5 latents in batches of 4: 15 latents, 4 steps
    log = train(build(), tiny(steps=None, epochs=3), None)
    assert log.steps == 4

def test_batch_larger_than_the_set():
    log = train(build(), tiny(batch=12, steps=2), None)
    assert log.steps == 2 and all(map(lambda l: l == l, log.losses))

def test_weight_decay_and_adamw(tmp_path):
    u = build(); s = tiny(steps=1, lr_schedule='constant', ema=0., weight_decay=.1)
    start = {n: p.detach().clone() for n, p in u.named_parameters()}
    train(u, s, tmp_path)
    kept = load_tensors(tmp_path/CHECKPOINT)
    for n in start: # the first step of AdamW, by hand
        g = kept[f'exp_avg.{n}']/.1
        want = start[n]*(1 - s.lr*.1) - s.lr*g/(g.abs() + 1e-8)
        assert torch.allclose(kept[f'weights.{n}'], want, atol=2e-6)

def test_precision_bf16_and_back():
    u = build(); log = train(u, tiny(), None, precision='bf16')
    assert all(p.dtype == torch.float32 for p in u.parameters()) and log.steps == 6
    with torch.no_grad(): out = u(LATENTS, torch.arange(5)); ref = Denoiser(u.unet, u.heads)(LATENTS, torch.arange(5))
    assert out.dtype == torch.float32 and torch.equal(out, ref) # no autocast is left on the network
    plain, again = build(), build()
    train(plain, tiny(), None); train(again, tiny(), None)
    assert plain.weights_hash == again.weights_hash != u.weights_hash

def test_fp16_without_gpu():
    if torch.cuda.is_available(): pytest.skip('this machine has a GPU, where fp16 is allowed')
    with pytest.raises(DenoiserError, match="precision = 'fp16' needs a GPU and this training runs on the CPU"): train(build(), tiny(), None, precision='fp16')

def test_two_processes_equal_one(tmp_path):
    "Two processes on the CPU (gloo) give the losses and weights of one, up to rounding."
    script = tmp_path/'job.py'
    script.write_text('''
import os, sys, torch
from dynad.config import DenoiserSettings, DiffusionSettings
from dynad.denoiser import make_unet, save_denoiser, train_denoiser
from dynad.diffusion import make_schedule
if __name__ == '__main__':
    s = DenoiserSettings(widths=(16, 32), attention=(1,), heads=4, layers_per_block=1, epochs=None, steps=4, batch=5, lr=2e-3, ema=.9, checkpoint_every=2)
    unet = make_unet(s, 2, 8)
    z = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    log = train_denoiser(unet, z, make_schedule(DiffusionSettings()), s, 0, sys.argv[1] + '/work', device='cpu', progress=False)
    from accelerate import PartialState
    print('world', PartialState().num_processes, flush=True)
    if os.environ['RANK'] == '0': save_denoiser(unet, sys.argv[1] + '/unet'); open(sys.argv[1] + '/losses.txt', 'w').write(' '.join(map(repr, log.losses)))
''')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script), str(tmp_path)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('world 2') == 2
    s = tiny(steps=4, batch=5, lr_schedule='constant'); u = build(s); log = train(u, s, tmp_path/'one')
    assert [float(l) for l in (tmp_path/'losses.txt').read_text().split()] == pytest.approx(log.losses, rel=1e-4)
    # AdamW blows rounding up where a gradient is 0 by symmetry (biases before a norm): outputs and gradient moments are what can be compared
    with torch.no_grad(): assert torch.allclose(u(LATENTS, torch.arange(5)), load_denoiser(tmp_path/'unet')(LATENTS, torch.arange(5)), atol=1e-3)
    one, two = (load_tensors(tmp_path/d/CHECKPOINT) for d in ('one', 'work'))
    for k in one:
        if k.startswith('exp_avg.'): assert torch.allclose(one[k], two[k], rtol=.02, atol=1e-5), k

# folders

def test_round_trip_and_diffusers_reads_it(tmp_path):
    u = build(); save_denoiser(u, tmp_path/'unet')
    v, ref = load_denoiser(tmp_path/'unet'), UNet2DModel.from_pretrained(tmp_path/'unet').eval()
    t = torch.arange(5)
    with torch.no_grad(): assert torch.equal(u(LATENTS, t), v(LATENTS, t)) and torch.equal(u(LATENTS, t), ref(LATENTS, t).sample)
    assert v.heads == 4 and v.weights_hash == u.weights_hash and not v.training and (v.latent_channels, v.latent_size) == (2, 8)

def test_heads_survive_the_folder(tmp_path):
    u = make_unet(tiny(widths=(16, 32), attention=(0, 1)), 2, 8); save_denoiser(u, tmp_path)
    with torch.no_grad(): assert torch.equal(u(LATENTS, torch.arange(5)), load_denoiser(tmp_path)(LATENTS, torch.arange(5)))

def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(DenoiserError, match='config.json: no such file'): load_denoiser(tmp_path)
    (tmp_path/'config.json').write_text('{')
    with pytest.raises(DenoiserError, match='config.json: cannot be read as JSON'): load_denoiser(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps({'_class_name': 'AutoencoderKL'}))
    with pytest.raises(DenoiserError, match="describes 'AutoencoderKL'"): load_denoiser(tmp_path)
    save_denoiser(build(), tmp_path); (tmp_path/WEIGHTS).unlink()
    with pytest.raises(StoreError, match='diffusion_pytorch_model.safetensors: no such file'): load_denoiser(tmp_path)
    save_tensors(tmp_path/WEIGHTS, {'x': torch.ones(1)})
    with pytest.raises(StoreError, match='diffusion_pytorch_model.safetensors: the weights of another network'): load_denoiser(tmp_path)
