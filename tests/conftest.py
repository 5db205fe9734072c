"""What several tests need: a small prepared corpus, a model trained for a moment, and the real excerpt where it is."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Models here are tiny: one thread is as fast, and two test processes side by side don't wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import pytest
import setuptools  # noqa: F401  PyTorch's compiler imports it late, and then not always finds its own distutils
import torch

from benchmarks import world
from helpers.batches import Prepared, prepare
from helpers.corpus import read_corpus
from helpers.run import Run
from helpers.settings import Settings
from helpers.training import fit

# A shell's background job ignores Ctrl-C, and so would the trainings that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

CPU = torch.device("cpu")
SOAK = bool(os.environ.get("CHATBOT_SOAK"))  # the long series of faults and hostile inputs: make soak
EXCERPT = Path(__file__).resolve().parents[2] / "shared" / "corpus" / "cornell_excerpt.zip"
TINY = Settings(
    embedding_size=24, hidden_size=24, layers=2, dropout=0.2, updates=12, batch_size=32, validate_every=4,
    learning_rate=5e-3, precision="fp32", held_out_share=0.15, query_dropout=0.1,
)  # fmt: skip


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory) -> Path:
    return world.write_corpus(tmp_path_factory.mktemp("corpus"), exchanges=600)


@pytest.fixture(scope="session")
def prepared(corpus_folder) -> Prepared:
    return prepare(read_corpus(corpus_folder), TINY)


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("trained"))
    prepared.save(run.data)
    fit(run, prepared, TINY, CPU, progress_bar=False)
    return run


@pytest.fixture
def batch(prepared):
    return prepared.splits["train"].batch(torch.tensor([0, 1, 2, 3, 40, 41]))


@pytest.fixture(scope="session")
def excerpt() -> Path:
    if not EXCERPT.is_file():
        pytest.skip("the real excerpt of the corpus is not beside this checkout")
    return EXCERPT
