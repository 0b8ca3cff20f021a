"What goes wrong in practice, done to the real thing: each time one clear error or correct work, and nothing half-written."
import ast
import json
import os
import pickle
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image

import dynad
from dynad.config import PRESETS, Config, ConfigError, load_config, make_config, parse_config
from dynad.data import DataError, load_images, open_dataset, read_image, read_mask
from dynad.denoiser import DenoiserError
from dynad.detector import DynAD
from dynad.evaluate import MEASURED, evaluate
from dynad.latents import LatentError
from dynad.training import CHECKPOINT
from dynad.paths import PathError
from dynad.store import Shards, Store, StoreError, TrainingStopped, WriteError, atomic_write, load_tensors, save_tensors
from dynad.synthetic import write_synthetic
from dynad.values import parse_overrides

CUT = {'data.image_size': 32, 'denoiser.steps': 8, 'denoiser.checkpoint_every': 3, 'denoiser.batch': 4, 'denoiser.widths': [32, 32], 'denoiser.attention': [], 'denoiser.heads': 2, 'latents.finetune_steps': 2,
       'latents.finetune_batch': 4, 'adaptation.gamma': 1, 'adaptation.batch': 4, 'reconstruction.S': 2, 'dic.bins': 2, 'dic.pool': 4} # every stage, none of it long

def fit(data, run, **more): return DynAD(make_config('smoke', {**CUT, **more})).fit(data, run, progress=False)
def judge(model, data): return comparable(evaluate(model, data, n_boot=20, null_models=False, progress=False).result)
def comparable(result): return {k: v for k, v in json.loads(json.dumps(result)).items() if k not in MEASURED}

@pytest.fixture(scope='module')
def gears(tmp_path_factory): return open_dataset(write_synthetic(tmp_path_factory.mktemp('faults')/'gear', 'gear', n_train=12, n_good=3, n_defect=5, size=64, seed=0))

@pytest.fixture(scope='module')
def fitted(gears, tmp_path_factory):
    run = tmp_path_factory.mktemp('faults')/'run'
    model = fit(gears, run)
    return model, run, judge(model, gears)

@pytest.fixture
def mine(gears, tmp_path):
    "A copy of the images that a test may spoil."
    shutil.copytree(gears.root, tmp_path/'gear')
    return tmp_path/'gear'

@pytest.fixture
def run(fitted, tmp_path): return Path(shutil.copytree(fitted[1], tmp_path/'run'))

def whole(run: Path, after_a_kill: bool = False) -> None:
    "Every finished stage can be read, and nothing temporary lies about."
    for f in run.rglob('*.json'): json.loads(f.read_text()) if not f.name.startswith('.') else None
    for f in run.rglob('*.safetensors'): load_tensors(f) if not f.name.startswith('.') else None
    for f in (run/'stages').glob('*/*'):
        if f.is_dir() and not f.name.endswith('.part'): assert (f/'stage.json').exists(), f
    if not after_a_kill: assert [*run.rglob('.*.tmp')] == []

# ---- images that change, vanish or hold nonsense

def test_a_changed_data_set_under_an_old_run_is_judged_anew(fitted, run, gears, mine):
    p = sorted((mine/'test').glob('*/*'))[0]
    Image.fromarray(255 - np.asarray(Image.open(p))).save(p)
    changed = open_dataset(mine)
    model = DynAD.open(run, progress=False)
    result = judge(model, changed)
    assert result['data']['fingerprint'] == changed.fingerprint != fitted[2]['data']['fingerprint']
    old, new = (model.all_maps(model.cached_walk(model.test_images(d.test, d)))[0] for d in (gears, changed))
    assert [s.name for s, a, b in zip(gears.test, old, new) if not torch.allclose(a, b, atol=1e-4)] == [p.relative_to(mine).as_posix()]
    whole(run)

def test_a_changed_training_image_trains_again_and_leaves_the_old_stages(fitted, run, mine):
    p = sorted((mine/'train/good').iterdir())[0]
    Image.fromarray(255 - np.asarray(Image.open(p))).save(p)
    before = {f.name for f in (run/'stages/denoiser').iterdir() if f.is_dir()}
    model = fit(open_dataset(mine), run)
    after = {f.name for f in (run/'stages/denoiser').iterdir() if f.is_dir()}
    assert before < after and model.parts.hashes['denoiser'] != fitted[0].parts.hashes['denoiser']
    again = DynAD.open(run, progress=False)
    assert again.parts.hashes == model.parts.hashes
    whole(run)

