"Frozen networks say what the networks say, for any number of images, and leave the original as it is."
import warnings

import pytest
import torch

from dynad.data import load_images, to_float
from dynad.denoiser import set_compiled
from dynad.frozen import Frozen, FrozenDenoiser, FrozenError, FrozenPhi, frozen

@pytest.fixture(scope='module')
def x(boards): return to_float(load_images(boards.test, 64))

@pytest.fixture(scope='module')
def both(smoke): return smoke[0], frozen(smoke[0])

def test_networks(both, x):
    model, fast = both
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('error')
        for n in (3, 1, 7):
            want, got = model.parts.phi(x[:n]), fast.parts.phi(x[:n])
            assert list(want) == list(got) and all(torch.allclose(want[j], got[j], atol=1e-3, rtol=1e-4) for j in want)
            first = fast.parts.phi(x[:n], first=1)
            assert list(first) == list(want)[:1] and torch.allclose(first[list(first)[0]], want[list(first)[0]], atol=1e-3, rtol=1e-4)
            z = model.parts.autoencoder.encode(x[:n])
            t = torch.arange(n)*30 + 5                                             # a step of its own for each image
            assert torch.allclose(model.parts.denoiser(z, t), fast.parts.denoiser(z, t), atol=1e-4)
    assert len(fast.parts.denoiser.made) == 1 and len(fast.parts.phi.made) == 2     # not once for each batch

@pytest.mark.parametrize('overrides', [{}, {'speed': 'exact'}, {'speed': 'exact', 'fusion.lam': 1.}, {'reconstruction.S': 3, 'reconstruction.steps': 'stride'}], ids=str)
def test_predictions(both, x, overrides):
    model = both[0].with_settings(overrides)
    want = model.predict(x)
    fast = frozen(model)
    for n in (len(x), 2, 1):
        got = fast.predict(x[:n])
        assert float((got.map - want.map[:n]).abs().max()) < 1e-4 and torch.allclose(got.score, want.score[:n], atol=1e-4)
        assert torch.equal(got.t_hat, want.t_hat[:n]) and torch.equal(got.anomalous, want.anomalous[:n])

def test_the_original_is_left_and_counts_go_on(both, x):
    model, fast = both
    d = model.parts.denoiser
    assert not isinstance(d, Frozen) and isinstance(fast.parts.denoiser, FrozenDenoiser) and isinstance(fast.parts.phi, FrozenPhi) and fast.parts.denoiser.of is d
    d.calls = d.samples = 0
    fast.predict(x[:2]); frozen_calls = d.calls, d.samples
    d.calls = d.samples = 0
    model.predict(x[:2])
    assert frozen_calls == (d.calls, d.samples) and d.calls > 0
    fast.parts.denoiser.samples = 0
    fast.predict(x[:2])
    assert fast.parts.denoiser.samples == d.samples == frozen_calls[1]               # set and read through the frozen one
    assert fast.parts.hashes == model.parts.hashes and fast.parts.phi.layers == model.parts.phi.layers and fast.parts.denoiser.latent_channels == d.latent_channels
    again = frozen(fast)
    assert again.parts.phi is fast.parts.phi and again.parts.denoiser is fast.parts.denoiser
    assert fast.with_settings({'fusion.lam': .25}).parts.phi is fast.parts.phi      # other settings, the same networks

def test_what_cannot_be_frozen(both):
    half = both[0].with_parts(config=both[0].config.model_copy(update={'precision': 'bf16'}))
    with pytest.raises(FrozenError, match="precision = 'bf16'.*open the run with device = 'cpu'"): frozen(half)

def test_where_it_is_used(smoke, tmp_path):
    "Runs opened to predict at fast or fastest; full and exact stay the same bits; an export takes the networks themselves."
    import json, shutil
    from dynad.export_networks import exportable
    from dynad.frozen import FREEZING_PAYS, at_its_speed, thawed
    from dynad.lean import SPEED_FILE, run_key
    from dynad.output import open_for_prediction
    model, run = smoke
    copy = shutil.copytree(run, tmp_path/'run')
    (copy/SPEED_FILE).write_text(json.dumps({'run': run_key(model.info), 'modes': {k: {'settings': {'reconstruction.S': 3}} for k in ('fast', 'fastest')}}))
    is_frozen = lambda m: [isinstance(p, Frozen) for p in (m.parts.phi, m.parts.denoiser)]
    for speed in ('fast', 'fastest'):
        m = open_for_prediction(copy, {'speed': speed})
        assert is_frozen(m) == [True, True] and m.config.reconstruction.S == 3
        assert is_frozen(open_for_prediction(copy, {'speed': speed}, FREEZING_PAYS - 1)) == [False, False]
        assert is_frozen(exportable(m)) == is_frozen(thawed(m)) == [False, False]
        assert thawed(m).parts.denoiser is m.parts.denoiser.of
    for speed in ('full', 'exact'): assert is_frozen(open_for_prediction(copy, {'speed': speed})) == [False, False]
    half = model.with_parts(config=model.config.model_copy(update={'precision': 'bf16', 'speed': 'fast'}))
    assert at_its_speed(half) is half

def test_a_compiled_network_is_frozen_without_torch_compile(smoke, x):
    model = smoke[0]
    want, d = model.predict(x[:3]), model.parts.denoiser
    set_compiled(d, backend='aot_eager')                                            # as denoiser.compile does; needs no compiler
    try:
        got = frozen(model).predict(x[:3])
        assert d.unet._compiled_call_impl is not None                               # the original stays compiled
    finally: set_compiled(d, False)
    assert float((got.map - want.map).abs().max()) < 1e-4
