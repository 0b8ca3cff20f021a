"""Writes tests/fixtures/spade.safetensors: scores and maps of SPADE-pytorch's own program for features given to it.

A developer script, of seconds: `git clone https://github.com/byungjae89/SPADE-pytorch`, then
`python tests/public_spade.py SPADE-pytorch`. Needs scikit-learn and SciPy. Its `main` runs as it is, with a
network that hands out the given features in place of the WideResNet-50, and numbered images in place of MVTec. It was
written for torch 1.5, whose `pairwise_distance` takes the norm along axis 1; today's takes the last axis, where this
program has the width of the map (its issue 15), and so that function is given back its earlier meaning while it runs.
"""
import importlib, subprocess, sys, tempfile
from pathlib import Path
from unittest.mock import patch

import matplotlib
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

TARGET = Path(__file__).parent/'fixtures'/'spade.safetensors'
SHAPES = {'layer1': (2, 20, 20), 'layer2': (3, 10, 10), 'layer3': (4, 5, 5), 'avgpool': (12, 1, 1)}
TRAIN, TEST = 6, 2
EVERY = 8   # of the map's 224 × 224 pixels, along both axes


class Images(torch.utils.data.Dataset):
    "What takes the place of MVTec: each image is its number, from where the network reads its features."
    def __init__(self, class_name: str, is_train: bool):
        self.rows = range(TRAIN) if is_train else range(TRAIN, TRAIN + TEST)

    def __len__(self): return len(self.rows)

    def __getitem__(self, i):
        mask = torch.zeros(1, 224, 224)
        mask[:, :9] = i % 2   # both classes, for the program's ROC curves
        return torch.tensor([float(self.rows[i])]), i % 2, mask


class Network(nn.Module):
    "Hands out given features where the program listens: at its layers and at the average."
    def __init__(self, features: dict[str, torch.Tensor]):
        super().__init__()
        self.features = features
        for k in SHAPES: setattr(self, k, nn.Identity() if k == 'avgpool' else nn.Sequential(nn.Identity()))

    def forward(self, x):
        for k in SHAPES: getattr(self, k)(self.features[k][x[:, 0].long()])


def along_channels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    "`torch.pairwise_distance` of torch 1.5."
    return (a - b + 1e-6).norm(dim=1)


def run(module, features: dict[str, torch.Tensor], K: int) -> tuple[np.ndarray, np.ndarray]:
    "Scores [TEST] and maps [TEST,224,224] of the program's `main`."
    seen = {}
    def roc(labels, scores):
        if len(scores) == TEST: seen['scores'] = scores
        return .5
    def shown(images, masks, maps, *_, **__): seen['maps'] = np.stack(maps)
    with (tempfile.TemporaryDirectory() as out,
          patch.object(sys, 'argv', ['main', '--top_k', str(K), '--save_path', out]),
          patch.object(module, 'wide_resnet50_2', lambda **_: Network(features)),
          patch.object(module, 'roc_auc_score', roc), patch.object(module, 'visualize_loc_result', shown),
          patch.object(module.mvtec, 'CLASS_NAMES', ['given']),
          patch.object(module.mvtec, 'MVTecDataset', Images), patch.object(torch, 'pairwise_distance', along_channels),
          patch.object(torch.cuda, 'is_available', lambda: False)):
        module.main()
    return seen['scores'], seen['maps']


def main(folder: str):
    matplotlib.use('Agg')
    sys.path.insert(0, str(Path(folder)/'src'))
    module, g = importlib.import_module('main'), torch.Generator().manual_seed(0)
    features = {k: torch.randn(TRAIN + TEST, *s, generator=g) for k, s in SHAPES.items()}
    found = {f'features.{k}': f for k, f in features.items()}
    for K in (4, 5):
        scores, maps = run(module, features, K)
        maps = torch.from_numpy(maps)[:, ::EVERY, ::EVERY].contiguous()
        found |= {f'K{K}.score': torch.from_numpy(scores), f'K{K}.map': maps}
    commit = subprocess.check_output(['git', '-C', folder, 'rev-parse', 'HEAD'], text=True).strip()
    save_file(found, TARGET, {'repository': 'https://github.com/byungjae89/SPADE-pytorch', 'commit': commit})
    TARGET.chmod(0o644)


if __name__ == '__main__': main(sys.argv[1])
