import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

import dynad
from dynad.backbone import resnet_file, resnet_url
from dynad.cli import app
from dynad.evaluate import MEASURED

run = CliRunner()
FIT = ['--preset', 'smoke', '--set', 'denoiser.steps=20', '--set', 'latents.finetune_steps=2', '--set', 'denoiser.checkpoint_every=10']


def test_version_and_help():
    assert run.invoke(app, ['--version']).stdout.strip() == dynad.__version__
    out = run.invoke(app, ['--help']).stdout
    for command in ('demo', 'fit', 'evaluate', 'predict', 'doctor'): assert command in out


def test_the_installed_command_fits_evaluates_and_predicts(boards, tmp_path):
    exe = str(Path(sys.executable).with_name('dynad'))
    def call(*words): return subprocess.run([exe, *map(str, words)], capture_output=True, text=True, timeout=600)
    out = call('fit', '--data', boards.root, '--out', tmp_path/'run', *FIT)
    assert out.returncode == 0, out.stderr
    results = []
    for i in range(2):
        out = call('evaluate', tmp_path/'run', '--data', boards.root, '--json', tmp_path/f'{i}.json', '--save-maps', tmp_path/'maps', '--report', tmp_path/'page', '--n-boot', 20)
        assert out.returncode == 0, out.stderr
        assert 'smoke preset' in out.stdout
        r = json.loads((tmp_path/f'{i}.json').read_text())
        for k in MEASURED: r.pop(k)
        results.append(r)
    assert results[0] == results[1] and (tmp_path/'maps'/'index.csv').exists() and list((tmp_path/'page').glob('*.html'))

    names = ['ein Bild mit Ä.png', 'second.png']
    for n, s in zip(names, boards.test): Image.open(s.image).save(tmp_path/n)
    out = call('predict', tmp_path/'run', *[tmp_path/n for n in names], '--out', tmp_path/'out')
    assert out.returncode == 0, out.stderr
    scores = pd.read_csv(tmp_path/'out'/'scores.csv')
    assert list(scores.image) == [str(tmp_path/n) for n in names]
    for stem in scores.files:
        for kind in ('map', 'overlay', 'reconstruction'): assert Image.open(tmp_path/'out'/f'{stem}_{kind}.png').size == (128, 128) # of the image itself


@pytest.mark.parametrize('words, said', [
    (['fit', '--data', '{tmp}/nothing', '--out', '{tmp}/r'], ['nothing']),
    (['fit', '--data', '{tmp}', '--out', '{tmp}/r', '--set', 'fusion.lam=2'], ['fusion.lam = 2', 'less than or equal to 1']),
    (['fit', '--data', '{tmp}', '--out', '{tmp}/r', '--set', 'lam'], ["--set 'lam': expected key=value"]),
    (['fit', '--data', '{tmp}', '--out', '{tmp}/r', '--preset', 'huge'], ["preset = 'huge' does not exist; allowed: paper, authors, small, smoke"]),
    (['evaluate', '{tmp}/norun', '--data', '{tmp}', '--json', '{tmp}/x.json'], ['norun', 'no such file']),
    (['predict', '{tmp}/norun', '{tmp}/none.png', '--out', '{tmp}/o'], ['none.png: no such file or folder']),
    (['predict', '{tmp}/norun', '{tmp}', '--out', '{tmp}/o'], ['no image in there']),
    (['demo', '--product', 'shoe', '--out', '{tmp}/d'], ["--product 'shoe' does not exist"]),
])
def test_mistakes_end_in_one_line_and_status_2(words, said, tmp_path):
    out = run.invoke(app, [w.format(tmp=tmp_path) for w in words])
    assert out.exit_code == 2, out.output
    assert out.output.startswith('dynad: ') and len(out.output.strip().splitlines()) == 1
    for s in said: assert s in out.output
    assert not (tmp_path/'r'/'run.json').exists() and not (tmp_path/'x.json').exists()


