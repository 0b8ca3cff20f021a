"""Other systems, simulated on this one: modules that Windows lacks, macOS's units, consoles of 128 and 256 characters, files that are held open.

What is simulated is not tested there; the README says so."""
import ast
import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import dynad
from dynad import machine, paths
from dynad.cli import app
from dynad.paths import console_text, echo_json, move
from dynad.store import Store, WriteError, atomic_write

PACKAGE = Path(dynad.__file__).parent
SOURCES = {f.stem: ast.parse(f.read_text(encoding='utf-8')) for f in sorted(PACKAGE.glob('*.py'))}
UNIX = {'resource', 'fcntl', 'pwd', 'grp', 'termios', 'tty', 'pty', 'syslog', 'crypt', 'readline'} # modules that Windows lacks
CALLS = {'os.uname', 'os.fork', 'os.getuid', 'os.geteuid', 'os.symlink', 'os.link', 'os.mkfifo', 'os.killpg', 'os.setsid', 'os.nice', 'os.getpgid', 'os.chown', 'signal.SIGKILL', 'signal.SIGUSR1', 'signal.alarm', 'os.sched_getaffinity', 'os.getloadavg'}
GUARDED = {('machine', 'os.sched_getaffinity'), ('machine', 'os.getloadavg'), ('jobs', 'os.sched_getaffinity'),
           ('runtime', 'os.sched_getaffinity')} # behind hasattr

def nodes(kind): return [(name, n) for name, tree in SOURCES.items() for n in ast.walk(tree) if isinstance(n, kind)]

# ---- what the source uses

def test_no_module_of_unix_is_imported_where_it_is_not_needed():
    found = {(m, a.name) for m, n in nodes(ast.Import) for a in n.names if a.name.split('.')[0] in UNIX} | {(m, n.module) for m, n in nodes(ast.ImportFrom) if n.module in UNIX and n.level == 0}
    assert found == {('machine', 'resource')}                                             # inside a function, behind `except ImportError`
    top = {a.name for n in SOURCES['machine'].body if isinstance(n, ast.Import) for a in n.names}
    assert 'resource' not in top

def test_no_call_that_only_unix_has():
    used = {(m, ast.unparse(n)) for m, n in nodes(ast.Attribute)}
    assert {u for u in used if u[1] in CALLS} <= GUARDED
    assert not [(m, n.lineno) for m, n in nodes(ast.Attribute) if n.attr in ('symlink_to', 'hardlink_to', 'lchmod', 'owner', 'group')]

def test_every_text_file_is_utf8_whatever_the_system_thinks():
    "On Windows a text file without an encoding is cp1252."
    bad = []
    for m, n in nodes(ast.Call):
        name, given = ast.unparse(n.func), {k.arg for k in n.keywords}
        if name.endswith(('.read_text', '.write_text')) and 'encoding' not in given: bad.append((m, n.lineno, name))
        if name == 'open' and 'encoding' not in given:
            mode = next((k.value for k in n.keywords if k.arg == 'mode'), n.args[1] if len(n.args) > 1 else None)
            if not (mode is not None and 'b' in ast.unparse(mode)): bad.append((m, n.lineno, name))
    assert not bad

def test_files_are_replaced_by_the_function_that_waits():
    assert {m for m, n in nodes(ast.Attribute) if ast.unparse(n) == 'os.replace'} == {'paths'}
    assert not [(m, n.lineno) for m, n in nodes(ast.Call) if ast.unparse(n.func) in ('os.rename', 'shutil.move') or isinstance(n.func, ast.Attribute) and n.func.attr == 'rename' and not n.keywords and 'df' not in ast.unparse(n.func)]

# ---- memory

