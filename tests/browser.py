"A JupyterLab of its own and a Chromium that looks at it, for the tests."
import json, os, shutil, signal, subprocess, sys, tempfile, time
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
APPS = ROOT/'nbs'/'apps'
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync']

def chromium():
    "The browser's path, or None."
    return next(filter(None, (shutil.which(n) for n in ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)

@lru_cache
def demo():
    "The demo run, made once per process."
    import atexit
    from dynad.demo import demo_run
    folder = tempfile.mkdtemp(prefix='dynad-demo-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return demo_run(folder)

def with_parameters(name, place, /, **parameters):
    "A copy of an app's notebook without outputs, with other values in its `parameters` cell. Fails for a name that the cell does not have."
    nb = nbformat.read(APPS/f'{name}.ipynb', 4)
    cell = next(c for c in nb.cells if 'parameters' in c.metadata.get('tags', []))
    for key in parameters: assert f'\n{key} = ' in '\n' + cell.source, f"{name}: no parameter {key}"
    cell.source += ''.join(f'\n{k} = {v!r}' for k, v in parameters.items())
    nb.metadata.kernelspec = {'name': 'python3', 'display_name': 'Python 3 (ipykernel)', 'language': 'python'}
    for c in nb.cells:
        if c.cell_type == 'code': c.outputs, c.execution_count = [], None
    path = Path(place)/f'{name}.ipynb'
    nbformat.write(nb, path)
    return path

@contextmanager
def server(module, folder, *arguments):
    "A Jupyter server (jupyterlab or voila) on a free port, isolated from the user's settings; yields its address with the token."
    folder = Path(folder)
    home = folder/'.jupyter'
    env = os.environ | {'JUPYTER_CONFIG_DIR': str(home/'config'), 'JUPYTER_DATA_DIR': str(home/'data'), 'JUPYTER_RUNTIME_DIR': str(home/'runtime'), 'JUPYTERLAB_SETTINGS_DIR': str(home/'settings'),
                        'JUPYTERLAB_WORKSPACES_DIR': str(home/'workspaces'), 'IPYTHONDIR': str(home/'ipython'), 'OMP_WAIT_POLICY': 'passive', 'TMPDIR': str(folder)}
    (folder/'dynad_runs').mkdir(exist_ok=True)
    (folder/'dynad_runs'/'demo').symlink_to(demo().parent) # where notebooks outside a checkout look for it
    def setting(extension, name, **values):
        path = home/'settings'/'@jupyterlab'/extension/f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    setting('apputils-extension', 'notification', fetchNews='false', checkForUpdates=False)
    setting('notebook-extension', 'tracker', windowingMode='none')
    port = free_port()
    command = [sys.executable, '-m', module, *map(str, arguments)]
    if module == 'jupyterlab': command += ['--no-browser', '--allow-root', f'--ServerApp.port={port}', '--ServerApp.port_retries=0', '--ServerApp.token=t', f'--ServerApp.root_dir={folder}', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    else: command += ['--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1']
    log = open(folder/f'{module}.log', 'w+')
    p = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        url = f'http://127.0.0.1:{port}'
        wait_for(url + ('/api?token=t' if module == 'jupyterlab' else '/voila/static/favicons/favicon.ico'), p, log)
        yield url
    finally:
        os.killpg(p.pid, signal.SIGTERM)
        try: p.wait(15)
        except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL); p.wait()
        log.close()

def free_port():
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def wait_for(url, process, log, seconds=90):
    from urllib.error import HTTPError
    from urllib.request import urlopen
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None: break
        try: urlopen(url, timeout=5).read(); return
        except HTTPError: return
        except OSError: time.sleep(.3)
    log.seek(0)
    raise RuntimeError(f"{url}: the server did not come up\n{log.read()[-3000:]}")

# from a key or a mouse move to new bytes in an <img>, measured in the page
WATCH = """(img) => { window.moves = []; window.begun = null;
  for (const kind of ['keydown', 'pointermove', 'mousemove']) document.addEventListener(kind, () => { if (window.begun === null) window.begun = performance.now(); }, true);
  new MutationObserver(() => { if (window.begun !== null) { window.moves.push(performance.now() - window.begun); window.begun = null; } }).observe(img, {attributes: true, attributeFilter: ['src']}); }"""
BYTES = "async (img) => { const b = new Uint8Array(await (await fetch(img.src)).arrayBuffer()); let h = 0; for (const v of b) h = (h*31 + v) >>> 0; return b.length + ':' + h; }"

class View:
    "A page with an app in it."
    def __init__(self, page):
        self.page, self.errors = page, []
        page.on('pageerror', lambda e: self.errors.append(f'pageerror: {e}'))
        page.on('console', lambda m: self.errors.append(f"{m.type}: {m.text} ({m.location.get('url', '')})") if m.type == 'error' else None)

    def open_in_lab(self, url, name, timeout):
        "Open a notebook alone in a fresh workspace, without kernels of earlier ones, and run all its cells."
        for k in self.page.request.get(f'{url}/api/kernels?token=t').json(): self.page.request.delete(f"{url}/api/kernels/{k['id']}?token=t")
        self.page.goto(f'{url}/lab/tree/{name}?token=t&reset', timeout=timeout*1000)
        self.page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=timeout*1000)
        self.page.wait_for_selector('#jp-main-statusbar :text("| Idle")', timeout=timeout*1000) # before, JupyterLab would ask for a kernel
        started = self.page.locator('.jp-InputPrompt:has-text("[*]"), .jp-InputPrompt:has-text("[1]")')
        self.page.click('.lm-MenuBar-item:has-text("Run")')
        self.page.click('.lm-Menu-item[data-command="runmenu:run-all"]')
        self.until(started.count, timeout, f'{name}: cells run')

    def track(self, name): return self.slider(name).locator('xpath=ancestor::*[contains(@class, "noUi-base")]').locator('.noUi-connects')
    def slider(self, name): return self.page.locator('.widget-slider', has=self.page.locator('label', has_text=name)).first.locator('.noUi-handle')
    def readout(self, name): return self.page.locator('.widget-slider', has=self.page.locator('label', has_text=name)).first.locator('.widget-readout').inner_text()
    def panel(self, text): return self.page.locator('.dynad-panel', has_text=text).first
    def bytes(self, text): return self.panel(text).locator('img').evaluate(BYTES)

    def until(self, test, timeout=60, what=''):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if test(): return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"{what or test}: not within {timeout} s; errors in the page: {self.errors[-3:]}")

    def unexpected(self):
        "Errors of the page that are not about files which a browser or JupyterLab asks for by itself."
        return [e for e in self.errors if not any(k in e for k in ('favicon', 'ERR_INTERNET_DISCONNECTED', 'ERR_NAME_NOT_RESOLVED'))]
