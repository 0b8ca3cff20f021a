"""Writes tests/fixtures/skip_ganomaly.safetensors: what Skip-GANomaly's public code makes of given images and weights.

A developer script, of seconds: `git clone https://github.com/samet-akcay/skip-ganomaly`, then
`python tests/public_skip_ganomaly.py skip-ganomaly`. Needs scikit-learn, SciPy, pandas and seaborn. Its class runs
as it is, with its own options but for sizes. Of its training the losses and gradients are taken, before any step:
today's torch refuses the second of its two steps, because the first has changed weights that the second needs.
"""
import importlib, subprocess, sys, tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import nn

from dynad.skip_ganomaly import GAN, Discriminator

TARGET = Path(__file__).parent/'fixtures'/'skip_ganomaly.safetensors'
IMAGES, SIZE, WIDTH, VECTOR = 4, 32, 2, 6


def as_public() -> GAN:
    """dynad's networks with what the public ones have otherwise: a ReLU before each transposed convolution, on skips
    too; neither norm nor activation at the deepest halving; features that a convolution brings to one vector."""
    gan = GAN(tuple(WIDTH*k for k in (1, 2, 4, 8, 8)))
    G, D = gan.G, Discriminator(tuple(WIDTH*k for k in (1, 2, 4)))
    G.down[-1] = G.down[-1][:1]
    for up in G.up: up.insert(0, nn.ReLU())
    G.last = nn.Sequential(nn.ReLU(), G.last)
    D.features = nn.Sequential(*D.features, nn.Conv2d(4*WIDTH, VECTOR, 4))
    D.head, gan.D = nn.Conv2d(VECTOR, 1, 3, padding=1), D
    for k, p in gan.named_parameters():
        if k.endswith('bias'): nn.init.zeros_(p)   # there a convolution has none, but for the last of G
    return gan


def seeded(gan: GAN, g: torch.Generator) -> dict[str, torch.Tensor]:
    "Random weights for `gan`, exact in half precision; returns those that the public code has too."
    kept = {}
    for name, m in gan.named_modules():
        if not isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)): continue
        for k, v in m.state_dict().items():
            norm = isinstance(m, nn.BatchNorm2d)
            if v.dtype != torch.float32 or k == 'bias' and not norm and name != 'G.last.1': continue
            r = torch.randn(v.shape, generator=g)
            if norm: r = .5*r.abs() + .5 if k in ('weight', 'running_var') else .3*r
            elif k == 'weight': r = r*(2/v[0].numel())**.5
            kept[f'{name}.{k}'] = r.half()
            v.copy_(kept[f'{name}.{k}'])
    return kept


def copy_into(theirs: nn.Module, ours: nn.Module, swapped: bool = False):
    "Weights of one layer; `swapped`: there the skip comes first among the channels that go in, here it comes last."
    for k, v in theirs.state_dict().items():
        w = ours.state_dict()[k]
        v.copy_(torch.cat(w.chunk(2)[::-1]) if swapped and k == 'weight' else w)


def copy_all(netg: nn.Module, netd: nn.Module, gan: GAN):
    of = lambda m, kind: [c for c in m.modules() if isinstance(c, kind)]
    blocks, block = [], netg.model
    while block is not None:
        blocks.append(block)
        block = next((m for m in block.model if type(m) is type(block)), None)
    for i, b in enumerate(blocks):
        own = lambda kind: [m for m in b.model if isinstance(m, kind)]
        up = gan.G.up[-i] if i else gan.G.last
        copy_into(own(nn.Conv2d)[0], gan.G.down[i][0])
        copy_into(own(nn.ConvTranspose2d)[0], up[1], swapped=b is not blocks[-1])
        norms = [*of(gan.G.down[i], nn.BatchNorm2d), *of(up, nn.BatchNorm2d)]
        for theirs, ours in zip(own(nn.BatchNorm2d), norms, strict=True): copy_into(theirs, ours)
    for kind in (nn.Conv2d, nn.BatchNorm2d):
        for theirs, ours in zip(of(netd.feat, kind), of(gan.D.features, kind), strict=True): copy_into(theirs, ours)
    copy_into(netd.clas.classifier, gan.D.head)


def main(folder: str):
    sys.path.insert(0, folder)
    module, options = (importlib.import_module(k) for k in ('lib.models.skipganomaly', 'options'))
    g, gan = torch.Generator().manual_seed(0), as_public()
    found = {f'weights.{k}': v for k, v in seeded(gan, g).items()}
    found['images'] = torch.randint(256, (IMAGES, 3, SIZE, SIZE), generator=g, dtype=torch.uint8)
    x = found['images']/127.5 - 1
    with tempfile.TemporaryDirectory() as out:
        sizes = dict(batchsize=IMAGES, isize=SIZE, nz=VECTOR, ngf=WIDTH, ndf=WIDTH)
        words = [w for k, v in (sizes | dict(device='cpu', outf=out)).items() for w in (f'--{k}', str(v))]
        opt = options.Options().parser.parse_args(words)
        opt.isTrain, opt.gpu_ids = True, []
        batches = [(x, torch.arange(IMAGES) % 2)]
        found |= run(module, opt, gan, batches)
    commit = subprocess.check_output(['git', '-C', folder, 'rev-parse', 'HEAD'], text=True).strip()
    save_file({k: v.detach().contiguous() for k, v in found.items()}, TARGET,
              {'repository': 'https://github.com/samet-akcay/skip-ganomaly', 'commit': commit})
    TARGET.chmod(0o644)


class Loader(list):
    "Batches, with the data set that the code asks for its length."
    @property
    def dataset(self): return range(IMAGES)


def run(module, opt, gan: GAN, batches: list) -> dict[str, torch.Tensor]:
    model, found = module.Skipganomaly(opt, SimpleNamespace(valid=Loader(batches))), {}
    copy_all(model.netg, model.netd, gan)
    with torch.no_grad():
        x = batches[0][0]
        found['copy'] = model.netg.eval()(x)[..., ::2, ::2]
        found['real'], found['features'] = model.netd.eval()(x)
    model.netg.train(), model.netd.train()
    model.noise.zero_()   # it is added to the images, and left as the memory was
    model.set_input(batches[0])
    model.forward(), model.optimizer_g.zero_grad(), model.backward_g()
    for k in ('adv', 'con', 'lat'): found[f'loss.{k}'] = getattr(model, f'err_g_{k}')
    found['loss.G'] = model.err_g
    first, last = (m.weight.grad.clone() for m in (model.netg.model.model[0], model.netg.model.model[-2]))
    found |= {'gradient.G.down.0.0.weight': first, 'gradient.G.last.1.weight': torch.cat(last.chunk(2)[::-1])}
    opt.w_lat = 0   # so that its discriminator's loss is the adversarial one alone
    model.forward(), model.backward_g(), model.optimizer_d.zero_grad(), model.backward_d()
    found |= {'loss.D': model.err_d, 'gradient.D.features.0.0.weight': model.netd.feat[0].weight.grad}
    with patch.object(module, 'roc', lambda *_: .5): model.test()
    return found | {'score': model.an_scores}


if __name__ == '__main__': main(sys.argv[1])
