import json, shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from typer.testing import CliRunner

from dynad.accumulator import KEYS
from dynad.cli import app
from dynad.config import make_config
from dynad.data import DataError, open_dataset
from dynad.detector import DynAD
from dynad.evaluate import evaluate, fitted_baseline, metrics_table, one_map, save_maps, save_table, write_result
from dynad.method import fitted_dataset, open_run
from dynad.metrics import pixel_metrics
from dynad.patchcore import PatchCore
from dynad.run_directory import split_seed


@pytest.fixture(scope='module')
def patchcore(smoke, boards): return fitted_baseline(smoke[0], 'patchcore', boards, progress=False)

@pytest.fixture(scope='module')
def evaluation(smoke, boards, patchcore): return evaluate(smoke[0], boards, n_boot=50, baselines=[patchcore], progress=False)


def test_the_json_has_what_it_promises(evaluation, tmp_path):
    r = json.loads(write_result(evaluation.result, tmp_path/'r.json').read_text())
    assert set(KEYS) | {'images', 'images_per_second', 'seconds_by_stage', 'peak_memory_mb', 'settings', 'protocol', 'versions', 'data', 'null_models', 'baseline'} <= set(r)
    for row in (r, *r['null_models'].values(), *r['baseline'].values()):
        for k in KEYS:
            if row[k] is None: continue
            assert set(row[k]) >= {'value', 'low', 'high'}
            assert 0 <= row[k]['low'] <= row[k]['high'] <= 1 and 0 <= row[k]['value'] <= 1
    assert set(r['null_models']) == {'t_hat_0', 'untrained_denoiser', 'neighbour_distance', 'one_map_for_all'} and r['null_models']['neighbour_distance']['pro'] is None
    assert r['data']['synthetic'] is True and 'smoke preset' in r['protocol']['note'] and r['images_per_second'] > 0
    assert set(r['seconds_by_stage']) >= {'latents', 'features', 'reconstructions', 'maps', 'metrics'}


def test_its_figures_are_those_of_its_maps(evaluation):
    e = evaluation
    y = np.array([s.label for s in e.samples])
    assert e.result['i_auroc']['value'] == pytest.approx(roc_auc_score(y, e.scores), abs=1e-6)
    assert e.result['i_ap']['value'] == pytest.approx(average_precision_score(y, e.scores), abs=1e-6)
    keep = e.has_mask.numpy()
    assert e.result['p_auroc']['value'] == pytest.approx(roc_auc_score(e.masks.numpy()[keep].ravel(), e.maps.numpy()[keep].ravel()), abs=1e-5)
    assert e.result['pro']['value'] == pytest.approx(pixel_metrics(e.maps, e.masks, e.has_mask, n_boot=0)['pro'].value, abs=1e-9)


def test_raw_maps_and_index(evaluation, tmp_path):
    folder = save_maps(evaluation, tmp_path/'maps')
    index = pd.read_csv(folder/'index.csv')
    assert list(index.columns) == ['image', 'label', 'score', 't_hat', 'distance', 'mask', 'map'] and len(index) == len(evaluation.samples)
    for i, row in index.iterrows():
        m = np.load(folder/row['map'], allow_pickle=False)
        assert m.dtype == np.float32 and m.shape == (64, 64)
        np.testing.assert_array_equal(m, evaluation.maps[i, 0].numpy())
        assert m.max() == pytest.approx(row['score'], rel=1e-5)
    save_table(evaluation, tmp_path/'t.parquet')
    assert len(pd.read_parquet(tmp_path/'t.parquet')) == len(index)


