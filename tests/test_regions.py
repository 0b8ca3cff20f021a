"Regions in the image's own pixels, and the region of interest outside which nothing counts."
import csv, io, json

import numpy as np
import pytest
import torch
from PIL import Image

from dynad.config import ConfigError, make_config
from dynad.detector import DynAD
from dynad.evaluate import evaluate, fitted_baseline
from dynad.method import Decision, Prediction, open_run, regions_of
from dynad.metrics import StreamingPixelMetrics, pixel_metrics
from dynad.output import write_predictions
from dynad.patchcore import PatchCore
from dynad.quick_metrics import QuickMetrics
from dynad.regions import ROI, ImageRegions, own_size, read_roi, region_mask, regions_coco, regions_csv, regions_in, save_roi
from dynad.session import Session
from dynad.store import StoreError

@pytest.fixture(scope='module')
def patchcore(boards, tmp_path_factory):
    run = tmp_path_factory.mktemp('patchcore')/'run'
    return PatchCore(make_config('smoke')).fit(boards, run, progress=False), run

def half(side=32): return ROI(np.arange(side)[None].repeat(side, 0) < side//2) # the left half

# regions

@pytest.mark.parametrize('size', [(64, 64), (101, 37), (37, 101), (7, 300), (1, 1)])
def test_a_map_goes_back_to_any_size_and_place(size):
    w, h = size
    yy, xx = np.mgrid[:h, :w]
    image = np.exp(-((xx - .7*w)**2/(.02*w*w + 1) + (yy - .3*h)**2/(.02*h*h + 1))).astype(np.float32)
    small = torch.from_numpy(np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR)))
    back = own_size(small[None], size)
    assert back.shape == (h, w) and back.dtype == np.float32
    y, x = np.unravel_index(back.argmax(), back.shape)
    assert abs(x - .7*w) <= max(2, w/40) and abs(y - .3*h) <= max(2, h/40)

def test_regions_partition_the_mask():
    rng = np.random.default_rng(0)
    m = rng.random((50, 83)).astype(np.float32)
    found = regions_in(m, m > .8)
    assert sum(r.area for r in found) == (m > .8).sum() and np.array_equal(region_mask(found, (83, 50)), m > .8)
    assert [r.peak for r in found] == sorted((r.peak for r in found), reverse=True)
    for r in found:
        x, y, w, h = r.box
        assert m[r.peak_at[1], r.peak_at[0]] == r.peak and x <= r.peak_at[0] < x + w and y <= r.peak_at[1] < y + h
        inside = region_mask([r], (83, 50))
        assert inside[y:y+h, x:x+w].sum() == inside.sum() == r.area and inside[y].any() and inside[:, x].any()
    assert regions_in(m, m > 2) == [] and len(regions_in(m, m > .8, smallest=10**6)) == 0

def test_a_diagonal_is_one_region_and_borders_are_kept():
    m = np.eye(9, dtype=np.float32)
    (r,) = regions_in(m, m > .5, mm_per_pixel=.5)
    assert r.box == (0, 0, 9, 9) and r.area == 9 and r.centre == (4, 4) and r.mm['area'] == 2.25 and r.mm['box'] == (0, 0, 4.5, 4.5)

def test_coco_is_read_by_its_own_tools(tmp_path):
    rng = np.random.default_rng(1)
    m = (rng.random((40, 60)) > .9).astype(np.float32)
    found = regions_in(m, m > .5)
    text = regions_coco([ImageRegions('a b,"ü.png', (60, 40), 1., True, .5, .5, found)])
    (tmp_path/'c.json').write_text(text, encoding='utf-8')
    tools = pytest.importorskip('pycocotools.coco', reason='pycocotools is not installed')
    coco = tools.COCO(str(tmp_path/'c.json'))
    every = np.zeros((40, 60), bool)
    for a in coco.loadAnns(coco.getAnnIds()): every |= coco.annToMask(a).astype(bool)
    assert np.array_equal(every, m > .5)

def test_without_a_region_the_table_has_its_header():
    none = regions_csv([ImageRegions('a.png', (4, 4), 0., False, 1., 1., [])], mm=True)
    assert none.strip().startswith('image,region,x,y') and none.strip().endswith('centre_y_mm') and len(none.splitlines()) == 1

# a region of interest

def test_what_a_roi_file_may_be(tmp_path):
    for name, a in (('grey.png', np.uint8([[0, 255]])), ('deep.png', np.uint16([[0, 65535]])), ('bool.png', np.array([[False, True]]))):
        Image.fromarray(a).save(tmp_path/name)
        assert read_roi(tmp_path/name).at(4, 4).tolist() == [[False, False, True, True]]*4
    Image.new('RGB', (5, 5)).save(tmp_path/'black.png')
    with pytest.raises(ConfigError, match='black.png.*paint white'): read_roi(tmp_path/'black.png')
    with pytest.raises(Exception, match='no such file'): read_roi(tmp_path/'none.png')
    thin = np.zeros((500, 500), bool); thin[:, 3] = True
    with pytest.raises(ConfigError, match='paint it wider'): ROI(thin).at(32, 32)

