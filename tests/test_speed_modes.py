"What has no weight is left out, to the bit; faster settings are picked by rules, kept with the run, and refused elsewhere."
import json, shutil

import pandas as pd
import pytest
import torch

from dynad.config import ConfigError, content_key, load_config, make_config, with_overrides
from dynad.data import to_float
from dynad.detector import DynAD
from dynad.lean import SPEED_FILE, layers_of, needed
from dynad.method import open_run, trained_settings
from dynad.speed_modes import METRICS, SpeedError, candidates, curve, curve_lines, in_words, pick, with_images, write_curve
from dynad.tiles import Tiling

@pytest.fixture(scope='module')
def images(boards):
    from dynad.data import load_images
    return to_float(load_images(boards.test[:6], 64))

@pytest.mark.parametrize('lam', [0., .5, 1.])
@pytest.mark.parametrize('neighbour', [0., .5, 1.])
@pytest.mark.parametrize('more', [{}, {'reconstruction.average': 2, 'fusion.reference': 'decoded', 'fusion.layers': [1, 2]}, {'reconstruction.omega': .5}], ids=['plain', 'averaged', 'noisy'])
def test_exact_is_the_same_to_the_bit(smoke, images, lam, neighbour, more):
    full = smoke[0].with_settings({'fusion.lam': lam, 'fusion.neighbour': neighbour} | more)
    exact = full.with_settings({'speed': 'exact'})
    a, n = full.predict(images), needed(full.config)
    full.parts.denoiser.samples = 0
    b = exact.predict(images)
    assert torch.equal(a.map, b.map) and torch.equal(a.score, b.score) and torch.equal(a.anomalous, b.anomalous) and torch.equal(a.t_hat, b.t_hat) and torch.equal(a.distance, b.distance)
    assert (full.parts.denoiser.samples > 0) == (n.latent or n.feature)
    for name in ('latent', 'feature'):
        if getattr(n, name): assert torch.equal(getattr(a, f'{name}_map'), getattr(b, f'{name}_map'))
    if not n.feature: assert b.feature_map is None
    if not (n.latent or n.feature): assert b.latent_map is None
    assert (b.neighbour_map is None) == (neighbour == 0) and b.reconstruction is None

def test_decoder_and_phi_rest_without_a_feature_map(smoke, images, monkeypatch):
    m = smoke[0].with_settings({'fusion.lam': 1., 'speed': 'exact'})
    m.decision
    m.predict(images)
    seen = []
    monkeypatch.setattr(m.parts.autoencoder, 'decode', lambda z: seen.append(len(z)))
    handle = m.parts.phi.register_forward_hook(lambda net, x, y: seen.append('φ'))
    m.predict(images); handle.remove()
    assert seen == ['φ']

@pytest.mark.filterwarnings('ignore:.*smallest and largest')
def test_exact_on_the_scale_of_a_test_set(smoke, images, monkeypatch):
    "What has no weight is left out there too: here the neighbour map and its bank."
    full = smoke[0].with_settings({'fusion.neighbour': .5}).with_settings({'fusion.neighbour': 0., 'fusion.calibration': 'test'})
    exact, want = full.with_settings({'speed': 'exact'}), full.predict(images)
    monkeypatch.setattr('dynad.lean.neighbour_maps', lambda *a: 1/0)
    monkeypatch.setattr('dynad.detector.walk', lambda *a: 1/0)
    assert torch.equal(exact.predict(images).map, want.map)

@pytest.mark.parametrize('reference,layers,want', [('input', (1, 2), ((1, 2), (1, 2))), ('decoded', (1,), ((2,), (1,))), ('input', (3,), ((2, 3), (3,)))])
def test_no_deeper_than_what_is_compared(reference, layers, want):
    assert layers_of(make_config('smoke', {'fusion.reference': reference, 'fusion.layers': layers})) == want

def test_keys_of_runs_from_before_the_setting():
    c = make_config('small')
    assert 'speed' not in c.model_dump() and 'speed' in with_overrides(c, {'speed': 'fast'}).model_dump()
    assert content_key(trained_settings(DynAD, c)) == content_key(trained_settings(DynAD, with_overrides(c, {'speed': 'exact'})))

