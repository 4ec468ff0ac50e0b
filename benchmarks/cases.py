"""What all contestants share: one model on disk and the token ids of every round, made from a seed.

A case is a folder: a Hugging Face Llama (`config.json`, `model.safetensors`), which transformers, TRL and palign each
read with a loader of their own, and `pairs.npz`. It takes numpy and safetensors only, so every interpreter can read it.
"""

import contextlib
import hashlib
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from benchmarks import driver

BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 1e-5, 1.0
SIGMA = 0.8  # of the logarithm of a length
# Name -> median tokens of prompt, chosen, rejected.
LENGTHS = {"uf": (107, 272, 239), "hh": (119, 49, 49)}


class Geometry(NamedTuple):
    """A Llama with untied embeddings, f32."""

    vocabulary: int = 32000
    width: int = 256
    layers: int = 4
    heads: int = 8
    hidden: int = 688


TINY = Geometry(vocabulary=320, width=32, layers=2, heads=2, hidden=64)
LARGE = Geometry(vocabulary=128256, width=2048, layers=16, heads=16, hidden=7168)  # 1.5 billion parameters


class Pair(NamedTuple):
    """Token ids of a prompt and two responses."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longer response."""
        return self.prompt.size + max(self.chosen.size, self.rejected.size)

    @property
    def once(self) -> int:
        """Tokens with the prompt counted once."""
        return sum(part.size for part in self)

    @property
    def repeated(self) -> int:
        """Tokens with the prompt counted for each response."""
        return self.once + self.prompt.size


Rounds = Sequence[Sequence[Pair]]


class Scale(NamedTuple):
    """What a machine is asked to train, and in what it computes; weights and optimizer are float32."""

    geometry: Geometry
    dtype: str

    @property
    def tolerances(self) -> dict[str, tuple[str, float]]:
        """How far apart contestants may be. The same code is held to the float32 ones on a CPU."""
        loose = {"loss": (driver.ABSOLUTE, 1e-3), "grad_norm": (driver.RELATIVE, 2e-2)}  # bfloat16 has 8 bits
        return driver.TOLERANCES if self.dtype == "float32" else loose


SMALL, BIG = Scale(Geometry(), "float32"), Scale(LARGE, "bfloat16")


def choose_scale(*, tiny: bool) -> Scale:
    """The tiny one, or what this interpreter's devices can do."""
    return Scale(TINY, "float32") if tiny else BIG if on_gpu() else SMALL


def on_gpu() -> bool:
    """Whether this interpreter's JAX finds a GPU; asked in a process of its own, which gives it back."""
    program = "import jax; print(jax.default_backend())"
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return asked.stdout.strip() == "gpu"


def equal(pairs: int, prompt: int, response: int, *, vocabulary: int, rounds: int, seed: int) -> Rounds:
    """Pairs of one shape, new tokens in every round."""
    rng = np.random.default_rng(seed)
    sizes = np.array([prompt, response, response])
    return [[_draw(rng, sizes, vocabulary) for _ in range(pairs)] for _ in range(rounds)]


