"""Compares dynad's PatchCore with anomalib's on the same φ, images and coreset size, over several seeds.

A developer script that writes nbs/results/patchcore_anomalib.json: `pip install anomalib==2.7.0 'lightning!=2.6.2,!=2.6.3'`, then
`DYNAD_DATA=… python tests/anomalib_patchcore.py` (about an hour on one core). It writes after each run and continues where it stopped.
"""
import contextlib, ctypes, json, os, platform, random, statistics, sys, time, warnings
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')   # huge pages, read when torch allocates first: see `steady_memory`
import numpy as np
import torch
from torch import Tensor, nn

from dynad.config import FeatureSettings
from dynad.data import load_images, load_masks, open_dataset, to_float
from dynad.features import load_features
from dynad.metrics import image_metrics, pixel_metrics
from dynad.patchcore import PatchBank, PatchCoreOptions, distance_map, reweighted_score
from dynad.spatial_dic import k_centre, patch_features
from dynad.store import atomic_write

TARGET = Path(__file__).parents[1]/'nbs'/'results'/'patchcore_anomalib.json'
SUBSETS = {'cookies': (None, None), 'magnetic_tile': (200, 240)}   # seeded subsets of the training and test images; None: all
METRICS = ('i_auroc', 'p_auroc', 'pro')
DIGITS = 5


class Setting(NamedTuple):
    "One comparison: the same ratio and the same number of seeds for both implementations."
    set: str
    size: int
    coreset_ratio: float   # of all patches of the training images
    seeds: int             # of dynad
    anomalib: int          # seeds of anomalib: the first of those, since its greedy choice takes minutes
    draws: int             # of these, how many are repeated by dynad from anomalib's projection and first patch


# small ratios, for the time: anomalib compares all patches with each chosen one; cookies at the default ratio as well
PLAN = [Setting('cookies', 128, .02, 40, 20, 3), Setting('cookies', 256, .005, 10, 8, 1), Setting('cookies', 128, .1, 20, 20, 0),
        Setting('magnetic_tile', 128, .02, 5, 5, 0), Setting('magnetic_tile', 256, .002, 5, 3, 0)]



class Named(nn.Module):
    "φ as anomalib expects a feature extractor: layer names instead of numbers."
    def __init__(self, phi, layers: tuple[int, ...]):
        super().__init__()
        self.phi, self.layers = phi, layers

    def train(self, mode: bool = True): return super().train(False)   # BatchNorm stays frozen, as in anomalib's own extractor

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.phi(images)
        return {f'layer{j}': features[j] for j in self.layers}


def reference(phi, options: PatchCoreOptions):
    "anomalib's model with φ as its feature extractor."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    model = PatchcoreModel([f'layer{j}' for j in options.layers], 'resnet18', pre_trained=False, num_neighbors=options.neighbours)
    model.feature_extractor = Named(phi, options.layers).eval()
    return model


def generator(sigma: float):
    "anomalib's map; sigma in pixels of the map, as anomalib counts it."
    from anomalib.models.image.patchcore.anomaly_map import AnomalyMapGenerator
    return AnomalyMapGenerator(sigma=sigma)


@contextlib.contextmanager
def kept_draws():
    "Keeps what anomalib draws for a coreset, `projection` [k,d] and `indices` in the order of choice."
    from anomalib.models.image.patchcore import torch_model
    class Sampler(torch_model.KCenterGreedy):
        def select_coreset_idxs(self):
            kept['indices'] = super().select_coreset_idxs()
            kept['projection'] = self.model.sparse_random_matrix
            return kept['indices']
    kept, original = {}, torch_model.KCenterGreedy
    torch_model.KCenterGreedy = Sampler
    try: yield kept
    finally: torch_model.KCenterGreedy = original


@contextlib.contextmanager
def quiet():
    "Without anomalib's progress bar."
    with open(os.devnull, 'w') as null, contextlib.redirect_stderr(null): yield


def subset(samples: list, n: int | None) -> list:
    "n samples, seeded, in their order."
    if n is None or n >= len(samples): return samples
    return [samples[i] for i in sorted(random.Random(0).sample(range(len(samples)), n))]


class Inputs:
    "What both implementations get: φ of the training and test images of one set at one size, computed once."
    def __init__(self, name: str, size: int, phi: nn.Module, layers: tuple[int, ...] = (2, 3)):
        data = open_dataset(Path(os.environ['DYNAD_DATA'])/name)
        train, test = (subset(s, n) for s, n in zip((data.train, data.test), SUBSETS[name]))
        self.size, self.counts = size, dict(train=len(train), test=len(test), test_anomalous=sum(s.label for s in test))
        self.labels = torch.tensor([s.label for s in test])
        self.masks, self.has_mask = load_masks(test, size)
        self.train, self.test = ([self.extract(phi, s[i:i+16], layers) for i in range(0, len(s), 16)] for s in (train, test))
        self.patches = sum(f[min(layers)][:, 0].numel() for f in self.train)

    @torch.no_grad()
    def extract(self, phi, samples: list, layers: tuple[int, ...]) -> dict[int, Tensor]:
        features = phi(to_float(load_images(samples, self.size)))
        return {j: features[j] for j in layers}

    def measure(self, maps: Tensor, scores: Tensor) -> dict[str, float]:
        "The metrics of dynad, whichever implementation gave the maps and scores."
        m = image_metrics(scores, self.labels, n_boot=0) | pixel_metrics(maps, self.masks, self.has_mask, n_boot=0)
        return {k: round(m[k].value, DIGITS) for k in METRICS}


