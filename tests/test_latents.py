"""Room 06: the four kinds behind one interface, fine-tuning, its determinism and resume, and errors by text."""
import json, math

import pytest, torch
from hypothesis import given, settings as hsettings, strategies as st

from dynad import autoencoder, latents
from dynad.config import FeatureSettings, LatentSettings, weights_root
from dynad.features import load_features
from dynad.store import TrainingStopped
from dynad.autoencoder import draw_rows, finetune, random_shift
from dynad.latents import KLF8, TAESD, IdentityAE, LatentError, TinyAE, load_latents, psnr, shipped
from dynad.training import warmup_cosine


def small(seed=0):
    torch.manual_seed(seed)
    return TinyAE(4, (8, 8, 16), (1, 1, 1), (1, 1, 1)).eval()


def images(n=6, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4, generator=g), size, mode='bilinear') * 255).byte()


def kl():
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4,
                         latent_channels=4, norm_num_groups=4, scaling_factor=.25)


def taesd():
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    return AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)


@pytest.mark.parametrize('make', [IdentityAE, small, lambda: KLF8(kl()).eval(), lambda: TAESD(taesd()).eval()], ids=['identity', 'tiny', 'kl-f8', 'taesd'])
def test_one_interface(make):
    ae, x = make(), torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        z = ae.encode(x)
        assert z.shape == (2, ae.latent_channels, 32 // ae.downsample, 48 // ae.downsample) and z.dtype == torch.float32
        y = ae.decode(z)
        assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
        assert torch.equal(y, ae.decode(z, clamp=False).clamp(0, 1)) and torch.equal(y, ae(x))
        assert torch.equal(z, ae.encode(x)) # the mode: no chance in it


@pytest.mark.parametrize('kind,make', [('identity', IdentityAE), ('tiny', small), ('kl-f8', lambda: KLF8(kl())), ('taesd', lambda: TAESD(taesd()))])
def test_saved_and_loaded(tmp_path, kind, make):
    ae = make().eval()
    ae.save_pretrained(tmp_path/'ae')
    again, x = load_latents(LatentSettings(kind=kind, weights=None if kind == 'identity' else str(tmp_path/'ae')), 32), torch.rand(1, 3, 32, 32)
    assert again.weights_hash == ae.weights_hash and not again.training and not any(p.requires_grad for p in again.parameters())
    with torch.no_grad(): torch.testing.assert_close(again.encode(x), ae.encode(x), atol=1e-5, rtol=1e-4)
    assert not list((tmp_path/'ae').glob('*.bin')) and not list((tmp_path/'ae').glob('*.pth'))


def test_klf8_scale_and_sampling():
    net, x = kl().eval(), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        q = net.encode(2 * x - 1).latent_dist
        torch.testing.assert_close(KLF8(net).encode(x), q.mode() * .25)
        ae = KLF8(net, 'sample')
        draws = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]
        pair = torch.cat([x[:1], x[:1]])
        torch.testing.assert_close(ae.encode(pair, draws(3, 4))[1:], ae.encode(pair[:1], draws(4)))        # each image has its own draw, whatever batch it comes in
        a, b = (ae.encode(x, torch.Generator().manual_seed(s)) for s in (0, 1))
        assert torch.equal(a, ae.encode(x, torch.Generator().manual_seed(0))) and not torch.equal(a, b)


def test_identity_is_exact():
    x = torch.rand(2, 3, 8, 8)
    ae = load_latents(LatentSettings(kind='identity'), 8)
    torch.testing.assert_close(ae(x), x)
    assert ae.encode(x).min() < 0


def test_taesd_real_weights():
    if weights_root() is None or not (weights_root()/'taesd').is_dir(): pytest.skip('DYNAD_WEIGHTS has no folder taesd')
    from sklearn.datasets import load_sample_image
    x = torch.tensor(load_sample_image('flower.jpg'))[None, :256, :256].permute(0, 3, 1, 2).float() / 255
    ae = load_latents(LatentSettings(kind='taesd'), 256)
    assert ae.downsample == 8 and ae.latent_channels == 4
    assert psnr(ae(x), x).item() > 24 # a swapped range or scale would be far below
    assert .3 < ae.encode(x).std() < 2


def test_shipped_autoencoder():
    config, weights = shipped()
    assert weights.stat().st_size <= 4_000_000
    from sklearn.datasets import load_sample_image
    x = torch.tensor(load_sample_image('flower.jpg'))[None, :256, :256].permute(0, 3, 1, 2).float() / 255
    ae = load_latents(LatentSettings(kind='tiny'), 256)
    with torch.no_grad(): assert psnr(ae(x), x).item() > 24


