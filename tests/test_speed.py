"Timing, counting and estimating."
import json
import os
import time

import pytest
import torch
import torch.nn.functional as F

from dynad import speed as S
from dynad.config import make_config
from dynad.denoiser import count_parameters, make_unet
from dynad.dic import neighbours

TINY = {'denoiser.widths': [16, 32], 'denoiser.attention': [1], 'latents.finetune_steps': 4, 'denoiser.steps': 50}

def test_seconds_are_seconds():
    calls = []
    out = S.seconds(lambda: (calls.append(1), time.sleep(.02)), repeats=3, warm=2)
    assert len(out) == 3 and len(calls) == 5 and all(.02 <= s < 2 for s in out)

def test_versus_takes_turns():
    order = []
    v = S.versus(lambda: (order.append('a'), time.sleep(.05)), lambda: (order.append('b'), time.sleep(.005)), repeats=3)
    assert order == ['a', 'b']*4 and v['before'] > v['after'] and v['times faster'] > 1.5

def test_peaks_are_positive_and_bounded():
    p = S.peaks(repeats=2)
    assert set(p) == {'convolution', 'matrix'} and all(.1 < v < 1e6 for v in p.values())

def test_flops_by_hand():
    x, w, m = torch.randn(2, 8, 16, 16), torch.randn(4, 8, 3, 3), torch.randn(5, 7)
    assert S.count_flops(lambda: (F.conv2d(x, w, padding=1), m @ m.T)) == {'convolution': 2*2*4*8*9*256, 'matrix': 2*5*7*5}
    assert S.count_flops(lambda: x + 1) == {'convolution': 0, 'matrix': 0}

def test_attention_is_counted():
    "With attention the UNet costs the four projections and the two products more."
    with torch.no_grad():
        z, t = torch.randn(1, 2, 8, 8), torch.tensor([3])
        s = make_config('smoke').denoiser
        a, b = (make_unet(s.model_copy(update={'attention': at}), 2, 8) for at in ((1,), ()))
        more = S.count_flops(lambda: a(z, t))['matrix'] - S.count_flops(lambda: b(z, t))['matrix']
    c, n, blocks = 64, 16, 1 + 2                    # one layer down, two up; the middle has attention either way
    assert more == blocks*(4*2*n*c*c + 2*2*n*n*c)

def test_share_of_peak():
    assert S.share({'convolution': 4*10**9, 'matrix': 0}, 2., {'convolution': 4., 'matrix': 1.}) == .5
    assert S.share({'convolution': 0, 'matrix': 0}, 2., {'convolution': 4., 'matrix': 1.}) is None

@pytest.fixture(scope='module')
def result():
    model = S.fresh(make_config('smoke', TINY, device='cpu'), images=12)
    return S.bench(model, torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)), repeats=2)

def test_bench_of_a_fresh_detector(result):
    r = json.loads(json.dumps(result))
    assert list(r['stages']) == list(S.STAGES) and r['weights'].startswith('random') and r['images'] == 3
    for name, s in r['stages'].items():
        assert len(s['all_seconds']) == 2 and min(s['all_seconds']) <= s['seconds'] <= max(s['all_seconds']) and s['seconds_per_image'] == pytest.approx(s['seconds']/3)
        assert (s['gflop_per_image'] is None) == (name in ('dic', 'metrics'))
    assert r['inference_seconds_per_image'] == pytest.approx(sum(s['seconds'] for k, s in r['stages'].items() if k != 'metrics')/3)
    assert 0 < r['stages']['denoise']['share_of_peak'] < 5 and .5 < r['stages']['denoise']['convolution_share'] <= 1
    assert S.bench_table(result).loc['metrics'].isna()['share_of_time']

def test_denoise_counts_all_calls(result):
    unet = make_unet(make_config('smoke', TINY).denoiser, 8, 8)
    with torch.no_grad(): one = S.count_flops(lambda: unet(torch.zeros(1, 8, 8, 8), torch.tensor([1])))
    assert result['stages']['denoise']['gflop_per_image'] == pytest.approx(10*sum(one.values())/1e9)

def test_bench_of_a_fitted_detector(smoke):
    model, _ = smoke
    r = S.bench(model, torch.rand(2, 3, 64, 64), repeats=1, count=False)
    assert r['weights'] == 'fitted' and all(s['gflop_per_image'] is None for s in r['stages'].values())