def test_a_image_removed_between_two_stages_is_named_and_its_return_is_enough(gears, mine, tmp_path):
    data = open_dataset(mine); data.fingerprint                                 # opened and read
    p = data.train[3].image; content = p.read_bytes(); p.unlink()
    with pytest.raises(DataError, match=rf'{p.name}: no such file; it was moved or deleted after the data set was opened'): fit(data, tmp_path/'run')
    assert not [*(tmp_path/'run/stages').glob('*/*/stage.json')]
    whole(tmp_path/'run')
    p.write_bytes(content)
    assert load_images(data.train, 32).shape == (12, 3, 32, 32)

def test_a_test_image_removed_after_opening(run, mine):
    data = open_dataset(mine); data.fingerprint
    data.test[-1].image.unlink()
    with pytest.raises(DataError, match='no such file; it was moved or deleted'): judge(DynAD.open(run, progress=False), data)
    whole(run)

def spoil(path, how):
    if how == 'nan': a = np.full((64, 64), .5, np.float32); a[3, 4] = np.nan; path.unlink(); path = path.with_suffix('.tiff'); Image.fromarray(a).save(path)
    if how == 'empty': path.write_bytes(b'')
    if how == 'cut': path.write_bytes(path.read_bytes()[:500])
    if how == 'huge': Image.new('1', (20_000, 10_000)).save(path)               # 200 megapixels in 24 kB
    return path

@pytest.mark.parametrize('how, words', [('nan', '1 of 4096 values are NaN or infinite; repair'), ('empty', r'the file is empty \(0 bytes\)'), ('cut', 'damaged or cut off'), ('huge', 'too large to be decoded safely')])
def test_a_image_that_cannot_be_used_ends_the_fit_before_it_began(mine, tmp_path, how, words):
    p = spoil(mine/open_dataset(mine).holdout()[how in ('nan', 'huge')][1].name, how)  # one of each part: it must not show up after hours
    with pytest.raises(DataError, match=f'{p.name}: .*{words}'): fit(open_dataset(mine), tmp_path/'run')
    assert not [*(tmp_path/'run/stages').glob('*/*/stage.json')]
    whole(tmp_path/'run')

def test_two_hundred_megapixels_are_refused_without_being_decoded(tmp_path):
    p = spoil(tmp_path/'a.png', 'huge')
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match='too large'): read(p, 64)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000 and time.perf_counter() - start < 1  # kB, s

# ---- few, equal, oddly named images

def flat(root, n=3, value=120, names='{}.png'):
    "Normal images that are all the same, and test images that are not."
    for i in range(n):
        p = root/'train/good'/names.format(i); p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), value, np.uint8)).save(p)
    for d, v in (('good', value), ('crack', 20)):
        a = np.full((64, 64, 3), value, np.uint8); a[20:40, 20:40] = v
        p = root/'test'/d/names.format(0); p.parent.mkdir(parents=True); Image.fromarray(a).save(p)
    m = np.zeros((64, 64), np.uint8); m[20:40, 20:40] = 255
    p = root/'ground_truth/crack'/names.format('0').replace('.png', '_mask.png'); p.parent.mkdir(parents=True); Image.fromarray(m).save(p)
    return root

def test_one_good_image_is_too_few_and_the_text_says_how_many(tmp_path):
    data = open_dataset(flat(tmp_path/'one', 1))
    with pytest.raises(DataError, match='1 normal training image, but 5 are held out .*; add at least 6 normal images'): fit(data, tmp_path/'run')
    with pytest.raises(DataError, match='add at least 2 normal images'): fit(data, tmp_path/'run', **{'data.min_holdout': 1})
    assert not (tmp_path/'run').exists()

def test_three_equal_images_with_odd_names_and_more_neighbours_than_images(tmp_path):
    "The smallest legal set: no variance anywhere, K ≥ n, spaces, umlauts, an emoji, a percent sign and a quote in the names."
    data = open_dataset(flat(tmp_path/"Größe 5 % 'neu' 🔩", 3, names='naïve Δ {} %d.png'))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model = fit(data, tmp_path/'läuft hier', **{'data.min_holdout': 1, 'dic.K': 20})
        result = judge(model, data)
    assert any('K' in str(w.message) and '20' in str(w.message) for w in said), [str(w.message) for w in said]
    e = evaluate(model, data, n_boot=0, null_models=False, progress=False)
    assert e.maps.isfinite().all() and e.scores.isfinite().all() and result['i_auroc']['value'] == 1
    p = model.predict([s.image for s in data.test])
    assert p.map.isfinite().all() and p.score[[s.label for s in data.test].index(1)] > p.score[[s.label for s in data.test].index(0)]
    again = DynAD.open(tmp_path/'läuft hier', progress=False)
    assert judge(again, data) == result
    whole(tmp_path/'läuft hier')

# ---- the run's folder

@contextmanager
def mounted(*args):
    "A mount for the test; skips where that is not allowed."
    place = args[-1]; Path(place).mkdir(exist_ok=True)
    if os.geteuid() or subprocess.run(['mount', *map(str, args)], capture_output=True).returncode: pytest.skip('mounting needs root')
    try: yield Path(place)
    finally: subprocess.run(['umount', '-l', place], check=True)