def test_windows_has_its_own_figure_of_memory(monkeypatch):
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3*2**20))
    monkeypatch.setitem(sys.modules, 'psutil', SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(machine.sys, 'platform', 'win32')
    assert machine.peak_memory_mb() == 3
    monkeypatch.setitem(sys.modules, 'psutil', None)                                       # as if it were not installed
    assert machine.peak_memory_mb() is None

def test_macos_counts_bytes(monkeypatch):
    import resource
    monkeypatch.setattr(resource, 'getrusage', lambda who: SimpleNamespace(ru_maxrss=3*2**20))
    monkeypatch.setattr(machine.sys, 'platform', 'darwin')
    assert machine.peak_memory_mb() == 3

# ---- a process without the modules of Unix, on a console of cp1252

WINDOWS = '''
import os, sys
for name in {unix!r}: sys.modules[name] = None                                              # import raises ImportError
for name in ('sched_getaffinity', 'getloadavg'):                                             # numpy itself asks os.uname on Linux
    if hasattr(os, name): delattr(os, name)
from dynad.cli import app
import dynad.evaluate, dynad.demo, dynad.speed, dynad.jobs, dynad.doctor, dynad.report, dynad.machine
dynad.machine.high_water_mark_mb = lambda: None                                               # there is no /proc
print('memory', dynad.machine.peak_memory_mb())
app(['doctor'])
'''

def test_all_commands_start_without_unix_on_a_console_of_windows(tmp_path):
    env = os.environ | {'PYTHONIOENCODING': 'cp1252', 'PYTHONUTF8': '0', 'PYTHONPATH': str(PACKAGE.parent), 'DYNAD_WEIGHTS': str(tmp_path/'Ω'), 'DYNAD_DATA': str(tmp_path/'φ')}
    out = subprocess.run([sys.executable, '-c', WINDOWS.format(unix=['resource', 'crypt', 'pty', 'syslog'])], env=env, capture_output=True, timeout=600)
    assert out.returncode == 0, out.stderr.decode(errors='replace')[-2000:]
    assert b'-> ' in out.stdout and b'Traceback' not in out.stderr and b'memory None' in out.stdout and b'\\u03a9 (no such folder)' in out.stdout
    assert '→ ' in CliRunner().invoke(app, ['doctor']).output                               # where the console has it

def test_help_and_errors_on_a_console_that_is_ascii(tmp_path):
    env = os.environ | {'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0', 'PYTHONPATH': str(PACKAGE.parent)}
    code = f"""
import sys
from dynad.cli import app
for words in (['--help'], ['fit', '--help'], ['reproduce', '--help'], ['fit', '--data', {str(tmp_path/'grün')!r}, '--out', 'x', '--preset', 'smoke']):
    try: app(words)
    except SystemExit as e: print('status', e.code)
"""
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, timeout=300)
    assert out.returncode == 0 and out.stdout.count(b'status 0') == 3 and b'status 2' in out.stdout, out.stderr
    assert b'gr\\xfcn: no such folder' in out.stderr and b'Traceback' not in out.stderr

def test_json_on_a_narrow_console_can_be_read_back(monkeypatch):
    import io
    for encoding in ('ascii', 'cp1252', 'utf-8'):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, encoding=encoding))
        echo_json({'T̂': 'ü → 🙂', 'path': '\udcfc'}); sys.stdout.flush()
        assert json.loads(raw.getvalue().decode(encoding)) == {'T̂': 'ü → 🙂', 'path': '\udcfc'}

def test_every_character_has_some_form_on_every_console():
    for encoding in ('ascii', 'cp1252', 'cp437', 'latin-1', 'utf-8', None):
        text = console_text('T̂ η λ → ≈ ² … — 🙂 \udcfc \ud800 ü', encoding)
        text.encode(encoding or 'utf-8')

# ---- files that are held open

def held(monkeypatch, times):
    "os.replace refuses so often, as on Windows while a virus scanner reads."
    real, left = os.replace, [times]
    def replace(a, b):
        if left[0]: left[0] -= 1; raise PermissionError(13, 'The process cannot access the file because it is being used by another process', str(a))
        return real(a, b)
    monkeypatch.setattr(os, 'replace', replace); monkeypatch.setattr(paths.time, 'sleep', lambda s: None)

def test_a_file_that_is_held_open_for_a_moment_is_replaced(monkeypatch, tmp_path):
    atomic_write(tmp_path/'a', 'old')
    held(monkeypatch, 2)
    assert atomic_write(tmp_path/'a', 'new').read_text() == 'new'
    held(monkeypatch, 2)
    folder = Store(tmp_path/'run').stage('s', {'a': 1}, lambda work: None)                  # a folder, too
    assert (folder/'stage.json').exists()

def test_a_file_that_stays_open_is_named_and_the_old_one_kept(monkeypatch, tmp_path):
    atomic_write(tmp_path/'a', 'old')
    held(monkeypatch, 99)
    with pytest.raises(WriteError, match='a: cannot be written .*being used by another process'): atomic_write(tmp_path/'a', 'new')
    assert (tmp_path/'a').read_text() == 'old' and [*tmp_path.iterdir()] == [tmp_path/'a']
    with pytest.raises(PermissionError): move(tmp_path/'a', tmp_path/'b')

def test_paths_in_a_run_are_those_of_every_system(smoke):
    stages = json.loads((smoke[1]/'run.json').read_text(encoding='utf-8'))['stages']
    assert all('\\' not in p and not Path(p).is_absolute() for p in stages.values())
