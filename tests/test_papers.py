"The committed notebooks of nbs/papers: parameters, outputs without errors, stand-in data named (executed elsewhere)."
import ast, re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from bs4 import BeautifulSoup

from dynad.data import to_float
from dynad.experiments import EXPERIMENTS, METRICS, TARGETS, plain_name, printed
from dynad.method import method_named
from dynad.subjects import NULLS, area_groups
from dynad.systems import OF_ANOMALIB, QUICK, reason_of

PAPERS = Path(__file__).parent.parent/'nbs'/'papers'
RECORDED = [e.name for e in EXPERIMENTS if e.kind != 'figure']
COMMITTED = [e.name for e in EXPERIMENTS if e.committed]       # as run on real images; the others with their defaults
TABLES = [n for n in RECORDED if n not in COMMITTED]
TIMES = [e.name for e in EXPERIMENTS if e.kind == 'timings']   # seconds only: no interval over images, no null models
BOOKS = sorted(PAPERS.glob('*.ipynb'))
PARITY = PAPERS/'parity.ipynb'
COMMON = {'data': 'auto', 'preset': 'smoke', 'seeds': [0], 'n_boot': 1000, 'out': ''}
each = pytest.mark.parametrize('path', BOOKS, ids=lambda p: p.stem)
tables = pytest.mark.parametrize('path', [p for p in BOOKS if p.stem in TABLES], ids=lambda p: p.stem)
recorded = pytest.mark.parametrize('path', [p for p in BOOKS if p.stem in RECORDED], ids=lambda p: p.stem)
defaults = pytest.mark.parametrize('path', [p for p in BOOKS if p.stem not in COMMITTED], ids=lambda p: p.stem)

def read(path): return nbformat.read(path, as_version=4)

def code(nb): return [c for c in nb.cells if c.cell_type == 'code']

def parameters(nb):
    "name -> (default, annotation, comment) of the tagged cell."
    [cell] = [c for c in nb.cells if 'parameters' in c.metadata.get('tags', [])]
    out, lines = {}, cell.source.splitlines()
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.AnnAssign), f"only typed settings belong here: {ast.unparse(node)}"
        comment = lines[node.lineno - 1].partition('#')[2].strip()
        out[node.target.id] = ast.literal_eval(node.value), ast.unparse(node.annotation), comment
    return out

def texts(nb):
    "Every text that a reader sees in the outputs."
    for c in code(nb):
        for o in c.outputs:
            if o.output_type == 'stream': yield o.text
            yield from (v for k, v in o.get('data', {}).items() if k.startswith('text/'))

def test_all_tables_are_there():
    assert {p.stem for p in BOOKS} == set(TARGETS)
    assert (PAPERS/'.notest').exists()

@each
def test_common_parameters(path):
    found = parameters(read(path))
    expected = COMMON | ({'n_boot': 0} if path.stem in TIMES else {})
    kinds = {k: type(v).__name__ for k, v in COMMON.items()}
    assert {k: v[0] for k, v in found.items() if k in COMMON} == expected
    assert {k: v[1] for k, v in found.items() if k in COMMON} == kinds

@each
def test_plain_papermill_knows_every_parameter(path):
    from papermill import inspect_notebook
    # its pattern loses a parameter whose comment holds an equals sign
    assert set(inspect_notebook(str(path))) == set(parameters(read(path)))

@recorded
def test_own_parameters_are_commented_and_recorded(path):
    nb = read(path)
    source = '\n'.join(c.source for c in code(nb))
    kept = re.search(r"Record\('(\w+)', out,\s*dict\((.*?)\)\)", source, re.S)
    assert kept and kept[1] == path.stem
    names = set(re.findall(r'(\w+)=', kept[2]))
    assert names == set(parameters(nb)) - {'out'}

@each
def test_executed_without_errors(path):
    nb = read(path)
    shown = [c for c in code(nb) if c.source.strip() and isinstance(ast.parse(c.source).body[-1], ast.Expr)]
    assert [c.source for c in shown if not c.outputs] == [] and code(nb)[-1] in shown
    assert not [o for c in code(nb) for o in c.outputs if o.output_type == 'error']
    assert not [o.text for c in code(nb) for o in c.outputs if o.output_type == 'stream' and o.name == 'stderr']

@defaults
def test_stand_in_data_are_named(path):
    assert any('synthetic board (stand-in)' in t for t in texts(read(path)))