def test_a_set_beyond_the_limit_is_evaluated_in_a_stream(smoke, boards, evaluation, patchcore, monkeypatch):
    "Above EXACT pixels no map is held: the same scores and decision, pixel figures within 1e-4 (F1-max 5e-4), and the protocol says so."
    monkeypatch.setattr('dynad.accumulator.EXACT', 0)
    e, exact = evaluate(smoke[0], boards, n_boot=50, baselines=[patchcore], progress=False), evaluation.result
    assert e.result['protocol']['pro'].startswith('streaming') and exact['protocol']['pro'].startswith('exact')
    assert torch.equal(e.scores, evaluation.scores) and e.result['decision'] == exact['decision'] and e.result['i_auroc'] == exact['i_auroc']
    for a, b in ((e.result, exact), (e.result['baseline']['patchcore'], exact['baseline']['patchcore'])):
        for k in ('p_auroc', 'pro', 'p_ap', 'p_f1_max'): assert a[k]['value'] == pytest.approx(b[k]['value'], abs=5e-4 if k == 'p_f1_max' else 2e-4), k

def test_maps_of_a_few(evaluation):
    p = evaluation.prediction_of([5, 2])
    assert torch.equal(evaluation.maps[[5, 2]], p.map) and torch.equal(evaluation.per_image['t_hat'][[5, 2]], p.t_hat)

def test_min_max_of_the_test_set_does_not_depend_on_batches(smoke, boards):
    "Calibration 'test' over more than one batch of 64."
    from dataclasses import replace
    from dynad.fusion import Calibration, feature_map, upsample
    model = smoke[0].with_settings({'fusion.calibration': 'test'})
    again = tuple(replace(s, name=f'{k}/{s.name}') for k in range(5) for s in boards.test) # the same images under five names
    five_times = model.test_images(list(again), replace(boards, samples=(*boards.train, *again)))
    walk, size = model.cached_walk(five_times), model.config.data.image_size
    assert len(walk) > 64
    raw = walk.raw_maps()
    l, f = upsample(raw.latent, size), feature_map(raw.features, size)
    lc, fc = Calibration.of_test_set(l, f)(l, f, walk.t_hat)
    scaled = model.for_test_set(five_times)
    _, a, b = scaled.all_maps(scaled.cached_walk(five_times))
    torch.testing.assert_close(a, lc); torch.testing.assert_close(b, fc)

def test_features_stay_on_disk(evaluation):
    walk = evaluation.method.cached_walk(evaluation.images)
    fx = walk.features
    for j, rows in fx.items():
        whole = rows[:]
        assert rows.shape == whole.shape and len(rows) == len(evaluation.samples)
        assert torch.equal(rows[[3, 1, 3]], whole[[3, 1, 3]]) and torch.equal(rows[-1], whole[-1]) and torch.equal(rows[torch.tensor([2])], whole[2:3]) and torch.equal(rows[np.int64(4)], whole[4])
    assert not walk.cached_features.shards._held

def test_the_null_model_without_a_walk_has_no_latent_residual(smoke, boards, evaluation):
    raw = evaluation.method.cached_walk(evaluation.images).raw_maps(torch.zeros(len(boards.test), dtype=torch.long))
    assert raw.latent.abs().max() == 0


def test_the_table_names_every_row(evaluation):
    t = metrics_table(evaluation.result)
    assert list(t.index) == ['DynAD', 'null: t hat 0', 'null: untrained denoiser', 'null: neighbour distance', 'null: one map for all', 'baseline: patchcore']
    assert t.loc['null: neighbour distance', 'PRO'] == '— (no map)'


def test_a_data_set_without_test_images(smoke, boards):
    from dataclasses import replace
    with pytest.raises(ValueError, match='no test image; put some under test/good'): evaluate(smoke[0], replace(boards, samples=boards.train))

def test_table_without_intervals(smoke, boards):
    "n_boot = 0 gives values and no brackets."
    e = evaluate(smoke[0], boards, n_boot=0, null_models=False, progress=False)
    assert e.result['i_auroc']['low'] is None and metrics_table(e.result).loc['DynAD', 'I-AUROC'] == f"{e.result['i_auroc']['value']:.3f}"

