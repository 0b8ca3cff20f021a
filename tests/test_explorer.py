"The widgets in this process: values in, PNG bytes and labels out."
import ast, copy, io, json, shlex, subprocess, sys, threading, time
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from PIL import Image

from browser import APPS
from dynad import trajectory
from dynad.config import ConfigError, make_config
from dynad.demo import demo_run
from dynad.detector import DynAD
from dynad.explorer import STATE, Explorer
from dynad.setting_text import t_max_grid
from dynad.surroundings import pull_html
from dynad.fusion import quantile, score, smooth, upsample
from dynad.images import DataError
from dynad.live import Background
from dynad.map_cache import Setting, upsample_and_smooth
from dynad.metrics import image_metrics, pixel_metrics
from dynad.quick_metrics import QuickMetrics
from dynad.session import Session
from dynad.show import outline, png_bytes, shade
from dynad.sweep import Sweep, best_settings
from dynad.synthetic import write_synthetic
from dynad.trajectory import Trajectory, reconstruct_steps
from dynad.walk import decode, reconstruct_latents

GRID = (80, 160, 320)

@pytest.fixture(scope='module')
def session(tmp_path_factory): return Session(demo_run(tmp_path_factory.mktemp('demo'))) # its own: views keep their state beside the run

@pytest.fixture
def explorer(session):
    (session.run/STATE).unlink(missing_ok=True)
    x = Explorer(session, t_maxes=GRID, setting=Setting.of(session.model.config), prefetch=True).wait(300)
    yield x
    x.close()

def size(data): return Image.open(io.BytesIO(data)).size

# the session

def test_blur_matrix_is_upsampling_and_filter():
    m = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
    for s in (0., .5, 4., 11.75): torch.testing.assert_close(upsample_and_smooth(m, 64, s), smooth(upsample(m[:, None], 64), s)[:, 0], atol=2e-5, rtol=1e-4)

@pytest.mark.parametrize('severity,t_max,lam,sigma', [('dynamic', 160, .5, 4.), ('static', 80, .9, 1.5), ('dynamic', 320, 0., 0.)])
def test_the_session_gives_what_the_detector_gives(session, severity, t_max, lam, sigma):
    s = Setting(t_max, severity, lam, sigma)
    cache = session.maps(s)
    m = DynAD.open(session.run, s.overrides, progress=False)
    A = m.all_maps(m.cached_walk(m.test_images(session.samples, session.dataset)))[0]
    torch.testing.assert_close(torch.from_numpy(session.anomaly_maps(s)), A[:, 0], atol=2e-4, rtol=1e-3)
    assert cache.thresholds(lam, sigma) == pytest.approx((m.decision.pixel_threshold, m.decision.image_threshold), rel=1e-4)
    got, exact = session.metrics(s)[0], pixel_metrics(A, session.masks, session.has_mask, n_boot=0)
    assert got['i_auroc'] == pytest.approx(image_metrics(score(A), session.labels, n_boot=0)['i_auroc'].value)
    assert [got['p_auroc'], got['pro']] == pytest.approx([exact['p_auroc'].value, exact['pro'].value], abs=2e-4)

def test_quick_metrics_on_ties_and_missing_classes():
    masks = torch.zeros(4, 1, 8, 8, dtype=torch.bool); masks[2:, :, 2:4, 2:4] = True
    y, every = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    flat = np.ones((4, 8, 8), np.float32)
    q = QuickMetrics(y, masks, every)(flat, flat.max((1, 2)))
    exact = pixel_metrics(torch.from_numpy(flat)[:, None], masks, n_boot=0)
    assert q == {'i_auroc': .5, 'p_auroc': exact['p_auroc'].value, 'pro': pytest.approx(exact['pro'].value)}
    assert QuickMetrics(y*0, masks & False, every)(flat, flat.max((1, 2))) == {'i_auroc': None, 'p_auroc': None, 'pro': None}
    assert QuickMetrics(y, masks, torch.tensor([True, True, True, False]))(flat, flat.max((1, 2)))['p_auroc'] == .5
    assert QuickMetrics(y, masks, every)(flat, flat.max((1, 2)), alive=lambda: False) is None

def test_the_maps_are_made_in_slices_and_stored(session):
    s = Setting(80, 'static', eta=2.)
    missing = session.missing(s)
    steps = list(session.make(s, slice=7))
    assert missing > 0 and steps[-1] == (missing, missing) and all(0 < b[0] - a[0] <= 7 for a, b in zip(steps, steps[1:]))
    assert Session(session.run).missing(s) == 0

def test_the_session_names_what_it_lacks(session):
    fresh = copy.copy(session.model)
    fresh.info = None # as without a run directory
    with pytest.raises(ValueError, match='give data='): Session(fresh)
    with pytest.raises(ValueError, match="severity = 'both'; allowed: dynamic, static"): Setting(80, 'both')

def test_drawing():
    m = np.zeros((9, 9), bool); m[2:7, 2:7] = True
    assert outline(m).sum() == 16 and not outline(m)[4, 4] and outline(np.ones((4, 4), bool)).sum() == 12
    assert shade(np.array([[-1., 0., 2., 9.]]), 2.).tolist() == [[0, 0, 255, 255]]
    assert size(png_bytes(np.zeros((5, 7), np.uint8))) == (7, 5) == size(png_bytes(np.zeros((5, 7, 3), np.uint8)))