@tables
def test_no_printed_number_beside_stand_in_data(path):
    last = code(read(path))[-1]
    assert last.source.strip() in ('record.save(); record.comparison()', 'record.save(); long_comparison(record)')
    [html] = [o.data['text/html'] for o in last.outputs if 'text/html' in o.get('data', {})]
    page = BeautifulSoup(html, 'html.parser')
    heads = [h.text for h in page.thead.tr.find_all('th') if h.text]
    rows = [dict(zip(heads, (d.text for d in r.find_all('td')), strict=True)) for r in page.tbody.find_all('tr')]
    assert len(rows) > 5
    for r in rows:
        named = 'stand-in' in r['data'] and 'smoke' in r['data']
        assert named or path.stem in TIMES and r['data'] == '—' # neighbours among random vectors
        assert r['paper'] == r['difference'] == '—' and r['ours'] != '—'

# the other systems

BESIDE = [e.name for e in EXPERIMENTS if any(t in ('table1', 'table2', 'table3', 'table4', 'table8', 'table9') for t in e.tables)]
beside = pytest.mark.parametrize('path', [PAPERS/f'{n}.ipynb' for n in BESIDE], ids=BESIDE)

def short_table(path):
    "The lines of `side_by_side`: system -> (heading, metric) -> text."
    [html] = [o.data['text/html'] for c in code(read(path)) if 'side_by_side(record' in c.source for o in c.outputs if 'text/html' in o.get('data', {})]
    page = BeautifulSoup(html, 'html.parser')
    assert page.find('details') is None # it is not folded
    spans = [h for h in page.thead.find_all('tr')[0].find_all('th')[1:]]
    tops = [h.text for h in spans for _ in range(int(h.get('colspan', 1)))]
    heads = list(zip(tops, (h.text for h in page.thead.find_all('tr')[1].find_all('th')[1:]), strict=True))
    rows = {r.th.text: dict(zip(heads, (d.text for d in r.find_all('td')), strict=True)) for r in page.tbody.find_all('tr')}
    return page.p.text, rows

@beside
def test_every_system_that_runs_has_a_computed_column(path):
    "At the default `methods`, which are all that run without extras and are quick."
    methods, *_ = parameters(read(path))['methods']
    assert set(methods) == set(QUICK)
    _, rows = short_table(path)
    for m in ('Ours', *(method_named(m).title for m in QUICK), *(f'{n} (null model)' for n in NULLS)):
        computed = [v for (top, _), v in rows[m].items() if top == 'computed here']
        assert computed and any(v != '—' for v in computed), m

@beside
def test_every_printed_system_has_a_line(path):
    tables = TARGETS[path.stem].tables
    _, rows = short_table(path)
    for system in {c for t in tables for c in printed(t).column}:
        [line] = [r for name, r in rows.items() if plain_name(name) == plain_name(system)]
        why = next(v for (top, _), v in line.items() if top.startswith('computed on'))
        if all(v == '—' for (top, _), v in line.items() if top == 'computed here'): # a reason instead
            assert why == reason_of(system) and (system in OF_ANOMALIB.values() or 'it would take' in why)

@beside
def test_computed_figures_say_what_they_rest_on_and_leave_the_paper_its_columns(path):
    caption, rows = short_table(path)
    cut = [v for line in rows.values() for (top, _), v in line.items() if top.startswith('computed on') and 'steps' in v]
    assert len(cut) == (0 if path.stem == 'table9' else 2) # a shorter training is said in its line
    about = r'synthetic board \(stand-in\); smoke preset, a test of the machinery; seed 0'
    assert re.search(about, caption)
    numbers = {(plain_name(r.column), METRICS[r.metric]): r.value for t in TARGETS[path.stem].tables for r in printed(t).query("row == 'average'").itertuples()}
    for name, line in rows.items():
        for (top, metric), v in line.items():
            if top.startswith('printed') and v != '—': assert float(v) == pytest.approx(numbers[plain_name(name), metric])
            if top == 'computed here' and v != '—':
                assert re.search(about, next(v for (top, _), v in line.items() if top.startswith('computed on')))

