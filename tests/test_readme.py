"README.md is what nbs/index.ipynb says, and what it says exists."
import importlib.util, re, shlex, shutil, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location('readme', Path(__file__).with_name('readme.py'))
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)

@pytest.fixture(scope='module')
def text(): return (ROOT/'README.md').read_text(encoding='utf-8')

@pytest.fixture(scope='module')
def commands(text):
    "Every command of the page's shell blocks, as words."
    lines = [l for b in re.findall(r'^```bash\n(.*?)^```', text, re.S | re.M) for l in b.splitlines() if l.strip()]
    return [shlex.split(part, comments=True) for l in lines for part in l.split('&&')]

def test_in_sync(text):
    made, images = readme.make()
    assert made == text, "README.md is not what nbs/index.ipynb gives; run python tests/readme.py"
    assert {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in (ROOT/'nbs'/'images').glob('index_*')} == images, "nbs/images is old; run python tests/readme.py"

def test_the_two_commands(text):
    assert "pip install -e . && dynad demo" in text and "pip install -e '.[dev]' && pytest" in text

def test_links_and_images_exist(text):
    targets = [t for t in re.findall(r'\]\(([^)\s]+)\)', text) if not re.match(r'[a-z]+:|#', t)]
    assert targets and not [t for t in targets if not (ROOT/t).exists()]

def test_images_are_described(text): assert '![](' not in text and '![png]' not in text

def test_every_room_is_listed(text):
    rooms = {p.relative_to(ROOT).as_posix() for p in (ROOT/'nbs').glob('[0-9]*.ipynb')}
    assert rooms == set(re.findall(r'\]\((nbs/[^/)]+\.ipynb)\)', text))

def test_nothing_is_left_of_the_notebook(text):
    "No directive, no empty code block, no style sheet."
    assert not re.search(r'^#\|', text, re.M) and '<style' not in text and not re.search(r'^```\w*\n\s*^```$', text, re.M)

def test_programs_exist(commands):
    here = Path(sys.executable).parent
    for words in commands:
        if words[:1] == ['python']: assert (ROOT/words[1]).is_file(), ' '.join(words)
        else: assert (here/words[0]).exists() or shutil.which(words[0]), f"{words[0]} is named in the README and not installed"

def test_dynad_commands_and_options_exist(commands, text):
    from typer.main import get_command
    from dynad.cli import app
    have = get_command(app).commands
    used = [w for w in commands if w[0] == 'dynad'] + [shlex.split(c) for c in re.findall(r'`(dynad [a-z][^`]*)`', text)]
    assert {'demo', 'fit', 'evaluate', 'predict', 'doctor'} <= {w[1] for w in used}
    for words in used:
        assert words[1] in have, f"dynad {words[1]} does not exist"
        options = {o for p in have[words[1]].params for o in p.opts}
        assert not [w for w in words[2:] if w.startswith('--') and w not in options], ' '.join(words)

def test_named_presets_and_variables_exist(text):
    from dynad.config import PRESETS
    assert all(f'`{p}`' in text for p in PRESETS)
    source = ''.join(p.read_text(encoding='utf-8') for p in (ROOT/'dynad').glob('*.py'))
    assert all(v in source for v in set(re.findall(r'DYNAD_[A-Z]+', text)))

# the generator

def scratch(tmp_path, *cells):
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
    (tmp_path/'nbs').mkdir(exist_ok=True)
    made = []
    for kind, source, png in cells:
        out = [new_output('display_data', {'image/png': 'iVBORw0KGgo=', 'text/plain': '<Figure>'})] if png else []
        made.append(new_markdown_cell(source) if kind == 'm' else new_code_cell(source, outputs=out))
    nbformat.write(new_notebook(cells=made), tmp_path/'nbs'/'index.ipynb')
    return tmp_path

def test_hidden_cells_and_directives(tmp_path):
    root = scratch(tmp_path, ('m', '# T\n\n> s', 0), ('c', '#| hide\nsecret = 1', 1), ('c', '#| echo: false\n#| fig-alt: a gear\nquiet()', 1), ('c', '#| slow\nloud()', 0))
    text, images = readme.make(root)
    assert 'secret' not in text and 'quiet' not in text and 'loud()' in text and '#|' not in text and '<Figure>' not in text
    assert len(images) == 1 and f"![a gear]({next(iter(images))})" in text and next(iter(images)).startswith('nbs/images/index_')

def test_links(tmp_path):
    root = scratch(tmp_path, ('m', '[a](00_config.ipynb) [b](../LICENSE) [c](#x) [d](https://example.org/a)\n\n```bash\necho [e](f)\n```', 0))
    text = readme.make(root)[0]
    for link in ('(nbs/00_config.ipynb)', '(LICENSE)', '(#x)', '(https://example.org/a)', '[e](f)'): assert link in text

def test_old_images_are_removed(tmp_path):
    root = scratch(tmp_path, ('m', '# T\n\n> s', 0))
    (root/'nbs'/'images').mkdir()
    (root/'nbs'/'images'/'index_9_0.png').write_bytes(b'')
    (root/'nbs'/'images'/'other.png').write_bytes(b'')
    readme.write(root)
    assert [p.name for p in (root/'nbs'/'images').iterdir()] == ['other.png']
