"Committed outputs of nbs/papers belong to the code beside them: `python tests/execute.py papers` makes them anew."
import json, subprocess, sys, warnings
from pathlib import Path

import nbformat
import pytest

import execute
from dynad import runner
from dynad.experiments import Experiment
from dynad.runner import RunnerError, committed_stamp, outdated_outputs

PARAMETERS = "data: str = 'synthetic:board'\npreset: str = 'smoke'\nseeds: list = [0]\nn_boot: int = 200\nout: str = ''"
WORK = """import json
from pathlib import Path
from dynad.config import data_root
Path(out, '{name}.json').write_text(json.dumps(dict(data=[], target='{name}')))
print(n_boot, data_root())"""

@pytest.fixture
def papers(tmp_path, monkeypatch):
    "Two notebooks in a folder of their own, one of them committed with parameters, and a registry of them."
    found = [Experiment('one', wanted=()), Experiment('two', wanted=(), committed={'n_boot': 7})]
    for e in found:
        cells = [nbformat.v4.new_markdown_cell(f'# {e.name}'),
                 nbformat.v4.new_code_cell(PARAMETERS, metadata={'tags': ['parameters']}),
                 nbformat.v4.new_code_cell(WORK.format(name=e.name))]
        metadata = {'kernelspec': dict(display_name='python3', language='python', name='python3')}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path/e.notebook)
    registry = {e.name: e for e in found}
    for module in (runner, execute):
        monkeypatch.setattr(module, 'TARGETS', registry)
        monkeypatch.setattr(module, 'papers_folder', lambda: tmp_path)
        monkeypatch.setattr(module, 'find_target', registry.__getitem__)
    monkeypatch.setenv('DYNAD_POOL', str(tmp_path/'pool'))
    return tmp_path

def edit(path, change):
    nb = nbformat.read(path, 4)
    change(nb)
    nbformat.write(nb, path)

def test_committed_outputs_are_up_to_date():
    """A notebook whose own code or parameters have changed since it was executed fails here. Where only modules of the
    package have changed, a warning names it: whether its numbers moved is seen when it is executed again."""
    old = outdated_outputs()
    words = lambda names: ', '.join(f'{n} ({old[n]})' for n in names)
    package = [n for n, what in old.items() if what == 'package']
    if package: warnings.warn(f"executed with an earlier state of the package: {words(package)}; `python tests/execute.py papers` makes them anew")
    rest = [n for n in old if n not in package]
    assert not rest, f"outputs older than the notebook itself; run `python tests/execute.py papers`: {words(rest)}"

def test_one_command_executes_and_stamps_all(papers, capsys, monkeypatch):
    monkeypatch.setenv('DYNAD_DATA', str(papers))
    assert outdated_outputs() == {'one': 'no stamp', 'two': 'no stamp'}
    assert execute.main(['papers', '--list', '--out', str(papers/'runs')]) == 0 and 'no stamp' in capsys.readouterr().out
    assert execute.main(['papers', '--out', str(papers/'runs')]) == 0
    assert '2 of 2 executed in ' in capsys.readouterr().out and outdated_outputs() == {}
    one, two = (nbformat.read(papers/f'{n}.ipynb', 4) for n in ('one', 'two'))
    assert [c.outputs[0].text for c in (one.cells[-1], two.cells[-1])] == ['200 None\n', f'7 {papers}\n'] # defaults: no data set
    assert [c.cell_type for c in one.cells] == ['markdown', 'code', 'code'] and len(two.cells) == 4
    assert two.cells[2].source == '# Parameters\nn_boot = 7\n' and two.cells[2].metadata == {'tags': ['injected-parameters']}
    assert set(one.metadata) == {'kernelspec', 'dynad'} # nbdev_clean keeps the stamp
    before = (papers/'two.ipynb').read_bytes()
    assert execute.main(['papers', 'two', '--out', str(papers/'runs')]) == 0 and (papers/'two.ipynb').read_bytes() == before

def test_what_makes_outputs_outdated(papers, monkeypatch):
    assert execute.main(['papers', '--out', str(papers/'runs')]) == 0
    def words(nb):
        nb.cells[0].source = '# Another heading'
        nb.cells[-1].source += ' # a comment'
    edit(papers/'one.ipynb', words)
    assert outdated_outputs() == {}
    edit(papers/'one.ipynb', lambda nb: nb.cells[-1].update(source=nb.cells[-1].source + '\nmore = 1'))
    assert outdated_outputs() == {'one': 'code'}
    monkeypatch.setitem(runner.TARGETS, 'two', Experiment('two', wanted=(), committed={'n_boot': 8}))
    monkeypatch.setattr(runner, 'source_hash', lambda code: 'another')
    assert outdated_outputs() == {'one': 'code and package', 'two': 'package and parameters'}

def test_a_notebook_that_fails_keeps_its_outputs(papers, capsys):
    assert execute.main(['papers', '--out', str(papers/'runs')]) == 0
    edit(papers/'one.ipynb', lambda nb: nb.cells[-1].update(source=nb.cells[-1].source + '\n1/0'))
    before = (papers/'one.ipynb').read_bytes()
    assert execute.main(['papers', '--out', str(papers/'runs')]) == 1
    said = capsys.readouterr()
    assert '0 of 1 executed' in said.out and 'failed: one' in said.out and 'ZeroDivisionError' in said.err
    assert (papers/'one.ipynb').read_bytes() == before
