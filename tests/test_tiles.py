"Images of any size: tiles in fit and predict, whole images in verdicts and metrics, bounded memory, no seams."
import json, shutil, subprocess, sys, warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dynad.config import ConfigError, make_config
from dynad.data import load_masks, open_dataset
from dynad.detector import DynAD
from dynad.evaluate import evaluate
from dynad.images import image_size, read_image, read_whole
from dynad.method import method_named, open_run
from dynad.patchcore import PatchCore
from dynad.regions import ROI, save_roi
from dynad.report import write_report
from dynad.session import Session
from dynad.tiles import Canvas, Tiling, cut, kept, kept_shape, tiles_of, whole_map

TILES = {'data.tile': 64, 'data.stride': 48}
SMOKE = {'denoiser.steps': 5, 'latents.finetune_steps': 1, 'adaptation.gamma': 0, 'denoiser.checkpoint_every': 10}

@pytest.fixture(scope='module')
def few(boards): return boards.limited(9, 8)

@pytest.fixture(scope='module')
def tiled(few, tmp_path_factory):
    run = tmp_path_factory.mktemp('tiled')/'run'
    return PatchCore(make_config('smoke', TILES)).fit(few, run, progress=False), run

# the grid and the canvas

@pytest.mark.parametrize('size', [(64, 64), (65, 64), (300, 41), (41, 300), (1, 1), (127, 200)])
@pytest.mark.parametrize('stride', [64, 48, 1 + 16])
def test_every_pixel_is_seen_and_a_constant_stays_one(size, stride):
    t = Tiling(64, stride)
    seen = np.zeros((max(size[1], 64), max(size[0], 64)), int)
    canvas = Canvas(t, size)
    for b in t.boxes(size):
        seen[b[1]:b[1]+64, b[0]:b[0]+64] += 1
        canvas.add(b, torch.full((1, 8, 8), 3.))
    m = canvas.map()
    assert seen.min() >= 1 and m.shape == (1, size[1], size[0]) and torch.allclose(m, torch.tensor(3.), atol=1e-4)
    assert torch.allclose(whole_map(Image.new('RGB', size), lambda x: torch.full((len(x), 1, 8, 8), 3.), t, 32, 5), torch.tensor(3.), atol=1e-4)

def test_a_tile_is_what_its_file_would_be(boards, tmp_path):
    f = boards.test[0].image
    im = read_whole(f)
    im.crop((30, 20, 94, 84)).save(tmp_path/'part.png')
    assert torch.equal(cut(im, (30, 20, 64, 64), 32), (read_image(tmp_path/'part.png', 32)*255).round()/255)
    deep = Image.fromarray((np.random.default_rng(0).random((20, 90))*65535).astype(np.uint16)); deep.save(tmp_path/'deep.png')
    whole = read_whole(tmp_path/'deep.png')
    x = cut(whole, (40, 0, 64, 64), 64)
    assert x.shape == (3, 64, 64) and torch.allclose(x[:, 20], x[:, 19]) and torch.allclose(x[:, :, 50], x[:, :, 49]) # mirrored

def test_peaks_are_kept_and_nothing_is_enlarged():
    m = torch.rand(1, 300, 700)
    for shape in ((30, 70), (299, 700), (128, 300)): assert kept(m, shape).max() == m.max() and kept(m, shape).shape == (1, *shape)
    assert kept_shape(Tiling(100, 75), (50, 40), 256) == (40, 50) and max(kept_shape(Tiling(128, 96), (9000, 300), 256)) == 2048

def test_more_tiles_than_allowed_are_drawn_and_said(boards):
    with pytest.warns(UserWarning, match='216 tiles, of which 50 are drawn.*data.max_tiles'): few = tiles_of(boards.train, Tiling(64, 48), 50)
    assert len({t.name for t in few}) == 50
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(tiles_of(boards.train, Tiling(64, 48, .5), 5000)) == 24*10 # and each image as a whole

@pytest.mark.parametrize('bad, words', [({'data.stride': 48}, 'data.stride = 48 without data.tile'), ({'data.tile': 64, 'data.stride': 65}, 'larger than data.tile'),
    ({'data.context': .3}, 'data.context = 0.3 without data.tile'), ({'data.tile': 64, 'fusion.calibration': 'test'}, 'fusion.calibration=train'), ({'data.tile': 3}, 'data.tile = 3')])
def test_settings_that_cannot_be(bad, words):
    with pytest.raises(ConfigError, match=words): make_config('smoke', bad)