def test_image_size_must_fit():
    with pytest.raises(LatentError, match='data.image_size = 36 is not a multiple of 8, the downsampling of latents.kind = tiny'): load_latents(LatentSettings(kind='tiny'), 36)


@pytest.mark.parametrize('kind', ['kl-f8', 'taesd'])
def test_weights_nowhere(monkeypatch, kind):
    import diffusers
    monkeypatch.delenv('DYNAD_WEIGHTS', raising=False)
    def unreachable(*a, **k): raise OSError('no route to host')
    for cls in (diffusers.AutoencoderKL, diffusers.AutoencoderTiny): monkeypatch.setattr(cls, 'from_pretrained', unreachable)
    with pytest.raises(LatentError, match=rf'put config.json and diffusion_pytorch_model.safetensors into \$DYNAD_WEIGHTS/{kind}/') as e: load_latents(LatentSettings(kind=kind), 128)
    assert 'latents.kind = tiny' in str(e.value)


def test_broken_folders(tmp_path):
    def load(kind): return load_latents(LatentSettings(kind=kind, weights=str(tmp_path)), 64)
    for kind in ('tiny', 'taesd', 'kl-f8'):
        with pytest.raises(LatentError, match=r'config\.json: no such file; latents.kind = .* needs a folder'): load(kind)
    taesd().save_pretrained(tmp_path)
    with pytest.raises(LatentError, match=r'config\.json: not a TinyAE; set latents.kind to what it is'): load('tiny')
    (tmp_path/'config.json').write_text('{')
    with pytest.raises(LatentError, match=r'config\.json: cannot be read as JSON'): load('tiny')
    (tmp_path/'diffusion_pytorch_model.safetensors').write_bytes(b'xx')
    with pytest.raises(LatentError, match='not a AutoencoderTiny that diffusers can read'): load('taesd')


def test_weights_of_another_shape(tmp_path):
    small().save_pretrained(tmp_path)
    raw = json.loads((tmp_path/'config.json').read_text()) | {'latent_channels': 8}
    (tmp_path/'config.json').write_text(json.dumps(raw))
    with pytest.raises(LatentError, match=r'diffusion_pytorch_model\.safetensors: does not fit .*config\.json: \d+ tensors'): load_latents(LatentSettings(kind='tiny', weights=str(tmp_path)), 64)


def test_half_precision_on_disk(tmp_path):
    ae, x = small(), torch.rand(1, 3, 32, 32)
    ae.save_pretrained(tmp_path, half=True)
    again = load_latents(LatentSettings(kind='tiny', weights=str(tmp_path)), 32)
    with torch.no_grad(): torch.testing.assert_close(again(x), ae(x), atol=2e-3, rtol=1e-2)


