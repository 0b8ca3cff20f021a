"Notebooks, package and README belong together: nothing edited by hand, nothing forgotten, and imports only downwards."
import ast, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEVELOPMENT = {'nbdev', 'execnb', 'ghapi', 'fastgit', 'voila', 'playwright', 'pytest', 'hypothesis', 'sklearn'} # not requirements of the package
MODULES = sorted(p for p in (ROOT/'dynad').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part.startswith(('.', '_')) for part in p.relative_to(ROOT).parts))
name = lambda p: p.relative_to(ROOT).as_posix()

def read(path): return json.loads(path.read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])
def flags(cell): return {m[1] for m in re.finditer(r'^#\|\s*(\S+)', source(cell), re.M)}

def numbered():
    "module -> place in the order of the rooms, from the notebook's name: 06 < 06a < 06aa < 06b < 07."
    out = {}
    for p in NOTEBOOKS:
        m = re.match(r'(\d+)([a-z]*)_', p.name)
        exp = [e[1] for c in read(p)['cells'] if c['cell_type'] == 'code' for e in re.finditer(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M)]
        if m and exp: out[exp[0]] = (int(m[1]), m[2])
    return out

# in sync

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The tree, copied; what the tools do, they do there."
    root = tmp_path_factory.mktemp('copy')
    ignore = shutil.ignore_patterns('_runs', '__pycache__', '.ipynb_checkpoints', '*.safetensors')
    for folder in ('nbs', 'dynad'): shutil.copytree(ROOT/folder, root/folder, ignore=ignore)
    shutil.copy(ROOT/'settings.ini', root/'settings.ini')
    return root

def tool(module, command, cwd):
    code = f"from nbdev.{module} import {command}; {command}.__wrapped__()"
    done = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and 'Failed to clean' not in done.stderr, done.stderr[-4000:]

def tree(root, folder, pattern): return {p.relative_to(root).as_posix(): p.read_bytes() for p in (root/folder).rglob(pattern) if '_runs' not in p.parts and '.ipynb_checkpoints' not in p.parts}

def changed(a, b): return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))

def test_export_leaves_no_difference(copy):
    shutil.rmtree(copy/'dynad')
    (copy/'dynad').mkdir()
    (copy/'dynad'/'__init__.py').write_bytes((ROOT/'dynad'/'__init__.py').read_bytes())
    tool('doclinks', 'nbdev_export', copy)
    assert not (d := changed(tree(ROOT, 'dynad', '*.py'), tree(copy, 'dynad', '*.py'))), f"{', '.join(d)}: not what the notebooks export; run nbdev_export and commit both"

def test_clean_leaves_no_difference(copy):
    tool('clean', 'nbdev_clean', copy)
    assert not (d := changed(tree(ROOT, 'nbs', '*.ipynb'), tree(copy, 'nbs', '*.ipynb'))), f"{', '.join(d)}: not clean; run nbdev_clean and commit"

# the notebooks as committed

@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_heading(path):
    first = next(source(c) for c in read(path)['cells'] if c['cell_type'] == 'markdown')
    assert re.match(r'# \S.*\n+> \S', first), "the first text of a notebook is an H1 and a > subtitle"

@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_under_one_megabyte(path): assert path.stat().st_size < 1_000_000

@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_no_error_in_outputs(path):
    for c in read(path)['cells']:
        for o in c.get('outputs', []):
            assert o['output_type'] != 'error', f"{o.get('ename')} below:\n{source(c)}"
            assert 'Traceback (most recent call last)' not in ''.join(o.get('text', [])), f"a traceback below:\n{source(c)}"

SILENT = re.compile(r'^(test_\w+|assert\w*|setattr|display)$|^(set_\w+|seed|manual_seed|mkdir|write_text|write_bytes|unlink|append|extend|update|rmtree|filterwarnings|simplefilter|axis|legend|close)$')

def shows(cell):
    "Whether the cell's last line is an expression whose value a reader should see."
    text = '\n'.join(l for l in source(cell).split('\n') if not l.startswith(('%', '!')))
    try: body = ast.parse(text).body
    except SyntaxError: return False
    if not body or not isinstance(body[-1], ast.Expr) or text.rstrip().endswith(';'): return False
    v = body[-1].value
    if isinstance(v, ast.Constant): return False
    if isinstance(v, ast.Call):
        f = v.func
        return not SILENT.match(f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else '')
    return True

@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_executed(path):
    "Cells that show something carry their output."
    empty = [source(c) for c in read(path)['cells'] if c['cell_type'] == 'code' and shows(c) and not c['outputs'] and not flags(c) & {'notest', 'eval:', 'hide'}]
    assert not empty, f"{path.name} was not executed before it was committed; no output below:\n" + '\n---\n'.join(empty[:3])

# the package

@pytest.mark.parametrize('path', MODULES, ids=name)
def test_every_module_has_a_notebook(path): assert path.stem in numbered(), f"{name(path)} is exported by no numbered notebook; delete it or write its notebook"

def imports(path):
    "(module, level) of all imports in a file, nested ones as well."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): yield from ((a.name, 0) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module: yield node.module, node.level
            else: yield from ((a.name, node.level) for a in node.names)

@pytest.mark.parametrize('path', MODULES, ids=name)
def test_imports_only_lower_rooms(path):
    order = numbered()
    for module, level in imports(path):
        room = module.split('.')[0] if level else module.removeprefix('dynad.') if module.startswith('dynad.') else None
        if room in order: assert order[room] < order[path.stem], f"{name(path)} imports {room}, which is not a lower room"

@pytest.mark.parametrize('path', MODULES, ids=name)
def test_package_needs_no_development_tool(path):
    assert not {m.split('.')[0] for m, level in imports(path) if not level} & DEVELOPMENT

@pytest.mark.parametrize('path', MODULES, ids=name)
def test_public_names_are_explained(path):
    body = ast.parse(path.read_text(encoding='utf-8')).body
    public = next((ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'), [])
    assert public, "nothing is exported"
    bare = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public and not ast.get_docstring(n)]
    assert not bare, f"without a docstring: {', '.join(bare)}"

def test_version():
    from configparser import ConfigParser
    c = ConfigParser(delimiters=['='])
    c.read(ROOT/'settings.ini', encoding='utf-8')
    assert (ROOT/'dynad'/'__init__.py').read_text().strip() == f'__version__ = "{c["DEFAULT"]["version"]}"'
