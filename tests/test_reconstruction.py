import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings, strategies as st

from dynad.config import make_config
from dynad.diffusion import make_schedule
from dynad.dic import t_grid
from dynad.reconstruction import ddim_step, guide, noise_for, overshoots, plan_timesteps, pull, reconstruct, start_index, timesteps

SCHEDULE = make_schedule(make_config('paper').diffusion)


def eps(x, t): return .3*x.tanh() + .1*torch.sin(.05*t.to(x.dtype)).view(-1, 1, 1, 1)


def latents(n=3, seed=0): return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def by_diffusers(z0, t_hat, eta, S=10):
    "One sample through diffusers' own scheduler, its timesteps set to the same indices."
    s = DDIMScheduler(num_train_timesteps=1000, beta_start=.0015, beta_end=.0195, beta_schedule='linear', clip_sample=False, set_alpha_to_one=True)
    ts = timesteps(t_hat, S)
    a = s.alphas_cumprod
    z = a[t_hat - 1].sqrt()*z0
    for k, t in enumerate(ts):
        e = eps(z, torch.tensor([t]))
        e_hat = e - eta*(1 - a[t]).sqrt()*(a[t].sqrt()*z0 + (1 - a[t]).sqrt()*e - z)
        # diffusers derives the previous timestep as t - T//steps; setting the number of steps makes that the next index of our list
        nxt = ts[k+1] if k + 1 < len(ts) else -1
        s.num_inference_steps = s.config.num_train_timesteps//(t - nxt)
        assert t - s.config.num_train_timesteps//s.num_inference_steps == nxt or nxt == -1
        z = s.step(e_hat, t, z, eta=0.).prev_sample
    return z


@pytest.mark.parametrize('eta', [0, 4, 8])
@pytest.mark.parametrize('t_hat', t_grid(80))
def test_sampler_equals_diffusers(t_hat, eta):
    z0 = latents(1)
    torch.testing.assert_close(reconstruct(eps, z0, t_hat, SCHEDULE, eta=eta).z_hat, by_diffusers(z0, t_hat, eta), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 999), st.floats(0, 20), st.integers(0, 9))
def test_guidance_equals_its_algebraic_form(t, eta, seed):
    g = torch.Generator().manual_seed(seed)
    e, z, z0 = (torch.randn(1, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(3))
    a, abar, t, end = SCHEDULE.abar[t].view(1, 1, 1, 1), SCHEDULE.abar, torch.tensor([t]), torch.tensor([-1])
    plain = ddim_step(e, z, t, end, abar)[1]
    guided = ddim_step(guide(e, z, z0, t, abar, eta), z, t, end, abar)[1]
    torch.testing.assert_close(guided, plain + eta*(1 - a)*(z0 - plain), rtol=1e-7, atol=1e-8*max(1, 1/float(a)))
    held = ddim_step(guide(e, z, z0, t, abar, eta, clamp=True), z, t, end, abar)[1]
    torch.testing.assert_close(held, plain + min(1., eta*(1 - float(a)))*(z0 - plain), rtol=1e-6, atol=1e-7*max(1, 1/float(a)))


@given(st.integers(1, 100), st.integers(1, 20), st.sampled_from(['count', 'stride']))
def test_timesteps_fall_from_t_hat_and_stay_in_range(k, S, steps):
    t_hat = min(1000, k*S)
    ts = timesteps(t_hat, S, steps, t_max=1000)
    assert ts[0] == t_hat - 1 and ts == sorted(set(ts), reverse=True) and ts[-1] >= 0
    if steps == 'count' and t_hat % S == 0: assert len(ts) == S and len({a - b for a, b in zip(ts, ts[1:])}) <= 1


def test_the_printed_calls_of_the_stride():
    assert [len(timesteps(T, steps='stride', t_max=80)) for T in (20, 40, 80)] == [3, 5, 10]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from([0, 20, 50, 80, 160]), min_size=1, max_size=6), st.sampled_from(['count', 'stride']), st.sampled_from(['paper', 'authors']))
