"19ab_ablation: parts switched off one at a time, paired with the run as fitted; the size of the defects found; the command."
import json

import pytest
from typer.testing import CliRunner

from dynad import ablation as A
from dynad.cli import app
from dynad.config import make_config, with_overrides
from dynad.patchcore import PatchCore
from dynad.speed_modes import with_images
from dynad.subjects import measure
from dynad.tiles import Tiling

@pytest.fixture(scope='module')
def result(smoke, boards): return A.ablation(smoke[0], boards, 20, progress=False)

@pytest.mark.parametrize('overrides', [{}, {'fusion.neighbour': 0.}, {'fusion.neighbour': 1.}, {'fusion.lam': 1.}, {'fusion.lam': 0., 'fusion.neighbour': .25},
    {'reconstruction.severity': 'static', 'reconstruction.static_t': 130}, {'reconstruction.severity': 'static'}, {'reconstruction.omega': 1.}, {'fusion.reference': 'decoded', 'fusion.score': 'top'}], ids=str)
def test_every_switch_changes_something_that_has_weight(overrides):
    c = make_config('small', overrides)
    for name, change in A.switches(c).items():
        other = with_overrides(c, change)
        assert other != c, name
        if c.fusion.neighbour == 1.: assert 'T̂' not in name and 'ω' not in name # no diffusion is left to be switched
    assert ('neighbour map alone' in ' '.join(A.switches(c))) == (0 < c.fusion.neighbour < 1)

def test_a_row_is_the_run_with_that_setting(result, smoke, boards):
    model, rows = smoke[0], result['rows']
    assert rows[0]['what'] == 'nothing' and len(rows) == 1 + len(A.switches(model.config)) > 4
    own = measure(model, boards, 0)
    for row in rows:
        m = measure(model.with_settings(row['settings']), boards, 0)
        for k in A.MAIN:
            assert row[k] == pytest.approx(m[k]['value'])
            if row['settings']: assert row['difference'][k]['difference'] == pytest.approx(own[k]['value'] - m[k]['value'], abs=2e-4) # streaming and exact
    assert any(abs(r['difference']['pro']['difference']) > 1e-3 for r in rows[1:])

def test_tables(result):
    table = A.ablation_table([result, result | {'seed': 1}])
    assert set(table.seeds) == {f"{result['seed']}, 1"} and table['Δ PRO'].str.contains('±').all()
    single = A.ablation_table([result])['Δ PRO']
    assert single.str.fullmatch(r'[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\]').all()
    assert A.areas_table([result]).empty and 'smoke preset: a test of the machinery' in A.chosen_words(result)

def test_defects_in_groups_of_area(smoke, boards, monkeypatch):
    model = with_images(smoke[0], boards)
    areas = A.found_by_area(model, 16)
    assert [a['n'] for a in areas] == [4]*4 and all(a['area'][1] <= b['area'][0] for a, b in zip(areas, areas[1:])) and all(0 <= a['found'] <= 4 for a in areas)
    text = A.areas_table([{'data': {'name': 'x', 'synthetic': True}, 'preset': 'smoke', 'areas': [{'area': [.01, .02], 'n': 4, 'found': k} for k in range(4)]}]*2)
    assert text.iloc[0].tolist() == ['0% of 8 (1.00% to 2.00%)', '25% of 8 (1.00% to 2.00%)', '50% of 8 (1.00% to 2.00%)', '75% of 8 (1.00% to 2.00%)']

def test_what_has_no_parts_is_refused(smoke, boards, monkeypatch):
    with pytest.raises(A.AblationError, match='method = patchcore: only DynAD'): A.ablation(PatchCore(make_config('smoke', method='patchcore')), boards)
    with pytest.raises(A.AblationError, match='no test image'): A.ablation(smoke[0], boards.limited(10, 0))
    monkeypatch.setattr(smoke[0], 'tiling', Tiling(64, 48), raising=False)
    with pytest.raises(A.AblationError, match='on whole images only'): A.ablation(smoke[0], boards)

def test_the_command(smoke, boards, tmp_path):
    out = CliRunner().invoke(app, ['ablate', str(smoke[1]), '--data', str(boards.root), '--n-boot', '0', '--json', str(tmp_path/'a.json')])
    assert out.exit_code == 0, out.output
    r = json.loads((tmp_path/'a.json').read_text())
    assert len(r['areas']) == 4 and r['seed'] == smoke[0].config.seed and 'by area' in out.output and 'as fitted: λ' in out.output
    other = CliRunner().invoke(app, ['ablate', str(smoke[1]), '--data', str(tmp_path)])
    assert other.exit_code == 2 and str(tmp_path) in other.output.replace('\n', '')