def test_metrics_leave_out_what_is_outside():
    g = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(6, 1, 32, 32, generator=g), torch.zeros(6, 1, 32, 32, dtype=torch.bool)
    masks[2:, :, 4:12, 10:22] = True # across the border of the left half
    maps = maps + .4*masks
    inside = half().at(32, 32).numpy()
    got = pixel_metrics(maps, masks, n_boot=20, inside=inside)
    want = pixel_metrics(maps[..., :16], masks[..., :16], n_boot=20)
    assert {k: m.value for k, m in got.items()} == pytest.approx({k: m.value for k, m in want.items()})
    stream = [StreamingPixelMetrics(inside=inside).update(maps, masks).compute(), StreamingPixelMetrics().update(maps[..., :16], masks[..., :16]).compute()]
    assert stream[0] == stream[1]
    y, every = torch.tensor([0, 0, 1, 1, 1, 1]), torch.ones(6, dtype=torch.bool)
    flat, scores = maps[:, 0].numpy(), maps.flatten(1).amax(1).numpy()
    assert QuickMetrics(y, masks, every, inside=inside)(flat, scores) == pytest.approx(QuickMetrics(y, masks[..., :16], every)(flat[..., :16], scores), abs=1e-4)
    other = maps.clone(); other[..., 16:] = torch.rand(6, 1, 32, 16, generator=g)*9
    assert pixel_metrics(other, masks, n_boot=0, inside=inside) == pixel_metrics(maps, masks, n_boot=0, inside=inside)

@pytest.mark.parametrize('name', ['smoke', 'patchcore'])
def test_nothing_outside_counts(name, boards, request):
    method = request.getfixturevalue(name)[0].with_roi(half())
    p = method.predict([s.image for s in boards.test[4:8]])
    inside = method.inside
    assert not p.mask[..., ~inside].any() and torch.equal(p.score, method.map_score(p.map[..., inside]))
    raw = Prediction(p.score, p.map + 100*(~inside))          # a spectacle outside
    again = method.decided(method.within_roi(raw))
    assert torch.equal(again.score, p.score) and torch.equal(again.mask, p.mask) and torch.equal(again.p_value, p.p_value)
    held = method.held_out_prediction()
    assert method.decision.pixel_threshold == Decision.learned(held, method.config.fusion.threshold_quantile, None, inside).pixel_threshold
    loud = Prediction(held.score, held.map + 100*(~inside))
    assert Decision.learned(loud, .995, None, inside).pixel_threshold == Decision.learned(held, .995, None, inside).pixel_threshold

def test_calibration_is_of_the_inside(smoke):
    model = smoke[0]
    held = model.held_out
    raw, t = held.raw_maps(held.t_hat), held.t_hat
    left, right = (model.with_roi(r).calibrated(t) for r in (half(), ROI(~half().mask)))
    assert left.levels != right.levels and model.with_roi(None).calibrated(t).levels == model.calibrated(t).levels

def test_without_a_roi_nothing_changes(smoke, patchcore, boards):
    for method in (smoke[0], patchcore[0]):
        everything = method.with_roi(ROI(np.ones((3, 3), bool)))
        assert everything.decision.image_threshold == pytest.approx(method.decision.image_threshold, abs=1e-6) or method is patchcore[0]
        assert 'roi' not in method.config.data.model_dump() and method.prediction_key == everything.prediction_key
        assert method.within_roi(p := Prediction(torch.zeros(1), torch.zeros(1, 1, 4, 4))) is p

def test_a_roi_is_kept_in_the_run_and_may_be_exchanged(boards, tmp_path):
    boards = boards.limited(8, 6)
    file = save_roi(half(50), tmp_path/'left.png')
    config = make_config('smoke', {'data.roi': str(file)})
    method = PatchCore(config).fit(boards, tmp_path/'run', progress=False)
    file.unlink()
    again = open_run(tmp_path/'run', progress=False)
    assert again.roi.key == method.roi.key and again.decision == method.decision
    right = save_roi(ROI(~half(50).mask), tmp_path/'right.png')
    other = open_run(tmp_path/'run', {'data.roi': str(right)}, progress=False)  # no image is read for it
    assert other.decision != again.decision and other.inside[0].tolist() == (~again.inside)[0].tolist()
    plain = open_run(tmp_path/'run', {'data.roi': None}, progress=False)
    assert plain.roi is None and 'roi' not in evaluate(plain, boards, n_boot=0, progress=False).result['protocol']
    baseline = fitted_baseline(again, 'padim', boards, progress=False) # the file that the settings name is gone
    assert baseline.roi.key == again.roi.key and not (tmp_path/'run/baselines/padim/roi.png').exists()
    e = evaluate(again, boards, n_boot=5, progress=False)
    assert '50.0% of the image count' in e.result['protocol']['roi']
    assert not any((m & ~again.inside).any() for m in e.masks)
    (tmp_path/'run'/'roi.png').unlink()
    with pytest.raises(StoreError, match='roi.png: no such file.*data.roi=FILE'): open_run(tmp_path/'run', progress=False)

