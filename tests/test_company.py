"The answer for an image is its own: alone, in any batch, in any order, from a file or a tensor, by every door; and nothing hangs on rounding."
import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from typer.testing import CliRunner

from dynad.cli import app
from dynad.config import DICSettings, make_config
from dynad.data import open_dataset, read_image
from dynad.detector import DynAD
from dynad.dic import DIC, bin_edges, lookup, t_hat
from dynad.evaluate import evaluate
from dynad.inspection import Inspector
from dynad.method import Decision, Prediction, above
from dynad.patchcore import PatchCore, nearest, reweighted_score
from dynad.reconstruction import noise_keys

TINY = {'latents.finetune_steps': 2, 'denoiser.steps': 4, 'adaptation.gamma': 0}

@pytest.fixture(scope='module')
def own(boards, tmp_path_factory):
    "A detector, its run, and files of every kind: test images, a training image, a copy, plain ones, one of 16 bits."
    run, folder = tmp_path_factory.mktemp('run'), tmp_path_factory.mktemp('files')
    detector = DynAD(make_config('smoke', TINY)).fit(boards, run, progress=False)
    files = [s.image for s in boards.test] + [boards.train[0].image, *(s.image for s in boards.train[-3:])]
    for k, im in enumerate([Image.open(files[0]), *(Image.new('RGB', (128, 128), (g,)*3) for g in (0, 128, 255))]): im.save(folder/f'{k}.png'); files.append(folder/f'{k}.png')
    deep = np.asarray(Image.open(files[3]).convert('L')).astype(np.uint16)*257 + np.random.default_rng(0).integers(-90, 90, (128, 128))
    Image.fromarray(deep.clip(0, 65535).astype(np.uint16)).save(folder/'deep.png')
    return detector, run, [*files, folder/'deep.png']

def same_answers(got: Prediction, want: Prediction, rows):
    assert torch.equal(got.t_hat, want.t_hat[rows]) and torch.equal(got.anomalous, want.anomalous[rows])
    assert (got.score - want.score[rows]).abs().max() < 1e-5 and (got.map - want.map[rows]).abs().max() < 1e-4

@pytest.mark.parametrize('setting', [{}, {'reconstruction.omega': .5}], ids=['scaled', 'noised'])
def test_alone_in_any_batch_and_order(own, setting):
    detector, _, files = own
    d = detector.with_settings(setting)
    x = torch.stack([read_image(f, 64) for f in files])
    want = d.predict(x)
    for size, seed in ((1, None), (2, 0), (7, 1), (32, 2)):
        order = torch.arange(len(x)) if seed is None else torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        parts = [d.predict(x[r]) for r in order.split(size)]
        same_answers(type(want).concatenated(parts), want, order)
    assert want.score[0] == pytest.approx(float(want.score[files.index(next(f for f in files if f.name == '0.png'))]), abs=1e-5)

def test_the_same_by_every_door(own, boards, tmp_path):
    detector, run, files = own
    want, everyone = detector.predict(files), list(range(len(files)))
    same_answers(detector.predict(torch.stack([read_image(f, 64) for f in files])), want, everyone)
    same_answers(DynAD.open(run, progress=False).predict(files), want, everyone)
    same_answers(DynAD.from_pretrained(detector.save_pretrained(tmp_path/'saved')).predict(files[::-1]), want, everyone[::-1])
    widget = Inspector(tmp_path/'widget')
    widget.detector = DynAD.open(run, progress=False)
    widget.inspect(files[5:9])
    same_answers(widget.prediction, want, everyone[5:9])
    n = len(boards.test)
    same_answers(detector.decision.applied(next(detector.predict_set(detector.test_images(boards.test, boards)))[1]), want, everyone[:n])
    e = evaluate(detector, boards)
    assert (e.scores - want.score[:n]).abs().max() < 1e-5
    for where in (run, tmp_path/'saved'):
        out = CliRunner().invoke(app, ['predict', str(where), *map(str, files[8:]), '--out', str(tmp_path/f'judged_{where.name}')])
        assert out.exit_code == 0, out.output
        rows = {r['image']: r for r in csv.DictReader((tmp_path/f'judged_{where.name}'/'scores.csv').open())}
        for i, f in list(enumerate(files))[8:]:
            r = rows[str(f)]
            assert float(r['score']) == pytest.approx(float(want.score[i]), abs=1e-5) and r['anomalous'] == str(bool(want.anomalous[i])) and int(r['t_hat']) == int(want.t_hat[i])

