"What a large set costs in memory: fit and evaluate as separate processes, the kernel's own account of their peak."
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dynad.synthetic import write_synthetic

SETTINGS = {'denoiser.steps': 20, 'latents.finetune_steps': 2, 'adaptation.gamma': 0, 'dic.pool': 16}
PEAK = "import sys; from dynad.cli import app; from dynad.machine import peak_memory_mb; sys.argv = ['dynad', *sys.argv[1:]]\ntry: app()\nfinally: print('peak', peak_memory_mb())"

def many(folder, n, size):
    "n good training and n test images: the synthetic boards, each shifted and with its own grain; every fourth test image defective."
    few = write_synthetic(folder/'few', 'board', n_train=8, n_good=6, n_defect=6, size=size, seed=0)
    rng = np.random.default_rng(0)
    def copies(source, target, count):
        files = sorted(source.glob('*.png'))
        target.mkdir(parents=True)
        for i in range(count):
            x = np.asarray(Image.open(files[i % len(files)]).convert('RGB')).astype(np.int16)
            Image.fromarray((x + rng.integers(-6, 7, x.shape)).clip(0, 255).astype(np.uint8)).save(target/f'{i:05d}.png', compress_level=1)
    copies(few/'train'/'good', folder/'set'/'train'/'good', n)
    copies(few/'test'/'good', folder/'set'/'test'/'good', n - n//4)
    defect = next(p for p in sorted((few/'test').iterdir()) if p.name != 'good')
    copies(defect, folder/'set'/'test'/defect.name, n//4)
    masks = sorted((few/'ground_truth'/defect.name).glob('*.png'))
    (folder/'set'/'ground_truth'/defect.name).mkdir(parents=True)
    for i in range(n//4): Image.open(masks[i % len(masks)]).save(folder/'set'/'ground_truth'/defect.name/f'{i:05d}_mask.png')
    return folder/'set'

def peak(*args): # MB
    p = subprocess.run([sys.executable, '-c', PEAK, *map(str, args)], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-3000:]
    return float(p.stdout.split('peak')[-1])

def cost(folder, n, size):
    data, settings = many(folder, n, size), [w for k, v in (SETTINGS | {'data.image_size': size}).items() for w in ('--set', f'{k}={json.dumps(v)}')]
    fit = peak('fit', '--data', data, '--out', folder/'run', '--preset', 'smoke', *settings)
    test = peak('evaluate', folder/'run', '--data', data, '--json', folder/'r.json', '--n-boot', 200, '--save-maps', folder/'maps')
    r = json.loads((folder/'r.json').read_text())
    assert r['images'] == n and len(list((folder/'maps').glob('*.npy'))) == n
    return fit, test, r

@pytest.mark.skipif(os.environ.get('DYNAD_SLOW') != '1', reason='two times 5 000 images, half an hour; DYNAD_SLOW=1 runs it')
def test_five_thousand_images_in_three_gigabytes(tmp_path, capsys):
    fit, test, r = cost(tmp_path, 5000, 128)
    with capsys.disabled(): print(f'\n5 000 + 5 000 images at 128²: peak of fit {fit:.0f} MB, of evaluate {test:.0f} MB')
    assert fit < 3000 and test < 3000
    assert r['protocol']['pro'].startswith('streaming')
