"Tables and figures by the command, each notebook really executed, from one shared 64² run; then the book."
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dynad.cli import app
from dynad.experiments import TARGETS, read_notebook
from dynad.method import method_named
from dynad.systems import QUICK

ROOT = Path(__file__).parents[1]
STAGES = ROOT/'nbs'/'_runs'/'pool'/'stages' # the shared run, made by the first target where it is not there
CODE = {n: '\n'.join(c.source for c in read_notebook(ROOT/'nbs'/'papers'/e.notebook)) for n, e in TARGETS.items()}
ALIKE = [n for n in TARGETS if 'by_class(' in CODE[n]][1:] # the same cells as the first of them, on other data
SYSTEMS = [n for n in TARGETS if 'check_methods(' in CODE[n] or 'by_class(' in CODE[n]] # they fit the other systems too
REAL = [n for n, e in TARGETS.items() if e.minutes <= .4 and n not in ALIKE] # seconds each once the shared run is there

@pytest.fixture(scope='module')
def out(tmp_path_factory): return tmp_path_factory.mktemp('targets')

@pytest.fixture
def call(out, monkeypatch):
    for k in ('DYNAD_POOL', 'DYNAD_DATA', 'DYNAD_WEIGHTS'): monkeypatch.delenv(k, raising=False)
    monkeypatch.chdir(ROOT)
    return lambda *words: CliRunner().invoke(app, ['reproduce', *words, '--out', str(out)])

def trained():
    folders = [p for kind in ('autoencoder', 'denoiser', 'phi') for p in (STAGES/kind).glob('*') if p.is_dir()]
    return {p.relative_to(STAGES) for p in folders}

@pytest.mark.parametrize('name', REAL)
def test_target_at_smoke(name, call, out):
    before, known = trained(), len(list((STAGES/'measured').glob('*/stage.json')))
    done = call(name, '--workers', '0', '-p', 'n_boot', '20')
    assert done.exit_code == 0, done.output
    if name == 'table6': assert {p.parts[0] for p in trained() - before} <= {'phi'} # it compares two adaptations
    elif before and (name not in SYSTEMS or known >= len(QUICK)): assert trained() == before # found, not trained again
    else: assert len(trained()) >= 3
    found = json.loads((out/'smoke'/name/f'{name}.json').read_text())
    assert found['target'] == name and found['stand_in'] and found['parameters']['n_boot'] == 20
    assert found['data'][0]['name'] == 'synthetic_board'
    if 'side_by_side(' in CODE[name]: assert {'Ours', *(method_named(m).title for m in QUICK)} <= {r['column'] for r in found['rows']} and not found['not_run']
    assert all(l['paper'] is None and l['difference'] is None for l in found['comparison'])
    assert all((out/'smoke'/name/f'{f}.{s}').stat().st_size > 500 for f in found['figures'] for s in ('png', 'pdf'))

def test_finished_targets_are_not_run_again_and_the_book_shows_them(call, out):
    assert call(*REAL, '--workers', '0', '-p', 'n_boot', '20').output.count(': already done') == len(REAL)
    assert call('book').exit_code == 0
    assert (out/'book'/'index.html').read_text().count('<b>stand-in data</b>') == len(REAL)
