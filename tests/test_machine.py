"The description of the machine: every system, and None for what a system does not tell."
import builtins, subprocess, sys

import pytest, torch

from dynad import machine as module
from dynad.machine import cpu_load, cpu_name, machine, peak_memory_mb


def test_fields():
    m = machine()
    assert list(m) == ['cpu', 'cores', 'threads', 'gpu', 'load', 'torch', 'peak_memory_mb']
    assert m['cores'] >= 1 and m['threads'] == torch.get_num_threads() and m['torch'] == torch.__version__


@pytest.mark.skipif(sys.platform not in ('linux', 'darwin'), reason='no module resource')
def test_the_unit_of_memory_is_that_of_the_system(monkeypatch):
    import resource
    class Usage: ru_maxrss = 3*2**20
    monkeypatch.setattr(resource, 'getrusage', lambda who: Usage)
    monkeypatch.setattr(module, 'high_water_mark_mb', lambda: None) # a kernel that does not tell
    monkeypatch.setattr(module.sys, 'platform', 'linux')
    assert peak_memory_mb() == 3*2**10
    monkeypatch.setattr(module.sys, 'platform', 'darwin')
    assert peak_memory_mb() == 3


@pytest.mark.skipif(sys.platform != 'linux', reason='read as Linux gives it')
def test_the_memory_of_the_process_that_started_this_one_does_not_count():
    held = bytearray(600*2**20)
    held[::4096] = b'x'*len(held[::4096])
    child = subprocess.run([sys.executable, '-c', 'from dynad.machine import peak_memory_mb; print(peak_memory_mb())'], capture_output=True, text=True, check=True)
    assert float(child.stdout) < 600 < peak_memory_mb()


def test_windows_tells_less(monkeypatch):
    real = builtins.__import__
    def no_resource(name, *a, **k):
        if name == 'resource': raise ImportError(name)
        return real(name, *a, **k)
    monkeypatch.setattr(builtins, '__import__', no_resource)
    for name in ('getloadavg', 'sched_getaffinity'): monkeypatch.delattr(module.os, name, raising=False)
    monkeypatch.setattr(module.Path, 'read_text', lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr(module.platform, 'processor', lambda: 'Intel64 Family 6')
    assert peak_memory_mb() is None and cpu_load() is None and cpu_name() == 'Intel64 Family 6' and machine()['cores'] >= 1
