"16e_skip_ganomaly: networks, losses, score; the public code's figures; the method in a run."
from pathlib import Path

import pytest
import torch
from public_skip_ganomaly import as_public
from safetensors.torch import load_file

from dynad.config import make_config
from dynad.data import to_float
from dynad.method import open_run
from dynad.skip_ganomaly import GAN, SkipGANomaly, SkipGANomalyError, SkipGANomalyOptions, discriminator_loss, gan_maps, generator_loss

SMALL = {'options': {'widths': [8, 16], 'steps': 12, 'batch': 4}}


@pytest.mark.parametrize('widths, size', [((4, 8), 32), ((4, 8, 8, 16), 64)])
def test_copies_have_the_size_of_the_images(widths, size):
    gan = GAN(widths)
    x = torch.rand(2, 3, size, size)*2 - 1
    copy = gan(x)
    assert copy.shape == x.shape and copy.abs().max() <= 1
    assert gan.D(x)[1].shape == (2, widths[-1], size//2**len(widths), size//2**len(widths))


def test_losses_are_weighted_as_asked_and_reach_one_network_each():
    torch.manual_seed(0)
    gan, x = GAN((4, 8)), torch.rand(4, 3, 32, 32)*2 - 1
    copy = gan(x)
    con = generator_loss(gan, x, copy, SkipGANomalyOptions(w_adv=0, w_con=1, w_lat=0))
    assert torch.isclose(con, (x - copy).abs().mean())
    before = {k: v.clone() for k, v in gan.D.named_buffers()}
    generator_loss(gan, x, copy, SkipGANomalyOptions()).backward()
    assert all(p.grad is None for p in gan.D.parameters()) and all(p.grad is not None for p in gan.G.parameters())
    assert all(torch.equal(v, before[k]) for k, v in gan.D.named_buffers()) # its statistics stay those of its own loss
    gan.zero_grad(set_to_none=True)
    discriminator_loss(gan, x, gan(x)).backward()
    assert all(p.grad is None for p in gan.G.parameters()) and all(p.grad is not None for p in gan.D.parameters())


def test_the_mean_of_the_map_is_the_score_of_equation_5():
    torch.manual_seed(0)
    gan, x = GAN((4, 8)).eval(), torch.rand(3, 3, 32, 32)*2 - 1
    with torch.no_grad(): copy = gan(x); features = (gan.D(x)[1] - gan.D(copy)[1]).square().flatten(1).mean(1)
    want = .9*(x - copy).abs().flatten(1).mean(1) + .1*features
    torch.testing.assert_close(gan_maps(gan, x).mean((1, 2, 3)), want.detach())


# the same images and weights given to the public code

@pytest.fixture
def public():
    t = load_file(Path(__file__).parent/'fixtures'/'skip_ganomaly.safetensors')
    return t | {'x': t['images']/127.5 - 1}


@pytest.fixture
def gan(public):
    "With the public code's wiring (see `as_public`) and its weights; biases, which it has not, stay zero."
    found = as_public()
    left = found.load_state_dict({k[8:]: v.float() for k, v in public.items() if k.startswith('weights.')}, strict=False)
    assert not left.unexpected_keys and all(k.endswith('bias') and not found.get_parameter(k).any() for k in left.missing_keys)
    return found


def near(a, b, atol=1e-5): torch.testing.assert_close(a, b, atol=atol, rtol=0)


@torch.no_grad()
def test_public_code_gives_the_same_copies_and_judgements(public, gan):
    x = public['x']
    logit, features = gan.eval().D(x)
    near(gan(x)[..., ::2, ::2], public['copy'])
    near(logit.sigmoid(), public['real'])
    near(features, public['features'])


@torch.no_grad()
def test_public_code_passes_skips_through_a_relu(public, gan):
    "Why `as_public` is needed: the generator as it is makes other copies of the same weights."
    for up in gan.G.up: up[0] = torch.nn.Identity()
    assert (gan.eval()(public['x'])[..., ::2, ::2] - public['copy']).abs().max() > .1


def test_public_code_gives_the_same_losses_and_gradients(public, gan):
    x, P = public['x'], dict(gan.named_parameters())
    copy = gan.train()(x)
    of = lambda adv, con, lat: generator_loss(gan, x, copy, SkipGANomalyOptions(w_adv=adv, w_con=con, w_lat=lat))
    for name, weights in (('adv', (1, 0, 0)), ('con', (0, 50, 0)), ('lat', (0, 0, 1)), ('G', (1, 50, 1))): # 50: its default
        near(of(*weights), public[f'loss.{name}'], 1e-4 if name in ('con', 'G') else 1e-5) # of 38 and 41
    of(1, 50, 1).backward()
    for k in ('G.down.0.0.weight', 'G.last.1.weight'): near(P[k].grad, public[f'gradient.{k}'])
    gan.zero_grad()
    loss = 2*discriminator_loss(gan, x, gan(x)) # there a sum, here a mean
    loss.backward()
    near(loss, public['loss.D'])
    near(P['D.features.0.0.weight'].grad, public['gradient.D.features.0.0.weight'])


@torch.no_grad()
def test_public_code_gives_the_same_score_but_for_squared_pixels(public, gan):
    "It judges in train mode, with pixel differences squared, and scales by the images judged."
    x = public['x']
    r = x - gan.train()(x)
    near(gan_maps(gan, x, 1.).mean(), public['loss.con']/50)
    score = gan_maps(gan, x, .9).mean((1, 2, 3)) + .9*(r.square() - r.abs()).mean((1, 2, 3))
    near((score - score.min())/(score.max() - score.min()), public['score'])


def test_a_run_fits_opens_and_predicts(boards, tmp_path):
    method = SkipGANomaly(make_config('smoke', SMALL)).fit(boards, tmp_path/'run', progress=False)
    files = [s.image for s in boards.test]
    p, q = method.predict(files), open_run(tmp_path/'run', progress=False).predict(files)
    assert torch.equal(p.map, q.map) and torch.equal(p.score, q.score) and p.map.shape == (len(files), 1, 64, 64)


def test_reconstructions_are_the_copies_that_it_scores(boards, tmp_path):
    method = SkipGANomaly(make_config('smoke', SMALL)).fit(boards, tmp_path/'run', progress=False)
    images, rows = method.test_images(boards.test, boards), [5, 0, 2]
    back = method.reconstructions(images, rows)
    assert method.reconstructs and back.shape == (3, 3, 64, 64) and 0 <= back.min() and back.max() <= 1
    x = to_float(images.images[rows])
    with torch.no_grad(): copy = method.gan(x*2 - 1)
    torch.testing.assert_close(back*2 - 1, copy)
    pixels = .9*(x - back).abs().mean((1, 2, 3))*2 # the part of Eq. 5 that is about pixels
    assert (gan_maps(method.gan, x*2 - 1).mean((1, 2, 3)) >= pixels - 1e-5).all()


def test_an_image_that_cannot_be_halved_so_often_is_named(boards, tmp_path):
    config = make_config('smoke', {'data.image_size': 96, 'options': {'widths': [4]*6}})
    with pytest.raises(SkipGANomalyError, match='6 halvings need images whose side is a multiple of 64, and data.image_size = 96'):
        SkipGANomaly(config).fit(boards, tmp_path/'run', progress=False)
