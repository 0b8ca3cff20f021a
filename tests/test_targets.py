"Tables and figures by the command, each notebook really executed, from one shared 64² run; then the book."
import json
from pathlib import Path

from typer.testing import CliRunner

from dynad.cli import app

REAL = ('fig5', 'table5', 'table2', 'fig1', 'fig2', 'fig3', 'fig4', 'fig6', 'fig7', 'fig8', 'fig10', 'fig12', 'fig14', 'scale', 'attribution', 'severity', 'table6') # all that take seconds once the shared run is there; only table6 adapts another φ

def test_real_targets_at_smoke_by_the_command(tmp_path, monkeypatch):
    "From the shared 64² run of nbs/_runs/pool, made here when it is not there; then the book."
    root = Path(__file__).parents[1]
    monkeypatch.delenv('DYNAD_POOL', raising=False); monkeypatch.delenv('DYNAD_DATA', raising=False); monkeypatch.chdir(root)
    call = lambda *w: CliRunner().invoke(app, ['reproduce', *w, '--out', str(tmp_path)])
    trained = lambda: {p.relative_to(stages) for kind in ('autoencoder', 'denoiser', 'phi') for p in (stages/kind).iterdir() if p.is_dir()}
    stages, seen = root/'nbs'/'_runs'/'pool'/'stages', []
    for n in REAL:
        r = call(n, '--workers', '0', '-p', 'n_boot', '20')
        assert r.exit_code == 0, r.output
        seen.append(trained())
    assert len(seen[0]) >= 3 and all(s == seen[0] for s in seen[:-1]) and {p.parts[0] for p in seen[-1] - seen[0]} <= {'phi'} # the first may train, the others find
    for n in REAL:
        found = json.loads((tmp_path/'smoke'/n/f'{n}.json').read_text())
        assert found['target'] == n and found['stand_in'] and found['parameters']['n_boot'] == 20 and found['data'][0]['name'] == 'synthetic_board'
        assert all(l['paper'] is None and l['difference'] is None for l in found['comparison'])
        assert all((tmp_path/'smoke'/n/f'{f}.{s}').stat().st_size > 500 for f in found['figures'] for s in ('png', 'pdf'))
    assert call(*REAL, '--workers', '0', '-p', 'n_boot', '20').output.count(": already done") == len(REAL)
    assert call('book').exit_code == 0
    assert (tmp_path/'book'/'index.html').read_text().count('<b>stand-in data</b>') == len(REAL)
