"""Writes tests/fixtures/simplenet.safetensors: what SimpleNet's public code makes of given features, weights and noise.

A developer script, of seconds: `git clone https://github.com/DonaldRR/SimpleNet`, then
`python tests/public_simplenet.py SimpleNet`. Needs SciPy, scikit-learn and TensorBoard. Its class runs as it is, set as
in its run.sh but for sizes, with a network that hands out the given features in place of the WideResNet-50 and the
given noise in place of `torch.normal`; OpenCV, which only its metrics need, has an empty stand-in.
"""
import importlib, subprocess, sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import nn

TARGET = Path(__file__).parent/'fixtures'/'simplenet.safetensors'
IMAGES, SIZE, HIDDEN, MARGIN = 3, 96, 16, .5
SHAPES = {'layer2': (4, 12, 12), 'layer3': (4, 6, 6)}
EVERY = 4   # of the map's 96 × 96 pixels, along both axes


class Network(nn.Module):
    "Hands out given features where the code listens; an image is its number, in all of its pixels."
    def __init__(self, features: dict[str, torch.Tensor]):
        super().__init__()
        self.features = features
        for k in features: setattr(self, k, nn.Sequential(nn.Identity()))

    def forward(self, x):
        for k, f in self.features.items(): getattr(self, k)(f[x[:, 0, 0, 0].long()])


def main(folder: str):
    sys.path.insert(0, folder)
    with patch.dict(sys.modules, {'cv2': ModuleType('cv2')}):
        module = importlib.import_module('simplenet')
    g = torch.Generator().manual_seed(0)
    features = {k: torch.randn(IMAGES, *s, generator=g) for k, s in SHAPES.items()}
    images = torch.arange(float(IMAGES)).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)
    found = {f'features.{k}': f for k, f in features.items()}
    net, cpu = module.SimpleNet('cpu'), torch.device('cpu')
    net.load(Network(features), list(features), cpu, (3, SIZE, SIZE), 4, 8, meta_epochs=2, dsc_hidden=HIDDEN,
             dsc_margin=MARGIN, pre_proj=1)   # as many channels as there are: its pooling leaves them as they are
    weights = net.pre_projection.state_dict(prefix='projection.')
    weights |= net.discriminator.state_dict(prefix='discriminator.')
    for k, v in weights.items():
        if v.dtype != torch.float32: continue
        v.copy_(torch.rand(v.shape, generator=g) + .5 if 'running_var' in k else .5*torch.randn(v.shape, generator=g))
        found[f'weights.{k}'] = v.clone()
    found['embedding'] = net._embed(images)[0]
    scores, maps, _ = net._predict(images)
    found['score'] = torch.tensor([float(s) for s in scores])
    found['map'] = torch.stack([torch.from_numpy(m[::EVERY, ::EVERY].copy()) for m in maps])
    found['noise'], said = .3*torch.randn(found['embedding'].shape, generator=g), {}
    board = SimpleNamespace(add_scalar=lambda k, v, _: said.update({k: v}))
    net.logger = SimpleNamespace(logger=board, g_iter=0, step=lambda: None)
    with patch.object(torch, 'normal', lambda *_: found['noise']):
        net._train_discriminator([{'image': images}])
    found['train.loss'] = said['loss'].detach()
    for part, name in ((net.pre_projection, 'projection'), (net.discriminator, 'discriminator')):
        found |= {f'train.gradient.{name}.{k}': p.grad for k, p in part.named_parameters()}
    commit = subprocess.check_output(['git', '-C', folder, 'rev-parse', 'HEAD'], text=True).strip()
    save_file({k: v.detach().contiguous() for k, v in found.items()}, TARGET,
              {'repository': 'https://github.com/DonaldRR/SimpleNet', 'commit': commit})
    TARGET.chmod(0o644)


if __name__ == '__main__': main(sys.argv[1])
