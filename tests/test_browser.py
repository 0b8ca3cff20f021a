"The apps in a real JupyterLab and in Voila, looked at by a real browser: run all, drag by mouse and keyboard, click, upload. Test names contain `browser`."
import json, os, re
from pathlib import Path

import nbformat
import pytest

from browser import APPS, BYTES, FLAGS, WATCH, View, chromium, demo, server, with_parameters
from dynad import explorer, sweep, trajectory
from dynad.map_cache import Setting
from dynad.session import Session

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
if chromium() is None: pytest.skip('no chromium on this machine', allow_module_level=True)

WAIT = 240 # seconds, for a machine that does other work
STATES = (explorer.STATE, sweep.STATE, trajectory.STATE)
SHOTS = os.environ.get('DYNAD_SCREENSHOTS') # a folder to keep them in

@pytest.fixture(scope='module')
def chrome():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('lab')

@pytest.fixture(scope='module')
def lab(folder):
    with server('jupyterlab', folder) as url: yield url

@pytest.fixture
def view(chrome, folder, request):
    for state in demo().glob('*.json'): # no test begins where another left a view
        if state.name in STATES: state.unlink()
    page = chrome.new_page(viewport=dict(width=1280, height=1000))
    v = View(page)
    yield v
    shots = Path(SHOTS) if SHOTS else folder
    page.screenshot(path=shots/f'{request.node.name}_last.png')
    page.close()

def shot(view, name, folder):
    "The app's output at 1280 and at 1920 pixels."
    for width in (1920, 1280):
        view.page.set_viewport_size(dict(width=width, height=2200)) # high, so that nothing is scrolled away
        view.page.wait_for_timeout(400)
        view.page.locator('.dynad-x').first.screenshot(path=Path(SHOTS or folder)/f'{name}_{width}.png')
    view.page.set_viewport_size(dict(width=1280, height=1000))

def written(path):
    "Whether JupyterLab has written all of a notebook: it empties the file first, and a copy lies beside it until the end."
    if list(path.parent.glob('.~*')): return False
    try: return bool(json.loads(path.read_text()))
    except json.JSONDecodeError: return False

def drag(view, name, by):
    "The handle of a slider, by so many pixels, in steps."
    box = view.slider(name).bounding_box()
    x, y = box['x'] + box['width']/2, box['y'] + box['height']/2
    view.page.mouse.move(x, y); view.page.mouse.down()
    for k in range(1, 6): view.page.mouse.move(x + by*k/5, y)
    view.page.mouse.up()

def ready(view, timeout=WAIT):
    tab = view.page.locator('.lm-TabBar-tab', has_text='Maps and sliders').first # the engineer's view is in front
    tab.wait_for(timeout=timeout*1000); tab.click()
    view.page.wait_for_selector('.dynad-panel img', timeout=timeout*1000)
    view.until(lambda: 'A_map =' in view.page.locator('.dynad-x').first.inner_text() and not view.page.locator('.dynad-panel img.dynad-stale, .dynad-stale .dynad-panel').count(), timeout, 'the image')

