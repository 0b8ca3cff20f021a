"The paper's kind of autoencoder in a whole run: KL-f8's layout with few channels and random weights, fitted, opened, evaluated, exported with its certificate."
import json

import numpy as np
import pytest
import torch

from dynad.config import make_config
from dynad.detector import DynAD
from dynad.evaluate import evaluate
from dynad.speed import KLF8_CONFIG

SMALL = KLF8_CONFIG | {'block_out_channels': [8, 16, 16, 16], 'norm_num_groups': 4}

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "A folder as diffusers writes it."
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('weights')/'kl-f8'
    AutoencoderKL(**SMALL).save_pretrained(folder)
    return folder

@pytest.fixture(scope='module')
def run(weights, boards, tmp_path_factory):
    "Fitted from that folder."
    out = tmp_path_factory.mktemp('run')/'run'
    config = make_config('smoke', {'latents.kind': 'kl-f8', 'latents.weights': str(weights), 'latents.finetune_steps': 0, 'denoiser.steps': 30, 'adaptation.gamma': 0})
    return DynAD(config).fit(boards, out, progress=False), out

def test_the_layout_is_that_of_the_paper(weights):
    kept, fewer = json.loads((weights/'config.json').read_text()), ('block_out_channels', 'norm_num_groups')
    same = {k: v for k, v in KLF8_CONFIG.items() if k not in fewer}
    assert {k: kept[k] for k in same} == json.loads(json.dumps(same)) and len(kept['block_out_channels']) == len(KLF8_CONFIG['block_out_channels']) == 4

def test_fitted_and_evaluated(run, boards):
    method, _ = run
    ae = method.parts.autoencoder
    x = torch.rand(2, 3, 64, 64)
    assert (ae.kind, ae.latent_channels, ae.downsample, ae.scale) == ('kl-f8', 4, 8, .18215) and ae.encode(x).shape == (2, 4, 8, 8) and ae.decode(ae.encode(x)).shape == x.shape
    assert method.parts.denoiser.unet.config.in_channels == 4
    e = evaluate(method, boards, n_boot=5, progress=False)
    assert all(0 <= e.result[k]['value'] <= 1 for k in ('i_auroc', 'p_auroc', 'pro')) and 't_hat_0' in e.result['null_models'] and e.result['settings']['latents']['kind'] == 'kl-f8'

def test_opened_and_saved_it_says_the_same(run, weights, boards, tmp_path):
    method, out = run
    files = [s.image for s in boards.test[:3]]
    assert torch.allclose(DynAD.open(out, progress=False).predict(files).map, method.predict(files).map, atol=1e-5)
    method.save_pretrained(tmp_path/'saved')
    assert torch.allclose(DynAD.from_pretrained(tmp_path/'saved').predict(files).map, method.predict(files).map, atol=1e-5)   # needs no other folder

def test_exported_with_a_certificate(run, boards, tmp_path):
    for name in ('onnx', 'onnxruntime'): pytest.importorskip(name)
    from dynad.export import export
    from dynad.runtime import Package, predict
    method, out = run
    c = export(out, tmp_path/'package', threads=1, defects=8)
    assert all(d['verdicts that differ'] == d['T̂ that differ'] == 0 and d['largest difference of map'] < 1e-3 for d in c['compared'].values())
    files = [s.image for s in boards.test]
    mine, theirs = predict(Package(tmp_path/'package', 1), files), method.predict(files)
    assert np.abs(mine.map - theirs.map.numpy()).max() < 1e-3 and np.array_equal(mine.anomalous, theirs.anomalous.numpy())