def test_doctor_tells_what_is_there_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv('DYNAD_WEIGHTS', str(tmp_path)); monkeypatch.setenv('DYNAD_DATA', str(tmp_path/'gone'))
    rows = {r['what']: r for r in json.loads(run.invoke(app, ['doctor', '--json']).stdout)}
    assert rows['weights: tiny']['state'] == 'shipped' and rows['dynad']['state'] == dynad.__version__
    assert 'no such folder' in rows['DYNAD_DATA']['state'] and 'put config.json' in rows['weights: kl-f8']['cure']
    (tmp_path/'taesd').mkdir(); (tmp_path/'taesd'/'diffusion_pytorch_model.safetensors').write_bytes(b'')
    examined = lambda: {r['what']: r['state'] for r in json.loads(run.invoke(app, ['doctor', '--json']).stdout)}
    assert examined()['weights: taesd'] == 'not found locally'                  # an empty file is none
    for n in ('config.json', 'diffusion_pytorch_model.safetensors'): (tmp_path/'taesd'/n).write_bytes(b'x')
    wide = tmp_path/resnet_url('wide_resnet50_2').rsplit('/', 1)[1]; wide.write_bytes(b'x') # under torchvision's own name
    now = examined()
    assert now['weights: taesd'] == str(tmp_path/'taesd') and now['weights: wide_resnet50_2'] == str(wide) == str(resnet_file('wide_resnet50_2'))
    assert now['tracker: tensorboard'] != 'not installed'


def test_predict_reads_every_image_before_it_writes_one(smoke, boards, tmp_path):
    folder = tmp_path/'new'; folder.mkdir()
    for i, s in enumerate(boards.test[:2]): Image.open(s.image).save(folder/f'{i}.png')
    (folder/'._0.png').write_bytes(b'what a Mac leaves')
    out = run.invoke(app, ['predict', str(smoke[1]), str(folder), '--out', str(tmp_path/'out')])
    assert out.exit_code == 0, out.output
    assert len(pd.read_csv(tmp_path/'out'/'scores.csv')) == 2
    (folder/'9.png').write_bytes(b'torn')
    out = run.invoke(app, ['predict', str(smoke[1]), str(folder), '--out', str(tmp_path/'again')])
    assert out.exit_code == 2 and '9.png' in out.output and not (tmp_path/'again').exists()


def test_places_that_cannot_be_written_are_named_before_the_work(smoke, boards, tmp_path):
    (tmp_path/'file').write_text('mine')
    for option in ('--save-maps', '--report'):
        out = run.invoke(app, ['evaluate', str(smoke[1]), '--data', str(boards.root), '--json', str(tmp_path/'x.json'), option, str(tmp_path/'file'/'below')])
        assert out.exit_code == 2 and f"{tmp_path/'file'/'below'}: cannot be written" in out.output and not (tmp_path/'x.json').exists()


def test_the_category_of_a_run_is_not_asked_of_another_folder(boards, tmp_path):
    several = tmp_path/'several'
    shutil.copytree(boards.root, several/'boardA'); shutil.copytree(boards.root, several/'boardB')
    out = run.invoke(app, ['fit', '--data', str(several), '--category', 'boardA', '--out', str(tmp_path/'run'), *FIT])
    assert out.exit_code == 0, out.output
    judged = lambda data: run.invoke(app, ['evaluate', str(tmp_path/'run'), '--data', str(data), '--json', str(tmp_path/'x.json'), '--n-boot', '5', '--no-null-models'])
    assert judged(several).exit_code == 0 and json.loads((tmp_path/'x.json').read_text())['data']['category'] == 'boardA'
    assert judged(boards.root).exit_code == 0 and json.loads((tmp_path/'x.json').read_text())['data']['category'] is None


def test_single_images_have_no_scale_of_a_test_set(smoke, boards, tmp_path):
    out = run.invoke(app, ['predict', str(smoke[1]), str(boards.test[0].image), '--out', str(tmp_path/'o'), '--set', 'fusion.calibration=test'])
    assert out.exit_code == 2 and "fusion.calibration = 'test' scales an image by the others" in out.output and not (tmp_path/'o').exists()
