"""Runs of seconds: a data file of short pairs, a tiny model over its words, a few steps.

All files have the same words and all runs the same shapes and schedule, so that few programs are compiled in all.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from palign.config.load import resolve_run
from palign.config.schema import RunConfig
from palign.sharding.mesh import make_mesh

WORDS = "the a pie soup bread cat dog sings runs sleeps red blue warm cold very not and but here there".split()


def sentence(rng: np.random.Generator, most: int) -> str:
    return " ".join(rng.choice(WORDS, size=rng.integers(1, most + 1)))


def write_pairs(path: pathlib.Path, num: int, *, seed: int = 0, prompts: int = 0) -> pathlib.Path:
    """`num` pairs of different responses, over at most `prompts` prompts where that is given."""
    rng = np.random.default_rng(seed)
    asked = ["say " + sentence(rng, 5) + " :" for _ in range(prompts or num)]
    lines = []
    for i in range(num):
        word = WORDS[i % len(WORDS)]  # every word comes up
        chosen, rejected = f" good {word} {sentence(rng, 4)}", " bad " + sentence(rng, 5)
        lines.append({"prompt": asked[i % len(asked)], "chosen": chosen, "rejected": rejected})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


PLAIN: dict[str, Any] = {
    "model": {
        "num_layers": 2, "dim": 16, "num_heads": 2, "num_key_heads": 1, "hidden_dim": 16, "remat": "none",
        "dtype": "float32",
    },
    "tokenizer": {"model_type": "word", "vocab_size": 64},
    "data": {"max_length": 32, "row_length": 64, "rows_per_step": 4, "block": 32, "trees_per_row": 4},
    "objective": {"loss_type": ["sft"]},
    "optimizer": {"learning_rate": 0.01, "warmup_ratio": None, "warmup_steps": 2},
    "train": {"max_steps": 6, "log_every": 1, "checkpoint_every": 2, "eval_every": 3, "keep": 2},
}  # fmt: skip


def plain(path: pathlib.Path, **sections: Any) -> dict[str, Any]:
    """The settings of an SFT run on a data file, `sections` on top."""
    merged = {**PLAIN, "data": PLAIN["data"] | {"path": str(path), "eval_fraction": 0.2}}
    for name, given in sections.items():
        merged[name] = merged.get(name, {}) | given if isinstance(given, dict) else given
    return merged


def config(path: pathlib.Path, **sections: Any) -> RunConfig:
    return resolve_run(plain(path, **sections))


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Runs on the first device: less to compile, and programs of several CPU devices must not be cached."""

    def first(**_: int):
        return make_mesh(data=1, devices=jax.devices()[:1])

    with mock.patch("palign.train.build.make_mesh", first), mock.patch("palign.train.evaluate.make_mesh", first):
        yield
