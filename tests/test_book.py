"The book: exact words, no stand-in number beside a printed one, no network."
import html.parser, json, re
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from dynad.book import formula, headline, paper_prints, status, write_book
from dynad.cli import app
from dynad.runner import TARGETS, RunnerError
from dynad.show import curve

ROOT = Path(__file__).parent.parent
PNG = ('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=')

def line(row, metric, ours, data, paper=None, column='Ours', null=False):
    return dict(row=row, column=column, metric=metric, null=null, data=data, paper=paper, ours=ours, difference=None if paper is None else ours - paper, low=None, high=None, least=None, most=None, n=5, seeds=[0], oracle=None, gap=None)

def result(root, target, lines, stand_in=True, sets=(), preset='smoke', profile='smoke', name=None, notes=()):
    "What a finished run leaves behind."
    out = root/profile/(name or target)
    out.mkdir(parents=True)
    for suffix in ('png', 'pdf'): curve([1., 3., 2.]).savefig(out/f'{target}.{suffix}')
    cells = [nbformat.v4.new_markdown_cell('# One <b>target</b>\n\nWith $\\hat T = \\frac{b}{|B|}$, and\n\n$$x_t = \\sqrt{\\bar{\\alpha}_t} x_0$$\n\n| a | b |\n|---|---|\n| 1 | 2 |'),
             nbformat.v4.new_code_cell('1 < 2', execution_count=1, outputs=[nbformat.v4.new_output('execute_result', {'text/plain': 'True', 'text/html': '<table><tr><td>seen</td></tr></table>', 'application/javascript': 'alert(1)'}, execution_count=1),
                                       nbformat.v4.new_output('display_data', {'image/png': PNG})])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), out/f'{target}.ipynb')
    data = [dict(label=sets[0] if sets else 'synthetic board (stand-in)', real=None, whole=not stand_in, fingerprint='f', train=3, test=5)]
    (out/f'{target}.json').write_text(json.dumps(dict(target=target, stand_in=stand_in, sets=list(sets), parameters=dict(preset=preset), rows=[], comparison=lines, notes=list(notes), figures=[target], data=data, settings={}, versions={}, commit=None, hardware=dict(cpu='x', cores=2, gpu=None), minutes=.5, finished='')))
    run(out, target, profile, name)

def run(out, target, profile='smoke', name=None, **more):
    out.mkdir(parents=True, exist_ok=True)
    (out/'run.json').write_text(json.dumps(dict(name=name or target, status='done', minutes=.5, cell=None, error='', traceback='', key='k', target=target, title='A title', profile=profile, parameters={}, notebook=f'{target}.ipynb', data='d') | more))

class Table(html.parser.HTMLParser):
    "Text of every cell, by the row's id."
    def __init__(self, text):
        super().__init__(); self.rows, self.cells, self.links = {}, None, []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.links += [a[k] for k in ('href', 'src') if k in a]
        if tag == 'tr': self.cells = self.rows.setdefault(a.get('id'), [])
        if tag == 'td' and self.cells is not None: self.cells.append('')
    def handle_data(self, data):
        if self.cells: self.cells[-1] += f'{data.strip()} ' if data.strip() else ''

PICTURE, TARGET, PAPER, OURS, DIFFERENCE, STANDIN, STATUS = range(7)

def test_the_front_page_row_by_row(tmp_path):
    result(tmp_path, 'table1', [line('synthetic board (stand-in)', 'i_auroc', 85.6, 'synthetic board (stand-in)'), line('synthetic board (stand-in)', 'pro', 59.9, 'synthetic board (stand-in)')])
    result(tmp_path, 'table2', [line('class 01', 'pro', 81., 'BTAD 01', 80.), line('average', 'i_auroc', 95.0, 'BTAD', 95.2), line('average', 'pro', 84.2, 'BTAD', 83.2)], False, ['BTAD'], 'paper', 'paper')
    run(tmp_path/'paper'/'table5.failed', 'table5', 'paper', status='failed', cell=7, error='ValueError: <no>', traceback='the end')
    t = Table(write_book(tmp_path).read_text())
    rows = {k: [c.strip() for c in v] for k, v in t.rows.items() if k}
    assert len([k for k in rows if k.startswith('paper-')]) == len([k for k in rows if k.startswith('smoke-')]) == len(TARGETS)
    r = rows['smoke-table1']
    assert r[PAPER] == 'I-AUROC 96.0 PRO 94.1' and r[OURS] == r[DIFFERENCE] == '—' and r[STANDIN] == 'smoke preset I-AUROC 85.6 PRO 59.9' and r[STATUS] == 'stand-in data'
    r = rows['paper-table2']
    assert r[PAPER] == 'I-AUROC 95.2 PRO 83.2' and r[OURS] == 'I-AUROC 95.0 PRO 84.2' and r[DIFFERENCE] == '-0.2 +1.0' and r[STANDIN] == '—' and r[STATUS] == 'reproduced on BTAD'
    assert rows['paper-table5'][STATUS] == 'not run: failed in cell 7: ValueError: <no>' and rows['paper-table5'][OURS] == '—'
    assert all(r[STATUS].startswith('not run: ') and r[OURS] == r[DIFFERENCE] == r[STANDIN] == '—' for k, r in rows.items() if k not in ('smoke-table1', 'paper-table2'))

