"The apps' notebooks from top to bottom without a browser, each in a kernel of its own, with a timeout."

import nbformat
import pytest
from nbclient import NotebookClient

from browser import APPS, demo, with_parameters

NAMES = sorted(p.stem for p in APPS.glob('*.ipynb'))

def test_all_apps_are_known(): assert NAMES == ['explore', 'sweep', 'trajectory', 'your_images'] and (APPS/'.notest').exists()

@pytest.mark.parametrize('name', NAMES)
def test_app_runs_headless(name, tmp_path, monkeypatch):
    (tmp_path/'dynad_runs').mkdir()
    (tmp_path/'dynad_runs'/'demo').symlink_to(demo().parent)
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    run = str(demo())
    more = {'explore': dict(run=run, setting={'t_max': 80, 'lam': .3}), 'sweep': dict(runs=[run], t_maxes=[80, 160], fill=True), 'trajectory': dict(run=run), 'your_images': dict(folder=str(tmp_path/'mine'))}[name]
    nb = nbformat.read(with_parameters(name, tmp_path, **more), 4)
    NotebookClient(nb, timeout=400, startup_timeout=120, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}).execute()
    data = [o.get('data', {}) for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    assert any('application/vnd.jupyter.widget-view+json' in d for d in data), 'no widget was shown'
    assert any('image/png' in d or 'text/html' in d for d in data), 'no image or table was shown'
    state = ' '.join(str(m['state'].get('value', '')) for m in nb.metadata.widgets['application/vnd.jupyter.widget-state+json']['state'].values())
    assert 'dynad-error' not in state.replace('.dynad-error{', ''), 'an error is shown in a widget'
    if name == 'explore': assert '= 0.30·l + 0.70·f' in state
