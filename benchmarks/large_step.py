"""The DPO step and the AlignDistil step of a model of 1.5 billion parameters, in bfloat16. H2, H4, H5.

    python -m benchmarks.large_step --peers-python=.venv-peers/bin/python

On a GPU: sequences of 2048 tokens, half of them prompt; weights and optimizer in float32; everybody but plain JAX
computes each layer again in the backward. All of a race are on the device at once. On a CPU the same runs with the
small model in float32, to be tried. palign has the prompt before every response, which is the very work of the others;
AlignDistil trains on the chosen response of each pair.

`planned_bytes` of palign's rounds is what the compiler says of the step, to be held against the device's peak.
"""

import contextlib
import functools
import pathlib

from benchmarks import cases
from benchmarks.driver import MEMORY, RELATIVE, SECONDS, Contestant, Goal, Race, contestant, parse, run

TRL, COMPILED, PLAIN, PALIGN, PORT = "TRL", "PyTorch loop, compiled", "plain JAX", "palign", "the authors' loop"


def main() -> None:
    flags = parse(__doc__, rounds=5)
    scale = cases.choose_scale(tiny=flags.tiny)
    length = 16 if flags.tiny else 1024 if scale == cases.BIG else 256  # of a prompt, and of a response
    pairs = 4 if scale == cases.BIG else 2
    draw = functools.partial(
        cases.equal,
        prompt=length,
        response=length,
        vocabulary=scale.geometry.vocabulary,
        rounds=flags.rounds + 1,
        seed=flags.seed,
    )
    with contextlib.ExitStack() as stack:

        def write(pairs: int, seed: int) -> pathlib.Path:
            return stack.enter_context(cases.written(scale.geometry, draw(pairs), dtype=scale.dtype, seed=seed))

        case, models = write(pairs, 0), [write(1, seed) for seed in range(3)]
        races = [*dpo(case, pairs, length, scale, flags), aligndistil(models, length, scale, flags)]
        run("large_step", races, flags)


def dpo(case: pathlib.Path, pairs: int, length: int, scale: cases.Scale, flags) -> list[Race]:
    """Each of the others against palign by itself, so that two at a time fit the device."""
    shared, batch = f"--case={case}", f"--batch={pairs}"
    ours = palign(shared, "--layout=unshared", f"--rows={pairs}", tokens=4 * length, scale=scale)
    peer = functools.partial(contestant, python=flags.peers_python)
    others = {
        peer(TRL, "trl_trainer", shared, batch, "--checkpointing"): Goal("H2", SECONDS, (TRL,), PALIGN, at_least=1.5),
        peer(COMPILED, "torch_loop", shared, batch, "--checkpointing", "--compile"): Goal(
            "H2", SECONDS, (COMPILED,), PALIGN, at_least=1.0
        ),
        contestant(PLAIN, "plain_jax", shared, batch): Goal("H4", MEMORY, (PALIGN,), PLAIN, at_most=0.6),
    }
    return [
        Race(
            f"DPO, {pairs} pairs of 2 x {2 * length} tokens, {scale.dtype}, against {other.name}",
            (other, ours),
            flags.rounds,
            (goal,),
            tolerances=scale.tolerances,
        )
        for other, goal in others.items()
    ]


def aligndistil(models: list[pathlib.Path], length: int, scale: cases.Scale, flags) -> Race:
    """One sequence: the others' float32 logits of three models fill what is left of a device."""
    shared = [f"--{role}={path}" for role, path in zip(("case", "teacher", "reverse"), models, strict=True)]
    port = contestant(PORT, "torch_aligndistil", *shared, "--checkpointing", python=flags.peers_python)
    ours = palign(*shared, "--method=aligndistil", "--rows=1", tokens=2 * length, scale=scale)
    goals = (Goal("H5", SECONDS, (PORT,), PALIGN, at_least=2.0), Goal("memory", MEMORY, (PALIGN,), PORT))
    apart = (RELATIVE, 1e-3 if scale.dtype == "float32" else 2e-2)  # the loss is small
    tolerances = {"loss": apart, "grad_norm": apart}
    title = f"AlignDistil, one sequence of {2 * length} tokens, {scale.dtype}"
    return Race(title, (port, ours), flags.rounds, goals, tolerances=tolerances)


def palign(*more: str, tokens: int, scale: cases.Scale) -> Contestant:
    block = 64 if scale.dtype == "float32" else 128
    return contestant(PALIGN, "palign_step", *more, f"--tokens={-(-tokens // block) * block}", f"--block={block}")


if __name__ == "__main__":
    main()