def test_background_shows_its_errors_and_goes_on():
    said, done = [], []
    def step():
        done.append(1)
        if len(done) == 1: raise RuntimeError('first')
        return len(done) < 3
    w = Background(step, said.append); w.poke()
    assert w.wait(10) and [str(e) for e in said] == ['first']
    w.poke()
    assert w.wait(10) and len(done) == 3
    w.close()

def test_a_script_ends_while_a_thread_works():
    "Without an end of its own the thread, inside torch when the interpreter goes, took the process down with SIGABRT."
    code = "import torch; from dynad.live import Background; x = torch.rand(600, 600)\nw = Background(lambda: (x@x).sum() > -1, print); w.poke(); import time; time.sleep(1)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

# the Explorer

def test_lambda_moves_the_image_and_its_label(explorer):
    before = {k: w.value for k, w in explorer.images.items()}
    explorer.lam.value = .1
    changed = {k for k, w in explorer.images.items() if w.value != before[k]}
    assert {'A_map', 'overlay'} <= changed <= {'A_map', 'overlay', 'mask'}
    assert explorer.captions['A_map'].value.startswith('<b>A_map</b> = 0.10·l + 0.90·f, σ = 4')
    explorer.lam.value = .5
    assert explorer.images['A_map'].value == before['A_map']

def test_what_is_drawn_is_the_blend(explorer):
    explorer.lam.value, explorer.sigma.value = .35, 2.
    s, cache = explorer.setting, explorer.session.map_caches[explorer.setting.maps_key]
    A = explorer.session.anomaly_maps(s)[explorer.i]
    top = .35*cache.top[0] + .65*cache.top[1]
    assert np.abs(np.asarray(Image.open(io.BytesIO(explorer.images['A_map'].value))).astype(int) - shade(A, top)).max() <= 1
    limit = cache.thresholds(.35, 2.)[0]
    assert f'{(A > limit).mean():.1%} of the pixels' in explorer.captions['mask'].value

def test_t_max_severity_and_image(explorer):
    explorer.t_max.value = 320
    T = int(explorer.session.map_caches[explorer.setting.maps_key].t_hat[explorer.i])
    assert f'T̂ = {T}' in explorer.captions['reconstruction'].value
    before = explorer.images['reconstruction'].value
    explorer.severity.value = 'static'
    assert 'T̂ = 320' in explorer.captions['reconstruction'].value and explorer.images['reconstruction'].value != before
    before = explorer.images['input'].value
    explorer.image.value = (explorer.i + 1) % len(explorer.session)
    explorer.wait()
    assert explorer.images['input'].value != before and explorer.session.samples[explorer.i].name in explorer.facts.value

def test_a_drag_calls_no_model(explorer):
    calls = []
    m = explorer.session.model
    hooks = [k.register_forward_pre_hook(lambda *_: calls.append(1)) for part in (m.parts.denoiser, m.parts.autoencoder, m.parts.phi) for k in part.modules()]
    try:
        for v in (.2, .4): explorer.lam.value = v
        for v in (0., 8.): explorer.sigma.value = v
        explorer.threshold.value = 1.
        for v in GRID: explorer.t_max.value = v
        explorer.severity.value = 'static'
        assert 'T_max 320' not in explorer.captions['A_map'].value
        explorer.wait()
        assert calls == []
        explorer.omega.value = .5
        explorer.wait(300)
        assert calls
    finally:
        for h in hooks: h.remove()

def test_omega_is_stored_and_shown(explorer):
    explorer.omega.value = 1.
    assert 'being reconstructed' in explorer.captions['A_map'].value or explorer.setting.maps_key in explorer.session.map_caches
    explorer.wait(300)
    assert explorer.captions['A_map'].value.startswith('<b>A_map</b> = ') and 'dynad-stale' not in explorer.panels.main._dom_classes
    assert Session(explorer.session.run).missing(explorer.setting) == 0 and explorer.progress.layout.visibility == 'hidden'

def test_threshold_learned_or_by_hand(explorer):
    learned = explorer.session.map_caches[explorer.setting.maps_key].thresholds(explorer.lam.value, explorer.sigma.value)[0]
    assert explorer.learned.value and explorer.threshold.value == pytest.approx(learned, abs=.005) and explorer.setting.threshold is None
    explorer.threshold.value = round(learned, 2) + .004 # as a browser answers, rounded
    assert explorer.learned.value
    before = explorer.images['mask'].value
    explorer.threshold.value = .3
    assert not explorer.learned.value and explorer.images['mask'].value != before and 'A_map &gt; 0.30' in explorer.captions['mask'].value
    explorer.lam.value = .9
    assert explorer.threshold.value == .3
    explorer.learned.value = True
    assert explorer.images['mask'].value != before or explorer.threshold.value != .3

def test_figures_follow_the_last_move(explorer):
    for v in (.1, .6, .3): explorer.lam.value = v
    assert 'dynad-stale' in explorer.metrics._dom_classes
    explorer.wait()
    want = explorer.session.metrics(explorer.setting)[0]
    assert f"I-AUROC <b>{want['i_auroc']:.3f}" in explorer.metrics.value and f"PRO <b>{want['pro']:.3f}" in explorer.metrics.value
    assert 'dynad-stale' not in explorer.metrics._dom_classes

