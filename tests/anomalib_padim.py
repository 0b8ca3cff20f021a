"""Compares dynad's PaDiM with anomalib's on the same φ, images and channels.

A developer script that writes nbs/results/padim_anomalib.json: `pip install 'dynad[baselines]'`, then
`DYNAD_DATA=… python tests/anomalib_padim.py` (minutes on one core).
"""
import json, os, platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from dynad.config import FeatureSettings
from dynad.data import load_images, load_masks, open_dataset, to_float
from dynad.features import load_features
from dynad.metrics import image_metrics, pixel_metrics
from dynad.padim import mahalanobis, padim_map, place_vectors, reduced
from dynad.places import PlaceGaussians
from dynad.store import atomic_write

TARGET = Path(__file__).parents[1]/'nbs'/'results'/'padim_anomalib.json'
PLAN = [('cookies', 128, 60), ('magnetic_tile', 128, 60), ('cookies', 64, 200)] # set, size, training images at most
METRICS = ('i_auroc', 'p_auroc', 'pro')
LAYERS, DIMS, RIDGE, TEST = (1, 2, 3), 100, .01 + 1e-5, 60


class Named(nn.Module):
    "φ as anomalib expects a feature extractor: layer names instead of numbers."
    def __init__(self, phi):
        super().__init__()
        self.phi = phi

    def train(self, mode: bool = True): return super().train(False) # BatchNorm stays frozen, as in anomalib's own extractor

    def forward(self, images): return {f'layer{j}': f for j, f in self.phi(images).items() if j in LAYERS}


def reference(phi, seed: int):
    "anomalib's model with φ as its feature extractor and its channels drawn by `seed`."
    from anomalib.models.image.padim.torch_model import PadimModel
    model = PadimModel('resnet18', [f'layer{j}' for j in LAYERS], pre_trained=False, n_features=DIMS)
    model.feature_extractor = Named(phi).eval()
    model.idx = torch.randperm(sum(phi.channels[j] for j in LAYERS), generator=torch.Generator().manual_seed(seed))[:DIMS]
    return model


@torch.no_grad()
def run_anomalib(phi, train: torch.Tensor, test: torch.Tensor, seed: int):
    "Maps, scores and channels of anomalib."
    model = reference(phi, seed).train()
    for x in train.split(16): model(to_float(x))
    model.fit()
    model.eval()
    found = [model(to_float(x)) for x in test.split(16)]
    return torch.cat([f.anomaly_map for f in found]), torch.cat([f.pred_score for f in found]).flatten(), model.idx


@torch.no_grad()
def run_dynad(phi, train: torch.Tensor, test: torch.Tensor, channels: torch.Tensor):
    "Maps and scores of dynad with these channels."
    U = torch.nn.functional.one_hot(channels, sum(phi.channels[j] for j in LAYERS)).T.float()
    vectors = lambda x: place_vectors(phi(to_float(x)), LAYERS)
    fitted = PlaceGaussians()
    for x in train.split(16): fitted.add(reduced(vectors(x), U))
    mean, inverse = fitted.fitted(RIDGE)
    out, size = [], tuple(test.shape[-2:])
    for x in test.split(16):
        v = vectors(x)
        d = mahalanobis(reduced(v, U), mean, inverse).view(len(v), *v.shape[-2:])
        out.append(padim_map(d, size, 4*256/size[1]))
    return tuple(torch.cat(x) for x in zip(*out))


@torch.no_grad()
def run_float64(phi, train: torch.Tensor, test: torch.Tensor, channels: torch.Tensor):
    "The same equations in double precision, all normal images at once."
    def vectors(x): return torch.cat([place_vectors(phi(to_float(b)), LAYERS) for b in x.split(16)])[:, channels].double()
    v = vectors(test)
    x, y, shape = vectors(train).flatten(2), v.flatten(2), v.shape[-2:]
    mean, eye = x.mean(0), torch.eye(len(channels), dtype=torch.float64)
    at = lambda p: torch.linalg.inv(x[:, :, p].T.cov() + RIDGE*eye)
    d = torch.stack([((y[:, :, p] - mean[:, p]) @ at(p)*(y[:, :, p] - mean[:, p])).sum(1).sqrt() for p in range(x.shape[2])], 1)
    return padim_map(d.view(len(v), *shape), tuple(test.shape[-2:]), 4*256/test.shape[-1])[0].float()


def compare(phi, name: str, size: int, most: int, seed: int = 0) -> dict:
    "One set at one size."
    data = open_dataset(Path(os.environ['DYNAD_DATA'])/name)
    test = data.test[::max(1, len(data.test)//TEST)][:TEST]
    train, x = (load_images(s, size) for s in (data.train[:most], test))
    maps, scores, channels = run_anomalib(phi, train, x, seed)
    ours, own = run_dynad(phi, train, x, channels)
    exact = run_float64(phi, train, x, channels)
    masks, has_mask = load_masks(test, size)
    labels = torch.tensor([s.label for s in test])
    def measure(m, s):
        found = image_metrics(s, labels, n_boot=0) | pixel_metrics(m, masks, has_mask, n_boot=0)
        return {k: round(found[k].value, 5) for k in METRICS}
    relative = lambda a, b: float((a - b).abs().max()/a.abs().max())
    return dict(set=name, size=size, train=len(train), test=len(test), seed=seed, map_difference=relative(maps, ours),
                score_difference=relative(scores, own), float64={'anomalib': relative(exact, maps), 'dynad': relative(exact, ours)}, anomalib=measure(maps, scores), dynad=measure(ours, own))


def main():
    phi = load_features(settings := FeatureSettings(backbone='efficientnet_lite0'), layers=LAYERS)
    versions = {p: version(p) for p in ('anomalib', 'torch', 'torchvision', 'timm')} | {'python': platform.python_version()}
    what = dict(what="PaDiM of anomalib and of dynad on the same φ, images and channels; differences are the largest ones, relative to the "
                     "largest value", backbone=settings.backbone, phi=phi.weights_hash, dims=DIMS, ridge=RIDGE, versions=versions)
    rows = [compare(phi, *setting) for setting in PLAN]
    atomic_write(TARGET, json.dumps(what | dict(rows=rows), indent=1) + '\n')
    print(json.dumps(rows, indent=1))


if __name__ == '__main__': main()