@torch.no_grad()
def run_anomalib(inputs: Inputs, options: PatchCoreOptions, seed: int, at: tuple[float, ...]):
    "anomalib's bank, how it was drawn, and its metrics for each σ in pixels."
    batch = {}
    model = reference(lambda _: batch, options).train()
    def forward(features):
        batch.update(features)
        return model(torch.zeros(1).expand(len(features[2]), 3, inputs.size, inputs.size))   # only the shape is read
    torch.manual_seed(seed)
    np.random.seed(seed)   # anomalib's projection draws from NumPy's global generator too
    for features in inputs.train: forward(features)
    with quiet(), kept_draws() as draws: model.subsample_embedding(options.coreset)
    maps = [generator(s) for s in at]
    del model.anomaly_map_generator
    model.eval().anomaly_map_generator = lambda scores, size: torch.stack([m(scores, size) for m in maps])
    found = [forward(f) for f in inputs.test]
    scores, maps = torch.cat([f.pred_score for f in found]), torch.cat([f.anomaly_map for f in found], 1)
    return model.memory_bank, draws, {s: inputs.measure(m, scores) for s, m in zip(at, maps)}


@torch.no_grad()
def run_dynad(inputs: Inputs, bank: PatchBank, at: tuple[float, ...]) -> dict[float, dict]:
    "dynad's metrics for each σ in pixels."
    found = [bank.search(f) for f in inputs.test]
    scores = torch.cat([reweighted_score(p.flatten(2).mT, d.flatten(1), i.flatten(1), bank.bank, bank.options.neighbours)
                        for p, d, i in found])
    distances = torch.cat([d for _, d, _ in found])[:, None]
    return {s: inputs.measure(distance_map(distances, inputs.size, s*256/inputs.size), scores) for s in at}


def own(inputs: Inputs, ratio: float, seed: int) -> tuple[PatchBank, dict[float, dict]]:
    "dynad with a coreset of its own, and its metrics for each σ."
    bank = PatchBank(PatchCoreOptions(coreset=ratio, max_patches=None), seed).fit(inputs.train)
    return bank, run_dynad(inputs, bank, sigmas(inputs.size))


def with_bank(options: PatchCoreOptions, seed: int, rows: Tensor) -> PatchBank:
    bank = PatchBank(options, seed)
    bank.bank = rows
    return bank


def compare(inputs: Inputs, ratio: float, seed: int, repeat: bool) -> dict:
    """One seed: metrics of anomalib, and of dynad with anomalib's coreset; with `repeat`, of dynad with the coreset that it
    chooses itself from anomalib's projection and first patch, and how many of its patches anomalib chose too."""
    options, at = PatchCoreOptions(coreset=ratio, max_patches=None), sigmas(inputs.size)
    started = time.perf_counter()
    bank, draws, theirs = run_anomalib(inputs, options, seed, at)
    same = run_dynad(inputs, with_bank(options, seed, bank), at)
    run = dict(seed=seed, coreset_anomalib=len(bank), numpy_seeded=True)
    metrics = [dict(sigma_pixels=s, anomalib=theirs[s], dynad_same_bank=same[s]) for s in at]
    if repeat:
        x = torch.cat([patch_features(f, options.layers).permute(0, 2, 3, 1).flatten(0, 2) for f in inputs.train])
        chosen = k_centre(x @ draws['projection'].T, len(bank), draws['indices'][0])
        run |= dict(shared=len(set(chosen.tolist()) & set(draws['indices'])),
                    first_difference=next((k for k, (a, b) in enumerate(zip(chosen.tolist(), draws['indices'])) if a != b), None))
        again = run_dynad(inputs, with_bank(options, seed, x[chosen]), at)
        for m in metrics: m['dynad_same_draws'] = again[m['sigma_pixels']]
    return run | dict(minutes=round((time.perf_counter() - started)/60, 2), metrics=metrics)


def sigmas(size: int) -> tuple[float, ...]:
    "σ in pixels: as dynad scales it, and as anomalib keeps it."
    return tuple(sorted({4*size/256, 4.}))


def spread(values: list[float]) -> tuple[float, float]:
    "Mean and standard deviation over seeds."
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.