def test_every_page_opens_without_a_network(tmp_path):
    result(tmp_path, 'table1', [line('synthetic board (stand-in)', 'pro', 59.9, 'synthetic board (stand-in)')], notes=['DIC above static: not settled <'])
    run(tmp_path/'smoke'/'fig3.failed', 'fig3', status='failed', cell=2, error='e', traceback='the <end>')
    index = write_book(tmp_path)
    pages = sorted(index.parent.rglob('*.html'))
    assert [p.relative_to(index.parent).as_posix() for p in pages] == ['index.html', 'smoke/fig3.html', 'smoke/table1.html']
    for p in pages:
        text = p.read_text()
        assert '<script' not in text and 'javascript' not in text
        for link in Table(text).links:
            assert link.startswith(('data:', '#')) or (p.parent/link.split('#')[0]).exists(), link
    text = (index.parent/'smoke'/'table1.html').read_text()
    assert text.count('<math ') == 2 and 'seen' in text and 'alert(1)' not in text and '1 &lt; 2' in re.sub('<[^>]+>', '', text) and 'not settled &lt;' in text and PNG[:40] in text
    assert 'the &lt;end&gt;' in (index.parent/'smoke'/'fig3.html').read_text()
    assert {p.name for p in (index.parent/'smoke'/'table1').iterdir()} == {'table1.png', 'table1.pdf', 'table1.json', 'thumb.png'}
    before = index.stat().st_mtime_ns
    assert write_book(tmp_path) == index and index.stat().st_mtime_ns > before and not [p for p in tmp_path.iterdir() if p.name.startswith('.')]

def test_variants_and_own_notebooks_have_rows(tmp_path, monkeypatch):
    monkeypatch.delenv('DYNAD_DATA', raising=False) # with it, the profile small plans one row per real set
    result(tmp_path, 'table5', [line('DIC', 'pro', 70., 'cookies (stand-in)')], preset='small', profile='small', name='table5-cookies')
    result(tmp_path, 'mine', [line('a', 'pro', 70., 'cookies (stand-in)', column='x')], preset='small', profile='small')
    rows = {k: v for k, v in Table(write_book(tmp_path).read_text()).rows.items() if k}
    assert 'small-table5-cookies' in rows and 'small-table5' not in rows and list(rows)[-1] == 'small-mine' and len(rows) == len(TARGETS) + 1
    assert rows['small-mine'][STANDIN].strip() == 'a · x · small preset PRO 70.0' and not any(k.startswith('smoke') for k in rows)

def test_words_of_the_status():
    real = dict(stand_in=False, sets=['VisA candle'], parameters=dict(preset='small'))
    assert status(real, None, 'ignored') == 'reproduced on VisA candle, small preset' and status(dict(real, stand_in=True), None, None) == 'stand-in data'
    assert status(None, None, 'VisA is not here') == 'not run: VisA is not here' and status(None, None, None) == 'not run: not asked for yet'
    assert status(real, dict(cell=None, error='x'), None) == 'not run: failed: x'

def test_headlines():
    assert paper_prints('table6') == [dict(metric='i_auroc', value=96.0), dict(metric='pro', value=94.1), dict(metric='p_auroc', value=97.9)] and paper_prints('fig13') == []
    assert [p['metric'] for p in paper_prints('table9')] == ['fps', 'seconds']
    lines = [line('neither', 'pro', 1., 'd'), line('ds+da', 'pro', 2., 'd'), line('ds+da', 'pro', 3., 'e'), line('ds+da', 'pro', 9., 'd', null=True)]
    assert [l['ours'] for l in headline('table6', lines)] == [2.] and headline('table6', []) == []

def test_a_figure_shows_one_measure_of_several_rows(tmp_path):
    result(tmp_path, 'fig1', [line('test, good', 'mean T̂', 55., 'd', column='DIC'), line('test, defective', 'mean T̂', 100.3333, 'd', column='DIC'), line('other', 'bin', 3., 'd', column='DIC')])
    rows = Table(write_book(tmp_path).read_text()).rows
    assert rows['smoke-fig1'][STANDIN].strip() == 'mean T̂ · DIC · smoke preset test, good: 55.0 test, defective: 100.3'

def test_formulas():
    assert formula(r'\hat T').startswith('<math') and 'display="block"' in formula(r'\frac{a}{b}', True) and '<mfrac>' in formula(r'\frac{a}{b}')
    assert formula('a_') == '<code class="tex">a_</code>'

def test_every_formula_of_the_papers_is_drawn():
    "MathML leaves a command that it does not know as an identifier with a backslash."
    text = '\n'.join(''.join(c.source) for f in sorted((ROOT/'nbs'/'papers').glob('*.ipynb')) for c in nbformat.read(f, 4).cells if c.cell_type == 'markdown')
    found = [a or b for a, b in re.findall(r'\$\$(.+?)\$\$|\$([^$\n]+?)\$', text, re.S)]
    assert len(found) > 30
    for tex in found: assert (out := formula(tex)).startswith('<math') and '\\' not in out, tex

def test_nothing_there(tmp_path):
    with pytest.raises(RunnerError, match='absent: no such folder; make results first'): write_book(tmp_path/'absent')
    out = CliRunner().invoke(app, ['reproduce', 'book', '--out', str(tmp_path)])
    assert out.exit_code == 0 and (tmp_path/'book'/'index.html').exists()
    assert CliRunner().invoke(app, ['reproduce', 'book', 'table1']).exit_code == 2
