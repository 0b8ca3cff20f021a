import pytest
import torch

from dynad.adaptation import adapt, adaptation_draws, adaptation_loss, draw_t_hat
from dynad.config import AdaptationSettings, FeatureSettings
from dynad.features import load_features
from dynad.store import TrainingStopped
from dynad.training import CHECKPOINT, TrainingError


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
    with pytest.raises(FloatingPointError, match='training of φ: the loss is nan at step 0 of 2, learning rate 0.0001; lower adaptation.lr'):
        adapt(phi, lambda x, r, T: x*float('nan'), IMAGES, AdaptationSettings(gamma=1, batch=4), progress=False)


def test_t_hat_is_drawn_over_all_ten_levels():
    g = torch.Generator().manual_seed(0)
    drawn = {draw_t_hat(AdaptationSettings(t_max=160), 10, g) for _ in range(300)}
    assert drawn == {20, 30, 50, 60, 80, 100, 110, 130, 140, 160}


def test_draws_are_a_function_of_seed_and_step():
    s = AdaptationSettings(gamma=3, batch=3)
    draws = adaptation_draws(8, s, 10, seed=1)
    assert len(draws) == 6 and str(draws) == str(adaptation_draws(8, s, 10, seed=1)) != str(adaptation_draws(8, s, 10, seed=2))
    for epoch in range(3): assert len({int(r) for rows, _ in draws[2*epoch:2*epoch + 2] for r in rows}) == 6
    assert [len(rows) for rows, _ in adaptation_draws(2, s, 10, seed=1)] == [2]*3 # fewer images than a batch


@pytest.mark.parametrize('batch_norm', ['train', 'frozen'])
def test_it_resumes_to_the_same_weights(phi, tmp_path, batch_norm):
    "Weights, AdamW's moments and the statistics of BatchNorm are in the checkpoint."
    s, seen = AdaptationSettings(gamma=3, batch=4, batch_norm=batch_norm), []
    whole, losses = adapt(phi, blurred, IMAGES, s, progress=False)
    with pytest.raises(TrainingStopped, match='training of φ stopped after step 2 of 6; .*checkpoint.safetensors lets the next run go on'):
        adapt(phi, blurred, IMAGES, s, progress=False, workdir=tmp_path, callback=lambda k, l: seen.append(k), should_stop=lambda: seen[-1] == 2)
    again, more = adapt(phi, blurred, IMAGES, s, progress=False, workdir=tmp_path, callback=lambda k, l: seen.append(k))
    assert seen == list(range(6)) and more == losses and again.weights_hash == whole.weights_hash
    assert [f.name for f in tmp_path.iterdir()] == [CHECKPOINT]
    with pytest.raises(TrainingError, match='a checkpoint of another training .seed = 0, now 1'): adapt(phi, blurred, IMAGES, s, seed=1, progress=False, workdir=tmp_path)