def summary(runs: list[dict], sigma: float) -> dict:
    "Means over seeds at one σ; differences dynad − anomalib, that of separately drawn coresets with its standard error."
    at = [r for run in runs for r in run['metrics'] if r['sigma_pixels'] == sigma]
    found = {k: [r[k] for r in at if k in r] for k in ('anomalib', 'dynad')}
    out = dict(sigma_pixels=sigma, seeds=len(found['dynad']), seeds_anomalib=len(found['anomalib']),
               same_draws=sum('dynad_same_draws' in r for r in at))
    for m in METRICS:
        (a, sa), (d, sd) = (spread([r[m] for r in found[k]]) for k in found)
        same, draws = ([r[k][m] - r['anomalib'][m] for r in at if k in r] for k in ('dynad_same_bank', 'dynad_same_draws'))
        out[m] = {k: round(v, DIGITS) for k, v in dict(
            anomalib=a, anomalib_std=sa, dynad=d, dynad_std=sd, difference=d - a,
            standard_error=(sa**2/len(found['anomalib']) + sd**2/len(found['dynad']))**.5,
            same_bank=statistics.mean(same), same_bank_largest=max(same, key=abs)).items()}
        if draws: out[m]['same_draws_largest'] = round(max(draws, key=abs), DIGITS)
    return out


def record(what: dict, groups: list[dict]):
    "Write what has been measured so far: the runs, and one row per setting and σ."
    rows = [{k: v for k, v in g.items() if k != 'runs'} | summary(g['runs'], r['sigma_pixels'])
            for g in groups for r in g['runs'][0]['metrics'] if 'dynad' in r and 'anomalib' in r]
    atomic_write(TARGET, json.dumps(what | dict(rows=rows, groups=groups), indent=1) + '\n')


def provenance(settings: FeatureSettings, phi: nn.Module) -> dict:
    "What the measurements depend on beside the settings: they are only continued when it is unchanged."
    options = PatchCoreOptions(max_patches=None).model_dump(mode='json', exclude={'coreset'})
    return dict(what="PatchCore of anomalib and of dynad on the same φ, images and coreset size; metrics by dynad.metrics",
                backbone=settings.backbone, phi=phi.weights_hash, options=options,
                versions={p: version(p) for p in ('anomalib', 'torch', 'torchvision', 'timm')} | {'python': platform.python_version()},
                threads=torch.get_num_threads())


def earlier(what: dict) -> list[dict]:
    "Groups of runs of the file, when they were measured under the same conditions."
    old = json.loads(TARGET.read_text(encoding='utf-8')) if TARGET.exists() else {}
    return old.get('groups', []) if all(old.get(k) == v for k, v in what.items()) else []


def steady_memory():
    "glibc maps large blocks one by one: in its heap the temporary tensors of anomalib's greedy loop fragment, seen up to 24 GB."
    if sys.platform == 'linux': ctypes.CDLL(None).mallopt(-3, 1 << 20)   # M_MMAP_THRESHOLD


def measured(inputs: Inputs, setting: Setting, seed: int, run: dict) -> dict | None:
    "A run with what it lacks: anomalib, dynad's coreset from the same draws, dynad's own coreset. None: it lacks nothing."
    first, before = run.get('metrics', [{}])[0], dict(run)
    repeat = seed < setting.draws
    if seed < setting.anomalib and 'anomalib' not in first or repeat and 'dynad_same_draws' not in first:
        new = compare(inputs, setting.coreset_ratio, seed, repeat)
        for m, old in zip(new['metrics'], run.get('metrics', [])): m |= {k: v for k, v in old.items() if k not in m}
        run = run | new
    if 'dynad' not in run.get('metrics', [{}])[0]:
        bank, found = own(inputs, setting.coreset_ratio, seed)
        metrics = run.get('metrics') or [dict(sigma_pixels=s) for s in found]
        run = run | dict(seed=seed, coreset=len(bank.bank), metrics=[m | dict(dynad=found[m['sigma_pixels']]) for m in metrics])
    return None if run == before else run


def main():
    steady_memory()
    phi = load_features(settings := FeatureSettings(backbone='efficientnet_lite0'))
    groups = earlier(what := provenance(settings, phi))
    for setting in PLAN:
        key = dict(set=setting.set, size=setting.size, coreset_ratio=setting.coreset_ratio)
        group = next((g for g in groups if key.items() <= g.items()), key | dict(runs=[]))
        inputs = None
        for seed in range(setting.seeds):
            run = next((r for r in group['runs'] if r['seed'] == seed), {})
            inputs = inputs or Inputs(setting.set, setting.size, phi)
            if (new := measured(inputs, setting, seed, run)) is None: continue
            group['runs'] = sorted([r for r in group['runs'] if r is not run] + [new], key=lambda r: r['seed'])
            if 'patches' not in group:
                group |= inputs.counts | dict(patches=inputs.patches, coreset=new['coreset'])
                groups.append(group)
            record(what, groups)
            print(json.dumps(key | new), flush=True)


if __name__ == '__main__': main()
