"SIGKILL at random moments of fit, evaluate and reproduce; what is resumed gives the JSON of the undisturbed work. A handful here, a hundred with DYNAD_SLOW=1."
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from test_faults import cli, comparable, evaluate_command, fit_command, gears, killed_and_resumed  # noqa: F401: fixtures and the harness of one command

slow = pytest.mark.skipif(os.environ.get('DYNAD_SLOW') != '1', reason='a hundred SIGKILLs take most of an hour; DYNAD_SLOW=1 runs them')
TIMES = {'hardware', 'minutes', 'finished', 'images_per_second', 'seconds_by_stage', 'peak_memory_mb', 'time', 'pid', 'out'} # may differ between two runs; so does the folder of the results

def without_times(x):
    if isinstance(x, dict): return {k: without_times(v) for k, v in x.items() if k not in TIMES}
    return [without_times(v) for v in x] if isinstance(x, list) else x

PARAMETERS = "data = 'synthetic:board'\npreset = 'smoke'\nseeds = [0]\nn_boot = 5\nout = ''\n"
WORK = ["import json, time, pathlib", "parts = []\nfor i in range(8): time.sleep(.1); parts.append(i*n_boot)",
        "(pathlib.Path(out)/'sums.json').write_text(json.dumps(dict(target='sums', data=[], value=sum(parts), parts=parts)))"]

def sums(folder):
    "A notebook of a second, with a result of its own."
    code = [nbformat.v4.new_code_cell(PARAMETERS, metadata={'tags': ['parameters']}), *map(nbformat.v4.new_code_cell, WORK)]
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# Sums'), *code]), folder/'sums.ipynb')
    return folder/'sums.ipynb'

def settled(folder, names):
    "The JSON of a profile's folder, without times; nothing of the killed runs lies beside it."
    assert not [p for p in (folder/'smoke').iterdir() if p.name.endswith(('.part', '.old', '.failed'))]
    return {n: without_times(json.loads((folder/'smoke'/n/f'{n}.json').read_text(encoding='utf-8'))) for n in names}

def reproduce(cli, words, names, kills, per_round, rng, tmp_path):
    "`dynad reproduce` killed at random moments until `kills` are done, each time resumed to its end."
    command = lambda out: ['reproduce', *words, '--workers', '0', '--out', out]
    start = time.perf_counter()
    assert cli.run(*command(tmp_path/'want'))
    seconds, want, done, rounds = time.perf_counter() - start, settled(tmp_path/'want', names), 0, 0
    while done < kills:
        out, mine = tmp_path/f'round{rounds}', 0
        while mine < per_round and done < kills:
            if cli.run(*command(out), kill_after=rng.uniform(0, seconds)): break
            mine += 1; done += 1
            for n in names:                                                                # a result that is there is whole
                f = out/'smoke'/n/f'{n}.json'
                assert not f.exists() or without_times(json.loads(f.read_text(encoding='utf-8'))) == want[n]
        assert cli.run(*command(out))
        assert settled(out, names) == want
        rounds += 1
    return done

def test_reproduce_killed_and_resumed_gives_the_same_json(cli, tmp_path, monkeypatch):
    assert reproduce(cli, [sums(tmp_path/'nb')], ['sums'], 3, 3, random.Random(2), tmp_path) == 3

@slow
def test_forty_kills_of_fit_and_thirty_of_evaluate(cli, gears, tmp_path):
    moments, rounds, seconds = killed_and_resumed(cli, gears, tmp_path, 70, 5, seed=3)
    print(len(moments), rounds, seconds)
    assert len(moments) == 70 and {m[0] for m in moments} == {'fit', 'evaluate'}

@slow
def test_thirty_kills_of_reproduce(cli, tmp_path):
    "A real table in one of three, a small notebook in the others."
    os.environ['DYNAD_POOL'] = str(tmp_path/'pool')
    assert reproduce(cli, [sums(tmp_path/'nb')], ['sums'], 20, 4, random.Random(4), tmp_path/'small') == 20
    assert reproduce(cli, ['table8'], ['table8'], 10, 4, random.Random(5), tmp_path/'table') == 10
