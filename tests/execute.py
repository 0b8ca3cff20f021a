"""Execute the committed notebooks of nbs/papers and stamp what their outputs were made from.

    python tests/execute.py papers                # those whose outputs are outdated
    python tests/execute.py papers --all          # all of them, one after another, with one shared pool
    python tests/execute.py papers table5 fig2    # these
    python tests/execute.py papers --list         # what is outdated, and what it would cost

Each notebook runs with the parameters of its committed run (`Experiment.committed`, else its own defaults: the synthetic
board at the preset smoke). A run that was killed and started again executes only what is missing."""
import argparse, os, subprocess, sys, time
from pathlib import Path
from typing import Any

import nbformat

from dynad.experiments import TARGETS, Experiment
from dynad.jobs import run_jobs
from dynad.lesson import runs_folder
from dynad.runner import Job, committed_stamp, find_target, notebook_hash, outdated_outputs, papers_folder, plan, read_json

INJECTED = 'injected-parameters'
tagged = lambda cell, tag: tag in cell.metadata.get('tags', [])

def outputs_into(
    path: Path,                 # a committed notebook
    executed: Path,             # the same, executed by papermill
    parameters: dict[str, Any], # of the committed run
    stamp: dict[str, Any]
) -> None:
    "Put the outputs of an executed notebook into the committed one, with its parameters and its stamp."
    from papermill.translators import PythonTranslator
    nb, done = nbformat.read(path, 4), nbformat.read(executed, 4)
    cells, results = ([c for c in x.cells if not tagged(c, INJECTED)] for x in (nb, done))
    if [c.source for c in cells] != [c.source for c in results]: raise SystemExit(f'{path}: edited while it was executed')
    for c, r in zip(cells, results):
        if c.cell_type == 'code': c.outputs, c.execution_count = r.outputs, None
    if parameters:
        place = next(i for i, c in enumerate(cells) if tagged(c, 'parameters'))
        cell = next((c for c in nb.cells if tagged(c, INJECTED)), nbformat.v4.new_code_cell(metadata={'tags': [INJECTED]}))
        cell.source = PythonTranslator.codify(parameters)
        cells.insert(place + 1, cell)
    nb.cells, nb.metadata['dynad'] = cells, stamp
    nbformat.write(nb, path)

def jobs_of(experiments: list[Experiment], root: Path) -> list[Job]:
    "The runs of some experiments; without parameters of its own, one is a run of the notebook's defaults."
    return [j for e in experiments for j in plan([e.name], 'smoke', e.committed, root)]

def commit(job: Job) -> None:
    "Take over the result of a finished run."
    e, path = TARGETS[job.target], Path(job.notebook)
    made = read_json(Path(job.out)/'run.json')['made']
    if made['notebook'] != notebook_hash(path): raise SystemExit(f'{path}: edited while it was executed; run this again')
    stamp = committed_stamp(path, e.committed) | {'package': made['package']}
    outputs_into(path, Path(job.out)/f'{job.target}.ipynb', e.committed, stamp)

def execute(experiments: list[Experiment], root: Path, workers: int | None) -> list[str]:
    "Run them and take over what they made; the names of those that failed."
    failed, env = [], {k: os.environ.pop(k, None) for k in ('DYNAD_DATA', 'DYNAD_WEIGHTS')}
    for own in (False, True): # the defaults run without data sets, as on a fresh checkout; the others need theirs
        if own: os.environ.update({k: v for k, v in env.items() if v})
        jobs = jobs_of([e for e in experiments if bool(e.committed) == own], root)
        for batch in [jobs] if workers else [[j] for j in jobs]: # without workers each is taken over when it is finished
            outcomes = run_jobs(batch, workers=workers, report=lambda s: print(s, flush=True))
            for job, o in zip(batch, outcomes):
                if o.status in ('done', 'already done'): commit(job)
                else:
                    failed.append(job.name)
                    print(o.traceback[-1500:], file=sys.stderr)
    return failed

def show(experiments: list[Experiment], outdated: dict[str, str], root: Path) -> None:
    "Each notebook, what is outdated, and what executing it would cost."
    for e, job in zip(experiments, jobs_of(experiments, root)):
        cost = 'not known' if job.minutes is None else f'{job.minutes:.1f} min'
        print(f'{e.name:<12} {outdated.get(e.name, "up to date"):<28} {cost}, {job.cost}; {job.reason or job.data}')

def main(words: list[str] | None = None) -> int:
    "Exit status: 1 where a notebook failed."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', choices=['papers'])
    p.add_argument('names', nargs='*', help='experiments; none: those whose outputs are outdated')
    p.add_argument('--all', action='store_true', help='all of them, whether outdated or not')
    p.add_argument('--list', action='store_true', help='say what is outdated and execute nothing')
    p.add_argument('--workers', type=int, help='notebooks at a time, through dask; default 0: in this process')
    p.add_argument('--out', type=Path, help='folder of the runs; default nbs/_runs/committed')
    a = p.parse_args(words)
    outdated, root, start = outdated_outputs(), a.out or runs_folder()/'committed', time.perf_counter()
    names = a.names or (list(TARGETS) if a.all or a.list else list(outdated))
    experiments = list(dict.fromkeys(find_target(n) for n in names))
    if a.list:
        show(experiments, outdated, root)
        return 0
    failed = execute(experiments, root, a.workers or 0)
    clean = f'from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__({str(papers_folder())!r})'
    subprocess.run([sys.executable, '-c', clean], check=True)
    print(f'{len(experiments) - len(failed)} of {len(experiments)} executed in {(time.perf_counter() - start)/60:.1f} min'
          + (f"; failed: {', '.join(failed)}" if failed else ''))
    return bool(failed)

if __name__ == '__main__': sys.exit(main())
