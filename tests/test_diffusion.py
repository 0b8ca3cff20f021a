"Schedule, forward process and its algebra: parity, properties, errors."
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings as hsettings, strategies as st

from dynad.config import DiffusionSettings
from dynad.diffusion import abar_at, make_schedule, predict_x0, q_sample, x_tilde
from dynad.store import load_tensors

FIXTURES = Path(__file__).parent/'fixtures'/'authors.safetensors'
S = make_schedule(DiffusionSettings())
few = hsettings(max_examples=30, deadline=None)

def gen(seed=0): return torch.Generator().manual_seed(seed)
def rand(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=gen(seed), dtype=dtype)

def test_betas_equal_the_authors():
    want = load_tensors(FIXTURES)['schedule.betas'].double()
    assert want.shape == S.betas.shape
    assert (S.betas - want).abs().max() < 1e-8 # theirs is rounded to float32 or comes from numpy

def test_printed_values():
    got = S.abar[torch.tensor([19, 39, 59, 79, 319])]
    assert torch.equal((got*1000).round().long(), torch.tensor([967, 929, 885, 838, 246]))
    assert abs(float(S.abar[79].sqrt()) - .915) < 1e-3

def test_schedule_is_float64_and_consistent():
    assert S.betas.dtype == S.alphas.dtype == S.abar.dtype == torch.float64
    assert S.T == len(S.betas) == len(S.abar) == 1000
    assert torch.allclose(S.alphas, 1 - S.betas) and torch.allclose(S.abar[1:]/S.abar[:-1], S.alphas[1:], atol=1e-14)
    assert (S.abar.diff() < 0).all()

def test_schedule_is_frozen():
    with pytest.raises(AttributeError): S.T = 5

@pytest.mark.parametrize('T', [10, 77])
def test_other_lengths(T):
    s = make_schedule(DiffusionSettings(T=T))
    assert s.T == T and s.abar.shape == (T,) and float(s.betas[0]) == .0015 and abs(float(s.betas[-1]) - .0195) < 1e-15

def test_abar_at_convention():
    assert float(abar_at(S.abar, -1)) == 1.
    assert torch.equal(S.abar_at(torch.tensor([[-1, 0], [79, 999]])), torch.stack([torch.stack([torch.ones(()).double(), S.abar[0]]), S.abar[[79, 999]]]))

@pytest.mark.parametrize('t,text', [(-2, 't = -2 is no step: a schedule of T = 1000'), (1000, 't = 1000 is no step'), (torch.tensor([3, 1500]), 't = 1500 is no step')])
def test_steps_outside_the_schedule(t, text):
    with pytest.raises(ValueError, match=text): abar_at(S.abar, t)

def test_steps_must_be_integers():
    with pytest.raises(ValueError, match='steps are integers'): abar_at(S.abar, torch.tensor([3.]))
    with pytest.raises(ValueError, match='steps are integers'): abar_at(S.abar, torch.tensor([True]))

def test_no_steps_at_all(): assert abar_at(S.abar, torch.zeros(0, dtype=torch.long)).shape == (0,)

def test_q_sample_equals_diffusers_add_noise():
    ref = DDPMScheduler(1000, beta_start=.0015, beta_end=.0195, beta_schedule='linear')
    x0, eps, t = rand(5, 4, 8, 8), rand(5, 4, 8, 8, seed=1), torch.tensor([0, 19, 79, 500, 999])
    assert torch.allclose(q_sample(x0, t, S.abar, noise=eps), ref.add_noise(x0, eps, t), atol=1e-5)

def test_predict_x0_equals_diffusers():
    ref = DDIMScheduler(1000, beta_start=.0015, beta_end=.0195, beta_schedule='linear', clip_sample=False)
    ref.set_timesteps(1000)
    x, eps = rand(1, 4, 8, 8), rand(1, 4, 8, 8, seed=1)
    for t in (0, 79, 400): assert torch.allclose(predict_x0(x, eps, torch.tensor([t]), S.abar), ref.step(eps, t, x).pred_original_sample, atol=1e-4)

@few
@given(t=st.integers(-1, 999), omega=st.floats(0, 1), seed=st.integers(0, 99))
def test_eq12_is_linear_in_omega(t, omega, seed):
    x0, eps, tt = rand(2, 3, 4, 4, seed=seed, dtype=torch.float64), rand(2, 3, 4, 4, seed=seed + 1, dtype=torch.float64), torch.tensor([t, t])
    ends = [q_sample(x0, tt, S.abar, w, noise=eps) for w in (0., 1.)]
    assert torch.allclose(q_sample(x0, tt, S.abar, omega, noise=eps), (1 - omega)*ends[0] + omega*ends[1], atol=1e-12)

@few
@given(t=st.integers(0, 999), seed=st.integers(0, 99))
def test_predict_x0_inverts_q_sample(t, seed):
    x0, eps, tt = rand(1, 2, 3, 3, seed=seed, dtype=torch.float64), rand(1, 2, 3, 3, seed=seed + 1, dtype=torch.float64), torch.tensor([t])
    assert torch.allclose(predict_x0(q_sample(x0, tt, S.abar, noise=eps), eps, tt, S.abar), x0, atol=1e-9)

@few
@given(t=st.integers(0, 999), seed=st.integers(0, 99))
def test_x_tilde_differs_from_x_t_by_what_was_changed(t, seed):
    x0, x_t, eps, tt = *(rand(1, 2, 3, 3, seed=seed + i, dtype=torch.float64) for i in range(3)), torch.tensor([t])
    assert torch.allclose(x_tilde(x0, eps, tt, S.abar) - x_t, S.abar[t].sqrt()*(x0 - predict_x0(x_t, eps, tt, S.abar)), atol=1e-9)

def test_each_sample_has_its_own_step():
    x0, eps, t = rand(3, 1, 2, 2), rand(3, 1, 2, 2, seed=1), torch.tensor([0, 79, 999])
    rows = torch.cat([q_sample(x0[i:i+1], t[i:i+1], S.abar, noise=eps[i:i+1]) for i in range(3)])
    assert torch.equal(q_sample(x0, t, S.abar, noise=eps), rows)

def test_clean_step_gives_the_image_back():
    x0 = rand(2, 1, 2, 2)
    assert torch.equal(q_sample(x0, torch.tensor([-1, -1]), S.abar, noise=rand(2, 1, 2, 2, seed=1)), x0)

def test_noiseless_scaling_draws_nothing():
    g = gen(); before = g.get_state()
    q_sample(rand(1, 1, 2, 2), torch.tensor([5]), S.abar, omega=0, generator=g)
    assert torch.equal(g.get_state(), before)

def test_noise_is_deterministic_and_must_have_a_source():
    x0, t = rand(2, 1, 4, 4), torch.tensor([5, 6])
    assert torch.equal(q_sample(x0, t, S.abar, generator=gen(3)), q_sample(x0, t, S.abar, generator=gen(3)))
    assert not torch.equal(q_sample(x0, t, S.abar, generator=gen(3)), q_sample(x0, t, S.abar, generator=gen(4)))
    with pytest.raises(ValueError, match='neither noise= nor generator='): q_sample(x0, t, S.abar)
    with pytest.raises(ValueError, match=r'noise has the shape \(1, 1, 4, 4\)'): q_sample(x0, t, S.abar, noise=x0[:1])

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computes_in_the_type_of_x(dtype):
    x0, t = rand(1, 1, 4, 4).to(dtype), torch.tensor([79])
    for out in (q_sample(x0, t, S.abar, generator=gen()), predict_x0(x0, x0, t, S.abar), x_tilde(x0, x0, t, S.abar)): assert out.dtype == dtype
