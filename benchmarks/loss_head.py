"""The heads alone, forward and backward: log-probabilities of targets, and the divergence of two models. H1, H6.

    python -m benchmarks.loss_head --peers-python=.venv-peers/bin/python

Hidden states and unembedding go in; the mean loss and both gradients come out. On a GPU at the size of a model of 8
billion parameters, in bfloat16; on a CPU at a size that it can do, in float32. *full logits* is what one writes down.
Liger's kernels are Triton's: they take part on a GPU where `liger-kernel` is installed beside TRL.
"""

import subprocess
from typing import NamedTuple

from benchmarks import cases
from benchmarks.driver import MEMORY, RELATIVE, SECONDS, Contestant, Goal, Race, contestant, parse, run

PALIGN, JAX, TORCH, TRL, LIGER = "palign", "JAX, full logits", "PyTorch, full logits", "TRL, chunked", "Liger"
GRADIENTS = ("dhidden", "dkernel")
TOLERANCES = {
    "float32": {"loss": (RELATIVE, 1e-5)} | dict.fromkeys(GRADIENTS, (RELATIVE, 1e-3)),
    "bfloat16": {"loss": (RELATIVE, 2e-3)} | dict.fromkeys(GRADIENTS, (RELATIVE, 2e-2)),  # of 8 bits
}


class Sizes(NamedTuple):
    """Of a head."""

    targets: int
    width: int
    vocabulary: int
    dtype: str


TINY = Sizes(targets=64, width=16, vocabulary=320, dtype="float32")
CPU = {what: Sizes(targets=1024, width=256, vocabulary=32000, dtype="float32") for what in ("logps", "divergence")}
GPU = {
    "logps": Sizes(targets=8192, width=4096, vocabulary=151936, dtype="bfloat16"),
    "divergence": Sizes(targets=8192, width=4096, vocabulary=128256, dtype="bfloat16"),
}
GOALS_ON_GPU = {
    "logps": (
        Goal("H1", SECONDS, (TRL,), PALIGN, at_least=2.0),
        Goal("H1", SECONDS, (LIGER,), PALIGN, at_least=2.0),
        Goal("H1", SECONDS, (PALIGN,), TORCH, at_most=1.35),
        Goal("full logits", SECONDS, (JAX,), PALIGN),
    ),
    "divergence": (
        Goal("H6", SECONDS, (LIGER,), PALIGN, at_least=1.0),
        Goal("full logits", SECONDS, (JAX, TORCH), PALIGN),
    ),
}
# Nothing is asked for at the sizes that a CPU can do.
AGAINST_FULL = (
    Goal("full logits", SECONDS, (JAX,), PALIGN),
    Goal("full logits, PyTorch", SECONDS, (TORCH,), PALIGN),
    Goal("full logits, memory", MEMORY, (PALIGN,), JAX),
)
GOALS_ON_CPU = {"logps": (*AGAINST_FULL, Goal("TRL", SECONDS, (TRL,), PALIGN)), "divergence": AGAINST_FULL}
TITLES = {"logps": "log-probabilities", "divergence": "divergence"}  # docs/make_performance.py knows them


def race(what: str, flags, large: bool) -> Race:
    sizes = TINY if flags.tiny else (GPU if large else CPU)[what]
    shared = [f"--{name}={value}" for name, value in sizes._asdict().items()]
    shared += [f"--what={what}", f"--seed={flags.seed}"]

    def side(name: str, module: str, which: str, python: str | None = None) -> Contestant:
        given = {"python": python} if module == "head_torch" else {}
        return contestant(name, module, *shared, f"--side={which}", **given)

    entered = [side(PALIGN, "head_jax", "palign"), side(JAX, "head_jax", "full")]
    entered.append(side(TORCH, "head_torch", "full", flags.peers_python))
    if what == "logps":
        entered.append(side(TRL, "head_torch", "trl", flags.peers_python))
    if large:
        python = flags.peers_python if has_liger(flags.peers_python) else None
        entered.append(side(LIGER, "head_torch", "liger", python))
    title = f"{TITLES[what]}, {sizes.targets} targets, width {sizes.width}, V {sizes.vocabulary}, {sizes.dtype}"
    goals = (GOALS_ON_GPU if large else GOALS_ON_CPU)[what]
    return Race(title, tuple(entered), flags.rounds, goals, unit="targets", tolerances=TOLERANCES[sizes.dtype])


def has_liger(python: str | None) -> bool:
    """Whether Liger's kernels would run there."""
    program = "import liger_kernel.transformers, torch; assert torch.cuda.is_available()"
    return python is not None and not subprocess.run([python, "-c", program], capture_output=True).returncode


def main() -> None:
    flags = parse(__doc__, rounds=5)
    large = not flags.tiny and cases.on_gpu()
    run("loss_head", [race(what, flags, large) for what in TITLES], flags)


if __name__ == "__main__":
    main()