@beside
def test_a_table_opens_with_what_was_found_and_folds_what_is_long(path):
    cells = code(read(path))
    place = lambda text: next(i for i, c in enumerate(cells) if text in c.source)
    words = place('said(record)' if path.stem == 'table9' else 'opening(record')
    assert words < place('side_by_side(record') < place('printed_table(record)') < place('long_comparison(record)')
    assert 'stand-in' in ''.join(cells[words].outputs[0].data['text/plain'])
    for text in ('printed_table(record)', 'long_comparison(record)'):
        [html] = [o.data['text/html'] for o in cells[place(text)].outputs]
        assert BeautifulSoup(html, 'html.parser').find('details').summary.text
    # the bar has ended and left one line
    bars = [o.data['text/plain'] for c in cells for o in c.outputs if '<progress' in o.get('data', {}).get('text/html', '')]
    assert bars and all((m := re.match(r'[a-z ]+: (\d+) of (\d+)', b)) and m[1] == m[2] for b in bars)

@beside
def test_the_other_systems_are_rows_of_the_record_too(path):
    [html] = [o.data['text/html'] for o in code(read(path))[-1].outputs]
    for m in QUICK: assert method_named(m).title in html

def test_figure_8_reconstructs_with_every_system_that_does():
    nb = read(PAPERS/'fig8.ipynb')
    [html] = [o.data['text/html'] for o in code(nb)[-1].outputs]
    rows = [[x.text for x in r.find_all(['th', 'td'])] for r in BeautifulSoup(html, 'html.parser').tbody.find_all('tr')]
    offered, *_ = parameters(nb)['methods']
    assert {m for m in (*QUICK, *OF_ANOMALIB) if method_named(m).reconstructs} == set(offered)
    for m in (m for m in offered if m in QUICK): assert sum(method_named(m).title in r for r in rows) == 3, m
    for m in (m for m in offered if m in OF_ANOMALIB): # rows where anomalib was installed, else the reason
        assert sum(method_named(m).title in r for r in rows) == 3 or re.search(rf'{re.escape(method_named(m).title)}: no column; not run: .*baselines', plain(PAPERS/'fig8.ipynb'))
    assert all(any('stand-in' in x and 'smoke' in x for x in r) for r in rows)
    assert any('synthetic board (stand-in)' in t and 'Change inside' in t for t in texts(nb))

def test_ran_concludes_its_finding_and_compares_one_network_with_several():
    nb, text = read(PAPERS/'ran.ipynb'), plain(PAPERS/'ran.ipynb')
    about = r'(holds|does not hold|not settled|not defined).*stand-in.*smoke preset, a test of the machinery'
    assert re.search(rf'noise which the denoising error takes for anomalies costs image AUROC .*I-AUROC\): {about}', text)
    for k in ('I-AUROC', 'P-AUROC', 'PRO'): assert re.search(rf'One network for 3 products above one for each, {k}: {about}', text)
    assert re.search(r'lies in the background: not counted on synthetic board.*fills the picture', text) and re.search(r'by area alone \d+ %; on synthetic weave .*synthetic gear', text)
    [html] = [o.data['text/html'] for o in code(nb)[-1].outputs]
    for row in ('feature error only − KL only', 'both − RGB error, noised to 249', 'both − RGB error, gradient denoising', 'one for all − one each', 'Skip-GANomaly (from scratch, small)'): assert row in html

@recorded
def test_null_rows(path):
    if path.stem in TIMES: return
    html = ''.join(t for t in texts(read(path)))
    assert all(n in html for n in NULLS)

@each
def test_a_baseline_stands_beside_the_null_models(path):
    "README says so of every notebook that measures a detector; that of a null model alone (Figures 1 and 5) is none."
    if path.stem in TIMES: return
    html = ''.join(o.data.get('text/html', '') for o in code(read(path))[-1].outputs)
    body, row, measured = BeautifulSoup(html, 'html.parser').tbody, '', []
    for r in body.find_all('tr') if body else []: # pandas leaves out what repeats from the line above
        cells = [x.text for x in r.find_all('th')]
        if len(cells) == 3: row = cells[0]
        if cells[-1] in ('I-AUROC', 'PRO') and '(null model)' not in row: measured.append(row)
    if measured or path.stem in RECORDED: assert 'PatchCore' in html and NULLS[0] in ''.join(texts(read(path)))

@each
def test_size_and_shape(path):
    nb = read(path)
    assert path.stat().st_size < 1_000_000
    head = nb.cells[0].source
    assert head.startswith('# ') and re.search(r'^> \S', head, re.M)
    assert not [c for c in code(nb) if 'ipywidgets' in c.source or '#| export' in c.source]
    assert any('image/png' in o.get('data', {}) for c in code(nb) for o in c.outputs)