def test_refusals(smoke, boards, tmp_path):
    model, run = smoke
    with pytest.raises(ConfigError, match='speed = .fast.: nothing has been picked.*dynad speed'): open_run(run, {'speed': 'fast'})
    with pytest.raises(ConfigError, match='nothing has been picked'): model.with_settings({'speed': 'fastest'})
    with pytest.raises(ConfigError, match='is picked for a fitted run'): DynAD(make_config('smoke', {'speed': 'fast'})).fit(boards, tmp_path/'run')
    with pytest.raises(ConfigError, match="allowed: .*'fastest'"): make_config('smoke', {'speed': 'faster'})

def test_a_method_with_one_speed(boards, tmp_path):
    from dynad.padim import PaDiM
    PaDiM(make_config('smoke')).fit(boards, tmp_path/'run', progress=False)
    with pytest.raises(ConfigError, match='padim has one speed'): open_run(tmp_path/'run', {'speed': 'fast'})
    assert open_run(tmp_path/'run', {'speed': 'exact'}, progress=False).decision

def test_static_keeps_the_reconstruction_that_its_map_is_made_of():
    from dynad.static_noise import Static
    lean = lambda **o: Static(make_config('smoke', {'speed': 'exact'}, method='static', options=o)).lean
    assert lean(map='fused') and not lean(map='pixels')

# picks

def row(ms, loss=0., pro=0., changed=0, test=False, pickable=True):
    return {'i_auroc': .9 - loss, 'p_auroc': .9 - loss, 'pro': .8 - pro, 'changed_normal': changed, 'changed_defects': 0, 'ms': ms, 'times': 10/ms, 'test': test, 'pickable': pickable}

def picks(**rows): return pick(pd.DataFrame({'full': row(10.), 'exact': row(9.), **rows}).T.infer_objects().astype({'test': bool, 'pickable': bool}), 40)

def test_the_rule_of_the_picks():
    assert picks() == {'fast': 'exact', 'fastest': 'exact'}
    assert picks(a=row(5., .001), b=row(2., .01)) == {'fast': 'a', 'fastest': 'b'}
    assert picks(a=row(5., -.1, pro=.006)) == {'fast': 'exact', 'fastest': 'a'}                     # a gain elsewhere does not pay for PRO
    assert picks(a=row(5., changed=3), b=row(6., changed=2)) == {'fast': 'b', 'fastest': 'a'}       # one verdict in twenty
    assert picks(a=row(1., test=True), b=row(1., pickable=False), c=row(1., .1)) == {'fast': 'exact', 'fastest': 'exact'}

def test_points_are_settings_that_can_be_had(smoke):
    for preset in ('smoke', 'small', 'paper', 'authors'):
        c = make_config(preset)
        found = candidates(c)
        assert next(iter(found.values())) == {} and len({str(s) for s in found.values()}) == len(found)
        for s in found.values(): with_overrides(c, s)

def test_a_curve_is_kept_with_its_run(smoke, boards, tmp_path):
    run = shutil.copytree(smoke[1], tmp_path/'run')
    model = with_images(open_run(run, progress=False), boards)
    found = curve(model, boards, n=6, batch=2, repeats=1)
    t = found.table
    own, exact = t.iloc[0], t[~t.test].iloc[1]
    assert all(own[k] == exact[k] for k in METRICS) and exact.changed_normal == exact.changed_defects == 0
    still = t.loc[f'{exact.name}, frozen']
    assert all(abs(own[k] - still[k]) < .002 for k in METRICS) and still.changed_normal == still.changed_defects == 0
    assert t.test.sum() == (~t.test).sum() and t[t.test].ms.notna().all() and t.loc['1 step'].calls == 1
    write_curve(model, found)
    lines = in_words(found)
    assert [l.split()[0] for l in lines] == ['exact', 'fast', 'fastest'] and 'PRO +0.00' in lines[0] and 'test set' not in ' '.join(lines)
    assert curve_lines(found).count('test set') == t.test.sum()
    kept = json.loads((run/SPEED_FILE).read_text())
    fast = open_run(run, {'speed': 'fastest'}, progress=False)
    settings = kept['modes']['fastest']['settings']
    want = open_run(run, settings, progress=False).predict([s.image for s in boards.test[:3]])
    got = fast.predict([s.image for s in boards.test[:3]])
    assert torch.equal(got.map, want.map) and torch.equal(got.anomalous, want.anomalous)
    kept['run'] = 'another'
    (run/SPEED_FILE).write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match='another fit of this run'): open_run(run, {'speed': 'fast'})