def test_a_read_only_run_can_be_used_but_not_added_to(fitted, run, gears, mine, tmp_path):
    with mounted('--bind', run, tmp_path/'ro') as ro:
        subprocess.run(['mount', '-o', 'remount,ro,bind', ro], check=True)
        model = DynAD.open(ro, progress=False)
        assert judge(model, gears) == fitted[2]                                    # all of it is there
        assert model.predict([gears.test[0].image]).map.isfinite().all()
        with pytest.raises(WriteError, match=r'cannot be written \(Read-only file system\); make room, or choose a folder'): judge(model, replace(gears, samples=gears.samples[:-1]))
        with pytest.raises(PathError, match=r'/ro: cannot be written \(Read-only file system\); choose a folder'): fit(gears, ro)
        with pytest.raises(PathError, match='/ro/new: cannot be written'): fit(gears, ro/'new')
    whole(run)

def test_a_run_below_a_file(gears, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(PathError, match='file/run: cannot be written .*is a file, not a folder.*choose another place'): fit(gears, tmp_path/'file'/'run')

def test_a_full_disk_ends_it_with_an_error_and_room_is_enough_to_go_on(fitted, gears, tmp_path):
    need = sum(f.stat().st_size for f in fitted[1].rglob('*') if f.is_file())
    with mounted('-t', 'tmpfs', '-o', 'size=64k', 'dynad-test', tmp_path/'small') as small:
        def room(size): subprocess.run(['mount', '-o', f'remount,size={int(size)//1024}k', small], check=True)
        with pytest.raises(PathError, match=r'the files of this fit take about .* MB, but only 0\.1 MB are free; make room, or'): fit(gears, small/'run')
        assert [*small.iterdir()] == []                                            # told before the first second of work
        for share in (.01, .1, .2):                                                # and where somebody else fills it later
            room(10*need)
            fill = lambda stage, step, loss, more=share*need: room(shutil.disk_usage(small).used + more) if step == 1 else None
            with pytest.raises(StoreError, match=r'cannot be written \(.*(No space left on device|os error 28).*; make room, or choose a folder'):
                DynAD(make_config('smoke', CUT)).fit(gears, small/'run', progress=False, callback=fill)
            whole(small/'run')
        room(10*need)
        model = fit(gears, small/'run')
        room(2*need)
        assert model.parts.hashes == fitted[0].parts.hashes
        with pytest.raises(WriteError):                                            # and a result of any size leaves the old one
            atomic_write(small/'result.json', '[1]'); atomic_write(small/'result.json', 'x'*4*need)
        assert (small/'result.json').read_text() == '[1]'
        whole(small)

# ---- files that are not what they should be

def stage_file(run, pattern): return sorted((run/'stages').glob(pattern))[0]

@pytest.mark.parametrize('pattern', ['latents/*/data.safetensors', 'features/*/rows-*.safetensors', 'denoiser/*/unet/*.safetensors', 'phi/*/phi.safetensors', 'autoencoder/*/autoencoder/*.safetensors', 'maps/*/rows-*.safetensors'])
@pytest.mark.parametrize('harm', ['cut', 'gone', 'pickle'])
def test_a_damaged_stage_is_named_and_deleting_its_folder_heals_the_run(fitted, gears, tmp_path, pattern, harm):
    if harm == 'gone' and 'rows' in pattern: pytest.skip('rows that are gone are made again')
    files = {f: f.read_bytes() for f in (fitted[1]/'stages').glob(pattern)} # all of them: which one is read first is the run's affair
    try:
        for f, old in files.items():
            if harm == 'cut': f.write_bytes(old[:len(old)//2])
            if harm == 'gone': f.unlink()
            if harm == 'pickle': f.write_bytes(pickle.dumps({'x': 1}))
        with pytest.raises((StoreError, LatentError), match=r'(no such file|not a whole safetensors file).*run again|no such file') as e: judge(DynAD.open(fitted[1], progress=False), gears)
        assert any(str(f.relative_to(fitted[1])) in str(e.value) for f in files)
    finally:
        for f, old in files.items(): f.write_bytes(old)

@pytest.fixture(scope='module')
def saved(fitted, tmp_path_factory): return fitted[0].save_pretrained(tmp_path_factory.mktemp('saved'))

def foreign(path: Path, content) -> Path:
    "A file that is whole, and something else."
    if isinstance(content, dict): save_tensors(path, content)
    else: path.write_text(content)
    return path

X = {'x': torch.ones(2)}

@pytest.mark.parametrize('pattern, content, words', [
    ('run.json', '{', 'cannot be read as JSON'), ('run.json', '{}', "has no 'data'"), ('run.json', '[]', 'no JSON object'),
    ('stages/latents/*/data.safetensors', X, "holds x and no 'z0'"), ('stages/phi/*/phi.safetensors', X, 'the weights of another network'), ('stages/denoiser/*/unet/config.json', '[]', 'no JSON object'), ('stages/autoencoder/*/autoencoder/config.json', '[]', 'no JSON object'),
    ('stages/autoencoder/*/autoencoder/config.json', '{"_class_name": "TinyAE"}', 'describes no autoencoder that can be built'),
    ('stages/autoencoder/*/autoencoder/config.json', '{"_class_name": "TinyAE", "latent_channels": "a", "widths": [1], "encoder_blocks": 2, "decoder_blocks": 3}', 'describes no autoencoder that can be built')])
def test_a_foreign_file_in_a_run_is_named(run, gears, pattern, content, words):
    files = [foreign(f, content) for f in run.glob(pattern)]
    with pytest.raises((StoreError, DenoiserError, LatentError), match=re.escape(words)) as e: judge(DynAD.open(run, progress=False), gears)
    assert any(str(f) in str(e.value) for f in files)

@pytest.mark.parametrize('name, content, words', [
    ('dic.safetensors', X, "holds x and no 'bank'"), ('dic.safetensors', {'bank': torch.rand(4, 3), 'train_distance': torch.rand(4), 'edges': torch.rand(3).sort().values}, 'a bank of [4, 3] numbers'),
    ('phi.safetensors', X, 'the weights of another network'), ('calibration.json', '{}', "has no 'levels'"), ('calibration.json', '[]', 'no JSON object'),
    ('calibration.json', '{"levels": 3, "threshold": 1, "image_threshold": 1}', 'holds no calibration'), ('calibration.json', '{', 'cannot be read as JSON')])
def test_a_foreign_file_in_a_saved_model_is_named(fitted, tmp_path, name, content, words):
    foreign(fitted[0].save_pretrained(tmp_path/'model')/name, content)
    with pytest.raises(StoreError, match=re.escape(words)) as e: DynAD.from_pretrained(tmp_path/'model')
    assert str(tmp_path/'model'/name) in str(e.value)

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5), x, max_size=4), max_leaves=8)

