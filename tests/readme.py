"""README.md from nbs/index.ipynb, through nbconvert: `python tests/readme.py`.

Cells that begin with `#| hide` are left out, `#| echo: false` shows the output alone; other directives are cut from the code.
Images go to nbs/images/index_*.png, named by `#| fig-alt:`. Links are made relative to the top of the project.
"""
import posixpath, re, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES = 'nbs/images'
DIRECTIVE = re.compile(r'^#\|\s*([\w-]+):?[ \t]*(.*)\n?', re.M)

def _visible(nb):
    "The notebook without what a reader should not see, and the text that describes each image."
    cells, alts = [], []
    for c in nb.cells:
        flags = dict(DIRECTIVE.findall(c.source)) if c.cell_type == 'code' else {}
        if 'hide' in flags: continue
        if c.cell_type == 'code':
            c.source = '' if flags.get('echo') == 'false' else DIRECTIVE.sub('', c.source)
            alts += [flags.get('fig-alt', '')]*sum('image/png' in o.get('data', {}) for o in c.outputs)
            for o in c.outputs:
                if 'image/png' in o.get('data', {}): o.data.pop('text/plain', None)
        cells.append(c)
    nb.cells = cells
    return nb, alts

def _from_top(target):
    "A link of nbs/index.ipynb, as seen from the top of the project."
    if re.match(r'[a-z]+:|#|/', target): return target
    return target if target.startswith('nbs/') else posixpath.normpath(f'nbs/{target}')

def make(root=ROOT):
    "(README.md, {path: bytes} of its images)."
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    nb, alts = _visible(nbformat.read(root/'nbs'/'index.ipynb', as_version=4))
    nb.metadata['language_info'] = {'name': 'python'} # nbdev_clean drops it
    exporter = MarkdownExporter(config=Config(ExtractOutputPreprocessor=dict(output_filename_template='index_{cell_index}_{index}{extension}')))
    text, resources = exporter.from_notebook_node(nb, {'output_files_dir': IMAGES})
    text = re.sub(r'^```(?:python)?\n\s*```\n', '', text, flags=re.M)                       # code that was cut away
    text = re.sub(r'<style scoped>.*?</style>\s*', '', text, flags=re.S)                # pandas' tables
    described = iter(alts)
    text = re.sub(r'!\[png\]\(', lambda m: f'![{next(described)}](', text)
    parts = re.split(r'(^```.*?^```$)', text, flags=re.S | re.M)                        # links, but not those in code
    parts[::2] = [re.sub(r'(\]\()([^)\s]+)(\))', lambda m: m[1] + _from_top(m[2]) + m[3], p) for p in parts[::2]]
    text = re.sub(r'\n{3,}', '\n\n', '\n'.join(l.rstrip() for l in ''.join(parts).split('\n'))).strip() + '\n'
    return '<!-- Made from nbs/index.ipynb by `python tests/readme.py`; edit the notebook. -->\n\n' + text, {k.replace('\\', '/'): v for k, v in resources['outputs'].items()}

def write(root=ROOT):
    "README.md and its images; images that it no longer shows are removed."
    text, images = make(root)
    (root/IMAGES).mkdir(parents=True, exist_ok=True)
    for old in (root/IMAGES).glob('index_*'):
        if old.relative_to(root).as_posix() not in images: old.unlink()
    for name, data in images.items(): (root/name).write_bytes(data)
    (root/'README.md').write_text(text, encoding='utf-8')
    return root/'README.md'

if __name__ == '__main__': sys.exit(0 if write() else 1)