@each
def test_no_table_is_cut(path):
    "pandas leaves out the middle of a long table, and says so in a line of its own."
    assert not [t for t in texts(read(path)) if re.search(r'\d+ rows [×x] \d+ columns', t)]

@each
def test_nothing_of_the_workplace(path):
    text = path.read_text(encoding='utf-8')
    assert str(PAPERS.parent.parent) not in text and str(Path.home()) not in text, 'an absolute path of this machine'

# parity

def html_rows(nb, head):
    "Rows of the first table with a column `head`: column -> text, line by line."
    for c in code(nb):
        for o in c.outputs:
            page = BeautifulSoup(o.get('data', {}).get('text/html', ''), 'html.parser')
            if not page.thead or head not in [h.text for h in page.thead.find_all('th')]: continue
            lines = [[x.text.strip() for x in r.find_all('th')] for r in page.thead.find_all('tr')]
            # pandas puts the index's name into a line of its own
            names = [next((n for n in column if n), '') for column in zip(*lines)]
            cells = [(x.text for x in r.find_all(['th', 'td'])) for r in page.tbody.find_all('tr')]
            return [dict(zip(names, row, strict=True)) for row in cells]
    raise AssertionError(f'{head}: no such table')

@each
def test_parameters_of_the_committed_run(path):
    given = [c for c in read(path).cells if 'injected-parameters' in c.metadata.get('tags', [])]
    found = [(k, ast.literal_eval(v)) for c in given for k, v in re.findall(r"^(\w+) = (.*)$", c.source, re.M)]
    assert found == list(TARGETS[path.stem].committed.items())

def test_parity_was_run_on_real_images():
    nb = read(PARITY)
    assert TARGETS['parity'].committed == dict(data='cookies', preset='small')
    assert any("['cookies (stand-in)']" in t for t in texts(nb)) and not any('synthetic' in t for t in texts(nb))

def test_parity_reproduces_the_fixtures():
    from safetensors import safe_open
    rows = html_rows(read(PARITY), 'with the switch')
    starts = ('sampler.dynamic', 'sampler.static', 'dic.t_hat', 'dic.b', 'adapt')
    with safe_open(Path(__file__).parent/'fixtures'/'authors.safetensors', 'pt') as f:
        outputs = {k for k in f.keys() if k.startswith(starts) or k.endswith('_map')}
    assert outputs <= {r['fixture'] for r in rows}
    for r in rows:
        if r['required'] == 'exact': assert r['with the switch'].startswith('0 of ')
        else: assert float(r['with the switch']) < float(r['required'])

def test_parity_covers_every_switch_of_the_authors():
    "Every key in which the preset `authors` departs from `paper` has a row, or is said to have none."
    from dynad.config import PRESETS
    nb = read(PARITY)
    rows = html_rows(nb, 'what else')
    markdown = '\n'.join(c.source for c in nb.cells if c.cell_type == 'markdown')
    for group, keys in PRESETS['authors'].items():
        for k in keys:
            has_row = any(re.search(rf'\b{k}\b', r['switch']) for r in rows)
            assert has_row or f'`{group}.{k}=' in markdown, f'{group}.{k}'
    singles = {m[1] for r in rows if (m := re.match(r'([a-z]+\.\w+)=', r['switch']))}
    assert {'reconstruction.steps', 'reconstruction.omega', 'reconstruction.clamp_pull', 'dic.pool', 'fusion.sigma',
            'adaptation.batch_norm', 'adaptation.gamma'} <= singles

def test_parity_differences_agree_with_their_sides():
    "Both sides and the difference are printed with one decimal; the interval holds the difference's sign or 0."
    rows = html_rows(read(PARITY), 'what else')
    cells = [v for r in rows for k, v in r.items() if k.endswith('dynad → other way') and v != '—']
    assert len(cells) > 3*20
    for v in cells:
        a, b, d, low, high = (float(x) for x in re.findall(r'[-+]?\d+\.\d', v))
        assert abs(b - a - d) < .151 and low <= high

# what a record rests on

def calls(nb, method):
    "The calls of record.<method>(…), also those chained behind another."
    for c in code(nb):
        for node in ast.walk(ast.parse(c.source)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)): continue
            if node.func.attr != method: continue
            root = node.func.value
            while isinstance(root, ast.Call): root = root.func.value
            if isinstance(root, ast.Name) and root.id == 'record': yield node