@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.fixed_dictionaries({}, optional={'levels': JSON | st.dictionaries(st.integers().map(str), st.lists(st.floats(), min_size=3, max_size=5), max_size=2), 'threshold': JSON, 'image_threshold': JSON}) | JSON)
def test_any_calibration_file_is_one_or_a_store_error(saved, raw):
    (saved/'calibration.json').write_text(json.dumps(raw))
    try: DynAD.from_pretrained(saved)
    except StoreError as e: assert str(saved/'calibration.json') in str(e)

@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(more=st.dictionaries(st.sampled_from(['data', 'keys', 'stages', 'trained']), JSON, min_size=1))
def test_any_run_file_opens_or_is_named(fitted, run, more):
    (run/'run.json').write_text(json.dumps(json.loads((fitted[1]/'run.json').read_text()) | more))
    with pytest.raises((StoreError, ConfigError, LatentError), match=re.escape(str(run))) if set(more) - {'data'} or not isinstance(more['data'], dict) else nullcontext(): DynAD.open(run, progress=False)

@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=st.sampled_from(['elpv', 'visa']), content=st.binary(max_size=80) | st.text(max_size=80).map(str.encode) | st.lists(st.sampled_from(['object,split,label,image,mask', 'a,train,normal,a.png,', 'a,test,anomaly,a.png,m.png', 'a,,,,', 'x.png 0.0 mono', 'x.png nan mono', '../x 1 mono', '"', '']), max_size=5).map(lambda rows: '\n'.join(rows).encode()))
def test_any_table_of_a_data_set_is_read_or_a_data_error(tmp_path, layout, content):
    table = tmp_path/('labels.csv' if layout == 'elpv' else 'split_csv/1cls.csv')
    table.parent.mkdir(exist_ok=True); table.write_bytes(content)
    (tmp_path/'a').mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: open_dataset(tmp_path, layout=layout, category=None if layout == 'elpv' else 'a')
        except DataError as e: assert str(tmp_path) in str(e)

@pytest.mark.parametrize('more, words', [({'denoiser.heads': 5, 'denoiser.attention': [1]}, 'denoiser.heads = 5 does not divide'), ({'precision': 'fp16', 'device': 'cpu'}, "precision = 'fp16' needs a GPU")])
def test_a_fit_that_fails_leaves_the_finished_run_as_it_was(fitted, run, gears, more, words):
    before = {f.name for f in (run/'stages').glob('*/*')}
    with pytest.raises(DenoiserError, match=words): fit(gears, run, **more)
    assert {f.name for f in (run/'stages').glob('*/*')} == before                # it ends before anything is trained
    assert judge(DynAD.open(run, progress=False), gears) == fitted[2]