def test_one_map_for_every_image(evaluation, patchcore, smoke, boards):
    "The mean of the held-out maps, whatever the method; it ranks nothing, and gets what the place alone gives."
    model, images = smoke[0], evaluation.images
    mean = model.held_out_prediction().map.mean(0, keepdim=True)
    [(rows, p)] = one_map(model, images)['one_map_for_all']
    assert rows == list(range(len(images))) and all(torch.equal(m, mean[0]) for m in p.map) and p.score.unique().numel() == 1
    found = evaluation.result['null_models']['one_map_for_all']
    assert found['i_auroc']['value'] == .5
    everywhere = mean.expand(len(images), -1, -1, -1)
    assert found['p_auroc']['value'] == pytest.approx(roc_auc_score(evaluation.masks.flatten().numpy(), everywhere.flatten().numpy()), abs=1e-6)
    assert found['pro']['value'] == pytest.approx(pixel_metrics(everywhere, evaluation.masks, evaluation.has_mask, n_boot=0)['pro'].value)
    other = evaluate(patchcore, boards, n_boot=20, progress=False).result
    assert set(other['null_models']) == {'one_map_for_all'} and {'i_auroc', 'p_auroc', 'pro'} <= set(other['differences']['null_models']['one_map_for_all'])
    assert other['null_models']['one_map_for_all']['pro']['value'] != found['pro']['value'] # of its own maps

def test_a_saved_model_has_no_such_map(evaluation, smoke, tmp_path):
    saved = DynAD.from_pretrained(smoke[0].save_pretrained(tmp_path/'saved'))
    assert one_map(saved, evaluation.images) == {}

@pytest.fixture(scope='module')
def tiles_without_a_split(boards, tmp_path_factory):
    "The layout whose split is drawn by a seed."
    root = tmp_path_factory.mktemp('mtd')/'tiles'
    for i, s in enumerate(boards.train + [s for s in boards.test if not s.label]):
        (root/'MT_Free'/'Imgs').mkdir(parents=True, exist_ok=True)
        Image.open(s.image).convert('RGB').save(root/'MT_Free'/'Imgs'/f'exp1_num_{i}.jpg')
    for i, s in enumerate(s for s in boards.test if s.label):
        (root/'MT_Crack'/'Imgs').mkdir(parents=True, exist_ok=True)
        Image.open(s.image).convert('RGB').save(root/'MT_Crack'/'Imgs'/f'exp1_num_{100 + i}.jpg')
        shutil.copy(s.mask, root/'MT_Crack'/'Imgs'/f'exp1_num_{100 + i}.png')
    return root

def test_a_run_is_judged_on_the_split_that_it_was_fitted_on(tiles_without_a_split, tmp_path):
    "Its own seed may be another one than that of the split, as in a comparison; no image is learned from and judged."
    root = tiles_without_a_split
    fitted_on, other = (open_dataset(root, seed=s) for s in (0, 1))
    assert {s.name for s in other.test} & {s.name for s in fitted_on.train}
    config = make_config('smoke', method='patchcore', seed=1)
    PatchCore(config).fit(fitted_on, tmp_path/'run', progress=False)
    again = open_run(tmp_path/'run', progress=False)
    assert split_seed(again.info, again.config) == 0 and fitted_dataset(again.info, again.config).fingerprint == fitted_on.fingerprint
    out = CliRunner().invoke(app, ['evaluate', str(tmp_path/'run'), '--data', str(root), '--json', str(tmp_path/'r.json'), '--baselines', ''])
    assert out.exit_code == 0, out.output
    assert json.loads((tmp_path/'r.json').read_text())['data']['fingerprint'] == fitted_on.fingerprint
    with pytest.raises(DataError, match=r'test images are among those that this run was fitted on: MT_Free.*another seed'): evaluate(again, other, n_boot=0, progress=False)
    info = json.loads((tmp_path/'run'/'run.json').read_text())
    del info['data']['seed'] # as runs of before were kept
    (tmp_path/'run'/'run.json').write_text(json.dumps(info))
    out = CliRunner().invoke(app, ['evaluate', str(tmp_path/'run'), '--data', str(root), '--json', str(tmp_path/'s.json'), '--baselines', ''])
    assert out.exit_code == 2 and 'among those that this run was fitted on' in ' '.join(out.output.split()) and not (tmp_path/'s.json').exists()