def test_an_answer_that_comes_late_is_dropped(explorer):
    real, begun, go, shown = explorer.session.quick_metrics, threading.Event(), threading.Event(), []
    def slow(maps, scores, alive): # it answers though nobody wants it any more
        begun.set(); go.wait(20)
        return real(maps, scores)
    explorer.metrics.observe(lambda change: shown.append((change['new'], explorer.lam.value)), 'value')
    explorer.session.quick_metrics = slow
    try:
        explorer.lam.value = .05
        assert begun.wait(20) # its figures are being computed
        explorer.lam.value = .95
        go.set()
        explorer.wait()
    finally: explorer.session.quick_metrics = real
    want = explorer.session.metrics(replace(explorer.setting, lam=.95))[0]
    assert [lam for _, lam in shown] == [.95] and f"P-AUROC <b>{want['p_auroc']:.3f}" in shown[0][0]
    assert want != explorer.session.metrics(replace(explorer.setting, lam=.05))[0]

def test_the_view_comes_back(explorer):
    explorer.load({'t_max': 320, 'lam': .25, 'threshold': .7}, 3)
    explorer.order.value = 'low'
    explorer.lam.value = .2
    explorer.wait()
    again = Explorer(explorer.session, t_maxes=GRID)
    assert again.setting == explorer.setting and again.i == 3 and again.order.value == 'low'
    again.wait()
    assert {k: w.value for k, w in again.images.items()} == {k: w.value for k, w in explorer.images.items()}
    again.close()

@pytest.mark.parametrize('text', ['{', '[]', '{"setting": {"t_max": 99999}}', '{"setting": {"speed": 3}}', '{"setting": {"t_max": "a"}}', '{"setting": {"threshold": "a"}}', '{"setting": {"threshold": -1}}', '{"setting": 3}'])
def test_a_broken_state_is_named_and_passed_over(session, text):
    (session.run/STATE).write_text(text)
    x = Explorer(session, t_maxes=GRID)
    assert STATE in x.message.value and x.setting.t_max == 160
    x.close()
    (session.run/STATE).unlink(missing_ok=True)

def test_errors_show_in_the_widget(explorer):
    def wrong(setting): raise RuntimeError('from an observer')
    explorer.observe(wrong)
    explorer.lam.value = .77
    assert 'from an observer' in explorer.message.value
    explorer.observers.clear()
    explorer.lam.value = .78
    assert explorer.message.value == ''
    i = next(k for k in range(len(explorer.session)) if k not in explorer.model.neighbours)
    path = explorer.session.training_samples[int(explorer.session.severity['neighbours'][i][0])].image
    hidden = path.rename(path.with_suffix('.hidden'))
    try:
        explorer.image.value = i
        assert explorer.worker.wait(60), 'a failed job is tried again and again'
        assert path.name in explorer.message.value and 'no such file' in explorer.message.value
    finally: hidden.rename(path)
    explorer.lam.value = .6                     # the next move tries again
    explorer.wait()
    assert explorer.message.value == '' and i in explorer.model.neighbours

def test_what_cannot_be_loaded(explorer):
    for raw, text in (({'t_max': 5000}, 't_max = 5000; allowed: 10 … 1000'), ({'lam': 2}, 'lam = 2; allowed: 0 … 1'), ({'speed': 1}, "'speed' does not exist; allowed: eta, lam"), ({'severity': 'x'}, "severity = 'x'")):
        with pytest.raises(ConfigError, match=text): explorer.load(raw)
    with pytest.raises(ConfigError, match="image = 'none.png' is not among the 22 test images"): explorer.load({}, 'none.png')

def test_gallery(explorer):
    scores = [explorer.model.measured.scores[k] for k in explorer.gallery.rows]
    assert scores == sorted(scores, reverse=True)
    explorer.kind.value = 'good'
    assert {explorer.session.samples[k].label for k in explorer.gallery.rows} == {0}
    explorer.strip.selected = explorer.gallery.rows[1] # as a click in the browser does
    assert explorer.i == explorer.gallery.rows[1]
    explorer.kind.value = 'all'; explorer.order.value = 'wrong'
    wrong, items = explorer.model.wrong, explorer.strip.items
    assert [it[3] for it in items] == sorted((bool(v) for v in wrong), reverse=True) and [it[0] for it in items] == explorer.gallery.rows
    explorer.threshold.value, explorer.lam.value = 0., .6
    explorer.wait()
    assert {it[0] for it in explorer.strip.items if it[3]} == set(np.flatnonzero(explorer.model.wrong)) # no mark stays

