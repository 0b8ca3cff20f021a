import pytest
import torch

from dynad.adaptation import adapt, adaptation_loss, draw_t_hat
from dynad.config import AdaptationSettings, FeatureSettings
from dynad.features import load_features


@pytest.fixture(scope='module')
def phi(): return load_features(FeatureSettings(backbone='efficientnet_lite0'))


IMAGES = torch.randint(0, 256, (8, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
def blurred(x, rows, T): return torch.nn.functional.avg_pool2d(x, 3, 1, 1)


def test_gap_and_flat_differ_and_gap_is_the_mean_over_places():
    a = {1: torch.tensor([[[[1., 10.]], [[0., 0.]]]])}
    b = {1: torch.tensor([[[[0., 10.]], [[1., 0.]]]])}
    assert adaptation_loss(a, b, 'gap').item() == pytest.approx(.5)
    assert adaptation_loss(a, b, 'flat').item() == pytest.approx(1 - 100/101, abs=1e-5)


def test_it_learns_repeats_itself_and_leaves_the_given_phi_alone(phi):
    before = phi.weights_hash
    s = AdaptationSettings(gamma=4, batch=4, lr=3e-4)
    (a, la), (b, lb) = (adapt(phi, blurred, IMAGES, s, seed=1, progress=False) for _ in range(2))
    assert phi.weights_hash == before and a.weights_hash == b.weights_hash != before and la == lb and la[-1] < la[0]
    assert adapt(phi, blurred, IMAGES, s, seed=2, progress=False)[0].weights_hash != a.weights_hash
    assert not any(p.requires_grad for p in a.parameters()) and not a.training


def test_batch_norm_statistics_move_or_stay(phi):
    stats = lambda m: torch.cat([v.flatten() for k, v in m.state_dict().items() if 'running_mean' in k])
    moved, frozen = (adapt(phi, blurred, IMAGES, AdaptationSettings(gamma=1, batch=4, batch_norm=b), progress=False)[0] for b in ('train', 'frozen'))
    assert not torch.equal(stats(moved), stats(phi)) and torch.equal(stats(frozen), stats(phi))


def test_gamma_0_is_the_same_phi(phi):
    a, losses = adapt(phi, blurred, IMAGES, AdaptationSettings(gamma=0), progress=False)
    assert losses == [] and a.weights_hash == phi.weights_hash


def test_a_loss_that_is_not_finite_stops_it(phi):
    with pytest.raises(FloatingPointError, match='adaptation: loss nan after 0 batches; lower adaptation.lr'):
        adapt(phi, lambda x, r, T: x*float('nan'), IMAGES, AdaptationSettings(gamma=1, batch=4), progress=False)


def test_t_hat_is_drawn_over_all_ten_levels():
    g = torch.Generator().manual_seed(0)
    drawn = {draw_t_hat(AdaptationSettings(t_max=160), 10, g) for _ in range(300)}
    assert drawn == {20, 30, 50, 60, 80, 100, 110, 130, 140, 160}
