"Every notebook runs from top to bottom, each in a process of its own, as `nbdev_test` runs it: cells flagged as in settings.ini's `tst_flags` are skipped."
import multiprocessing, os, re, signal, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TIMEOUT = 600 # seconds per notebook

TRAINS = '08c_lesson.ipynb' # the model that the notebooks above it wait for

def in_order(path):
    "The one that trains first, beside those that need no training; then the number, then the letter; index comes last."
    m = re.match(r'(\d+)([a-z]*)_', path.name)
    return (path.name != TRAINS, path.parent.as_posix(), *((0, int(m[1]), m[2]) if m else (1, 0, path.name)))

def notebooks():
    "All notebooks but hidden ones, checkpoints, and those whose folder holds a `.notest`."
    found = [p for p in (ROOT/'nbs').rglob('*.ipynb')
             if not any(part.startswith(('.', '_')) for part in p.relative_to(ROOT).parts) and not (p.parent/'.notest').exists()]
    return sorted(found, key=in_order)

def run(command, timeout, **kwargs):
    "Output and exit code; on a timeout the whole process group is ended and the exit code is None."
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, start_new_session=True, **kwargs)
    try: return p.communicate(timeout=timeout)[0], p.returncode
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        return p.communicate()[0], None

def run_notebook(path, root=ROOT, timeout=TIMEOUT):
    env = os.environ | {'MPLBACKEND': 'agg', 'PYTHONIOENCODING': 'utf-8'}
    code = "import sys; from nbdev.test import nbdev_test; nbdev_test.__wrapped__(path=sys.argv[1], n_workers=0)"
    return run([sys.executable, '-c', code, str(path)], timeout, cwd=root, env=env)

# A process that has imported torch and the package already starts each notebook by a fork: half a second instead of five.

PRELOADED = ['torch', 'torchvision', 'timm', 'diffusers', 'accelerate', 'pandas', 'seaborn', 'matplotlib.pyplot', 'nbdev.test']

def in_child(path, root, out):
    "What a forked process does: the notebook, with all that is printed in a file."
    os.setsid()
    os.chdir(root)
    os.environ.update(MPLBACKEND='agg', PYTHONIOENCODING='utf-8')
    f = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2): os.dup2(f, fd)
    from nbdev.test import nbdev_test
    nbdev_test.__wrapped__(path=str(path), n_workers=0)

def run_forked(path, out, root=ROOT, timeout=TIMEOUT//2):
    "As `run_notebook`."
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(PRELOADED)
    p = server.Process(target=in_child, args=(path, root, out))
    p.start()
    p.join(timeout)
    if p.is_alive():
        os.killpg(p.pid, signal.SIGKILL)
        p.join()
    return out.read_text(encoding='utf-8', errors='replace') if out.exists() else '', p.exitcode

def good(out, code): return code == 0 and 'Success.' in out

def test_there_are_notebooks(): assert len(notebooks()) >= 15

@pytest.mark.parametrize('path', notebooks(), ids=lambda p: p.relative_to(ROOT/'nbs').with_suffix('').as_posix())
def test_notebook(path, tmp_path):
    "One that fails in a forked process is run again in a process that has imported nothing before."
    if 'forkserver' in multiprocessing.get_all_start_methods() and good(*run_forked(path, tmp_path/'out.txt')): return
    out, code = run_notebook(path)
    assert code is not None, f"{path.name} did not finish within {TIMEOUT} s\n{out[-4000:]}"
    assert good(out, code), f"{path.name} failed\n{out[-8000:]}"

# the runner itself: it must be able to fail

def scratch(tmp_path, *cells):
    import nbformat
    (tmp_path/'nbs').mkdir(exist_ok=True)
    (tmp_path/'settings.ini').write_text((ROOT/'settings.ini').read_text(encoding='utf-8'), encoding='utf-8')
    path = tmp_path/'nbs'/'00_scratch.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), path)
    return path

def test_a_failing_cell_is_reported(tmp_path):
    out, code = run_notebook(scratch(tmp_path, "x = 1", "assert x == 2, 'x is wrong'"), tmp_path)
    assert code != 0 and 'x is wrong' in out and '00_scratch.ipynb' in out

@pytest.mark.parametrize('flag', ['notest', 'slow', 'gpu'])
def test_flagged_cells_are_skipped(tmp_path, flag):
    out, code = run_notebook(scratch(tmp_path, "x = 1", f"#| {flag}\nassert False", "assert x == 1"), tmp_path)
    assert code == 0 and 'Success.' in out

def test_a_forked_notebook_that_fails_or_hangs_is_none_that_runs(tmp_path):
    good_one = scratch(tmp_path, "x = 1")
    assert good(*run_forked(good_one, tmp_path/'a.txt', tmp_path))
    out, code = run_forked(scratch(tmp_path, "assert 1 == 2, 'x is wrong'"), tmp_path/'b.txt', tmp_path)
    assert not good(out, code) and 'x is wrong' in out
    assert not good(*run_forked(scratch(tmp_path, "import time", "time.sleep(600)"), tmp_path/'c.txt', tmp_path, timeout=10))

def test_a_notebook_that_hangs_is_ended(tmp_path):
    _, code = run_notebook(scratch(tmp_path, "import time", "time.sleep(600)"), tmp_path, timeout=10)
    assert code is None