def test_the_engineers_view(explorer):
    v, b = explorer.inspect.viewer, explorer.model.blend(explorer.model.map_cache)
    assert np.array_equal(np.frombuffer(v.values, '<f4').reshape(v.shape), b.anomaly) and v.threshold == pytest.approx(b.threshold)
    assert v.size == list(size(v.image)) and size(v.overlay) == (128, 128) and explorer.session.samples[explorer.i].name in v.alt
    assert (above := b.anomaly > b.threshold).any() and len(v.regions) > 0 and sum(r['area'] for r in v.regions) == pytest.approx(above.sum(), abs=3)
    assert v.regions[0]['peak'] == pytest.approx(float(b.anomaly.max())) and 'times the' in explorer.inspect.verdict.value
    before = v.overlay
    explorer.threshold.value = float(b.anomaly.max()) + 1
    assert v.regions == [] and v.overlay != before
    explorer.omega.value = .35 # nothing is known at it yet
    assert v.stale or explorer.model.map_cache is not None

def test_one_image_is_shown_before_the_others(session):
    x = Explorer(session, t_maxes=GRID, setting={'t_max': 80, 'eta': 5.}, prefetch=False) # at which nothing is stored
    seen = []
    x.inspect.viewer.observe(lambda change: seen.append(x.model.map_cache is None), 'values')
    x.wait(300)
    alone = x.model.first[x.setting.maps_key, x.i]
    whole = x.model.map_cache
    assert seen and True in seen and len(alone.t_hat) == 1
    torch.testing.assert_close(alone.pair([0], 4.)[0], whole.pair([x.i], 4.)[0], atol=1e-4, rtol=1e-3)
    x.close()

def test_a_cell_holds_no_slider(session, monkeypatch):
    x = Explorer(session, t_maxes=GRID, setting={'t_max': 160, 'eta': 3.}, prefetch=True)
    monkeypatch.setenv('JPY_SESSION_NAME', 'explore.ipynb')
    start = time.perf_counter()
    x.still()
    assert time.perf_counter() - start < 1
    monkeypatch.delenv('JPY_SESSION_NAME')
    assert not x.model.session.missing(x.shown(200).setting) and hasattr(x.still(), 'save')
    x.close()

def test_the_setting_as_text(explorer):
    explorer.load({'t_max': 80, 'lam': .3, 'threshold': .7}, 4)
    want, name = explorer.setting, explorer.session.samples[4].name
    text, shell, code = (explorer.copied(k) for k in ('JSON', 'papermill', 'Python'))
    explorer.load({'t_max': 160, 'lam': .9}, 2)
    explorer.load(text)                                   # as text, as a parameter, as Python
    assert (explorer.setting, explorer.i) == (want, 4)
    flag, raw = shlex.split(shell)
    parameters = json.loads(raw)                          # YAML of flow style
    assert flag == '-y' and parameters['run'] == str(explorer.session.run)
    cell = next(c for c in nbformat.read(APPS/'explore.ipynb', 4).cells if 'parameters' in c.metadata.get('tags', [])).source
    assert set(parameters) <= {t.id for node in ast.parse(cell).body for t in node.targets}
    x = Explorer(explorer.session, t_maxes=GRID, setting=parameters['setting'], prefetch=False)
    assert (x.setting, x.session.samples[x.i].name) == (want, name)
    x.close()
    space = {}
    exec(code, space)
    assert space['model'].config.fusion.lam == .3 and (space['explorer'].setting, space['explorer'].i) == (want, 4)
    space['explorer'].close()
    for bad in ('{', '3'):
        with pytest.raises(ConfigError, match='is not'): explorer.load(bad)
    explorer.copy_button.click()
    assert explorer.copy_text.layout.display is None and explorer.copy_text.value == explorer.copied('JSON') and explorer.copy_now.layout.display is None
    explorer.copy_format.value = 'Python'
    assert explorer.copy_text.value == explorer.copied('Python')

def test_what_is_known_before_anything_is_reconstructed(explorer):
    held = threading.Event()
    explorer.session.make, real = lambda s: iter(lambda: held.wait(20) and None, 0), explorer.session.make # does not end
    i = next(k for k in range(len(explorer.session)) if k != explorer.i)
    try:
        with explorer.quiet(): explorer.image.value, explorer.severity.value = i, 'static'
        explorer.eta.value = 11.5
        assert explorer.setting.maps_key not in explorer.session.map_caches
        name = explorer.session.samples[i].name
        assert name in explorer.facts.value and '= 160 (bin' in explorer.facts.value and 'score' not in explorer.facts.value and '⚠ overshoots' in explorer.overshoot.value
        for w in (explorer.facts, explorer.made_of, explorer.panels.main, explorer.metrics): assert 'dynad-stale' in w._dom_classes
        assert 'being reconstructed' in explorer.captions['mask'].value and explorer.surroundings.shown['histogram'] == i
    finally: explorer.session.make = real; held.set()
    explorer.model.jobs.begun.clear(); explorer.eta.value = 0.
    explorer.wait()
    assert 'score' in explorer.facts.value and not any('dynad-stale' in w._dom_classes for w in (explorer.facts, explorer.made_of, explorer.panels.main))

def test_the_decision_at_a_threshold_by_hand(explorer):
    explorer.image.value = next(k for k, y in enumerate(explorer.session.labels) if y)
    decided = explorer.facts.value
    explorer.threshold.value = explorer.threshold.max
    assert '0.0% of the pixels' in explorer.captions['mask'].value
    assert explorer.facts.value == decided  # the threshold for pixels decides about no image