# a method on tiles

def test_fit_open_predict_and_evaluate(tiled, few):
    (method, run), boards = tiled, few
    again = open_run(run, progress=False)
    assert again.decision == method.decision and again.map_shape == method.map_shape == (128, 128)
    assert len(method.training_set) == 4*9 and len(method.held_out_set) == 45 and len(method.decision.normal_scores) == 5
    p = again.predict([s.image for s in boards.test])
    assert p.map.shape == p.mask.shape == (8, 1, 128, 128) and torch.equal(p.score, p.map.flatten(1).amax(1))
    e = evaluate(again, boards, n_boot=5, progress=False, baselines=[method])
    assert torch.allclose(e.scores, p.score) and torch.allclose(e.maps, p.map)
    assert torch.equal(e.masks, load_masks(boards.test, 128)[0])
    assert 'tiles of 64 pixels every 48' in e.result['protocol']['image'] and 'null_models' not in e.result
    assert e.result['i_auroc']['value'] > .5 and e.result['seconds_by_stage']['predict'] > 0
    other = open_run(run, progress=False)
    other.predict_batch = None # not called: all of it is in the store
    assert torch.equal(torch.cat([q.score for _, q in other.predictions(other.test_images(boards.test, boards))]), e.scores)
    assert write_report(e, run.parent/'page').exists()

def test_a_tensor_a_file_and_other_sizes(tiled, tmp_path):
    method, _ = tiled
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 400, 3), np.uint8)); wide.save(tmp_path/'strip.png')
    x = torch.from_numpy(np.asarray(wide).copy()).permute(2, 0, 1)[None]/255
    a, b = method.predict(x), method.predict([tmp_path/'strip.png'])
    assert torch.equal(a.map, b.map) and a.map.shape == (1, 1, 128, 128)
    assert method.own_pixels(b, 0, image_size(tmp_path/'strip.png')).map.shape == (50, 400)
    with pytest.raises(ValueError, match='finite values'): method.predict(x*9)

def test_a_strip_keeps_its_aspect(tiled):
    "What a tile shows of a strip has the proportions of the strip."
    seen = []
    im = Image.fromarray(np.kron(np.indices((4, 40)).sum(0) % 2, np.ones((16, 16))).astype(np.uint8)*255).convert('RGB') # a checkerboard
    whole_map(im, lambda x: seen.append(x) or torch.zeros(len(x), 1, 4, 4), Tiling(64, 64), 64, 100)
    assert all(torch.equal(t, seen[0][0]) or torch.equal(t, 1 - seen[0][0]) for t in seen[0]) and seen[0][0, 0, ::16, ::16].unique().tolist() == [0, 1]

def test_a_shifted_image_has_the_shifted_map(tiled, boards):
    method, _ = tiled
    row = Image.new('RGB', (128*4, 128))
    for k, s in enumerate(boards.test[:4]): row.paste(read_whole(s.image), (128*k, 0))
    predict = lambda x: method.predict_batch(x, list(range(len(x)))).map
    a, b = (whole_map(row.crop(c), predict, Tiling(64, 48), 64, 32)[0] for c in ((0, 0, 400, 128), (96, 0, 496, 128)))
    same = slice(64, 400 - 96 - 64) # where both have the same tiles around
    assert (a[:, 96:][:, same] - b[:, same]).abs().max() < 1e-3*a.max()
    jump = lambda m: m.diff(dim=1).abs().mean(0)
    borders = [k for k in range(47, 300, 48)]
    assert jump(a)[borders].mean() < 2*jump(a).mean() # a seam would stand out

def test_a_roi_on_tiles(tiled, boards, tmp_path):
    _, run = tiled
    left = save_roi(ROI(np.arange(128)[None].repeat(128, 0) < 40), tmp_path/'roi.png')
    method = open_run(run, {'data.roi': str(left)}, progress=False) # thresholds from what is stored
    calls = []
    batch = method.predict_batch
    method.predict_batch = lambda x, rows: calls.append(len(x)) or batch(x, rows)
    p = method.predict([boards.test[0].image])
    assert sum(calls) == 3 # of nine tiles those that touch it
    whole = open_run(run, progress=False).predict([boards.test[0].image])
    inside = method.inside
    assert torch.allclose(p.map[..., inside], whole.map[..., inside]) and not p.mask[..., ~inside].any() and p.score <= whole.score

