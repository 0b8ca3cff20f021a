import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

import dynad
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
    assert list(scores.picture) == [str(tmp_path/n) for n in names]
    for stem in scores.files:
        for kind in ('map', 'overlay', 'reconstruction'): assert Image.open(tmp_path/'out'/f'{stem}_{kind}.png').size == (64, 64)


@pytest.mark.parametrize('words, said', [
    (['fit', '--data', '{tmp}/nothing', '--out', '{tmp}/r'], ['nothing']),
    (['fit', '--data', '{tmp}', '--out', '{tmp}/r', '--set', 'fusion.lam=2'], ['fusion.lam = 2', 'less than or equal to 1']),
    (['fit', '--data', '{tmp}', '--out', '{tmp}/r', '--set', 'lam'], ["--set 'lam': expected key=value"]),
    (['fit', '--data', '{tmp}', '--out', '{tmp}/r', '--preset', 'huge'], ["preset = 'huge' does not exist; allowed: paper, authors, small, smoke"]),
    (['evaluate', '{tmp}/norun', '--data', '{tmp}', '--json', '{tmp}/x.json'], ['norun', 'no such file']),
    (['predict', '{tmp}/norun', '{tmp}/none.png', '--out', '{tmp}/o'], ['none.png: no such file or folder']),
    (['predict', '{tmp}/norun', '{tmp}', '--out', '{tmp}/o'], ['no picture in there']),
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
    rows = {r['what']: r for r in json.loads(run.invoke(app, ['doctor', '--json']).stdout)}
    assert rows['weights: taesd']['state'] == str(tmp_path/'taesd')