def test_browser_explore(view, lab, folder, capsys):
    with_parameters('explore', folder, run=str(demo()), setting={'t_max': 160, 'lam': .5})
    view.page.context.grant_permissions(['clipboard-read', 'clipboard-write'])
    view.open_in_lab(lab, 'explore.ipynb', WAIT)
    ready(view)
    session = Session(demo())
    def t_hat(t_max): # of the image in view, by DIC
        name = view.page.locator('.dynad-big', has_text='test/').inner_text()
        return int(session.t_hat(Setting(int(t_max)))[[x.name for x in session.samples].index(name)])
    img = view.panel('A_map =').locator('img')
    view.until(lambda: 'being' not in view.page.locator('.dynad-x').first.inner_text() and 'reconstructing' not in view.page.locator('.dynad-x').first.inner_text(), WAIT, 'the T_max grid')
    shot(view, 'explore', folder)

    before = img.evaluate(BYTES)                            # by mouse
    drag(view, 'λ', -20)
    view.until(lambda: img.evaluate(BYTES) != before and f"A_map = {view.readout('λ')}·l" in view.panel('A_map =').inner_text().replace('\xa0', ' '), 30, 'A_map and its label follow λ')
    before, old = view.bytes('reconstruction'), view.readout('T_max')
    drag(view, 'T_max', 40)
    label = lambda: f"T̂ = {t_hat(view.readout('T_max'))}" in view.panel('reconstruction').inner_text()
    view.until(lambda: view.readout('T_max') != old and view.bytes('reconstruction') != before and label(), 60, 'the reconstruction and its label follow T_max')

    img.element_handle().evaluate(WATCH)                    # by keyboard
    view.slider('λ').focus()
    for k in range(50):
        n = view.page.evaluate('window.moves.length')
        view.page.keyboard.press('ArrowRight' if k % 20 < 10 else 'ArrowLeft')
        view.until(lambda: view.page.evaluate('window.moves.length') > n, 30, f'key {k}')
    moves = sorted(view.page.evaluate('window.moves'))
    assert f"A_map = {view.readout('λ')}·l" in view.panel('A_map =').inner_text()
    old = view.readout('T_max')
    view.slider('T_max').focus(); view.page.keyboard.press('ArrowLeft')
    view.until(lambda: view.readout('T_max') != old and label(), 30, 'T_max by key')

    view.page.get_by_role('button', name='copy this setting').click()
    view.page.get_by_role('button', name='to the clipboard').click()
    text = view.page.locator('.dynad-copy textarea').input_value()
    view.until(lambda: view.page.evaluate('navigator.clipboard.readText()') == text, 10, 'the clipboard')
    assert json.loads(text)['t_max'] == int(view.readout('T_max'))
    with capsys.disabled(): print(f'\nbrowser, milliseconds from a key to a new image, 128², λ: median {moves[len(moves)//2]:.0f}, worst {moves[-1]:.0f} of {len(moves)}')
    assert moves[len(moves)//2] < 300 # of a machine that does other work

    assert view.page.locator('.dynad-x input[type=checkbox]').first.is_checked() # the threshold is still the learned one
    name, before = view.page.locator('.dynad-big', has_text='test/'), view.bytes('input')
    old = name.inner_text()
    view.page.locator('.dynad-thumb').nth(5).click()        # another image
    view.until(lambda: name.inner_text() != old and view.bytes('input') != before, 60, 'another image')
    view.slider('η').focus()                                # the mark of the overshoot is on the way of the handle
    for key, share in (('Home', 0.), ('End', 1.)):
        view.page.keyboard.press(key)
        view.until(lambda: float(view.readout('η')) == 12*share, 30, f'η by {key}')
        track, handle = view.track('η').bounding_box(), view.slider('η').bounding_box()
        assert abs(handle['x'] + handle['width']/2 - track['x'] - share*track['width']) < 3
    view.until(lambda: 'overshoots:' in view.page.locator('.dynad-x').first.inner_text(), 30, 'the warning, before the computation is done')
    limit = float(re.search(r'above η = ([\d.]+) it overshoots', view.page.locator('.dynad-x').first.inner_text())[1])
    mark = re.search(r'rgb\(230, 159, 0\) ([\d.]+)%', view.track('η').evaluate('(e) => getComputedStyle(e).backgroundImage'))
    assert abs(float(mark[1]) - 100*min(1, limit/12)) < .5
    assert not view.page.locator('.dynad-error').count() and view.unexpected() == []

def test_browser_narrow_panel(view, lab, folder):
    "As in a side panel: nothing runs out of the image."
    with_parameters('trajectory', folder, run=str(demo()), t_hat=160, eta=8.)
    view.open_in_lab(lab, 'trajectory.ipynb', WAIT)
    view.page.wait_for_selector('.dynad-panel img', timeout=WAIT*1000)
    view.until(lambda: 't = 160' in view.page.locator('.dynad-x').first.inner_text(), WAIT, 'the walk')
    before = view.bytes('z_t decoded')
    view.slider('call').focus()
    for _ in range(3): view.page.keyboard.press('ArrowRight')
    view.until(lambda: view.bytes('z_t decoded') != before and view.readout('call') == '4' and 'call 4, t = 112' in view.page.locator('.dynad-x').first.inner_text(), 30, 'the step')
    shot(view, 'trajectory', folder)
    view.page.set_viewport_size(dict(width=760, height=900))
    view.page.wait_for_timeout(400)
    wide = view.page.locator('.dynad-x').first.evaluate('(e) => [e.scrollWidth, e.clientWidth]')
    assert wide[0] <= wide[1] + 8, wide
    assert not view.page.locator('.dynad-error').count() and view.unexpected() == []

def test_browser_sweep(view, lab, folder):
    with_parameters('sweep', folder, runs=[str(demo())], t_maxes=[80, 160], fill=True)
    view.open_in_lab(lab, 'sweep.ipynb', WAIT)
    cell = view.page.locator('button[title^="PRO"][title*="T_max 80, λ 0.15"]')
    cell.wait_for(timeout=WAIT*1000)
    ready(view)
    view.until(lambda: not view.page.locator('.dynad-x img.dynad-wait').count(), WAIT, 'the curves')
    shot(view, 'sweep', folder)
    before = view.bytes('A_map =')
    cell.click()
    view.until(lambda: view.readout('T_max') == '80' and 'A_map = 0.15·l' in view.panel('A_map =').inner_text() and view.bytes('A_map =') != before, 60, 'the cell is in the Explorer')
    assert not view.page.locator('.dynad-error').count() and view.unexpected() == []

def test_browser_upload(view, lab, folder, boards):
    with_parameters('your_images', folder, folder=str(folder/'mine'), preset='smoke')
    view.open_in_lab(lab, 'your_images.ipynb', WAIT)
    button = view.page.locator('.dynad-x .widget-upload').first
    button.wait_for(timeout=WAIT*1000)
    def drop(files):
        with view.page.expect_file_chooser() as chooser: button.click()
        chooser.value.set_files([str(f) for f in files])
    drop(s.image for s in boards.train[:6])
    view.until(lambda: '6 dropped so far' in view.page.locator('.dynad-x').first.inner_text(), WAIT, 'the upload')
    assert len(list((folder/'mine'/'good').iterdir())) == 6
    shot(view, 'your_images', folder)
    bad = folder/'notes.png'
    bad.write_bytes(b'not an image')
    drop([bad])
    view.until(lambda: 'notes.png: not an image that can be read' in view.page.locator('.dynad-x').first.inner_text(), WAIT, 'the error')
    assert view.unexpected() == []

def test_browser_open(view, tmp_path, monkeypatch):
    "The front door: a token, three tabs, the overlay without scrolling, keys, a clean console, and nothing left behind."
    pytest.importorskip('voila', reason='voila is not installed')
    from dynad.server import place_of, server as front_server
    monkeypatch.setenv('DYNAD_CACHE', str(tmp_path))
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    (tmp_path/'demo').symlink_to(demo().parent)
    page = view.page
    page.set_viewport_size(dict(width=1280, height=800))
    with front_server(place_of(None), tmp_path/'keep') as (url, process):
        assert '/login' in page.request.get(url.split('?')[0]).url and url.startswith('http://127.0.0.1:')
        page.goto(url, timeout=WAIT*1000)
        view.until(lambda: 'times the' in page.locator('.dynad-x').first.inner_text(), WAIT, 'the verdict')
        assert [t.inner_text() for t in page.locator('.lm-TabBar-tab').all()[:3]] == ['Your images', 'Explorer', 'Report']
        frame, top = page.locator('.dynad-frame').first, page.locator('.dynad-top').first
        view.until(lambda: top.evaluate('(i) => i.naturalWidth') == 128, WAIT, 'the overlay')
        for width, height in ((1920, 1080), (1280, 800)):
            page.set_viewport_size(dict(width=width, height=height))
            page.wait_for_timeout(300)
            box = frame.bounding_box()
            assert box['y'] + box['height'] <= height and box['height'] > .5*height
            page.screenshot(path=Path(SHOTS or tmp_path)/f'open_{width}.png')
        page.mouse.move(box['x'] + box['width']/2, box['y'] + box['height']/2)
        view.until(lambda: 'A_map ' in page.locator('.dynad-readout').first.inner_text(), 30, 'the value under the pointer')
        scale = lambda: page.locator('.dynad-stage').first.evaluate('(e) => e.style.transform')
        frame.focus()
        before = scale()
        page.keyboard.press('+'); view.until(lambda: scale() != before, 10, 'the zoom')
        page.keyboard.press('0'); view.until(lambda: scale() == before, 10, 'the whole image')
        page.keyboard.press('i')
        view.until(lambda: top.evaluate('(i) => i.style.visibility') == 'hidden', 10, 'the input alone')
        page.keyboard.press('w')
        view.until(lambda: top.evaluate('(i) => i.style.clipPath').startswith('inset'), 10, 'the wipe')
        name = frame.get_attribute('aria-label')
        page.locator('.dynad-strip-box').first.focus(); page.keyboard.press('ArrowDown')
        view.until(lambda: frame.get_attribute('aria-label') != name, 30, 'another image by key')
        page.locator('.dynad-symbol').last.hover()
        view.until(page.locator('.dynad-card').last.is_visible, 10, 'what the symbol means')
        assert 'blob/main/nbs/05_features.ipynb' in page.locator('.dynad-card a').last.get_attribute('href')
        page.locator('.lm-TabBar-tab', has_text='Your images').click()
        assert page.locator('button', has_text='fit').first.is_visible()
        assert view.unexpected() == []
    assert process.poll() is not None and not list(tmp_path.glob('dynad-open-*'))

LATER = """
import time
import ipywidgets as W
from dynad.view import PageSign, View

class Later(View):
    def __init__(self):
        super().__init__()
        self.slot, self.sign = W.VBox(), PageSign()
        self.assemble([self.slot, self.sign])
        self.thread(self.make).poke()

    def make(self):
        self.sign.wait()
        made, more = [], 40
        while more and len(made) < 3000: # for as long as the page connects, and a little longer
            made.append(W.VBox([W.HBox([W.HTML(f'made {len(made)};')])]))
            time.sleep(.01)
            more -= self.sign.shown
        self.slot.children = [*made, W.HTML(f'all {len(made)} of them')]
        return False

Later().ui
"""

def test_browser_widgets_that_a_thread_makes(view, tmp_path):
    "Voila connects the page after the notebook has run; nothing that a thread makes in between or afterwards stays empty."
    pytest.importorskip('voila', reason='voila is not installed')
    path = tmp_path/'later.ipynb'
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LATER)])
    nb.metadata.kernelspec = {'name': 'python3', 'display_name': 'Python 3 (ipykernel)', 'language': 'python'}
    nbformat.write(nb, path)
    with server('voila', tmp_path, path) as url:
        view.page.goto(url, timeout=WAIT*1000)
        text = lambda: view.page.inner_text('body')
        view.until(lambda: re.search(r'all \d+ of them', text()), WAIT, 'all widgets')
        n = int(re.search(r'all (\d+) of them', text())[1])
        view.until(lambda: text().count('made ') == n, 10, 'none is empty')
        assert view.unexpected() == []

