"""What the quick start and the study share: runs in the embedded world, and what its models' samples are worth."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from palign.config.load import to_plain
from palign.config.schema import ModelConfig
from palign.data import world
from palign.data.loader import Dataset
from palign.data.tokenize import TokenTree, encode_prompt
from palign.eval.score import as_dataset, sequence_kl
from palign.generate.texts import Generation, generate
from palign.sharding.mesh import make_mesh
from palign.train.checkpoint import FOLDER
from palign.train.sources import Loaded

MAX_NEW_TOKENS = 28  # the longest review and its EOS, with a little room to ramble
EXAMPLES_PER_SFT_STEP = 80
MODEL = ModelConfig(num_layers=3, dim=96, num_heads=4, num_key_heads=2, hidden_dim=256, remat="none")

Drawn = list[list[Generation]]


def base_config() -> dict[str, Any]:
    """What all stages share: a decoder of 0.3 million parameters over a vocabulary of words."""
    return {
        "model": to_plain(MODEL),
        "tokenizer": {"model_type": "word", "vocab_size": 128},
        # Every device takes its share of the rows.
        "data": {"max_length": 64, "row_length": 512, "rows_per_step": math.lcm(4, jax.device_count()), "block": 32},
        "optimizer": {"b2": 0.98, "schedule": "cosine_to_floor", "warmup_ratio": 0.05},
        "train": {"log_every": 5, "keep": 20},
    }


def merged(**sections: Any) -> dict[str, Any]:
    """The shared settings with sections laid over them."""
    base = base_config()
    return base | {k: base.get(k, {}) | v if isinstance(v, dict) else v for k, v in sections.items()}


def write_corpus(path: epath.Path, rng: np.random.Generator, prompts: Sequence[str], *, steps: int) -> None:
    """Writes reviews of the grammar, enough for so many steps of SFT, once."""
    corpus = world.corpus(rng, EXAMPLES_PER_SFT_STEP * steps, prompts)
    write_once(path, ({"prompt": prompt, "completion": " " + review} for prompt, review in corpus))


def write_once(path: epath.Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines, unless the file is there; a file under its name is whole."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    temporary.rename(path)


def win_shares(scores: np.ndarray) -> np.ndarray:
    """Labels in [0, 1], as LiPO wants them: the share of the other responses that a response was preferred to.

    Args:
        scores: `[n, K]`, higher is better.

    Returns:
        `[n, K]`.
    """
    return (scores[:, :, None] > scores[:, None, :]).sum(axis=2) / (scores.shape[1] - 1)


def best_and_worst(record: Mapping[str, Any]) -> dict[str, str]:
    """The pair of a ranked list: its best and its worst response."""
    best, worst = (int(pick(record["scores"])) for pick in (np.argmax, np.argmin))
    return {"prompt": record["prompt"], "chosen": record["responses"][best], "rejected": record["responses"][worst]}


def draw(loaded: Loaded, prompts: Sequence[str], *, samples: int, seed: int, progress: Any = None) -> Drawn:
    """Samples at temperature 1.

    Args:
        loaded: the model.
        prompts: texts.
        samples: how many of each.
        seed: of all draws.
        progress: what `generate` reports to, or None.
    """
    return generate(
        loaded.lm,
        loaded.params,
        loaded.tokenizer,
        prompts,
        samples=samples,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
        batch_size=128,
        progress=progress,
    )


def golds(prompts: Sequence[str], drawn: Drawn) -> np.ndarray:
    """Gold rewards of all samples, `[prompts, samples]`."""
    rewards = [[world.gold_reward(p, s.text.strip()) for s in row] for p, row in zip(prompts, drawn, strict=True)]
    return np.asarray(rewards, np.float64)


def kl_of_samples(loaded: Loaded, reference: Loaded, prompts: Sequence[str], drawn: Drawn) -> np.ndarray:
    """KL(policy || reference) along each prompt's first sample, nats a response, exact in every state: `[prompts]`."""
    dataset = as_rows(trees(loaded, prompts, [row[:1] for row in drawn]))
    sums = sequence_kl(loaded.lm, loaded.params, reference.params, dataset, one_device())
    return np.asarray([values[0] for values in sums])


def trees(loaded: Loaded, prompts: Sequence[str], drawn: Drawn) -> list[TokenTree]:
    """Samples as token trees: the ids as they were drawn, never decoded and tokenised again."""
    made = []
    for index, (prompt, row) in enumerate(zip(prompts, drawn, strict=True)):
        ids = encode_prompt(prompt, loaded.tokenizer)
        made.append(TokenTree(ids, tuple(sample.ids for sample in row), (0.0,) * len(row), index))
    return made


def as_rows(samples: Sequence[TokenTree]) -> Dataset:
    """Trees in rows for scoring."""
    return as_dataset(samples, row_length=512, rows_per_step=8, block=32)


def one_device() -> jax.sharding.Mesh:
    """The mesh of the first device, where models are scored."""
    return make_mesh(data=1, devices=jax.devices()[:1])


def checkpoint_steps(place: epath.Path) -> list[int]:
    """The steps that a run kept, oldest first."""
    return sorted(int(d.name) for d in (place / FOLDER).glob("*") if d.name.isdigit())
