"""Compares dynad's PatchCore with anomalib's on the same φ, images and coreset size; writes nbs/results/patchcore_anomalib.json.

A developer script: `pip install anomalib==2.7.0 'lightning!=2.6.2,!=2.6.3'`, then `DYNAD_DATA=… python tests/anomalib_patchcore.py` (minutes on one core).
"""
import contextlib, ctypes, json, os, platform, random, sys, time, warnings
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')   # huge pages, read when torch allocates first: see `steady_memory`
import torch
from torch import Tensor, nn

from dynad.config import FeatureSettings
from dynad.data import load_images, load_masks, open_dataset, to_float
from dynad.features import load_features
from dynad.metrics import image_metrics, pixel_metrics
from dynad.patchcore import PatchBank, PatchCoreOptions, distance_map, reweighted_score
from dynad.store import atomic_write

TARGET = Path(__file__).parents[1]/'nbs'/'results'/'patchcore_anomalib.json'
SETS = {'cookies': (None, None), 'magnetic_tile': (40, 160)}   # seeded subsets of the training and of the test images; None: all
SIZES, SEEDS = (128, 256), (0, 1, 2)
METRICS = ('i_auroc', 'p_auroc', 'pro')


class Named(nn.Module):
    "φ as anomalib expects a feature extractor: layer names instead of numbers."
    def __init__(self, phi: nn.Module, layers: tuple[int, ...]):
        super().__init__()
        self.phi, self.layers = phi, layers

    def train(self, mode: bool = True): return super().train(False)   # BatchNorm stays frozen, as in anomalib's own extractor

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.phi(images)
        return {f'layer{j}': features[j] for j in self.layers}


def reference(phi: nn.Module, options: PatchCoreOptions, sigma: float = 4.):
    "anomalib's model with φ as its feature extractor; sigma in pixels of the map, as anomalib counts it."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from anomalib.models.image.patchcore.anomaly_map import AnomalyMapGenerator
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    model = PatchcoreModel([f'layer{j}' for j in options.layers], 'resnet18', pre_trained=False, num_neighbors=options.neighbours)
    model.feature_extractor = Named(phi, options.layers).eval()
    model.anomaly_map_generator = AnomalyMapGenerator(sigma=sigma)
    return model


@contextlib.contextmanager
def quiet():
    "Without anomalib's progress bar."
    with open(os.devnull, 'w') as null, contextlib.redirect_stderr(null): yield


def subset(samples: list, n: int | None) -> list:
    "n samples, seeded, in their order."
    return samples if n is None or n >= len(samples) else [samples[i] for i in sorted(random.Random(0).sample(range(len(samples)), n))]


def figures(maps: Tensor, scores: Tensor, truth: dict) -> dict[str, float]:
    "The metrics of dynad."
    m = image_metrics(scores, truth['labels'], n_boot=0) | pixel_metrics(maps, truth['masks'], truth['has_mask'], n_boot=0)
    return {k: round(m[k].value, 5) for k in METRICS}


def anomalib_run(phi, train: Tensor, test: Tensor, options: PatchCoreOptions, size: int, coreset: int, seed: int):
    "Bank, and for each σ in pixels the maps and scores, of anomalib."
    torch.manual_seed(seed)
    model = reference(phi, options).train()
    for x in train.split(32): model(to_float(x))
    patches = sum(map(len, model.embedding_store))
    with quiet(): model.subsample_embedding((coreset + .5)/patches)
    model.eval()
    out = {}
    with torch.no_grad():
        found = [model(to_float(x)) for x in test.split(16)]
        out[4.] = torch.cat([f.anomaly_map for f in found]), torch.cat([f.pred_score for f in found])
        if size != 256:
            model.anomaly_map_generator = reference(phi, options, 4*size/256).anomaly_map_generator
            found = [model(to_float(x)) for x in test.split(16)]
            out[4*size/256] = torch.cat([f.anomaly_map for f in found]), out[4.][1]
    return model.memory_bank, out