def test_browser_from_an_empty_folder(view, tmp_path, boards, monkeypatch):
    "`dynad open EMPTY`, without a line of code: images are dropped, fitted, one of one's own is judged, said to be wrong, learned from."
    pytest.importorskip('voila', reason='voila is not installed')
    from dynad.server import place_of, server as front_server
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    (tmp_path/'mine').mkdir()
    page = view.page
    page.set_viewport_size(dict(width=1280, height=1000))
    text = lambda: page.locator('.dynad-x').first.inner_text()
    look = lambda name: page.screenshot(path=Path(SHOTS or tmp_path)/f'empty_{name}.png', full_page=True)
    def drop(which, files):
        with page.expect_file_chooser() as chooser: page.locator('.widget-upload', has_text=which).first.click()
        chooser.value.set_files([str(f) for f in files])
    press = lambda name: page.locator('.dynad-x button:enabled', has_text=re.compile(rf'^\s*{name}\s*$')).first.click()
    with front_server(place_of(tmp_path/'mine'), tmp_path/'keep') as (url, _):
        page.goto(url, timeout=WAIT*1000)
        view.until(lambda: page.locator('.widget-upload', has_text='drop normal images').is_visible(), WAIT, 'the page')
        look('1_page')
        drop('drop normal images', [s.image for s in boards.train[:16]])
        view.until(lambda: '16 dropped so far' in text(), WAIT, 'the upload')
        page.locator('.widget-dropdown', has_text='preset').locator('select').select_option('smoke (a test)')
        press('fit')
        view.until(lambda: 'fitted on ' in text() or page.locator('.dynad-error').count(), 3*WAIT, 'the fit')
        view.until(lambda: 'Nobody knows yet how much it finds' in text(), WAIT, 'the verdict on the run')
        look('2_fitted')
        bad = [s for s in boards.test if s.label][:3]
        drop('drop new images', [s.image for s in bad])
        view.until(lambda: 'of 3 classified as anomalous' in text() and page.locator('.dynad-sheet img').count() == 12, WAIT, 'the judgement')
        assert 'preset smoke: a test' in text()
        press('this is normal')
        view.until(lambda: 'This image is marked as normal' in text(), 60, 'the mark')
        press('learn from the marks')
        view.until(lambda: '1 marked image joined' in text(), WAIT, 'what it changes')
        view.until(lambda: re.search(r'recall on 56 synthetic defects in held-out normal images \d+% → \d+%', text()), WAIT, 'what it costs')
        look('3_judged')
        press('keep in the run')
        view.until(lambda: 'every view have learned it' in text(), 60, 'kept')
        assert not page.locator('.dynad-error').count() and view.unexpected() == []
    log = [json.loads(l) for l in (tmp_path/'mine'/'run'/'marks.jsonl').read_text().splitlines()]
    assert [m['what'] for m in log] == ['normal'] and json.loads((tmp_path/'mine'/'run'/'learned.json').read_text())['normals'] == [log[0]['pixels']]

