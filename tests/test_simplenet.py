"16d_simplenet: features, loss, training that resumes; the public code's figures; the method in a run."
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


# the same features, weights and noise given to the public code

LAYERS = {'adaptor': 'projection.layers.0fc', 'discriminator.0': 'discriminator.body.block1.0', 'discriminator.1': 'discriminator.body.block1.1', 'discriminator.3': 'discriminator.tail'}

def theirs_of(name):
    layer, kind = name.rsplit('.', 1)
    return f'{LAYERS[layer]}.{kind}'


@pytest.fixture
def public(): return load_file(Path(__file__).parent/'fixtures'/'simplenet.safetensors')


@pytest.fixture
def net(public):
    found = AdaptedDiscriminator(8, 16)
    given = {k: public[f'weights.{theirs_of(k)}'] for k in found.state_dict() if '.' in k and not k.endswith('tracked')}
    assert found.load_state_dict(given, strict=False).missing_keys == ['mean', 'std']
    return found


def test_public_code_gives_the_same_local_features(public):
    x = patch_features({j: public[f'features.layer{j}'] for j in (2, 3)})
    torch.testing.assert_close(x.permute(0, 2, 3, 1).flatten(0, 2), public['embedding'], atol=1e-5, rtol=0)


def test_public_code_gives_the_same_scores_and_maps(public, net):
    method = SimpleNet(make_config('smoke', {'options': {'sigma': 4*256/96}})) # σ = 4 at 96², as there
    method.phi, method.net = lambda _: {j: public[f'features.layer{j}'] for j in (2, 3)}, net.eval()
    p = method.predict_batch(torch.zeros(3, 3, 96, 96), [0, 1, 2])
    torch.testing.assert_close(p.score, public['score'], atol=1e-5, rtol=0)
    off = (p.map[:, 0, ::4, ::4] - public['map']).abs()
    assert off[:, 4:-4, 4:-4].max() < 1e-5 # further than 4σ = 16 pixels from the border
    assert 1e-4 < off.max() < .01          # at the border a Gaussian of SciPy repeats the edge pixel


def test_public_code_gives_the_same_loss_and_gradients(public, net):
    out = net.train()(public['embedding'], public['noise'])
    loss = truncated_loss(out, .5)
    loss.backward()
    assert .1 < (out.chunk(2)[0] > .5).float().mean() < .9 and (out.chunk(2)[1] < -.5).any() # both truncations have a part in it
    torch.testing.assert_close(loss, public['train.loss'], atol=1e-5, rtol=0)
    for k, p in net.named_parameters(): torch.testing.assert_close(p.grad, public[f'train.gradient.{theirs_of(k)}'], atol=1e-6, rtol=0, msg=k)


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