def dynad_run(phi, bank: PatchBank, test: Tensor, size: int, sigmas) -> dict:
    "For each σ in pixels: maps and scores of dynad."
    with torch.no_grad(): found = [bank.search(phi(to_float(x))) for x in test.split(16)]
    s = torch.cat([reweighted_score(p.flatten(2).mT, d.flatten(1), i.flatten(1), bank.bank, bank.options.neighbours) for p, d, i in found])
    d = torch.cat([d for _, d, _ in found])[:, None]
    return {px: (distance_map(d, size, px*256/size), s) for px in sigmas}


def compare(name: str, size: int, seed: int, phi: nn.Module) -> list[dict]:
    "One row per σ: figures of anomalib, and of dynad by default, with all patches as candidates, and with anomalib's bank."
    data, options = open_dataset(Path(os.environ['DYNAD_DATA'])/name), PatchCoreOptions()
    fit, judged = (subset(s, n) for s, n in zip((data.train, data.test), SETS[name]))
    train, test = load_images(fit, size), load_images(judged, size)
    masks, has_mask = load_masks(judged, size)
    truth = dict(labels=torch.tensor([s.label for s in judged]), masks=masks, has_mask=has_mask)
    t0 = time.perf_counter()
    with torch.no_grad(): bank = PatchBank(options, seed).fit(phi(to_float(x)) for x in train.split(32))
    t1 = time.perf_counter()
    reference_bank, theirs = anomalib_run(phi, train, test, options, size, len(bank.bank), seed)
    t2 = time.perf_counter()
    same, patches = PatchBank(options, seed), len(train)*(size//8)**2
    same.bank = reference_bank
    of_all = options.model_copy(update=dict(max_patches=None, coreset=(len(bank.bank) + .5)/patches))
    with torch.no_grad(): every = PatchBank(of_all, seed).fit(phi(to_float(x)) for x in train.split(32))
    runs = dict(dynad=bank, dynad_all_candidates=every, dynad_same_bank=same)
    ours = {k: dynad_run(phi, b, test, size, theirs) for k, b in runs.items()}
    return [dict(set=name, size=size, seed=seed, sigma_pixels=px, train=len(fit), test=len(judged), test_anomalous=int(truth['labels'].sum()),
                 patches=patches, candidates=min(options.max_patches, patches),
                 coreset=len(bank.bank), coreset_anomalib=len(reference_bank),
                 dynad_fit_minutes=round((t1 - t0)/60, 3), anomalib_minutes=round((t2 - t1)/60, 3),
                 anomalib=figures(*theirs[px], truth), **{k: figures(*o[px], truth) for k, o in ours.items()})
            for px in theirs]


def record(settings: FeatureSettings, phi: nn.Module, rows: list[dict], started: float):
    "Write what has been measured so far."
    atomic_write(TARGET, json.dumps(dict(
        what="PatchCore of anomalib and of dynad on the same φ, images and coreset size; metrics by dynad.metrics",
        backbone=settings.backbone, phi=phi.weights_hash, options=PatchCoreOptions().model_dump(mode='json'), seeds=list(SEEDS),
        versions={p: version(p) for p in ('anomalib', 'torch', 'torchvision', 'timm')} | {'python': platform.python_version()},
        threads=torch.get_num_threads(), minutes=round((time.perf_counter() - started)/60, 1), rows=rows), indent=1) + '\n')


def steady_memory():
    "glibc maps large blocks one by one: in its heap the temporary tensors of anomalib's greedy loop fragment, seen up to 24 GB."
    if sys.platform == 'linux': ctypes.CDLL(None).mallopt(-3, 1 << 20)   # M_MMAP_THRESHOLD


def main():
    steady_memory()
    sets, started = sys.argv[1:] or list(SETS), time.perf_counter()
    phi, rows = load_features(settings := FeatureSettings(backbone='efficientnet_lite0')), []
    for seed in SEEDS:
        for name, size in ((n, s) for s in SIZES for n in sets):
            for r in compare(name, size, seed, phi):
                rows.append(r)
                print(json.dumps(r), flush=True)
            record(settings, phi, rows, started)


if __name__ == '__main__': main()