def test_neighbours_are_the_images_learned_from(session, tmp_path):
    "Also where another data set is shown; and where those images are gone, that is said."
    board = write_synthetic(tmp_path/'other', 'weave', n_train=20, n_good=2, n_defect=2, size=128, seed=3)
    other = Session(session.run, board)
    assert [s.image for s in other.training_samples] == [s.image for s in session.training_samples] and len(session.training_samples) == len(session.model.training_set)
    root = Path(session.dataset.root)
    hidden = root.rename(root.with_name('hidden'))
    try:
        other = Session(session.run, board)
        with pytest.raises(DataError, match='their neighbours cannot be shown'): other.training_samples
        x = Explorer(other, t_maxes=GRID, prefetch=False).wait(300)
        assert 'their neighbours cannot be shown' in x.neighbours_text.value and x.message.value == '' and x.neighbours.layout.display == 'none'
        x.close()
    finally: hidden.rename(root)
    (session.run/STATE).unlink(missing_ok=True)

def test_a_failing_look_ahead_is_not_repeated(session):
    b, calls = copy.copy(session), []
    def missing(setting): calls.append(1); raise OSError('the store is gone')
    b.map_caches, b.missing = dict(b.map_caches), missing
    x = Explorer(b, t_maxes=(*GRID, 240), prefetch=False)
    time.sleep(1)
    assert len(calls) <= 4 and 'the store is gone' in x.message.value
    x.close()

def test_overshoot_is_marked(explorer):
    explorer.severity.value = 'static'
    explorer.wait()
    assert 'overshoots:' not in explorer.overshoot.value
    explorer.eta.value = 8.
    explorer.wait(300)
    m = explorer.session.model
    want = 8*(1 - float(m.parts.schedule.abar[explorer.t_max.value - 1]))
    assert f'= {want:.2f}' in explorer.overshoot.value and ('⚠' in explorer.overshoot.value) == (want > 1)
    share = min(1., 1/(want/8)/12)
    assert f'{explorer.css_id}-eta' in explorer.eta._dom_classes and f'.{explorer.css_id}-eta .noUi-connects' in explorer.overshoot.value and f'#0072B2 {share:.2%}' in explorer.overshoot.value

def test_overshoot_by_the_runs_own_switches(session):
    def said(**switches):
        b = copy.copy(session)
        b.model = copy.copy(session.model)
        b.model.config = make_config('smoke', {f'reconstruction.{k}': v for k, v in switches.items()} | {'data.image_size': 128})
        first = b.at(Setting(160, 'static', eta=12.)).first_pull(160)
        return pull_html(12., first, 160, switches.get('clamp_pull', False), 12., 'dx')
    abar = session.model.parts.schedule.abar
    assert f'= {12*(1 - float(abar[159])):.2f};' in said() and '⚠' in said()
    assert '⚠' not in said(clamp_pull=True) and '= 1.00; above' in said(clamp_pull=True) and 'held at 1' in said(clamp_pull=True)
    assert f'= {12*(1 - float(abar[144])):.2f};' in said(indices='authors') # its first call is one stride lower

def test_t_max_grid(): assert t_max_grid(640, 10, 1000) == [160, 320, 480, 640, 960] and t_max_grid(10, 10, 1000) == [10, 20, 30]

def at_256(session, held):
    "The same images, enlarged, with so many held-out ones."
    b = copy.copy(session)
    b.size, b.images = 256, F.interpolate(session.images.float(), 256).to(torch.uint8)
    b.masks = F.interpolate(session.masks.float(), 256) > .5
    b.quick_metrics = QuickMetrics(b.labels, b.masks, b.has_mask)
    b.reconstructions = lambda i, s, t_hats: {T: x.repeat(2, 0).repeat(2, 1) for T, x in session.reconstructions(i, s, t_hats).items()}
    grow = lambda parts: [F.interpolate(p[:, None], scale_factor=2)[:, 0].contiguous() for p in parts] # as an image of 256² has them
    g = torch.Generator().manual_seed(0)
    def more(parts):
        k, bright = torch.arange(held) % len(parts[0]), 1 + .1*torch.randn(held, 1, 1, generator=g)
        return [p[k]*bright for p in grow(parts)]
    settings = [Setting(t, s, .5) for t in GRID for s in ('dynamic', 'static')]
    b.map_caches = {s.maps_key: replace(session.maps(s), size=256, maps=grow(session.maps(s).maps), held_out=more(session.maps(s).held_out)) for s in settings}
    return b, settings[0]

