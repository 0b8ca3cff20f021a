"The book: exact words, no stand-in number beside a printed one, no network."
import html.parser, json, re
from pathlib import Path

import nbformat
import pytest
from browser import FLAGS, chromium
from typer.testing import CliRunner

from dynad import runner
from dynad.book import formula, headline, paper_prints, status, write_book
from dynad.cli import app
from dynad.runner import TARGETS, RunnerError, plan
from dynad.experiments import SETS
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
    real = next((k for k, v in SETS.items() if sets and sets[0].startswith(v.label)), None)
    data = [dict(name='d', label=sets[0] if sets else 'synthetic board (stand-in)', real=real, whole=not stand_in, fingerprint='f', train=3, test=5)]
    (out/f'{target}.json').write_text(json.dumps(dict(target=target, stand_in=stand_in, sets=list(sets), parameters=dict(preset=preset), rows=[], comparison=lines, notes=list(notes), figures=[target], data=data, settings={}, versions={}, commit=None, hardware=dict(cpu='x', cores=2, gpu=None), minutes=.5, finished='')))
    run(out, target, profile, name)

def run(out, target, profile='smoke', name=None, **more):
    "run.json as this version would write it now."
    out.mkdir(parents=True, exist_ok=True)
    made = {k: v for k, v in runner.job_parts(plan([target], profile, root=out.parent)[0]).items() if k != 'parameters'} if target in TARGETS else None
    parameters = runner.PROFILES[profile].parameters
    (out/'run.json').write_text(json.dumps(dict(name=name or target, status='done', minutes=.5, cell=None, error='', traceback='', key='k', target=target, title='A title', profile=profile, parameters=parameters, notebook=f'{target}.ipynb', data='d', made=made) | more))

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

IMAGE, TARGET, PAPER, OURS, DIFFERENCE, STANDIN, STATUS = range(7)

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

def test_only_the_papers_settings_on_its_data_are_a_reproduction(tmp_path):
    result(tmp_path, 'table2', [line('average', 'i_auroc', 95.0, 'BTAD', 95.2), line('average', 'pro', 84.2, 'BTAD', 83.2)], False, ['BTAD'])
    result(tmp_path, 'fig8', [line('BTAD 01', 'psnr', 20., 'BTAD 01', column='dynad')], False, ['BTAD 01'])
    result(tmp_path, 'scale', [line('small', 'pro', 70., 'BTAD 01', column='DIC'), line('large', 'pro', 80., 'BTAD 01', column='DIC')], False, ['BTAD 01'], 'paper')
    rows = {k: [c.strip() for c in v] for k, v in Table(write_book(tmp_path).read_text()).rows.items() if k}
    assert rows['smoke-table2'][OURS:] == ['average · smoke preset I-AUROC 95.0 PRO 84.2', '—', '—', "run on BTAD, smoke preset : not the paper's settings"]
    assert rows['smoke-fig8'][STATUS] == 'stand-in data' and rows['smoke-fig8'][OURS] == '—' and '20' in rows['smoke-fig8'][STANDIN]    # the paper shows MVTec AD
    assert rows['smoke-scale'][STATUS] == 'run on BTAD 01, paper preset : not in the paper' and rows['smoke-scale'][OURS] == 'small · DIC PRO 70.0' and rows['smoke-scale'][STANDIN] == '—'

def test_what_has_been_outrun_says_so(tmp_path):
    result(tmp_path, 'table1', [line('synthetic board (stand-in)', 'pro', 59.9, 'synthetic board (stand-in)')])
    result(tmp_path, 'table5', [line('DIC', 'pro', 59.9, 'synthetic board (stand-in)')])
    run(tmp_path/'smoke'/'fig3.failed', 'fig3', status='failed', cell=2, error='e')
    def read():
        index = write_book(tmp_path)
        return {k: v[STATUS].strip() for k, v in Table(index.read_text()).rows.items() if k} | {None: (index.parent/'smoke'/'table5.html').read_text()}
    now = read()
    assert now['smoke-table5'] == 'stand-in data' and 'older version' not in now[None]
    for out in ('table5', 'fig3.failed'):
        note = json.loads((f := tmp_path/'smoke'/out/'run.json').read_text())
        note['made']['notebook'] = 'edited since'
        f.write_text(json.dumps(note))
    now = read()
    assert now['smoke-table5'] == 'stand-in data from an older version of the notebook' and now['smoke-table1'] == 'stand-in data' and '(from an older version of the notebook)' in now[None]
    assert now['smoke-fig3'] == 'not run: failed in cell 2: e from an older version of the notebook' and '2 of them from an older version' in (tmp_path/'book'/'index.html').read_text()

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