def test_noise_follows_from_the_pixels():
    x = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert noise_keys(x) == noise_keys(x.float()/255) == [noise_keys(x[k:k+1])[0] for k in range(3)] and len(set(noise_keys(x))) == 3

def plain_set(root, grey, n=10):
    "Equal good images, equal good test images, and copies with an inverted spot."
    for sub, count in (('train/good', n), ('test/good', 3)):
        (root/sub).mkdir(parents=True)
        for i in range(count): Image.new('RGB', (64, 64), (grey,)*3).save(root/sub/f'{i:03}.png')
    (root/'test'/'spot').mkdir()
    a = np.full((64, 64, 3), grey, np.uint8); a[20:32, 24:38] = 255 - grey if grey != 128 else 20
    Image.fromarray(a).save(root/'test'/'spot'/'000.png')
    return open_dataset(root)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('cls', [DynAD, PatchCore])
@pytest.mark.parametrize('grey, n', [(0, 10), (128, 10), (255, 7)])
def test_equal_images(tmp_path, cls, grey, n):
    "A case of its own: what is equal to the normal images is normal with the lowest T̂, what is not gets the highest."
    data = plain_set(tmp_path/'data', grey, n)
    d = cls(make_config('smoke', TINY if cls is DynAD else {})).fit(data, tmp_path/'run', progress=False)
    files = [s.image for s in data.test]
    all_, alone = d.predict(files), cls.prediction_class.concatenated([d.predict([f]) for f in files])
    assert torch.equal(all_.anomalous, alone.anomalous) and ((all_.score - alone.score).abs() < 1e-5*all_.score.abs().clamp_min(1)).all()
    spot = torch.tensor([s.label == 1 for s in data.test])
    assert not all_.anomalous[~spot].any() and torch.equal(all_.mask, alone.mask)
    if cls is PatchCore: assert all_.anomalous[spot].all()
    if cls is DynAD: assert torch.equal(all_.t_hat, alone.t_hat) and (all_.t_hat[spot] == d.config.reconstruction.t_max).all() and len(set(all_.t_hat[~spot].tolist())) == 1 and all_.t_hat[0] < all_.t_hat[-1]


bank = lambda n, d=50, seed=0: torch.rand(n, d, generator=torch.Generator().manual_seed(seed))

@pytest.mark.filterwarnings('ignore:K = ')
@pytest.mark.parametrize('match, K', [('exclude', 4), ('include', 5)])
def test_training_and_test_distances_have_as_many_neighbours(match, K):
    d = DIC.fit(bank(5), DICSettings(K=20, self_match=match))
    assert d.K == K and d.severity(bank(2, seed=1))[2].shape == (2, K) and DIC.from_state(d.state(), d.settings).K == K
    assert DIC.fit(bank(30), DICSettings(K=20, self_match=match)).K == 20

@pytest.mark.filterwarnings('ignore:K = ')
@pytest.mark.parametrize('n', range(2, 7))
@pytest.mark.parametrize('jitter', [0., 1e-7, 1e-6])
def test_nearly_equal_banks(n, jitter):
    "Copies whose features differ by rounding: near is the lowest bin, far the highest, however the last bits fall."
    x = bank(1).expand(n, -1)*(1 + jitter*torch.randn(n, 50, generator=torch.Generator().manual_seed(n)))
    d = DIC.fit(x, DICSettings(K=20))
    q = bank(1)*(1 + 1e-6*torch.randn(20, 50, generator=torch.Generator().manual_seed(9)))
    assert d.severity(q)[1].tolist() == [0]*20 and d.severity(q + .01)[1].tolist() == [10]*20