def realistic(
    lengths: str, pairs: int, *, longest: int, first: tuple[int, int], vocabulary: int, rounds: int, seed: int
) -> Rounds:
    """Pairs of log-normal lengths around a data set's medians.

    Args:
        lengths: a name in `LENGTHS`.
        pairs: in a round.
        longest: tokens that a prompt and one response are cut to, half of it for the prompt.
        first: round 0 holds at most so many pairs, and as many as fit in so many tokens, prompts once: what all
            contestants take as one batch.
        vocabulary: token ids are drawn from it, evenly.
        rounds: with the first one.
        seed: of lengths and tokens.
    """
    rng = np.random.default_rng(seed)

    def draw() -> Pair:
        sizes = (np.array(LENGTHS[lengths]) * np.exp(SIGMA * rng.standard_normal(3))).astype(int)
        prompt = int(np.clip(sizes[0], 2, longest // 2))
        return _draw(rng, np.array([prompt, *np.clip(sizes[1:], 1, longest - prompt)]), vocabulary)

    drawn = [[draw() for _ in range(pairs)] for _ in range(rounds)]
    sums = itertools.accumulate(pair.once for pair in drawn[0])
    most, tokens = first
    drawn[0] = drawn[0][: min(most, sum(total <= tokens for total in sums))]
    if not drawn[0]:
        raise ValueError(f"first = {first} holds no pair; it must hold {longest} tokens and a response")
    return drawn


def _draw(rng: np.random.Generator, sizes: np.ndarray, vocabulary: int) -> Pair:
    return Pair(*(rng.integers(1, vocabulary, size=n, dtype=np.int32) for n in sizes))  # 0 is padding


@contextlib.contextmanager
def written(geometry: Geometry, rounds: Rounds, *, dtype: str = "float32", seed: int = 0) -> Iterator[pathlib.Path]:
    """A case on disk, for as long as a race takes.

    Args:
        geometry: of the model.
        rounds: pairs of every round.
        dtype: what contestants compute in.
        seed: of the weights.
    """
    with tempfile.TemporaryDirectory(prefix="palign-case-") as folder:
        directory = pathlib.Path(folder)
        write_model(directory, geometry, seed)
        pairs = list(itertools.chain.from_iterable(rounds))
        np.savez(
            directory / "pairs.npz",
            tokens=np.concatenate([part for pair in pairs for part in pair]),
            sizes=np.array([[part.size for part in pair] for pair in pairs]),
            rounds=np.array([len(each) for each in rounds]),
            dtype=np.array(dtype),
        )
        yield directory


def read_rounds(case: pathlib.Path) -> list[list[Pair]]:
    """The pairs of every round."""
    with np.load(case / "pairs.npz") as file:
        tokens, sizes, rounds = file["tokens"], file["sizes"], file["rounds"]
    parts = np.split(tokens, np.cumsum(sizes)[:-1])
    pairs = [Pair(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
    ends = np.cumsum(rounds)
    return [pairs[end - n : end] for n, end in zip(rounds, ends, strict=True)]


def read_dtype(case: pathlib.Path) -> str:
    """What to compute in: float32 or bfloat16."""
    with np.load(case / "pairs.npz") as file:
        return str(file["dtype"])


def work(pairs: Sequence[Pair]) -> dict[str, float]:
    """What a round does, counted alike for everybody: pairs, and tokens with prompts repeated."""
    return {"pairs": len(pairs), "tokens": sum(pair.repeated for pair in pairs)}


def digest(pairs: Sequence[Pair]) -> str:
    """What is equal for two lists of pairs only where they are."""
    found = hashlib.sha256()
    for pair in pairs:
        found.update(np.array([part.size for part in pair], "<i8").tobytes())
        for part in pair:
            found.update(part.astype("<i4").tobytes())
    return found.hexdigest()[:16]


def weights_digest(case: pathlib.Path) -> str:
    """The same for the model."""
    found = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        found.update((case / name).read_bytes())
    return found.hexdigest()[:16]


def write_model(directory: pathlib.Path, geometry: Geometry, seed: int = 0) -> None:
    """Random weights, as transformers initialises a Llama: normal of 0.02, norm scales 1."""
    g, rng, tensors = geometry, np.random.default_rng(seed), {}

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    tensors["model.embed_tokens.weight"] = normal(g.vocabulary, g.width)
    tensors["lm_head.weight"] = normal(g.vocabulary, g.width)
    tensors["model.norm.weight"] = np.ones(g.width, np.float32)
    for layer in range(g.layers):
        at = f"model.layers.{layer}."
        for name in "qkvo":
            tensors[f"{at}self_attn.{name}_proj.weight"] = normal(g.width, g.width)
        for name in ("gate", "up"):
            tensors[f"{at}mlp.{name}_proj.weight"] = normal(g.hidden, g.width)
        tensors[f"{at}mlp.down_proj.weight"] = normal(g.width, g.hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = np.ones(g.width, np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": g.vocabulary,
        "hidden_size": g.width,
        "intermediate_size": g.hidden,
        "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.heads,
        "head_dim": g.width // g.heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