def test_context(few, tmp_path):
    method = PatchCore(make_config('smoke', {**TILES, 'data.context': .4})).fit(few, tmp_path/'run', progress=False)
    assert len(method.training_set) == 4*10
    f = few.test[0].image
    seen = method.predict_batch(cut(read_whole(f), (0, 0, 128, 128), 64)[None], [0]).map
    method.tiling = replace(method.tiling, context=0.)
    bare = method.predict([f]).map
    mixed = .6*bare + .4*torch.nn.functional.interpolate(seen, (128, 128), mode='bilinear')
    method.tiling = replace(method.tiling, context=.4)
    assert torch.allclose(method.predict([f]).map, mixed, atol=1e-5)

def test_the_papers_method_on_tiles(few, tmp_path):
    less = {'data.max_tiles': 24, 'data.max_calibration': 6, **TILES}
    boards = few.limited(9, 2)
    with pytest.warns(UserWarning, match='drawn at random'): model = DynAD(make_config('smoke', {**SMOKE, **less})).fit(boards, tmp_path/'run', progress=False)
    files = [s.image for s in boards.test[:2]]
    again = DynAD.open(tmp_path/'run', progress=False)
    p = again.predict(files)
    assert p.map.shape == (2, 1, 128, 128) and again.decision == model.decision and len(model.training_set) == 24
    saved = DynAD.from_pretrained(model.save_pretrained(tmp_path/'saved'))
    assert torch.allclose(saved.predict(files).score, p.score, atol=1e-5)
    with pytest.raises(ConfigError, match='fitted on tiles'): Session(again, boards)
    assert write_report(evaluate(again, boards, n_boot=0, progress=False), tmp_path/'page').exists() # without T̂, distances and reconstructions

@pytest.mark.parametrize('which', ['patchcore', 'dynad'])
def test_learning_from_marks_on_tiles(which, tiled, few, tmp_path):
    "A false alarm on a run of tiles is marked and learned from by its tiles; verdicts, recall and the next `open` follow; the sliders say one sentence."
    from typer.testing import CliRunner
    from dynad import learning, marks
    from dynad.cli import app
    run, boards = tmp_path/'run', few.limited(9, 4)
    if which == 'patchcore': shutil.copytree(tiled[1], run); boards = few
    else: DynAD(make_config('smoke', {**SMOKE, 'data.max_tiles': 24, 'data.max_calibration': 6, **TILES})).fit(boards, run, progress=False)
    method = open_run(run, progress=False)
    images = method.test_images(boards.test, boards)
    s, _ = learning.called(method, images)
    worst = [boards.test[int(i)].image for i in s.topk(2).indices]
    marks.mark_images(run, worst, 'normal', method.config.data.image_size)
    after, found = learning.relearn(method, boards, into='bank')
    assert len(after.marked) == 2 and len(after.normals) == 2*9 == len(after.joined) and found.shown == len(boards.test) and found.normals == 2
    if which == 'patchcore': assert found.still == 0 and (after.predict(worst).score < method.predict(worst).score).all()
    *_, found = learning.follow(found, method, after, boards, images, 6)
    assert found.what == 'tiles' and 'in held-out normal tiles' in learning.recall_line(found) and 0 <= found.recall[1] <= 1
    assert found.other.into == 'both' and found.other.still <= found.still and after.joined_into('both').decision.marked == 2
    after.keep_normals(learning.normal_marks(run))
    again = open_run(run, progress=False)
    assert again.decision.image_threshold == pytest.approx(after.decision.image_threshold) and torch.allclose(again.predict(worst).score, after.predict(worst).score, atol=1e-5)
    assert evaluate(again, boards, n_boot=0, progress=False).result['protocol']['marked'] == 2
    if which == 'dynad':
        with pytest.raises(ConfigError, match='fitted on tiles .data.tile = 64.*`learn` and `threshold` take this run'): Session(run)
    dynad = lambda *args: CliRunner().invoke(app, list(map(str, args)))
    assert dynad('mark', run, worst[1], '--withdraw').exit_code == 0
    if which == 'dynad': return # its data set was limited
    root = tmp_path/'few'; [((root/s.name).parent.mkdir(parents=True, exist_ok=True), shutil.copy(s.image, root/s.name)) for s in few.samples]
    PatchCore(make_config('smoke', TILES)).fit(open_dataset(root), tmp_path/'fresh', progress=False)
    assert dynad('mark', tmp_path/'fresh', worst[0], '--normal').exit_code == 0
    said = dynad('learn', tmp_path/'fresh', '--data', root, '--defects', 4)
    assert said.exit_code == 0 and '1 marked image joined the bank of patches' in said.output and 'kept' in said.output