@pytest.mark.filterwarnings('ignore:K = ')
def test_two_kinds_of_copies_lie_on_edges_and_keep_their_bin():
    "Distances that are whole parts of the range fall exactly on edges."
    a, b = bank(2, 400)
    x = torch.stack([a]*6 + [b]*6)
    d = DIC.fit(x, DICSettings(K=5))
    for w in torch.linspace(0, 1, 11):
        q = torch.lerp(a, b, w)*(1 + 1e-7*torch.randn(30, 400, generator=torch.Generator().manual_seed(1)))
        assert len(set(d.severity(q)[1].tolist())) == 1

distances = hnp.arrays(np.float64, st.integers(2, 30), elements=st.floats(0, 1e4))

@settings(deadline=None)
@given(distances, st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_a_bin_does_not_hang_on_the_last_bits(train, bins, seed):
    edges, r = bin_edges(torch.from_numpy(train), bins), np.random.default_rng(seed)
    at, wide = edges.repeat(8), float(edges[-1] - edges[0])
    moved = at + torch.from_numpy(r.uniform(-1e-7, 1e-7, len(at)))*wide
    want = torch.arange(bins + 1).repeat(8) if wide else torch.zeros(len(at), dtype=torch.long)
    assert torch.equal(lookup(at, edges), want) and torch.equal(lookup(moved, edges), want)

@settings(deadline=None)
@given(distances, distances, st.integers(2, 20))
def test_bins_and_t_hat_rise_with_the_distance(train, test, bins):
    b = lookup(torch.from_numpy(np.sort(test)), bin_edges(torch.from_numpy(train), bins))
    assert (b.diff() >= 0).all() and 0 <= b.min() and b.max() <= bins and (t_hat(b, 80, bins).diff() >= 0).all()

@settings(deadline=None)
@given(st.floats(0, 1e4), st.integers(2, 30), st.integers(2, 20), st.floats(0, 9e-6))
def test_equal_distances_are_one_case(d, n, bins, spread):
    train = torch.full((n,), d, dtype=torch.float64)*(1 + spread*torch.linspace(-1, 0, n, dtype=torch.float64))
    edges = bin_edges(train, bins)
    assert (edges == edges[0]).all() and lookup(train, edges).tolist() == [0]*n
    assert lookup(torch.tensor([0., d*1.001 + 1]), edges).tolist() == [0, bins]

def test_a_score_on_its_threshold_is_normal():
    p = Prediction(torch.tensor([.5, .5 + 1e-7, .5 + 4e-6, .51]), torch.full((4, 1, 2, 2), .5 + 1e-7))
    got = Decision(.5, .5).applied(p)
    assert got.anomalous.tolist() == [False, False, False, True] and not got.mask.any()
    assert above(2000.01, 2000.) == False and above(2000.1, 2000.) == True and above(-1., -1. - 1e-6) == False

def test_equally_far_patches_weigh_the_first():
    x = torch.tensor([[[0., 3.], [3., 0.]]]).repeat(2, 1, 1)
    d = torch.tensor([[3., 3.], [3.*(1 - 1e-7), 3.]])
    i, normal = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0., 0.], [0., 0.], [9., 0.], [0., 1.]])
    a, b = reweighted_score(x, d, i, normal, neighbours=3)
    assert float(a) == pytest.approx(float(b), rel=1e-5)

@pytest.mark.parametrize('backend', ['faiss', 'torch'])
def test_near_patches_are_told_apart_by_their_exact_distance(backend):
    if backend == 'faiss': pytest.importorskip('faiss')
    g = torch.Generator().manual_seed(0)
    base = 30 + torch.rand(1, 256, generator=g)
    normal = torch.cat([base + 1e-4*torch.randn(3, 256, generator=g), 30 + torch.rand(60, 256, generator=g)])
    q = normal[:3].repeat(20, 1)
    d, i = nearest(q, normal, 1, backend)
    one = torch.cat([nearest(v[None], normal, 1, backend)[0] for v in q])
    assert torch.equal(d, one) and d.max() == 0 and torch.equal(i[:, 0], torch.arange(3).repeat(20))