@pytest.mark.parametrize('stage, at', [('autoencoder', 0), ('denoiser', 4), ('phi', 0)])
def test_every_training_can_be_stopped_and_goes_on(fitted, gears, tmp_path, stage, at):
    seen = []
    with pytest.raises(TrainingStopped): DynAD(make_config('smoke', CUT)).fit(gears, tmp_path/'run', progress=False, callback=lambda *a: seen.append(a), should_stop=lambda: seen[-1][:2] == (stage, at))
    assert seen[-1][:2] == (stage, at) and not (tmp_path/'run'/'run.json').exists()
    model = fit(gears, tmp_path/'run')
    assert model.parts.hashes == fitted[0].parts.hashes

def test_what_the_error_advises_heals_the_run(fitted, run, gears):
    for pattern in ('phi/*/phi.safetensors', 'features/*/rows-*.safetensors'):
        f = stage_file(run, pattern); f.write_bytes(b'torn')
    folders = [stage_file(run, 'phi/*/phi.safetensors').parent, *(run/'stages/features').iterdir()]
    for d in folders: shutil.rmtree(d) if d.is_dir() else d.unlink()
    model = fit(gears, run)
    assert model.parts.hashes == fitted[0].parts.hashes and judge(model, gears) == fitted[2]
    whole(run)

def test_features_that_are_gone_are_asked_of_a_fit(fitted, run, gears):
    shutil.rmtree(run/'stages'/'features')
    assert judge(DynAD.open(run, progress=False), gears) == fitted[2]             # the bins, its own stage, are enough to judge
    assert judge(fit(gears, run), gears) == fitted[2]
    DynAD.open(run, progress=False)
    with pytest.raises(StoreError, match=r'with the same --out and --set dic.layer=1 again'): DynAD.open(run, {'dic.layer': 1}, progress=False)
    fit(gears, run, **{'dic.layer': 1})
    assert DynAD.open(run, {'dic.layer': 1}, progress=False).parts.layers == (1, 2, 3)

def test_checkpoints_that_are_torn_or_of_another_training(fitted, gears, tmp_path):
    class Stop(BaseException): pass
    def stop(stage, step, loss):
        if step == 5: raise Stop
    run = tmp_path/'run'
    with pytest.raises(Stop): DynAD(make_config('smoke', CUT)).fit(gears, run, progress=False, callback=stop)
    c = stage_file(run, f'denoiser/*.part/{CHECKPOINT}'); good = c.read_bytes()
    c.write_bytes(good[:100])
    with pytest.raises(StoreError, match=f'{CHECKPOINT}: not a whole safetensors file .*delete it'): fit(gears, run)
    save_tensors(c, {'x': torch.ones(2)})
    with pytest.raises(DenoiserError, match=f"{CHECKPOINT}: no checkpoint of the denoiser's training; delete it and run again"): fit(gears, run)
    c.write_bytes(good)
    assert fit(gears, run).parts.hashes == fitted[0].parts.hashes
    whole(run)

@pytest.mark.parametrize('content', [b'torn', None])
def test_a_checkpoint_of_the_autoencoder_that_is_torn_or_foreign(gears, tmp_path, content):
    run = tmp_path/'run'
    class Stop(BaseException): pass
    import dynad.stages as room
    keep = room.finetune
    def dies(ae, images, s, phi, seed, progress, work, **how): raise Stop(str(work))
    room.finetune = dies
    try:
        with pytest.raises(Stop) as e: fit(gears, run)
    finally: room.finetune = keep
    f = Path(str(e.value))/'finetune.safetensors'
    f.write_bytes(content) if content else save_tensors(f, {'net.x': torch.ones(2)})
    with pytest.raises((StoreError, LatentError), match=r'finetune\.safetensors: .*delete it'): fit(gears, run)

def test_rows_of_another_stage(tmp_path):
    s = Shards(Store(tmp_path), 'n', {'k': 1})
    make = lambda rows: {'y': torch.tensor(rows).float()}
    s.get([1, 2], make)
    save_tensors(s.dir/'rows-00007.safetensors', {'y': torch.ones(2)})
    with pytest.raises(StoreError, match=r'rows-00007\.safetensors: not rows of a stage; delete it'): Shards(Store(tmp_path), 'n', {'k': 1}).get([3], make)
    (s.dir/'rows-00007.safetensors').unlink()
    s.get([3], make); (s.dir/'rows-00000.safetensors').unlink()                       # rows that are gone are made again, and overwrite no others
    t = Shards(Store(tmp_path), 'n', {'k': 1})
    assert t.get([1, 2, 3], make)['y'].tolist() == [1, 2, 3] and Shards(Store(tmp_path), 'n', {'k': 1}).missing([1, 2, 3]) == []