@each
def test_numbers_of_a_detector_carry_its_settings(path):
    """`enter` and `enter_difference` take them from the measurement; `record.add` has to be told. Figures 10 to 12 have
    no detector."""
    if path.stem in ('fig10', 'fig12'): return
    given = [(ast.unparse(c), {k.arg for k in c.keywords}) for c in calls(read(path), 'add')]
    assert [c for c, names in given if not {'model', None} & names and {'subject', 'seed'} & names] == []

def plain(path):
    outputs = [o['data'] for c in code(read(path)) for o in c.outputs if 'text/plain' in o.get('data', {})]
    return '\n'.join(''.join(d['text/plain']) for d in outputs)

def test_dic_by_the_authors_code_stands_beside_its_static_rows():
    "What DIC gains over their static rows is counted from DIC at their indices."
    path = PAPERS/'table5.ipynb'
    source = '\n'.join(c.source for c in code(read(path)))
    assert "theirs = measure(model.with_settings({'reconstruction.indices': 'authors'})" in source
    assert """("DIC − static, authors' sampler", theirs)""" in source
    assert re.search(r"^DIC +Ours +I-AUROC.*\n.*\n.*\n +Ours, authors' sampler +I-AUROC", plain(path), re.M)

def test_a_space_that_training_made_worse_is_named():
    [source] = [c.source for c in code(read(PAPERS/'spaces.ipynb')) if 'def weak' in c.source]
    space = {'METRICS': {'pro': 'PRO'}}
    exec(ast.unparse(next(n for n in ast.parse(source).body if getattr(n, 'name', '') == 'weak')), space)
    value = lambda v: {'pro': {'value': v}}
    assert space['weak']('latents, tiny', value(.87), value(.70), 'pro') == []
    text = 'the pixel denoiser is worse than random weights there (35.1 against 72.0)'
    assert space['weak']('pixels', value(.351), value(.72), 'pro') == [text]

def test_change_inside_a_defect_by_that_outside():
    [source] = [c.source for c in code(read(PAPERS/'spaces.ipynb')) if 'def changes' in c.source]
    space = {'torch': torch, 'to_float': to_float, 'area_groups': area_groups}
    exec(ast.unparse(next(n for n in ast.parse(source).body if getattr(n, 'name', '') == 'changes')), space)
    masks = torch.zeros(3, 1, 8, 8, dtype=torch.bool) # half of the image, all of it, a normal image
    masks[0, :, :4] = True; masks[1] = True
    rebuilt = torch.full((3, 3, 8, 8), .1); rebuilt[0, :, :4] = .4
    walk = SimpleNamespace(images=torch.zeros(3, 3, 8, 8, dtype=torch.uint8),
                           reconstructions=lambda t_hat, rows: rebuilt[rows])
    m = {'masks': masks, 'labels': torch.tensor([1, 1, 0]), 'has_mask': torch.ones(3, dtype=torch.bool),
         't_hat': torch.zeros(3, dtype=torch.long), 'walk': walk}
    ratio, large = space['changes'](m)
    assert ratio.tolist() == pytest.approx([4.]) and large.tolist() == [False]
    assert len(space['changes'](m | {'has_mask': torch.zeros(3, dtype=torch.bool)})[0]) == 0

@pytest.mark.parametrize('name', ['fig7', 'fig14'])
def test_figures_of_two_sets_open_both(name, monkeypatch, tmp_path):
    import dynad.subjects
    for folder in ('visa/candle', 'mvtec/tile'): (tmp_path/folder).mkdir(parents=True)
    monkeypatch.setenv('DYNAD_DATA', str(tmp_path))
    [line] = [l for c in code(read(PAPERS/f'{name}.ipynb')) for l in c.source.splitlines() if l.startswith('found = ')]
    for data, found in (('auto', ['visa/candle', 'mvtec/tile']), ('synthetic:board', ['synthetic_board'])):
        exec(line, space := vars(dynad.subjects) | {'data': data})
        assert [s.name for s in space['found']] == found

def test_nothing_but_t_hat_0_is_called_the_null_model_of_attribution():
    text = plain(PAPERS/'attribution.ipynb')
    assert set(re.findall(r'^(.*) \(null model\)', text, re.M)) == {'T̂ = 0'}
    assert 'only autoencoder, on the scale of its T̂' in text
