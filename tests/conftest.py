"Shared fixtures: one smoke run for all tests that need a fitted detector."
import os

os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
from safetensors.torch import load_file
from pathlib import Path

HERE = Path(__file__).parent

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
