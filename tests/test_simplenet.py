"16d_simplenet: features, loss, training that resumes; the method in a run."
import pytest
import torch

from dynad.config import make_config
from dynad.method import open_run
from dynad.spatial_dic import SpatialDICError, patch_features
from dynad.simplenet import AdaptedDiscriminator, SimpleNet, SimpleNetError, SimpleNetOptions, simplenet_training, truncated_loss
from dynad.store import TrainingStopped
from dynad.training import train

OPTIONS = {'options': {'steps': 30, 'hidden': 64, 'batch': 4}}


def test_patch_features_are_means_of_neighbourhoods():
    f = {2: torch.arange(16.).view(1, 1, 4, 4), 3: torch.ones(1, 2, 2, 2)}
    v = patch_features(f)
    assert v.shape == (1, 3, 4, 4) and torch.isclose(v[0, 0, 1, 1], f[2][0, 0, :3, :3].mean())
    with pytest.raises(SpatialDICError, match=r'layers \[1\] are not among'): patch_features(f, (1, 2))


def test_loss_stops_at_the_margin_on_both_sides():
    out = torch.tensor([.4, .6, -.6, -.4], requires_grad=True) # two normal ones, two with noise
    loss = truncated_loss(out, .5)
    loss.backward()
    assert torch.isclose(loss, torch.tensor(.1)) and out.grad.tolist() == [-.5, 0, 0, .5]


def test_a_training_that_was_cut_off_ends_like_one_that_was_not(tmp_path):
    x, o = torch.randn(12, 6, 4, 4, generator=torch.Generator().manual_seed(0)), SimpleNetOptions(steps=12, hidden=16, batch=2)
    def net():
        torch.manual_seed(1)
        return AdaptedDiscriminator(6, 16)
    whole, parts = net(), net()
    train(simplenet_training(whole, x, o), progress=False)
    asked = iter([False]*5 + [True]*20)
    with pytest.raises(TrainingStopped): train(simplenet_training(parts, x, o), tmp_path/'c', progress=False, should_stop=lambda: next(asked))
    again = net()
    log = train(simplenet_training(again, x, o), tmp_path/'c', progress=False)
    assert log.resumed_at > 0
    for k, v in whole.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k


def test_a_run_fits_opens_and_predicts(boards, tmp_path):
    losses = []
    method = SimpleNet(make_config('smoke', OPTIONS)).fit(boards, tmp_path/'run', progress=False, callback=lambda stage, k, loss: losses.append((stage, loss)))
    assert len(losses) == 30 and {s for s, _ in losses} == {'simplenet'} and losses[-1][1] < losses[0][1]
    files = [s.image for s in boards.test]
    p, q = method.predict(files), open_run(tmp_path/'run', progress=False).predict(files)
    assert torch.equal(p.map, q.map) and torch.equal(p.score, q.score) and p.map.shape == (len(files), 1, 64, 64)
    assert (p.score >= p.map.flatten(1).amax(1) - 1e-5).all() # the score is taken before smoothing
    labels = torch.tensor([s.label for s in boards.test])
    assert p.score[labels == 1].mean() > p.score[labels == 0].mean()
    other = SimpleNet(make_config('smoke', OPTIONS, seed=1)).fit(boards, tmp_path/'other', progress=False)
    assert not torch.equal(other.predict(files).score, p.score)