def test_standardise_changes_latents_not_images():
    ae, x = small(), images(8)
    f = x.float() / 255
    with torch.no_grad():
        before = ae(f)
        ae.standardise(x, batch=3)
        z = ae.encode(f)
        torch.testing.assert_close(ae(f), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_constant_images_do_not_divide_by_zero():
    ae, plain = small(), torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    ae.standardise(plain)
    assert torch.isfinite(ae.encode(torch.rand(1, 3, 32, 32))).all()
    ae.standardise(plain, least=torch.full((1, 4, 1, 1), .3))
    torch.testing.assert_close(ae.std, torch.full((1, 4, 1, 1), .3))
    assert torch.isfinite(ae.encode(torch.rand(1, 3, 32, 32))).all()


FAST = LatentSettings(kind='tiny', finetune_steps=12, finetune_batch=4)

def test_finetune_lowers_the_loss_and_repeats():
    a, b, c, x = small(), small(), small(), images()
    steps = LatentSettings(kind='tiny', finetune_steps=25, finetune_batch=4, finetune_lr=1e-2)
    losses = finetune(a, x, steps, None, seed=1, progress=False)
    assert len(losses) == 25 and sum(losses[-5:]) < .85 * sum(losses[:5])
    assert finetune(b, x, steps, None, seed=1, progress=False) == losses and a.weights_hash == b.weights_hash
    finetune(c, x, steps, None, seed=2, progress=False)
    assert c.weights_hash != a.weights_hash
    assert not a.training and not any(p.requires_grad for p in a.parameters())


def test_finetune_resumes_to_the_same_weights(tmp_path, monkeypatch):
    whole, cut, x = small(), small(), images()
    losses = finetune(whole, x, FAST, None, progress=False)
    calls, real = [], autoencoder.reconstruction_loss
    def dies(*a):
        calls.append(1)
        if len(calls) == 9: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(autoencoder, 'reconstruction_loss', dies)
    with pytest.raises(KeyboardInterrupt): finetune(cut, x, FAST, None, progress=False, workdir=tmp_path, save_every=5)
    monkeypatch.setattr(autoencoder, 'reconstruction_loss', lambda *a: calls.append(1) or real(*a))
    calls.clear()
    again = small(seed=9)
    assert finetune(again, x, FAST, None, progress=False, workdir=tmp_path, save_every=5) == losses
    assert len(calls) == 7 and again.weights_hash == whole.weights_hash
    assert all(p.suffix == '.safetensors' for p in tmp_path.iterdir())


def test_finetune_leaves_phi_alone():
    phi, ae = load_features(FeatureSettings(backbone='efficientnet_lite0')), small()
    before, flags = phi.weights_hash, [p.requires_grad for p in phi.parameters()]
    losses = finetune(ae, images(), LatentSettings(kind='tiny', finetune_steps=2, finetune_batch=2), phi, progress=False)
    assert phi.weights_hash == before and [p.requires_grad for p in phi.parameters()] == flags and all(p.grad is None for p in phi.parameters())
    assert all(math.isfinite(l) for l in losses)


def test_finetune_refuses():
    assert finetune(small(), images(), LatentSettings(kind='tiny', finetune_steps=0), None) == []
    with pytest.raises(LatentError, match='latents.finetune_steps = 12, but latents.kind = identity is used as it is; set it to 0'): finetune(IdentityAE(), images(), FAST)
    with pytest.raises(LatentError, match=r'expected \[N,3,H,W\] uint8 with N > 0'): finetune(small(), torch.rand(2, 3, 32, 32), FAST)
    with pytest.raises(LatentError, match=r'uint8 with N > 0'): finetune(small(), images(0), FAST)


def test_fewer_images_than_a_batch():
    assert len(finetune(small(), images(1), LatentSettings(kind='tiny', finetune_steps=2, finetune_batch=4), None, progress=False)) == 2


@hsettings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_draw_is_even(n, batch, seed):
    count = torch.bincount(draw_rows(n, batch, torch.Generator().manual_seed(seed)), minlength=n)
    assert count.sum() == batch and count.max() - count.min() <= 1


@hsettings(max_examples=20, deadline=None)
@given(st.integers(1, 500))
def test_warmup_cosine_stays_in_range(steps):
    f = [warmup_cosine(s, steps) for s in range(steps)]
    assert all(0 <= v <= 1 for v in f) and f[-1] < 1e-6


def test_shift_keeps_the_image():
    x = torch.rand(3, 3, 16, 16)
    assert torch.equal(random_shift(x, 0, torch.Generator().manual_seed(0)), x)
    y = random_shift(x, 4, torch.Generator().manual_seed(0))
    assert y.shape == x.shape and set(y.flatten().tolist()) <= set(x.flatten().tolist())


@hsettings(max_examples=20, deadline=None)
@given(st.floats(.001, .5))
def test_psnr_is_its_formula(d):
    assert psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), d)).item() == pytest.approx(-20 * math.log10(d), abs=1e-3)

def test_fine_tuning_follows_the_autoencoders_device():
    "On the device that holds no numbers, all that differs is where tensors are: it ends where the loss is read, not where two devices meet."
    ae, phi = load_latents(LatentSettings(kind='tiny'), 32).to('meta'), load_features(FeatureSettings(backbone='efficientnet_lite0'), pretrained=False).to('meta')
    with pytest.raises(RuntimeError, match='meta tensors'): finetune(ae, torch.zeros(4, 3, 32, 32, dtype=torch.uint8), LatentSettings(kind='tiny', finetune_steps=1, finetune_batch=2), phi, progress=False)

def test_fine_tuning_that_is_stopped_goes_on(tmp_path):
    images, s = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), LatentSettings(kind='tiny', finetune_steps=4, finetune_batch=2)
    whole, cut = load_latents(s, 32), load_latents(s, 32)
    losses = finetune(whole, images, s, progress=False, seed=2**32 - 1)
    seen = []
    with pytest.raises(TrainingStopped, match='stopped after step 1 of 4; .*finetune.safetensors lets the next run go on'):
        finetune(cut, images, s, progress=False, seed=2**32 - 1, workdir=tmp_path, callback=lambda *a: seen.append(a), should_stop=lambda: len(seen) == 2)
    assert seen == [*enumerate(losses[:2])]
    assert finetune(load_latents(s, 32), images, s, progress=False, seed=2**32 - 1, workdir=tmp_path) == losses