def test_timing_changes_nothing(smoke):
    model, _ = smoke
    x, hashes, weights = torch.rand(2, 3, 64, 64), dict(model.parts.hashes), model.parts.denoiser.weights_hash
    before = model.predict(x).map
    S.bench(model, x, repeats=1, count=False)
    assert torch.equal(before, model.predict(x).map) and model.parts.hashes == hashes and model.parts.denoiser.weights_hash == weights

@pytest.mark.parametrize('kind,channels,down', [('tiny', 8, 8), ('taesd', 4, 8), ('identity', 3, 1)])
def test_random_autoencoders_have_the_shape_of_the_real(kind, channels, down):
    ae = S.random_autoencoder(make_config('small', {'latents.kind': kind, 'latents.finetune_steps': 0}).latents, 64)
    with torch.no_grad(): z = ae.encode(torch.rand(1, 3, 64, 64))
    assert z.shape == (1, channels, 64//down, 64//down)

def test_kl_f8_counted_as_the_specification_says():
    "256²: encode 273 GFLOP, decode 622 (latent diffusion's KL-f8, 83.65 M weights); counted on 64², where convolutions cost 1/16."
    ae = S.random_autoencoder(make_config('paper').latents, 256)
    assert count_parameters(ae) == 83_653_863
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64); z = ae.encode(x)
        e, d = S.count_flops(lambda: ae.encode(x)), S.count_flops(lambda: ae.decode(z))
    assert 16*e['convolution']/1e9 == pytest.approx(271, abs=4) and 16*d['convolution']/1e9 == pytest.approx(619, abs=6)

def test_a_line_through_two_batches():
    assert S._at_batch([1, 2], [3., 5.], 30) == 61 and S._at_batch([2], [4.], 30) == 60 and S._at_batch([1, 2], [5., 4.], 10) == 5
    assert S._sizes(30, 2) == [1, 2] and S._sizes(1, 2) == [1] and S._sizes(16, 8) == [4, 8]

@pytest.mark.skipif(os.environ.get('DYNAD_SLOW') != '1', reason='takes most of a minute; DYNAD_SLOW=1 runs it')
def test_an_estimate_adds_up():
    e = S.estimate('smoke', {**TINY, 'denoiser.steps': None, 'denoiser.epochs': 20}, images=50, test=10, steps=1, most=2)
    assert json.loads(json.dumps(e)) == e
    assert e['fit_minutes'] == pytest.approx(sum(e['fit_minutes_by_part'].values())) and min(e['fit_minutes_by_part'].values()) > 0
    assert e['optimiser_steps'] == 20*40//16 and e['seconds_per_step']*50/60 == pytest.approx(e['fit_minutes_by_part']['denoiser'])
    assert e['weights_and_optimiser_gb'] == pytest.approx(20*e['parameters']/1e9) and .1 < e['fit_memory_gb'] < 8 and .1 < e['inference_memory_gb'] < 8
    assert e['inference_minutes']*60 == pytest.approx(10*e['inference_seconds_per_image'])
    first, fit, inference = S.estimate_lines(e)
    assert first.startswith('smoke on this machine') and 'fit on 50 normal images' in fit and 'inference on 10 images' in inference

def test_a_measuring_process_that_fails_is_quoted():
    with pytest.raises(RuntimeError, match='estimate: the measuring process failed: .*nothing_of_the_kind'): S._apart('nothing_of_the_kind')

# neighbours

@pytest.mark.parametrize('own', [False, True])
def test_three_searches_agree(own):
    sklearn = pytest.importorskip('sklearn.neighbors'); pytest.importorskip('faiss')
    g = torch.Generator().manual_seed(0)
    bank = torch.rand(60, 512, generator=g)
    query = bank if own else torch.rand(9, 512, generator=g)
    (d0, i0), (d1, i1) = (neighbours(query, bank, 7, own=own, backend=b) for b in ('torch', 'faiss'))
    d2, i2 = sklearn.NearestNeighbors(n_neighbors=8, algorithm='brute', metric='manhattan').fit(bank.numpy()).kneighbors(query.numpy())
    d2, i2 = (d2[:, 1:], i2[:, 1:]) if own else (d2[:, :7], i2[:, :7])
    assert torch.equal(i0, i1) and (i0.numpy() == i2).all() and torch.allclose(d0, d1, rtol=1e-4) and torch.allclose(d0, torch.from_numpy(d2).float(), rtol=1e-4)
