import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
from hypothesis import given, strategies as st

from dynad.config import FusionSettings
from dynad.fusion import Calibration, anomaly_map, feature_maps, fuse, latent_map, quantile, score, smooth, upsample


def test_smooth_is_scipys_gaussian():
    m = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    want = ndi.gaussian_filter(m[0, 0].numpy(), 1.0, mode='mirror', truncate=4)
    np.testing.assert_allclose(smooth(m, 4.)[0, 0], want, atol=1e-5)


def test_sigma_scales_with_the_image_and_zero_leaves_it():
    m = torch.zeros(1, 1, 65, 65); m[..., 32, 32] = 1
    spread = lambda x: float((x[0, 0].sum(0)*(torch.arange(x.shape[-1]) - x.shape[-1]//2)**2).sum().sqrt())
    assert spread(smooth(m, 4.)) == pytest.approx(4*65/256, rel=.05) and spread(smooth(m, 4., scale=False)) == pytest.approx(4, rel=.05)
    assert torch.equal(smooth(m, 0), m)


@given(st.floats(0, 1))
def test_fusion_is_linear_in_lambda(lam):
    l, f = torch.full((1, 1, 2, 2), 3.), torch.full((1, 1, 2, 2), -1.)
    torch.testing.assert_close(fuse(l, f, lam), torch.full((1, 1, 2, 2), 4*lam - 1))


def test_calibration_sends_median_to_0_and_the_quantile_to_1():
    g = torch.Generator().manual_seed(0)
    l, f = torch.rand(6, 1, 32, 32, generator=g)*5, torch.rand(6, 1, 32, 32, generator=g) + 2
    c = Calibration({40: Calibration.measure(l, f, .99), 80: Calibration.measure(3*l, 2*f, .99)})
    for m in c(l, f, torch.full((6,), 40)):
        assert float(m.median()) == pytest.approx(0, abs=1e-3) and float((m > 1).float().mean()) == pytest.approx(.01, abs=1e-3)
    a, b = c(l[:1], f[:1], torch.tensor([40])), c(3*l[:1], 2*f[:1], torch.tensor([80]))
    for x, y in zip(a, b): torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_a_map_without_scale_is_only_shifted():
    c = Calibration({0: Calibration.measure(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4))})
    l, f = c(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4), torch.tensor([0]))
    assert l.abs().max() == 0 and f.abs().max() == 0


def test_a_t_hat_that_is_not_calibrated_is_named():
    with pytest.raises(KeyError, match=r'T̂ = 90 is not calibrated \(there are \[80\]\)'): Calibration({80: (0, 1, 0, 1)})(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.tensor([90]))


def test_maps_of_an_image_and_itself_are_zero_and_scores_find_the_changed_place():
    z, f = torch.rand(1, 4, 8, 8), {2: torch.rand(1, 6, 8, 8) + .1, 3: torch.rand(1, 6, 4, 4) + .1}
    assert latent_map(z, z).max() == 0 and max(v.abs().max() for v in feature_maps(f, f).values()) < 1e-6
    z2 = z.clone(); z2[0, :, 2, 5] += 3
    A, _, _ = anomaly_map(latent_map(z, z2), feature_maps(f, f), torch.tensor([80]), Calibration({80: (0, 1, 0, 1)}), FusionSettings(lam=1.), 64)
    y, x = divmod(int(A.flatten().argmax()), 64)
    assert abs(y - 2*63/7) <= 3 and abs(x - 5*63/7) <= 3 and float(score(A)) == float(A.max())


def test_upsample_aligns_corners():
    m = torch.tensor([[[[0., 1.], [2., 3.]]]])
    u = upsample(m, 5)
    assert (u[0, 0, 0, 0], u[0, 0, 0, -1], u[0, 0, -1, 0], u[0, 0, 2, 2]) == (0, 1, 2, 1.5)


@given(st.integers(1, 50), st.floats(0, 1), st.integers(0, 9))
def test_quantiles_are_numpys_and_a_value_of_the_data(n, q, seed):
    v = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    assert quantile(v, q) == pytest.approx(np.quantile(v.double().numpy(), q), rel=1e-12)
    assert quantile(v, q) == quantile(v.numpy(), q) == quantile(v.numpy().copy(), q, overwrite_input=True)
    assert quantile(v, q, 'rank') == float(v.sort().values[min(int(q*n), n - 1)])


def test_ten_million_values_are_not_interpolated_and_the_input_is_kept():
    v = np.random.default_rng(0).random(10_000_000, dtype=np.float32)
    before = v[:5].copy()
    assert quantile(v, .995) == quantile(v, .995, 'rank') == np.sort(v)[int(.995*v.size)] and np.array_equal(v[:5], before)


@pytest.mark.parametrize('args', [([], .5), ([1.], 1.5), ([1.], .5, 'nearest')])
def test_quantiles_that_are_not_defined(args):
    with pytest.raises(ValueError, match='needs q in'): quantile(np.array(args[0]), *args[1:])
