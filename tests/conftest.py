"Shared fixtures: one smoke run for all tests that need a fitted detector."
import os

if 'PYTEST_XDIST_WORKER_COUNT' in os.environ: # before torch is imported: the workers share the cores
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//int(os.environ['PYTEST_XDIST_WORKER_COUNT']))))
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
from safetensors.torch import load_file
from pathlib import Path

HERE = Path(__file__).parent

@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    "The whole suite runs on up to four cores at once; named files, `-n 0` and a debugger stay in one process."
    o = config.option
    if config.pluginmanager.hasplugin('xdist') and not (config.args_source.name == 'ARGS' or 'PYTEST_XDIST_WORKER' in os.environ or o.numprocesses is not None or o.usepdb or o.collectonly):
        o.numprocesses, o.dist = min(4, os.cpu_count() or 1), 'loadfile'

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file's tests share its fixtures and stay together, in their order; each notebook is a process of its own anyway."
    from xdist.scheduler import LoadScopeScheduling
    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid): return nodeid if 'test_notebook[' in nodeid else nodeid.split('::')[0]
    return Files(config, log)

@pytest.fixture(scope='session')
def authors():
    "Inputs and outputs of the public code's own functions (tests/fixtures/README.md)."
    return load_file(HERE/'fixtures'/'authors.safetensors')

@pytest.fixture(scope='session')
def boards(tmp_path_factory):
    "A small synthetic data set."
    from dynad.data import open_dataset
    from dynad.synthetic import write_synthetic
    return open_dataset(write_synthetic(tmp_path_factory.mktemp('data')/'board', 'board', n_train=24, n_good=6, n_defect=10, size=128, seed=0))

SMOKE = {'denoiser.steps': 40, 'latents.finetune_steps': 5, 'adaptation.gamma': 1, 'denoiser.checkpoint_every': 10}

@pytest.fixture(scope='session')
def smoke(boards, tmp_path_factory):
    "A fitted detector and its run directory."
    from dynad.config import make_config
    from dynad.detector import DynAD
    run = tmp_path_factory.mktemp('run')
    return DynAD(make_config('smoke', SMOKE)).fit(boards, run, progress=False), run