def test_a_batch_of_many_t_hat_equals_singles_and_calls_no_more_than_needed(ts, steps, indices):
    z0 = latents(len(ts))
    seen = []
    def counting(x, t): seen.append(len(x)); return eps(x, t)
    kw = dict(steps=steps, t_max=160, indices=indices, eta=2.)
    r = reconstruct(counting, z0, torch.tensor(ts), SCHEDULE, **kw)
    assert sum(seen) == sum(r.calls) == sum(len(timesteps(t, 10, steps, 160, indices)) for t in ts)
    for i, t in enumerate(ts):
        torch.testing.assert_close(r.z_hat[i:i+1], reconstruct(eps, z0[i:i+1], t, SCHEDULE, **kw).z_hat, rtol=1e-6, atol=1e-6)


def test_t_hat_zero_returns_the_latent_itself():
    def never(x, t): raise AssertionError
    z0 = latents()
    assert torch.equal(reconstruct(never, z0, 0, SCHEDULE).z_hat, z0)


def test_noiseless_needs_no_noise_and_noise_belongs_to_the_image():
    z0 = latents(4)
    with pytest.raises(ValueError, match='omega = 0.5 needs noise'): reconstruct(eps, z0, 80, SCHEDULE, omega=.5)
    n = noise_for([0, 1, 2, 3], (4, 8, 8), seed=3)
    assert torch.equal(noise_for([2], (4, 8, 8), 3)[0], n[2]) and not torch.equal(noise_for([2], (4, 8, 8), 4)[0], n[2])
    assert abs(float(n.std()) - 1) < .05
    a, b = (reconstruct(eps, z0, 80, SCHEDULE, omega=w, noise=n).z_hat for w in (0., 1.))
    assert torch.equal(a, reconstruct(eps, z0, 80, SCHEDULE).z_hat) and not torch.allclose(a, b, atol=.1)


@pytest.mark.parametrize('bad', [-1, 1001])
def test_t_hat_out_of_range(bad):
    with pytest.raises(ValueError, match=r'T̂ must lie in 0…1000'): reconstruct(eps, latents(), bad, SCHEDULE)


def test_the_overshoot_is_warned_of():
    with pytest.warns(UserWarning, match='overshoots; lower reconstruction.eta'): assert overshoots(8., 80, SCHEDULE) == pytest.approx(1.30, abs=5e-3)
    assert overshoots(2., 80, SCHEDULE) < 1
    assert math.isclose(float(pull(8., torch.tensor(159), SCHEDULE.abar)), 3.0, abs_tol=.1)


def test_trajectory_holds_every_call():
    r = reconstruct(eps, latents(2), torch.tensor([20, 80]), SCHEDULE, steps='stride', t_max=80, trajectory=True)
    assert [len(s['rows']) for s in r.trajectory] == [2, 2, 2] + [1]*7
    assert r.trajectory[0]['t'].tolist() == [19, 79]


@given(st.lists(st.sampled_from([0, 10, 20, 50, 80, 160, 1000]), max_size=6), st.sampled_from(['count', 'stride']), st.sampled_from(['paper', 'authors']))
def test_a_row_of_the_plan_is_the_list_of_its_sample(ts, steps, indices):
    t_hat = torch.tensor(ts, dtype=torch.long)
    plan, start = plan_timesteps(t_hat, 10, steps, 160, indices), start_index(t_hat, 1000, indices)
    assert len(plan) == len(start) == len(ts) and (plan[:, -1] == -1).all()
    for row, first, T in zip(plan.tolist(), start.tolist(), ts):
        want = timesteps(T, 10, steps, 160, indices)
        assert row == want + [-1]*(len(row) - len(want))
        assert first == (-1 if T == 0 else min(T, 999) if indices == 'authors' else T - 1)


def test_an_empty_batch_is_returned_empty():
    assert reconstruct(eps, latents()[:0], 80, SCHEDULE).z_hat.shape == (0, 4, 8, 8)