def test_browser_lab_leaves_the_checkout_as_it_is(view, tmp_path, monkeypatch):
    "`dynad open --lab` in a checkout: the page and an app are used and saved in JupyterLab, and git sees no change."
    import subprocess
    from browser import ROOT
    from dynad.server import place_of, server as front_server
    for name, value in dict(DYNAD_CACHE=tmp_path, TMPDIR=tmp_path, JUPYTER_CONFIG_DIR=tmp_path/'config', JUPYTER_DATA_DIR=tmp_path/'data', JUPYTERLAB_WORKSPACES_DIR=tmp_path/'spaces', JUPYTERLAB_SETTINGS_DIR=tmp_path/'settings').items(): monkeypatch.setenv(name, str(value))
    (tmp_path/'demo').symlink_to(demo().parent)
    repo, page = tmp_path/'repo', view.page
    (repo/'nbs').mkdir(parents=True)
    for f in APPS.glob('*.ipynb'): (repo/'nbs'/f.name).write_bytes(f.read_bytes())
    (repo/'.gitignore').write_bytes((ROOT/'.gitignore').read_bytes())
    git = lambda *args: subprocess.run(['git', '-c', 'user.name=t', '-c', 'user.email=t@t', *args], cwd=repo, check=True, capture_output=True, text=True).stdout
    git('init', '-q'); git('add', '-A'); git('commit', '-qm', 'as it was')
    with front_server(place_of(None), repo/'dynad_open', lab=True) as (url, process):
        page.goto(url, timeout=WAIT*1000)
        page.wait_for_selector('#jp-main-statusbar :text("| Idle")', timeout=WAIT*1000)
        page.click('.lm-MenuBar-item:has-text("Run")'); page.click('.lm-Menu-item[data-command="runmenu:run-all"]')
        view.until(lambda: page.locator('.dynad-x').first.count() and 'times the' in page.locator('.dynad-x').first.inner_text(), WAIT, 'the verdict')
        page.screenshot(path=Path(SHOTS or tmp_path)/'lab.png')
        page.keyboard.press('Control+s')
        kept = repo/'dynad_open'/'dynad.ipynb'
        view.until(lambda: 'widget-view' in kept.read_text() and written(kept), 60, 'saved with its outputs')
    assert {p.name for p in (repo/'dynad_open').glob('*.ipynb')} == {'dynad.ipynb', *(p.name for p in APPS.glob('*.ipynb'))}
    assert git('status', '--porcelain') == '' and process.poll() is not None