def test_images_of_another_data_set_are_refused(smoke, boards):
    with pytest.raises(SpeedError, match='does not hold the held-out images'): with_images(open_run(smoke[1], progress=False), boards.limited(10, 4, 0))

def test_a_run_on_tiles_is_refused_for_what_it_is(smoke, boards, monkeypatch):
    model = open_run(smoke[1], progress=False)
    model.config, model.tiling = with_overrides(model.config, {'data.tile': 64}), Tiling(64, 48)
    with pytest.raises(SpeedError, match='data.tile = 64: the curve is measured on whole images'): with_images(model, boards)

# what evaluate computes

class Calls:
    "How many images φ, the UNet and the decoder have seen."
    def __init__(self, model, monkeypatch):
        self.n = dict.fromkeys(('φ', 'UNet', 'D'), 0)
        p, count = model.parts, lambda k, x: self.n.update({k: self.n[k] + len(x)})
        self.handles = [p.phi.register_forward_hook(lambda net, x, y: count('φ', x[0])), p.denoiser.register_forward_hook(lambda net, x, y: count('UNet', x[0]))]
        decode = p.autoencoder.decode
        monkeypatch.setattr(p.autoencoder, 'decode', lambda z: count('D', z) or decode(z))

    def __enter__(self): return self.n
    def __exit__(self, *a): [h.remove() for h in self.handles]

@pytest.mark.parametrize('lam, neighbour, rests', [(1., .5, ('D',)), (.5, 1., ('D', 'UNet')), (.5, .5, ())], ids=['no f_map', 'n_map alone', 'all'])
def test_evaluate_computes_nothing_without_a_weight(smoke, boards, tmp_path, monkeypatch, lam, neighbour, rests):
    "Calibration, thresholds and the test set: what has no weight is not computed, and every figure is that of the full walk."
    from dynad.evaluate import evaluate
    weights = {'fusion.lam': lam, 'fusion.neighbour': neighbour}
    made = smoke[0].with_settings(weights) # the banks of patches and the features of held-out images are in its store
    assert made.parts.spatial and made.held_out.features
    bare = shutil.ignore_patterns('maps*', 'latent maps*', 'reconstructions*')
    roots = [shutil.copytree(smoke[1], tmp_path/k, ignore=bare) for k in ('full', 'lean')]
    monkeypatch.setattr(DynAD, 'reconstruction_errors', lambda self: {}) # of every possible T̂, whatever the weights
    def evaluated(root, speed):
        model = with_images(DynAD.open(root, progress=False), boards).with_settings(weights | {'speed': speed})
        with Calls(model, monkeypatch) as n: e = evaluate(model, boards, n_boot=0, null_models=False, progress=False)
        return e, n
    (a, full), (b, lean) = map(evaluated, roots, ('full', 'exact'))
    assert torch.equal(a.maps, b.maps) and torch.equal(a.scores, b.scores) and a.result['pro'] == b.result['pro'] and a.result['decision'] == b.result['decision']
    assert all(full[k] > 0 for k in full) and all(lean[k] == 0 for k in rests)
    assert lean['φ'] == (len(boards.test) if 'D' in rests else full['φ']) # each image once, for severity and neighbours alike
    assert ('reconstructions' in b.result['seconds_by_stage']) == ('UNet' not in rests)
    p = next(iter(b.method.predictions(b.images)))[1]
    assert (p.feature_map is None) == bool(rests) and (p.latent_map is None) == ('UNet' in rests)

def test_what_was_compared_in_full_is_read(smoke, boards, monkeypatch):
    "A run that was evaluated before calls nothing for a faster setting of the same steps."
    full = smoke[0].with_settings({'fusion.lam': 1.})
    images = full.test_images(boards.test, boards)
    want = torch.cat([p.map for _, p in full.predict_set(images)])
    lean = full.with_settings({'speed': 'exact'})
    with Calls(lean, monkeypatch) as n: got = torch.cat([p.map for _, p in lean.predict_set(images)])
    assert torch.equal(got, want) and not any(n.values())