def test_a_roi_that_cannot_be_is_refused_before_anything(boards, tmp_path):
    with pytest.raises(Exception, match='no such file'): PatchCore(make_config('smoke', {'data.roi': str(tmp_path/'no.png')})).fit(boards, tmp_path/'run', progress=False)
    assert not (tmp_path/'run').exists()
    class NoMap(PatchCore):
        def predict_batch(self, images, rows): return Prediction(super().predict_batch(images, rows).score)
    with pytest.raises(ConfigError, match='gives no map'): NoMap(make_config('smoke')).with_roi(half()).within_roi(Prediction(torch.zeros(2)))
    with pytest.raises(ConfigError, match='data.mm_per_pixel = 0'): make_config('smoke', {'data.mm_per_pixel': 0})

def test_sliders_and_a_saved_model_keep_to_it(smoke, boards, tmp_path):
    model = smoke[0].with_settings({'data.roi': str(save_roi(half(), tmp_path/'left.png'))})
    session = Session(model, boards)
    own = torch.cat([p.map for _, p in model.predictions(session.test_set)])[:, 0].numpy()
    from dynad.map_cache import Setting
    setting = Setting.of(model.config)
    cache = session.maps(setting)
    A = session.anomaly_maps(setting)
    assert np.allclose(A, own, atol=1e-3) and np.allclose(cache.scores(A), A[:, :, :32].max((1, 2)))
    pixel, image = cache.thresholds(setting.lam, setting.sigma)
    assert (pixel, image) == pytest.approx((model.decision.pixel_threshold, model.decision.image_threshold), abs=1e-3)
    near = cache.estimate(setting.lam, 2.)
    assert len(near) == 3 and np.isfinite(near[0])
    saved = DynAD.from_pretrained(model.save_pretrained(tmp_path/'saved'))
    x = [s.image for s in boards.test[:3]]
    assert torch.equal(saved.predict(x).mask, model.predict(x).mask) and saved.roi.key == model.roi.key

# what predict writes

def test_results_have_the_size_of_their_images(smoke, boards, tmp_path):
    model = smoke[0]
    source = [s for s in boards.test if s.label][:2]
    files = [tmp_path/'wide.png', tmp_path/'tall, "ü".png']
    for s, f, size in zip(source, files, ((200, 90), (61, 144))): Image.open(s.image).resize(size).save(f)
    rows = write_predictions(model, files, tmp_path/'out', mm_per_pixel=.25)
    assert [(r['width'], r['height']) for r in rows] == [(200, 90), (61, 144)]
    for r in rows:
        for kind in ('map', 'mask', 'overlay', 'reconstruction'):
            assert Image.open(tmp_path/'out'/f"{r['files']}_{kind}.png").size == (r['width'], r['height'])
        mask = np.asarray(Image.open(tmp_path/'out'/f"{r['files']}_mask.png"))
        assert set(np.unique(mask)) <= {0, 255} and (mask > 0).sum() == r['anomalous_pixels']
    table = [*csv.DictReader(io.StringIO((tmp_path/'out/regions.csv').read_text(encoding='utf-8'), newline=''))]
    whole = json.loads((tmp_path/'out/regions.json').read_text(encoding='utf-8'))
    coco = json.loads((tmp_path/'out/regions_coco.json').read_text(encoding='utf-8'))
    assert len(table) == len(coco['annotations']) == sum(r['regions'] for r in rows) == sum(len(i['regions']) for i in whole['images'])
    assert {t['image'] for t in table} <= {str(f) for f in files} and all(float(t['width_mm']) == int(t['width'])*.25 for t in table)
    p = model.predict(files)
    for o, r in zip(regions_of(model, p, files), rows): assert len(o.regions) == r['regions'] and o.mask.sum() == r['anomalous_pixels']
    fewer = write_predictions(model, files, tmp_path/'out', smallest=10**6)
    assert [r['regions'] for r in fewer] == [0, 0] and fewer[0]['anomalous_pixels'] == rows[0]['anomalous_pixels']