@pytest.mark.parametrize('target, real, sets, preset, said', [
    ('table1', 'visa', 'VisA candle', 'paper', 'reproduced on VisA candle'), ('table3', 'mvtec', 'MVTec AD', 'authors', 'reproduced on MVTec AD'), ('fig12', 'visa', 'VisA capsules', 'paper', 'reproduced on VisA capsules'), ('fig2', 'btad', 'BTAD', 'paper', 'reproduced on BTAD'),
    ('table1', 'visa', 'VisA candle', 'small', "run on VisA candle, small preset: not the paper's settings"), ('fig14', 'mvtec', 'MVTec AD hazelnut', 'smoke', "run on MVTec AD hazelnut, smoke preset: not the paper's settings"),
    ('fig8', 'btad', 'BTAD', 'smoke', 'stand-in data'), ('fig12', 'btad', 'BTAD', 'paper', 'stand-in data'), ('fig13', 'mvtec', 'MVTec AD', 'paper', 'stand-in data'),
    ('scale', 'btad', 'BTAD', 'smoke', 'run on BTAD, smoke preset: not in the paper'), ('parity', 'visa', 'VisA', 'paper', 'run on VisA, paper preset: not in the paper'), ('mine', 'visa', 'VisA', None, 'run on VisA: not in the paper')])
def test_words_of_the_status(target, real, sets, preset, said):
    r = dict(target=target, stand_in=False, sets=[sets], data=[dict(real=real)], parameters=dict(preset=preset))
    assert status(r, None, 'ignored') == said and status(dict(r, stand_in=True), None, None) == 'stand-in data'
    assert status(r, dict(cell=None, error='x'), None) == 'not run: failed: x' and status(None, None, 'VisA is not here') == 'not run: VisA is not here' and status(None, None, None) == 'not run: not asked for yet'

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

def test_browser_book(tmp_path):
    "The front page and a target's page in a real browser, from the file system."
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if chromium() is None: pytest.skip('no chromium on this machine')
    result(tmp_path, 'table1', [line('synthetic board (stand-in)', 'pro', 59.9, 'synthetic board (stand-in)')], notes=['DIC above static'])
    result(tmp_path, 'fig13', [line('ω = 0', 'pro', 59.9, 'synthetic board (stand-in)')])
    index, wrong = write_book(tmp_path), []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport=dict(width=1280, height=900), java_script_enabled=True)
        page.on('pageerror', lambda e: wrong.append(f'pageerror: {e}'))
        page.on('console', lambda m: wrong.append(f'{m.type}: {m.text}') if m.type in ('error', 'warning') else None)
        page.on('requestfailed', lambda r: wrong.append(f'failed: {r.url[:80]}'))
        page.on('request', lambda r: None if r.url.startswith(('file://', 'data:')) else wrong.append(f'network: {r.url}'))
        drawn = lambda: page.locator('img').evaluate_all('all => all.map(i => i.complete && i.naturalWidth)')
        page.goto(index.as_uri())
        assert drawn() == [288, 288] and page.locator('tr[id^="smoke-"]').count() == len(TARGETS)
        assert page.locator('#smoke-table1 .state').inner_text() == 'stand-in data' and page.locator('#smoke-fig3 .state').inner_text().startswith('not run: ')
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')      # wide tables scroll in themselves
        page.click('#smoke-table1 a')
        assert page.url.endswith('/smoke/table1.html') and len(found := drawn()) and all(found)
        assert page.locator('img.first').bounding_box()['y'] < 900 and 'DIC above static' in page.locator('main').inner_text() and not page.locator('math').first.is_visible()
        page.click('summary:has-text("the notebook")')
        assert page.locator('math').count() == 2 and page.locator('math mfrac').count() == page.locator('math msqrt').count() == 1 and not page.locator('code.tex').count()
        assert page.locator('math[display=block]').bounding_box()['height'] > 10 and page.locator('math').first.evaluate('m => m.namespaceURI').endswith('MathML')
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
        page.click('nav a:has-text("all targets")')
        assert page.url.endswith('index.html#smoke-table1')
        browser.close()
    assert not wrong