def test_what_a_killed_process_was_writing_is_swept_away(tmp_path):
    store = Store(tmp_path/'run')
    def dies(work): (work/'.data.safetensors.x1.tmp').write_bytes(b'half'); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): store.stage('s', {'a': 1}, dies)
    assert [p.name for p in store.stage('s', {'a': 1}, lambda work: None).iterdir()] == ['stage.json']
    old, new = tmp_path/'run/.config.json.a.tmp', tmp_path/'run/.config.json.b.tmp'
    old.write_text(''); new.write_text(''); os.utime(old, (0, 0))
    Store(tmp_path/'run')
    assert not old.exists() and new.exists()                                          # another process may be writing the young one

def test_a_stage_without_its_note_is_not_believed(tmp_path):
    store = Store(tmp_path/'run')
    f = store.stage('s', {'a': 1}, lambda work: {'x': torch.ones(1)})
    (f/'stage.json').write_text('{"name"')
    with pytest.raises(StoreError, match=r'stage\.json: cannot be read .*delete the folder of the stage'): store.seconds('s', {'a': 1})
    (f/'stage.json').unlink()
    with pytest.raises(StoreError, match='holds no stage.json, so it is not a whole stage; delete the folder and run again'): store.stage('s', {'a': 1}, lambda work: {'x': torch.ones(1)})

# ---- real processes: two at once, and SIGKILL

SERVER = '''
import json, os, sys
import torch, dynad.cli, dynad.detector, dynad.evaluate, dynad.data, dynad.report
for line in sys.stdin:
    pids = []
    for args, log in json.loads(line):
        pid = os.fork()
        if not pid:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(fd, 1); os.dup2(fd, 2)
            try: dynad.cli.app(args)
            except SystemExit as e: os._exit(e.code or 0)
            except BaseException:
                import traceback; traceback.print_exc(); sys.stderr.flush(); os._exit(99)
            os._exit(0)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]), flush=True)
'''