@pytest.mark.parametrize('held', (80, 200))
def test_fifty_moves_at_256(session, capsys, held):
    "Times are printed; the bounds are for this thread's own time, as the machine does other work."
    b, first = at_256(session, held)
    x = Explorer(b, t_maxes=GRID, setting=first, prefetch=False).wait(300)
    rows, cpu = {}, {}
    moves = dict(lam=[round(.013*k, 3) for k in range(1, 51)], threshold=[.1 + .02*k for k in range(1, 51)], sigma=[.24*k for k in range(1, 51)], t_max=[GRID[k % 3] for k in range(1, 51)], severity=['static', 'dynamic']*25)
    for name, values in moves.items():
        spent, own, seen = [], [], x.images['mask' if name == 'threshold' else 'A_map']
        for v in values:
            before, start, begin = seen.value, time.perf_counter(), time.thread_time()
            getattr(x, name).value = v
            spent.append(time.perf_counter() - start); own.append(time.thread_time() - begin)
            assert seen.value != before and x.message.value == '', (name, v, x.message.value)
        rows[name], cpu[name] = sorted(spent), sorted(own)
        x.wait(300)
    assert {size(w.value) for w in x.images.values()} - {size(x.images['f_2'].value), size(x.images['f_3'].value)} == {(256, 256)}
    limit = x.session.map_caches[x.setting.maps_key].thresholds(x.lam.value, x.sigma.value)
    assert f'{limit[1]:.2f} learned' in x.facts.value and '≈' not in x.facts.value # after the rest it is exact
    x.close()
    with capsys.disabled(): print(f'\n256², {held} held out, milliseconds from a value to new bytes (median, worst of 50): ' + ', '.join(f'{k} {1000*v[25]:.0f} {1000*v[-1]:.0f} (of this thread {1000*cpu[k][25]:.0f} {1000*cpu[k][-1]:.0f})' for k, v in rows.items()))
    assert all(cpu[k][25] < most for k, most in (('lam', .05), ('threshold', .05), ('sigma', .05), ('t_max', .1), ('severity', .1)))
    assert all(v[25] < .5 for v in rows.values())

def test_thresholds_of_a_drag_and_of_rest(session):
    b, s = at_256(session, 80)
    cache = b.map_caches[s.maps_key]
    l, *f = cache.held_out
    A = smooth(.3*upsample(l[:, None], 256) + .7*sum(upsample(x[:, None], 256) for x in f), 2.)
    want = float(A.flatten().double().quantile(cache.quantile)), float(score(A).double().quantile(cache.quantile))
    rough = cache.estimate(.3, 2.)
    assert not rough[2] and cache.step > 1 and rough[:2] == pytest.approx(want, rel=.05)
    assert cache.thresholds(.3, 2., alive=lambda: False) is None and not cache.estimate(.3, 2.)[2]
    assert cache.thresholds(.3, 2.) == pytest.approx(want, rel=1e-4) and cache.estimate(.3, 2.) == (*cache.thresholds(.3, 2.), True)
    few = replace(cache, held_out=[x[:2] for x in cache.held_out])
    assert few.step == 1 and few.estimate(.3, 2.)[:2] == pytest.approx(few.thresholds(.3, 2.), rel=1e-6)
    for k in range(20): cache.estimate(.5, k/4)
    assert sum(x.numel() for pair in cache._coarse.values() for x in pair if x is not None) <= 2*250_000 # what a visited setting keeps

def test_the_quantile_is_the_detectors(): # beyond ten million values, where it takes one instead of a place between two
    a = np.random.default_rng(0).random(10_000_001).astype(np.float32)
    assert quantile(a.copy(), .995) == np.sort(a)[int(.995*a.size)]
    assert quantile(a[:999].copy(), .995) == pytest.approx(np.quantile(a[:999].astype(float), .995))

def test_600_images_at_128(session, capsys):
    s = Setting.of(session.model.config)
    k = torch.arange(600) % len(session)
    b = copy.copy(session)
    b.samples, b.quick_metrics = [session.samples[j] for j in k], QuickMetrics(session.labels[k], session.masks[k], session.has_mask[k])
    b.map_caches = {s.maps_key: replace(session.maps(s), t_hat=session.maps(s).t_hat[k], maps=[m[k] for m in session.maps(s).maps])}
    start = time.perf_counter()
    b.metrics(s)
    spent = time.perf_counter() - start
    with capsys.disabled(): print(f'\n600 images at 128²: figures in {spent:.2f} s')
    assert spent < 6

# sweep

def test_sweep(session):
    (session.run/'sweep.json').unlink(missing_ok=True)
    x = Explorer(session, t_maxes=GRID, prefetch=False)
    s = Sweep(x, t_maxes=GRID).fill().wait(300)
    assert len(s.table) == len(GRID)*len(s.model.lams) and s.message.value == ''
    row = s.table.iloc[4]
    assert row.pro == session.metrics(Setting(int(row.t_max), 'dynamic', row.lam))[0]['pro']
    cell = s.cells['pro', 320, .15] # below .9995, where the text is 1.00
    assert cell.description == f"{session.metrics(Setting(320, 'dynamic', .15))[0]['pro']:.3f}".lstrip('0') and not cell.disabled
    cell.click()
    assert (x.t_max.value, x.lam.value) == (320, .15) and 'T_max 320, λ 0.15' in s.picked.value
    assert all(k in s.best.value for k in ('own setting', 'best fixed', 'oracle', 'not results'))
    before = s.curves.value
    s.lam.value = 1.
    assert size(s.curves.value) and s.curves.value != before
    s.severity.value = 'static'
    s.fill().wait(300)
    t = s.table[s.table.severity == 'static']
    assert len(t) == len(GRID)*len(s.model.lams) and s.model.chosen.severity == 'dynamic' and s.start.disabled
    assert s.cells['pro', 320, .15].description == f"{session.metrics(Setting(320, 'static', .15))[0]['pro']:.3f}".lstrip('0')
    again = Sweep(session, t_maxes=GRID).wait(300)             # the same view after a restart
    assert (again.severity.value, again.lam.value, again.model.chosen, again.picked.value) == ('static', 1., s.model.chosen, '<b>chosen: T_max 320, λ 0.15, dynamic</b>')
    assert {k: w.description for k, w in again.cells.items()} == {k: w.description for k, w in s.cells.items()}
    again.close(); s.close()