LESS = {'data.max_tiles': 24, 'data.max_calibration': 6, **TILES}
RAN_TINY = {'widths': (32, 64), 'attention': (), 'layers_per_block': 1, 'steps': 6, 'batch': 4, 'dims': 12, 'start': 10}
OTHERS = {'padim': {'options': {'dims': 30}}, 'spade': {'options': {'K': 4}}, 'simplenet': {'options': {'steps': 6, 'hidden': 64, 'batch': 4}}, 'skip_ganomaly': {'options': {'widths': [8, 16], 'steps': 6, 'batch': 4}},
          'static': SMOKE, 'ddad': SMOKE, 'ran': {'options': RAN_TINY}}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', OTHERS)
def test_every_other_method_on_tiles(few, tmp_path, name):
    "Fitted on tiles, opened again, asked for whole images and strips, evaluated: score and verdict are of the image."
    model = method_named(name)(make_config('smoke', LESS | OTHERS[name], method=name)).fit(few, tmp_path/'run', progress=False)
    assert len(model.training_set) == 24 and len(model.decision.normal_scores) == 5
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 200, 3), np.uint8)).save(tmp_path/'strip.png')
    files = [s.image for s in few.test[:2]]
    again = open_run(tmp_path/'run', progress=False)
    p = again.predict([*files, tmp_path/'strip.png'])
    assert again.decision == model.decision and p.map.shape == (3, 1, 128, 128) and torch.allclose(p.score, again.score_of(p.map.flatten(2)))
    assert torch.allclose(p.map[:2], again.predict(files).map, atol=1e-5) and torch.isfinite(p.map).all() and p.map[0].std() > 0
    seams = p.map[:2].diff(dim=-1).abs().mean((0, 1, 2))
    assert seams[[47, 63]].mean() < 3*seams.mean() # where tiles begin and end
    e = evaluate(again, few, n_boot=0, progress=False)
    assert torch.allclose(e.scores[:2], p.score[:2], rtol=1e-4, atol=1e-5) and write_report(e, tmp_path/'page').exists()

# twelve megapixels

BIG = """
import json, sys
from pathlib import Path
from dynad.machine import peak_memory_mb as peak
from dynad.method import method_named, open_run
from dynad.output import write_predictions
run, big, out = map(Path, sys.argv[1:])
m = open_run(run, progress=False)
before = peak()
rows = write_predictions(m, [big], out)
print(json.dumps([before, peak(), rows[0]['width'], rows[0]['height']]))
"""

@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read as Linux gives it')
def test_twelve_megapixels_in_bounded_memory(tmp_path):
    y, x = np.mgrid[:600, :800]
    part = lambda k: Image.fromarray(np.stack([90 + (x//4 + y//4) % 2*60 + k + 0*c for c in range(3)], -1).astype(np.uint8)) # a checkerboard
    (tmp_path/'data/train/good').mkdir(parents=True)
    for k in range(7): part(k).save(tmp_path/'data/train/good'/f'{k}.png')
    method = PatchCore(make_config('smoke', {'data.tile': 512, 'batch': 8})).fit(open_dataset(tmp_path/'data', layout='folder'), tmp_path/'run', progress=False)
    big = Image.new('RGB', (4000, 3000))
    for b in range(0, 3000, 600):
        for a in range(0, 4000, 800): big.paste(part(3), (a, b))
    big.paste((255, 0, 0), (2100, 1100, 2160, 1150))
    big.save(tmp_path/'big.png', compress_level=1)
    child = subprocess.run([sys.executable, '-c', BIG, *map(str, (tmp_path/'run', tmp_path/'big.png', tmp_path/'out'))], capture_output=True, text=True)
    before, after, *size = json.loads(child.stdout.splitlines()[-1]) if not child.returncode else pytest.fail(child.stderr[-800:])
    print(f'{before:.0f} MB before, {after:.0f} MB at most (VmHWM)')
    assert size == [4000, 3000] and after - before < 700 and after < 2048 # MB
    first = json.loads((tmp_path/'out/regions.json').read_text())['images'][0]['regions'][0]
    assert abs(first['peak_at'][0] - 2130) < 60 and abs(first['peak_at'][1] - 1125) < 60
