"The `authors` switches reproduce the outputs of the public code's own functions."
import pytest
import torch

from dynad import adaptation, dic, fusion
from dynad.config import make_config
from dynad.diffusion import make_schedule
from dynad.reconstruction import reconstruct

SCHEDULE = make_schedule(make_config('authors').diffusion)


def eps(x, t): return .3*x.tanh() + .1*torch.sin(.05*t.float()).view(-1, 1, 1, 1)


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('eta', [0, 4, 8])
def test_dynamic_sampler(authors, eta):
    r = reconstruct(eps, authors['sampler.z0'], authors['sampler.t_hat'], SCHEDULE, indices='authors', eta=eta, trajectory=True)
    close(r.z_hat, authors[f'sampler.dynamic_eta{eta}'])
    close(r.trajectory[0]['x0'], authors[f'sampler.dynamic_eta{eta}_first_x0'])
    assert r.calls == [10]*len(r.calls)


@pytest.mark.parametrize('eta', [0, 4, 8])
@pytest.mark.parametrize('t_hat, calls', [(20, 3), (40, 5), (60, 8), (80, 10)])
def test_static_sampler_is_another_one(authors, eta, t_hat, calls):
    r = reconstruct(eps, authors['sampler.z0'], t_hat, SCHEDULE, sampler='authors', t_max=80, eta=eta)
    close(r.z_hat, authors[f'sampler.static{t_hat}_skip8_eta{eta}'])
    assert r.calls == [calls]*len(r.calls)


def test_bins_and_timesteps(authors):
    d = dic.DIC.fit(authors['dic.train'], make_config('authors').dic)
    distance, b, _ = d.severity(authors['dic.test'])
    torch.testing.assert_close(d.edges, authors['dic.bin_edges'].double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(distance.double(), authors['dic.test_mean_distance'].double(), rtol=1e-5, atol=0)
    assert torch.equal(b, authors['dic.bins'].long())
    for t_max in (80, 160, 250): assert torch.equal(dic.t_hat(b, t_max), authors[f'dic.t_hat_{t_max}'].long())
    assert torch.equal(dic.t_hat(torch.arange(11)), authors['dic.table_80'].long())


def test_maps_and_adaptation_loss(authors):
    fx, fx_hat = ({j: authors[f'maps.phi_{n}_layer{j}'] for j in (1, 2, 3)} for n in ('x', 'xhat'))
    l = fusion.upsample(fusion.latent_map(authors['maps.z0'], authors['maps.z_hat']), 64)
    f = fusion.feature_map(fusion.feature_maps(fx, fx_hat), 64)
    close(l, authors['maps.l_map']); close(f, authors['maps.f_map'])
    lc, fc = fusion.Calibration.of_test_set(l, f)(l, f, torch.zeros(len(l)))
    close(fusion.smooth(fusion.fuse(lc, fc, .85), 4., scale=False), authors['maps.A_map'])
    close(adaptation.adaptation_loss(fx, fx_hat, 'flat'), authors['adapt.loss_flat'].squeeze())
