"The paper's scale, once: a training step and an inference at 256², with random weights in every file that the paper preset reads. Slow; DYNAD_SLOW=1 runs it."
import json
import os
import resource
import time
from dataclasses import replace

import pytest
import torch
import torchvision
from diffusers import AutoencoderKL

from dynad.config import make_config
from dynad.training import CHECKPOINT
from dynad.denoiser import count_parameters, load_denoiser, make_unet, train_denoiser
from dynad.detector import DynAD
from dynad.dic import DIC, pooled, t_grid
from dynad.diffusion import make_schedule
from dynad.features import FeatureError, load_features
from dynad.fusion import Calibration
from dynad.method import Decision
from dynad.latents import LatentError, load_latents
from dynad.speed import KLF8_CONFIG
from dynad.store import save_tensors
from dynad.walk import extract_features

slow = pytest.mark.skipif(os.environ.get('DYNAD_SLOW') != '1', reason='minutes and more than 6 GB of memory; DYNAD_SLOW=1 runs it')

def gigabytes() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6

@pytest.fixture
def weights(tmp_path, monkeypatch):
    "Every weights file of the paper preset, with random contents, where DYNAD_WEIGHTS says."
    torch.manual_seed(0)
    AutoencoderKL(**KLF8_CONFIG).save_pretrained(tmp_path/'kl-f8')
    for name in ('resnet34', 'wide_resnet50_2'): save_tensors(tmp_path/f'{name}.safetensors', getattr(torchvision.models, name)(weights=None).state_dict())
    monkeypatch.setenv('DYNAD_WEIGHTS', str(tmp_path))
    return tmp_path

def detector(cfg, unet, good):
    "The parts of the paper preset, put together by hand: fitting them would take days here."
    m = DynAD(cfg)
    m.parts = replace(m.parts, autoencoder=load_latents(cfg.latents, cfg.data.image_size), phi=load_features(cfg.features), denoiser=unet)
    m.parts = replace(m.parts, dic=DIC.fit(pooled(extract_features(m.parts, good)[cfg.dic.layer], cfg.dic.pool), cfg.dic))
    m.fixed_calibration = Calibration({T: (0., 1., 0., 1.) for T in t_grid(cfg.reconstruction.t_max)})
    m._decision = Decision(1., 1.)
    return m

@slow
def test_one_step_and_one_inference_at_full_scale(weights, tmp_path):
    cfg = make_config('paper', {'denoiser.steps': 1, 'denoiser.epochs': None, 'denoiser.batch': 2, 'denoiser.gradient_checkpointing': True}, device='cpu')
    images = torch.rand(4, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    told, start = {}, time.perf_counter()
    def lap(what):
        nonlocal start
        told[what] = round(time.perf_counter() - start, 1); told[f'{what}, peak GB'] = round(gigabytes(), 1); start = time.perf_counter()
    unet = make_unet(cfg.denoiser, 4, 32)
    assert count_parameters(unet) == 256_401_796
    first = unet.unet.conv_in.weight.detach().clone()
    ae = load_latents(cfg.latents, 256)
    assert (ae.kind, ae.latent_channels, ae.downsample, ae.scale) == ('kl-f8', 4, 8, .18215)
    with torch.no_grad(): z = ae.encode(images[:2])
    assert z.shape == (2, 4, 32, 32)
    lap('encode two images')
    del ae
    log = train_denoiser(unet, z/z.std(), make_schedule(cfg.diffusion), cfg.denoiser, 0, tmp_path/'work', device='cpu', progress=False)
    assert log.steps == 1 and .5 < log.losses[0] < 2 and not torch.equal(unet.unet.conv_in.weight, first)
    assert (tmp_path/'work'/CHECKPOINT).stat().st_size > 16*256_401_796 # weights, average, two moments
    (tmp_path/'work'/CHECKPOINT).unlink()
    lap('a step of batch 2 with its checkpoint')
    with pytest.warns(UserWarning, match='K = 20 neighbours asked for'): m = detector(cfg, unet, images)
    p = m.predict(images[:1])
    assert p.map.shape == (1, 1, 256, 256) and p.map.isfinite().all() and p.reconstruction.shape == (1, 3, 256, 256) and unet.calls >= 10
    lap('an inference of one image')
    m.save_pretrained(tmp_path/'saved')
    again = load_denoiser(tmp_path/'saved'/'unet')
    assert again.weights_hash == unet.weights_hash
    assert told['an inference of one image, peak GB'] < 20
    print('\n' + json.dumps(told, indent=1))

@slow
def test_wide_resnet_50_as_the_eye(weights):
    cfg = make_config('paper', {'features.backbone': 'wide_resnet50_2', 'denoiser.widths': [32, 32], 'denoiser.attention': [1], 'denoiser.heads': 4}, device='cpu')
    images = torch.rand(3, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning): m = detector(cfg, make_unet(cfg.denoiser, 4, 32), images)
    assert {j: f.shape[1:] for j, f in extract_features(m.parts, images[:1]).items()} == {2: (512, 32, 32), 3: (1024, 16, 16)}
    p = m.predict(images[:1])
    assert p.map.shape == (1, 1, 256, 256) and p.map.isfinite().all()

# not slow: where the files belong

def test_missing_weights_of_the_paper_preset_are_named(tmp_path, monkeypatch):
    cfg = make_config('paper')
    monkeypatch.setenv('DYNAD_WEIGHTS', str(tmp_path))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(LatentError, match=r'weights of kl-f8 are not on this machine .* put config.json and diffusion_pytorch_model.safetensors into \$DYNAD_WEIGHTS/kl-f8/'): load_latents(cfg.latents, 256)
    (tmp_path/'kl-f8').mkdir()
    with pytest.raises(LatentError, match=r'kl-f8/config.json: no such file; latents.kind = kl-f8 needs a folder with config.json and diffusion_pytorch_model.safetensors'): load_latents(cfg.latents, 256)
    monkeypatch.setattr('torch.hub.get_dir', lambda: str(tmp_path/'hub')) # no file in the user's own cache
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')                # and no network
    monkeypatch.setenv('no_proxy', '')
    with pytest.raises(FeatureError, match=r'weights of resnet34 are not on this machine .* put resnet34-b627a593.pth or resnet34.safetensors into the folder named by DYNAD_WEIGHTS'): load_features(cfg.features)
