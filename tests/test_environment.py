"environment.yml against settings.ini, without conda: what it names is what the package asks for."
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parent.parent
CONDA_NAME = {'torch': 'pytorch'} # where conda-forge's name is another
ONLY_CONDA = {'python', 'pip', 'pytorch-gpu', 'faiss-gpu'}

@pytest.fixture(scope='module')
def cfg():
    c = ConfigParser(delimiters=['='])
    c.read(ROOT/'settings.ini', encoding='utf-8')
    return c['DEFAULT']

@pytest.fixture(scope='module')
def env(): return yaml.safe_load((ROOT/'environment.yml').read_text(encoding='utf-8'))

@pytest.fixture(scope='module')
def conda(env):
    "Conda's specs by name; conda's `python=3.11` means ==3.11.*."
    out = {}
    for d in env['dependencies']:
        if not isinstance(d, str): continue
        name = next((d[:i] for i, ch in enumerate(d) if ch in '=<>! '), d)
        spec = d[len(name):].strip()
        assert name not in out, f"environment.yml names {name} twice"
        out[name] = SpecifierSet(f"=={spec[1:]}.*" if spec.startswith('=') and not spec.startswith('==') else spec)
    return out

@pytest.fixture(scope='module')
def required(cfg): return {r.name: r.specifier for r in map(Requirement, cfg['requirements'].split())}

def lower(spec):
    return max((Version(s.version.removesuffix('.*')) for s in spec if s.operator in ('>=', '==', '~=')), default=None)

def uppers(spec): return {(s.operator, s.version) for s in spec if s.operator in ('<', '<=')}

def test_form(env):
    assert env['name'] == 'dynad' and env['channels'] == ['conda-forge']
    assert [d for d in env['dependencies'] if isinstance(d, dict)] == [{'pip': ['-e .']}], "the package itself comes by pip, and nothing beside it"

def test_python(conda, cfg):
    assert conda['python'].contains(cfg['min_python'])
    assert lower(conda['python']) >= Version(cfg['min_python'])

def test_every_requirement_is_provided(conda, required, env):
    "By conda with bounds inside those of settings.ini, or by `pip -e .`, which reads settings.ini."
    assert {'pip': ['-e .']} in env['dependencies'] and 'pip' in conda
    for name, spec in required.items():
        here = conda.get(CONDA_NAME.get(name, name))
        if here is None: continue
        assert lower(here) >= lower(spec), f"{name}: environment.yml allows {here}, settings.ini asks for {spec}"
        assert uppers(spec) <= uppers(here), f"{name}: environment.yml lacks the upper bound of {spec}"

def test_nothing_unknown(conda, required):
    known = {CONDA_NAME.get(n, n) for n in required} | ONLY_CONDA
    assert not set(conda) - known, f"environment.yml names {set(conda) - known}, which settings.ini does not ask for"

@pytest.mark.parametrize('name', ['pytorch', 'torchvision', 'faiss-gpu', 'jupyterlab'])
def test_workstation(conda, name): assert name in conda

def test_faiss_bound(conda, cfg):
    extra = Requirement(cfg['extra_faiss_gpu'])
    assert lower(conda['faiss-gpu']) >= lower(extra.specifier)

def test_it_says_that_it_is_untested(): assert 'NOT TESTED' in (ROOT/'environment.yml').read_text(encoding='utf-8')

def test_setup_reads_settings(cfg):
    "setup.py repeats no version and no requirement."
    text = (ROOT/'setup.py').read_text(encoding='utf-8')
    for word in (cfg['version'], 'torch', 'nbdev', 'faiss_cpu>='): assert word not in text
    from importlib.metadata import requires, version
    assert version('dynad') == cfg['version']
    got = {str(Requirement(r)) for r in requires('dynad') if 'extra ==' not in r}
    assert got == {str(Requirement(r)) for r in cfg['requirements'].split()}, "the installed package has other requirements; run pip install -e '.[dev]' again"