def test_sweep_of_two_runs(session, monkeypatch):
    (session.run/'sweep.json').unlink(missing_ok=True)
    other, bands = copy.copy(session), []
    other.metrics = lambda setting: ({k: v - .1 for k, v in session.metrics(setting)[0].items()}, None) # another seed
    monkeypatch.setattr(Axes, 'fill_between', lambda self, x, low, high, **_: bands.append((list(x), low.tolist(), high.tolist(), self)))
    explorer = Explorer(session, t_maxes=GRID, prefetch=False)
    s = Sweep([session, other], t_maxes=(80, 160), lams=(.5,), explorer=explorer).fill().wait(300)
    assert s.table.run.nunique() == 2 and s.run.options[0][0] == 'mean of all runs' and 'all runs' in s.best.value
    one = {k: session.metrics(Setting(80, 'dynamic', .5))[0][k] for k in ('i_auroc', 'p_auroc', 'pro')}
    s.lam.value = .5
    x, low, high, ax = bands[-1]
    assert x == [80, 160] and low[0] == pytest.approx(one['pro'] - .1) and high[0] == pytest.approx(one['pro'])
    assert all(b[3].get_ylim()[1] <= 1 for b in bands)      # no figure is above 1
    assert float(s.cells['pro', 80, .5].tooltip.split()[1]) == pytest.approx(one['pro'] - .05, abs=1e-4)
    s.run.value = 1
    assert float(s.cells['pro', 80, .5].tooltip.split()[1]) == pytest.approx(one['pro'] - .1, abs=1e-4)
    s.cells['pro', 80, .5].click()
    assert s.model.chosen == Setting(80, 'dynamic', .5) and 'which shows run 1: run, seed 0' in s.picked.value
    s.close()
    with pytest.raises(ConfigError, match='no run was given'): Sweep([])

def test_a_sweep_after_an_error(session):
    (session.run/'sweep.json').unlink(missing_ok=True)
    b = copy.copy(session)
    s = Sweep(b, t_maxes=(80, 160), lams=(.5,)).wait(300)
    s.model.rows.clear()
    real, b.metrics = b.metrics, lambda setting: 1/0
    s.fill().wait(60)
    assert 'ZeroDivisionError' in s.message.value and not s.start.disabled and s.stop.disabled and s.progress.layout.visibility == 'hidden'
    b.metrics = real
    s.start.click(); s.wait(300)
    assert s.message.value == '' and len(s.table) == 2*len(s.model.lams)
    b.map_caches, b.make = {}, lambda setting: (1/0 for _ in range(3))   # a slice that cannot be made is tried again, not taken for done
    s.model.rows.clear()
    for _ in range(2):
        s.fill().wait(60)
        assert 'ZeroDivisionError' in s.message.value and not s.start.disabled and not s.model.rows
    s.fill = lambda: 1/0
    s.message.value = ''
    s.start.click()
    assert 'ZeroDivisionError' in s.message.value
    s.close()

def test_one_thread_paints_at_a_time(session):
    s = Sweep(session, t_maxes=(80, 160), lams=(.5,)).wait(300)
    for paint in (s.paint, s.draw_curves):
        done = threading.Event()
        with s.model.lock:
            threading.Thread(target=lambda: (paint(), done.set()), daemon=True).start()
            assert not done.wait(.2)
        assert done.wait(20)
    s.close()

def test_best_settings():
    import pandas as pd
    t = pd.DataFrame([dict(run=r, t_max=m, lam=.5, pro=v) for r, m, v in (('a', 80, .9), ('a', 160, .7), ('b', 80, .6), ('b', 160, .7))])
    assert best_settings(t, 'pro') == {'fixed': {'t_max': 80, 'lam': .5}, 'fixed_value': pytest.approx(.75), 'oracle': {'a': {'t_max': 80, 'lam': .5}, 'b': {'t_max': 160, 'lam': .5}}, 'oracle_value': pytest.approx(.8)}
    assert best_settings(t.iloc[:0], 'pro') == {}

# trajectory

def test_the_steps_end_where_the_detector_does(session):
    m, z0 = session.model, session.latents[3:4]
    w = reconstruct_steps(m, z0, 160, 0., 0., key=3)
    x = decode(m.parts, reconstruct_latents(m.parts, z0, torch.tensor([160]), [3]))
    assert w.t == [159, 143, 127, 111, 95, 79, 63, 47, 31, 15] and len(w.x0) == 11
    assert np.abs(w.z_t[-1].astype(float)/255 - x[0].permute(1, 2, 0).numpy()).max() < .01
    assert reconstruct_steps(m, z0, 80, 8., 0.).pulls[0] == pytest.approx(8*(1 - float(m.parts.schedule.abar[79])))
    with pytest.raises(ValueError, match='T̂ = 0: there is no step'): reconstruct_steps(m, z0, 0, 0., 0.)