def switch_extension(etc, monkeypatch, to):
    "Let the Jupyter server load the extension or not, whatever `pip install` has put into this environment."
    from browser import ROOT
    text = (ROOT/'dynad'/'templates'/'dynad.json').read_text()
    assert text.count('true') == 1
    (etc/'jupyter_server_config.d').mkdir(parents=True)
    (etc/'jupyter_server_config.d'/'dynad.json').write_text(text.replace('true', to))
    monkeypatch.setenv('JUPYTER_CONFIG_PATH', str(etc))

def test_browser_app_in_place_keeps_its_file(view, tmp_path, monkeypatch):
    "A tracked app is run in its checkout in JupyterLab, a slider is moved, the notebook saved: git sees no change, and only the text that is typed."
    import subprocess
    from browser import ROOT
    repo, page = tmp_path/'repo', view.page
    switch_extension(tmp_path/'etc', monkeypatch, 'true')
    (repo/'nbs'/'apps').mkdir(parents=True); (repo/'nbs'/'_runs').mkdir()
    for name in ('settings.ini', '.gitignore', *(f'nbs/apps/{p.name}' for p in APPS.glob('*.ipynb'))): (repo/name).write_bytes((ROOT/name).read_bytes())
    (repo/'nbs'/'_runs'/'demo').symlink_to(demo().parent)
    git = lambda *args: subprocess.run(['git', '-c', 'user.name=t', '-c', 'user.email=t@t', *args], cwd=repo, check=True, capture_output=True, text=True).stdout
    git('init', '-q'); git('add', '-A'); git('commit', '-qm', 'as it was')
    tracked = repo/'nbs'/'apps'/'explore.ipynb'
    def save():
        before = tracked.stat().st_mtime_ns
        page.keyboard.press('Control+s')
        view.until(lambda: tracked.stat().st_mtime_ns != before and written(tracked), 60, 'saved')
    with server('jupyterlab', tmp_path) as url:
        view.open_in_lab(url, 'repo/nbs/apps/explore.ipynb', WAIT)
        ready(view)
        assert 'dynad open --lab' not in ' '.join(page.locator('.jp-OutputArea').all_inner_texts())
        before = view.readout('λ')
        view.slider('λ').focus(); page.keyboard.press('ArrowRight')
        view.until(lambda: view.readout('λ') != before, 30, 'the slider')
        page.screenshot(path=Path(SHOTS or tmp_path)/'app_in_place.png')
        save()
        assert git('status', '--short') == ''
        page.locator('.jp-CodeCell .cm-content').first.click(); page.keyboard.press('Control+End'); page.keyboard.type('# mine')
        save()
        assert git('diff', '--numstat').split()[:2] == ['1', '1'] # one line of one cell
    assert view.unexpected() == []