class Dynad:
    "`dynad` in processes of their own, forked from one that has done the imports: what is killed is the work."
    def __init__(self, log):
        self.log = Path(log)
        env = os.environ | {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive', 'HF_HUB_OFFLINE': '1'}
        self.p = subprocess.Popen([sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def start(self, *commands): self.p.stdin.write(json.dumps([([str(a) for a in c], str(self.log)) for c in commands]) + '\n'); self.p.stdin.flush(); return json.loads(self.p.stdout.readline())
    def wait(self): return json.loads(self.p.stdout.readline())

    def run(self, *command, kill_after=None) -> bool:
        "Whether it ended by itself; it is killed after so many seconds."
        pid, = self.start(command)
        killed = kill_after is not None and not select.select([self.p.stdout], [], [], kill_after)[0]
        if killed: os.kill(pid, signal.SIGKILL)
        status, = self.wait()
        assert status == 0 or killed and status == -signal.SIGKILL, self.log.read_text()[-3000:]
        return status == 0

    def close(self): self.p.stdin.close(); self.p.wait()

@pytest.fixture
def cli(tmp_path):
    d = Dynad(tmp_path/'log.txt')
    yield d
    d.close()

def fit_command(data, run): return ['fit', '--data', data.root, '--out', run, '--preset', 'smoke', *(x for k, v in CUT.items() for x in ('--set', f'{k}={json.dumps(v)}'))]
def evaluate_command(data, run, out): return ['evaluate', run, '--data', data.root, '--json', out, '--n-boot', 20]

def test_two_processes_fit_one_run_directory_at_the_same_time(fitted, cli, gears, tmp_path):
    run = tmp_path/'run'
    cli.start(fit_command(gears, run), fit_command(gears, run))
    assert cli.wait() == [0, 0], cli.log.read_text()[-3000:]
    assert {n: len([f for f in (run/'stages'/n).iterdir() if f.is_dir()]) for n in ('autoencoder', 'denoiser', 'phi')} == dict(autoencoder=1, denoiser=1, phi=1)
    whole(run)
    model = DynAD.open(run, progress=False)
    assert judge(model, gears)['data'] == fitted[2]['data'] and model.info['data']['fingerprint'] == gears.fingerprint

def killed_and_resumed(cli, gears, tmp_path, kills, per_round, seed, reach=1., more=()):
    "Kill `fit` and `evaluate` at random moments until `kills` are done; every round ends whole and with the same JSON. `reach`: how far into the undisturbed time."
    rng, seconds, want = random.Random(seed), {}, tmp_path/'want.json'
    for name, command in (('fit', fit_command(gears, tmp_path/'want')), ('evaluate', [*evaluate_command(gears, tmp_path/'want', want), *more])):
        start = time.perf_counter(); assert cli.run(*command); seconds[name] = time.perf_counter() - start
    want, done, rounds, moments = comparable(json.loads(want.read_text())), 0, 0, []
    while done < kills:
        run, out = tmp_path/f'run{rounds}', tmp_path/f'out{rounds}.json'
        for name, command in (('fit', fit_command(gears, run)), ('evaluate', [*evaluate_command(gears, run, out), *more])):
            mine = 0
            while mine < per_round and done < kills:
                after = rng.uniform(0, reach*seconds[name])
                if cli.run(*command, kill_after=after): break
                mine += 1; done += 1; moments.append((name, round(after, 2)))
                if (run/'stages').is_dir(): whole(run, after_a_kill=True)
                assert not out.exists() or name == 'fit' or comparable(json.loads(out.read_text())) == want
            assert cli.run(*command)
        whole(run)
        assert comparable(json.loads(out.read_text())) == want
        rounds += 1
    return moments, rounds, seconds

def test_sigkill_at_random_moments_and_resume_give_the_same_json(cli, gears, tmp_path): killed_and_resumed(cli, gears, tmp_path, 4, 2, seed=0, reach=.5, more=['--no-null-models'])

@pytest.mark.skipif(os.environ.get('DYNAD_SLOW') != '1', reason='twenty SIGKILLs take many minutes; DYNAD_SLOW=1 runs them')
def test_twenty_sigkills(cli, gears, tmp_path): print(killed_and_resumed(cli, gears, tmp_path, 20, 5, seed=1))

# ---- random bytes, random settings

def seeds(folder):
    "One small file of every kind that the readers know."
    a = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    kinds = dict(png={}, jpg={}, bmp={}, gif={}, webp={}, ppm={}, tga={}, tif=dict(compression='tiff_lzw'))
    for ext, kw in kinds.items(): Image.fromarray(a).save(folder/f'a.{ext}', **kw)
    Image.fromarray(a[..., 0]).convert('P').save(folder/'p.png', transparency=3)
    Image.fromarray(a[..., 0].astype('uint16')*257).save(folder/'s.png'); Image.fromarray(a[..., 0].astype('float32')/255).save(folder/'f.tif')
    return [p.read_bytes() for p in sorted(folder.iterdir())]

@pytest.fixture(scope='module')
def files(tmp_path_factory): return seeds(tmp_path_factory.mktemp('seeds'))

FUZZ = settings(max_examples=int(os.environ.get('DYNAD_FUZZ', 150)), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

def only_data_errors(path):
    for read in (lambda: read_image(path, 16), lambda: read_mask(path, 16), lambda: read_mask(path, 16, nonzero=True)):
        try: x = read()
        except DataError as e: assert str(e).startswith(str(path)); continue
        assert x.shape in ((3, 16, 16), (1, 16, 16)) and (x.dtype == torch.bool or x.isfinite().all() and 0 <= x.min() and x.max() <= 1)

@pytest.mark.filterwarnings('ignore')
@FUZZ
@given(st.binary(max_size=400), st.sampled_from(['', 'png', 'tif', 'jpg', 'ppm']))
def test_random_bytes_are_images_or_data_errors(tmp_path, content, ext):
    magic = {'': b'', 'png': b'\x89PNG\r\n\x1a\n', 'tif': b'II*\0\x08\0\0\0', 'jpg': b'\xff\xd8\xff\xe0', 'ppm': b'P6 '}[ext]
    (tmp_path/'x.png').write_bytes(magic + content)
    only_data_errors(tmp_path/'x.png')

@pytest.mark.filterwarnings('ignore')
@FUZZ
@given(st.data())
def test_mutated_images_are_images_or_data_errors(tmp_path, files, data):
    b = bytearray(data.draw(st.sampled_from(files)))
    for _ in range(data.draw(st.integers(1, 6))):
        i = data.draw(st.integers(0, min(len(b) - 1, 200)) | st.integers(0, len(b) - 1))
        how = data.draw(st.sampled_from(['flip', 'cut', 'double', 'ones', 'zeros']))
        if how == 'flip': b[i] ^= data.draw(st.integers(1, 255))
        elif how == 'cut': del b[i:i + data.draw(st.integers(1, 50))]
        elif how == 'double': b[i:i] = b[i:i + 20]
        else: b[i:i + 4] = (b'\xff' if how == 'ones' else b'\0')*4
        if not b: b = bytearray(b'\0')
    (tmp_path/'x.png').write_bytes(b)
    only_data_errors(tmp_path/'x.png')

GROUPS = [k for k, f in Config.model_fields.items() if hasattr(f.annotation, 'model_fields')]
KEYS = [k for k in Config.model_fields if k not in GROUPS] + GROUPS + [f'{g}.{k}' for g in GROUPS for k in Config.model_fields[g].annotation.model_fields]
keys = st.sampled_from(KEYS) | st.text(max_size=8) | st.tuples(st.sampled_from(KEYS), st.text(max_size=5)).map('.'.join)
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([1, 2, 64, 128, .5, 'auto', 'tiny', 'resnet34']),
                      lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5)

def config_or_error(make):
    try: c = make()
    except ConfigError as e: assert str(e); return
    assert parse_config(json.loads(dynad.config.dump_config(c))) == c                  # what is accepted survives its file

@FUZZ
@example('smoke', {'data': 1, 'data.image_size': 64})
@example('small', {'seed': 1, 'seed.x': 2})
@example('small', {'': 1, '.': 2, 'a..b': 3})
@given(st.sampled_from([*PRESETS, 'other', '']), st.dictionaries(keys, values, max_size=4))
def test_random_settings_are_a_config_or_a_config_error(preset, overrides): config_or_error(lambda: make_config(preset, overrides))

@FUZZ
@given(st.lists(st.tuples(keys, st.text(max_size=10)).map('='.join) | st.text(max_size=15), max_size=3))
def test_random_set_options(pairs): config_or_error(lambda: make_config('smoke', parse_overrides(pairs)))

@FUZZ
@example(b'[]')
@example(b'null')
@example(b'{"seed": 1e999}')
@given(st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode()) | st.dictionaries(keys, values, max_size=3).map(lambda v: json.dumps(v).encode()))
def test_random_config_files(tmp_path, content):
    (tmp_path/'config.json').write_bytes(content)
    try: load_config(tmp_path/'config.json')
    except ConfigError as e: assert 'config.json' in str(e)

# ---- no pickle that a user names is ever run

class Boom:
    def __reduce__(self): return (os._exit, (66,))

def test_the_source_unpickles_nowhere_but_as_tensors_only():
    "torch.load only with weights_only=True; no other way into a pickle."
    for f in Path(dynad.__file__).parent.glob('*.py'):
        for node in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call):
                call, kw = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                if call == 'torch.load': assert kw.get('weights_only') == 'True', f'{f.name}:{node.lineno}'
                assert call not in ('pickle.load', 'pickle.loads', 'pickle.Unpickler', 'pd.read_pickle', 'joblib.load', 'dill.load', 'marshal.loads', 'shelve.open', 'torch.jit.load', 'yaml.load', 'eval', 'exec',
                                    'torch.hub.load', 'torch.hub.load_state_dict_from_url'), f'{f.name}:{node.lineno}: {call}'
                if call in ('np.load', 'numpy.load'): assert kw.get('allow_pickle') == 'False', f'{f.name}:{node.lineno}'
                if call.endswith('.from_pretrained') and 'diffusers' in call: assert kw.get('use_safetensors') == 'True', f'{f.name}:{node.lineno}'
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {a.name for a in node.names} if isinstance(node, ast.ImportFrom) and node.module == 'pickle' else {a.name.split('.')[0] for a in node.names} if isinstance(node, ast.Import) else set()
                assert not names & {'pickle', 'dill', 'joblib', 'shelve', 'marshal', 'load', 'loads', 'Unpickler'}, f'{f.name}:{node.lineno}'

def bomb(path, how):
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == 'torch': torch.save({'w': Boom()}, path)
    elif how == 'npy': np.save(path.with_suffix('.npy'), np.array([Boom()], dtype=object), allow_pickle=True); path.with_suffix('.npy').replace(path)
    else: path.write_bytes(pickle.dumps(Boom()))
    return path

@pytest.mark.parametrize('how', ['torch', 'npy', 'pickle'])
def test_a_pickle_that_a_user_names_is_refused_unrun(fitted, gears, run, tmp_path, how):
    "Were it run, this process would end with status 66."
    from dynad.features import FeatureError
    for file in ('w.pth', 'w.safetensors', 'w.pkl'):
        with pytest.raises(FeatureError, match=rf'{file}: '): fit(gears, tmp_path/'new', **{'features.weights': str(bomb(tmp_path/file, how))})
    folder = tmp_path/'ae'; folder.mkdir()
    (folder/'config.json').write_text('{"_class_name": "AutoencoderKL"}'); bomb(folder/'diffusion_pytorch_model.bin', how)
    for _ in range(2):
        with pytest.raises(LatentError, match='ae'): fit(gears, tmp_path/'new', **{'latents.kind': 'kl-f8', 'latents.weights': str(folder), 'latents.finetune_steps': 0})
        bomb(folder/'diffusion_pytorch_model.safetensors', how)
    saved = fitted[0].save_pretrained(tmp_path/'model')
    bomb(saved/'phi.safetensors', how)
    with pytest.raises(StoreError, match=r'phi\.safetensors: not a whole safetensors file'): DynAD.from_pretrained(saved)
    with pytest.raises(DataError): DynAD.open(run, progress=False).predict([bomb(tmp_path/'image.png', how)])