def test_the_steps_are_the_runs_own(session):
    "Also with the public code's static sampler, and with a pull that is held at 1."
    for switches in ({'clamp_pull': True}, {'severity': 'static', 'static_sampler': 'authors'}, {'steps': 'stride', 'indices': 'authors'}):
        m = session.model.with_settings({f'reconstruction.{k}': v for k, v in switches.items()} | {'reconstruction.eta': 8.})
        z0 = session.latents[3:4]
        w, x = reconstruct_steps(m, z0, 160, 8., 0., key=3), decode(m.parts, reconstruct_latents(m.parts, z0, torch.tensor([160]), [3]))
        assert np.abs(w.z_t[-1].astype(float)/255 - x[0].permute(1, 2, 0).numpy()).max() < .01
        assert (max(w.pulls) == 1.) == ('clamp_pull' in switches)

def test_trajectory(session):
    t = Trajectory(session, image=session.samples[9].name, t_hat=160, eta=0., points=5).wait(120)
    assert t.step.label == '1' and 'call 1, t = 160' in t.captions['z_t', 0.].value # counted from 1 everywhere
    before = {k: w.value for k, w in t.images.items()}
    t.step.value = 4
    changed = {k for k, w in t.images.items() if w.value != before[k]}
    assert changed == {('z_t', 0.), ('x0', 0.), ('z_t', 1.), ('x0', 1.)} and 'call 5, t = 96' in t.captions['z_t', 0.].value and t.step.label == '5'
    assert t.out.label == '1' and 't = 1,' in t.captions['out', 0.].value
    t.out.value = t.model.ts[-1]
    assert t.images['out', 1.].value != before['out', 1.] and 't = 1000' in t.captions['out', 0.].value and t.out.label == '1000'
    t.eta.value = 8.
    t.wait(120)
    assert t.model.steps[0.].pulls[0] > 1 and t.message.value == '' and t.step.value == 4
    far = max(max(w.distance) for w in t.model.steps.values())
    assert f'fill="#0072B2">{far:.2g}</text>' in t.curve.value and 'mean |z₀ − ẑ₀|</text>' in t.curve.value # an axis of its own
    again = Trajectory(session, points=5).wait(120)          # the same view after a restart
    assert again.model.selected == t.model.selected and (again.step.value, again.out.value) == (4, t.model.ts[-1]) and again.curve.value == t.curve.value
    again.close(); t.close()
    with pytest.raises(ValueError, match="image = 'x' is not among"): Trajectory(session, image='x')

def test_trajectory_back_to_what_is_shown(session, monkeypatch):
    "The image is changed and changed back: nothing is left to compute, and nothing stays faded."
    t = Trajectory(session, image=session.samples[9].name, t_hat=80, eta=0., points=3).wait(120)
    try:
        stale = lambda: 'dynad-stale' in t.back_panels._dom_classes or 'dynad-stale' in t.out_panels._dom_classes
        shown = t.images['x0', 0.].value
        monkeypatch.setattr(t.worker, 'poke', lambda: None)           # the thread has not come to it yet
        t.eta.value = 3.
        assert stale() and not t.ready
        t.eta.value = 0.
        assert not stale() and t.ready and not t.model.work()
        t.eta.value = 3.
        monkeypatch.undo()
        done = t.model.changed
        def back(key): t.eta.value = 0.; done(key)                    # changed back while the steps are being shown
        t.model.changed = back
        t.model.work()
        assert t.model.ready == (9, 80, 3.) != t.model.selected and stale()
        t.model.changed = done
        t.worker.poke(); t.wait(120)
        assert not stale() and t.ready and t.images['x0', 0.].value == shown
    finally: t.close()

def test_t_hat_by_hand_stays(session):
    (session.run/'trajectory.json').unlink(missing_ok=True)
    t = Trajectory(session, image=session.samples[9].name, t_hat=170, points=3).wait(120)
    t.image.value = 3
    assert t.t_hat.value == 170 and not t.own.value
    t.own.value = True
    assert t.t_hat.value == int(session.staged.t_hat[3])
    t.image.value = 0
    assert t.t_hat.value == int(session.staged.t_hat[0]) and t.own.value
    t.t_hat.value = 200
    assert not t.own.value
    t.wait(120).close()
    again = Trajectory(session, points=3).wait(120)
    assert again.t_hat.value == 200 and not again.own.value
    again.close()

def test_steps_that_fail_leave_no_other_image(session, monkeypatch):
    t = Trajectory(session, image=session.samples[9].name, t_hat=80, points=3).wait(120)
    def broken(*_): raise RuntimeError('no steps')
    monkeypatch.setattr(trajectory, 'reconstruct_steps', broken)
    t.image.value = 3
    t.wait(60)
    before = {k: w.value for k, w in t.images.items()}
    t.step.value = 3
    assert 'no steps' in t.message.value and {k: w.value for k, w in t.images.items()} == before and 'dynad-stale' in t.back_panels._dom_classes
    monkeypatch.undo()
    t.eta.value = 1.
    t.wait(120)
    assert t.message.value == '' and t.images['z_t', 0.].value != before['z_t', 0.] and 'dynad-stale' not in t.back_panels._dom_classes
    t.close()