def test_browser_app_in_place_says_so(view, tmp_path, monkeypatch):
    "Without the extension the app says in one line that the tracked file would change."
    from browser import ROOT
    switch_extension(tmp_path/'etc', monkeypatch, 'false')
    repo = tmp_path/'repo'
    (repo/'nbs'/'apps').mkdir(parents=True)
    for name in ('settings.ini', 'nbs/apps/explore.ipynb'): (repo/name).write_bytes((ROOT/name).read_bytes())
    with server('jupyterlab', tmp_path) as url:
        view.open_in_lab(url, 'repo/nbs/apps/explore.ipynb', WAIT)
        view.until(lambda: 'use dynad open --lab, which opens a copy' in ' '.join(view.page.locator('.jp-OutputArea').all_inner_texts()), WAIT, 'the line')

def test_browser_region_by_mouse(view, tmp_path, boards, monkeypatch):
    "What counts is drawn by a real mouse: outlines add up, are taken back, and the fit, its scores and its marks know nothing of the rest."
    pytest.importorskip('voila', reason='voila is not installed')
    from dynad.collector import DataError
    from dynad.method import open_run
    from dynad.regions import read_roi
    from dynad.server import place_of, server as front_server
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    page, mouse = view.page, view.page.context.new_cdp_session(view.page)
    text = lambda: page.locator('.dynad-x').first.inner_text()
    press = lambda name: page.locator('.dynad-x button:enabled', has_text=re.compile(rf'^\s*{name}\s*$')).first.click()
    def trace(*corners): # of shares of the canvas; as a hand draws, in small steps
        box = page.locator('.dynad-region canvas').bounding_box()
        at = lambda x, y: dict(x=box['x'] + x*box['width'], y=box['y'] + y*box['height'])
        send = lambda kind, x, y, **more: mouse.send('Input.dispatchMouseEvent', dict(type=kind, **at(x, y), **more))
        send('mouseMoved', *corners[0]); send('mousePressed', *corners[0], button='left', buttons=1, clickCount=1)
        for (a, b), (c, d) in zip(corners, corners[1:]):
            for k in range(1, 9): send('mouseMoved', a + (c - a)*k/8, b + (d - b)*k/8, button='left', buttons=1)
        send('mouseReleased', *corners[-1], button='left', buttons=0, clickCount=1)
    left, low = [(.02, .02), (.5, .02), (.5, .98), (.02, .98), (.02, .02)], [(.02, .5), (.02, .98), (.98, .98), (.98, .5), (.02, .5)] # one each way round
    bright = lambda x, y: page.locator('.dynad-region canvas').evaluate('(c, [x, y]) => [...c.getContext("2d").getImageData(x*c.width, y*c.height, 1, 1).data].slice(0, 3).reduce((a, b) => a + b)', [x, y])
    with front_server(place_of(Path(boards.root)/'train'/'good'), tmp_path/'keep') as (url, _):
        page.goto(url, timeout=WAIT*1000)
        view.until(lambda: page.locator('button', has_text='draw what counts').first.is_visible(), WAIT, 'the page')
        press('draw what counts')
        canvas = page.locator('.dynad-region canvas')
        view.until(lambda: canvas.is_visible() and canvas.bounding_box()['width'] >= 400, 60, 'an image large enough to draw on')
        canvas.scroll_into_view_if_needed()
        whole = {p: bright(*p) for p in ((.25, .75), (.25, .25), (.75, .25), (.75, .75))}
        trace(*left)
        roi = tmp_path/'keep'/'good'/'roi.png'
        def share(): # the page takes the file away between a look and a reading
            try: return read_roi(roi).share if roi.exists() else None
            except DataError:
                if roi.exists(): raise
        view.until(lambda: share() and abs(share() - .47) < .03 and re.search('4[5-9]% of the image counts', text()), 60, 'the region')
        assert bright(.25, .25) == whole[.25, .25] and bright(.75, .25) < whole[.75, .25]    # the rest is dimmed
        trace(*low)
        view.until(lambda: abs(share() - .71) < .03, 60, 'both')
        assert bright(.25, .75) == whole[.25, .75]                                            # what lies in both counts
        page.screenshot(path=Path(SHOTS or tmp_path)/'region.png')
        page.keyboard.press('Control+z'); view.until(lambda: abs(share() - .47) < .03, 60, 'the first alone')
        page.keyboard.press('Control+z'); view.until(lambda: share() is None and 'everything counts' in text(), 60, 'nothing drawn')
        trace(*left); view.until(lambda: share() and abs(share() - .47) < .03, 60, 'the region again')
        page.locator('.widget-dropdown', has_text='preset').locator('select').select_option('smoke (a test)')
        press('fit')
        view.until(lambda: re.search(r'fitted on .* 4[5-9]% of the image counts', text()) or page.locator('.dynad-error').count(), 3*WAIT, 'the fit')
        bad = next(s for s in boards.test if s.label)
        with page.expect_file_chooser() as chooser: page.locator('.widget-upload', has_text='drop new images').first.click()
        chooser.value.set_files([str(bad.image)])
        view.until(lambda: 'of 1 classified as anomalous' in text(), WAIT, 'the judgement')
        shown = float(re.search(r'score ([\d.]+) [>≤]', text())[1])
        assert not page.locator('.dynad-error').count() and view.unexpected() == []
    run = tmp_path/'keep'/'good'/'run'
    method = open_run(run, progress=False)
    p, inside = method.predict([bad.image]), method.inside
    n = inside.shape[-1]
    assert inside[n//4, n//4] and not inside[:, int(.55*n):].any() and not p.mask[..., ~inside].any()
    assert (p.map[..., ~inside] == p.map[..., inside].min()).all()                         # nothing of the rest is seen in map or score
    assert shown == pytest.approx(float(p.score), abs=.006) and float(p.score) == pytest.approx(float(method.score_of(p.map[..., inside])))

def test_browser_strip_of_two_thousand(view):
    "Only what is in view exists; a scroll through all of it never holds the page."
    from dynad.charts import template_text
    page = view.page
    page.set_content(f'<style>{template_text("canvas.css")}</style><div id=a style="width:220px"></div>')
    script = template_text('strip.js').replace('export default', 'window.strip =')
    page.add_script_tag(content=script, type='module')
    view.until(lambda: page.evaluate('!!window.strip'), 10, 'the script')
    page.evaluate("""() => { const state = {items: [...Array(2000).keys()].map((k) => [k, `${k}.png`, k/2000, k % 7 === 0]), selected: 0}, hear = {};
      window.asked = [];
      window.model = {get: (k) => state[k], set: (k, v) => { state[k] = v; (hear['change:' + k] || []).forEach((f) => f()); }, save_changes() {},
        on: (k, f) => (hear[k] = hear[k] || []).push(f), off() {}, send: (m) => window.asked.push(...m.want)};
      window.strip.render({model: window.model, el: document.getElementById('a')}); }""")
    drawn = page.locator('.dynad-thumb')
    view.until(lambda: drawn.count() > 5, 10, 'thumbnails')
    longest = page.evaluate("""async () => { const box = document.querySelector('.dynad-strip-box'); let last = performance.now(), worst = 0;
      for (let y = 0; y < box.scrollHeight; y += 900) { box.scrollTop = y; await new Promise(requestAnimationFrame); const now = performance.now(); worst = Math.max(worst, now - last); last = now; }
      return worst; }""")
    assert drawn.count() < 120 and len(page.evaluate('window.asked')) == len(set(page.evaluate('window.asked'))) > 300
    assert longest < 400 # milliseconds of one frame, on a machine that does other work
    page.locator('.dynad-strip-box').focus(); page.keyboard.press('End')
    assert page.evaluate("window.model.get('selected')") == 1999 and page.locator('[aria-selected=true]').get_attribute('aria-label') == '1999.png: score 1.00'
    assert view.unexpected() == []

@pytest.mark.parametrize('name', sorted(p.stem for p in APPS.glob('*.ipynb')))
def test_browser_voila(view, tmp_path, name):
    "For people without JupyterLab."
    pytest.importorskip('voila', reason='voila is not installed')
    run = str(demo())
    more = {'explore': dict(run=run, setting={'t_max': 160, 'lam': .5}), 'sweep': dict(runs=[run], t_maxes=[80, 160], fill=True), 'trajectory': dict(run=run, t_hat=160), 'your_images': dict(folder=str(tmp_path/'mine'))}[name]
    path = with_parameters(name, tmp_path, **more)
    text = lambda: view.page.locator('.dynad-x').first.inner_text()
    with server('voila', tmp_path, path) as url:
        view.page.goto(url, timeout=WAIT*1000)
        view.page.wait_for_selector('.dynad-x', timeout=WAIT*1000)
        if name in ('explore', 'sweep'):
            ready(view)
            before = view.bytes('A_map =')
            if name == 'explore': view.slider('λ').focus(); view.page.keyboard.press('ArrowRight')
            else: view.page.locator('button[title^="PRO"][title*="T_max 160, λ 0.30"]').click()
            want = 'A_map = 0.51·l' if name == 'explore' else 'A_map = 0.30·l'
            view.until(lambda: view.bytes('A_map =') != before and want in view.panel('A_map =').inner_text(), 60, want)
        elif name == 'trajectory':
            view.until(lambda: 't = 160' in text(), WAIT, 'the walk')
            before = view.bytes('z_t decoded')
            view.slider('call').focus(); view.page.keyboard.press('ArrowRight')
            view.until(lambda: view.bytes('z_t decoded') != before and 'call 2, t = 144' in text(), 60, 'the step')
        else:
            view.page.locator('.dynad-x button', has_text='fit').first.click()
            view.until(lambda: 'no such folder; name the folder that holds your normal images' in text(), WAIT, 'the answer to an empty form')
        shot(view, f'voila_{name}', tmp_path)
        assert view.unexpected() == []
