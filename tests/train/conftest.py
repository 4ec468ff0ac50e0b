"""What several files of tests train from: pairs, and a model that has learned a little of them."""

import pytest

from palign.train.loop import run
from tests.recipes.tiny_runs import config, one_device, write_pairs


@pytest.fixture(scope="module")
def single():
    with one_device():
        yield


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 40, prompts=30)


@pytest.fixture(scope="session")
def sft(pairs, tmp_path_factory):
    """A trained model, so that its log-probabilities are not all alike; it is read, never trained further."""
    workdir = tmp_path_factory.mktemp("sft") / "run"
    with one_device():
        run(config(pairs), workdir)
    return workdir
