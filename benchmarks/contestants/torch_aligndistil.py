"""AlignDistil as its authors train it, in PyTorch: three models, full float32 logits at every position, eager.

After `aligndistil_offpolicy_trainer.py` of songmzhang/AlignDistil, on chosen responses. The positions are those that
predict the response's tokens, so that losses can be compared; theirs are one later.
"""

import argparse
import pathlib
from collections.abc import Sequence

import torch

from benchmarks import cases
from benchmarks.contestants.distill_inputs import BETA0, EPSILON, SCALE
from benchmarks.contestants.padded import pad
from benchmarks.contestants.torch_loop import PACKAGES, describe, load
from benchmarks.worker import Done, serve


def collate(pairs: Sequence[cases.Pair], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and which positions predict a response's token: `[B, S]` and `[B, S - 1]`."""
    batch = pad([pair._replace(rejected=pair.chosen[:1]) for pair in pairs])
    token, response = (torch.from_numpy(array[: len(pairs)]).to(device) for array in batch)
    return token.long(), response[:, 1:]


def aligndistil(student: torch.Tensor, teacher: torch.Tensor, reverse: torch.Tensor, mask: torch.Tensor):
    """The mean over a response's tokens, then over responses; logits `[B, S - 1, V]`."""
    student_probs, student_logps = torch.softmax(student, -1), torch.log_softmax(student, -1)
    with torch.no_grad():
        distance = (torch.softmax(teacher, -1) - torch.softmax(reverse, -1)).abs().sum(-1)
        weight = SCALE / 2 * distance + EPSILON
        target = torch.log_softmax(weight[..., None] * (teacher - reverse) + teacher, -1)
    each = (student_probs * (student_logps - target)).sum(-1) * BETA0 / weight
    return ((each * mask).sum(-1) / mask.sum(-1)).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name in ("case", "teacher", "reverse"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--checkpointing", action="store_true")
    flags = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = cases.read_rounds(flags.case)
    model, *frozen = (load(case, device) for case in (flags.case, flags.teacher, flags.reverse))
    if flags.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    mixed = torch.autocast(device, torch.bfloat16, enabled=cases.read_dtype(flags.case) == "bfloat16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=cases.LEARNING_RATE, weight_decay=0.0, fused=True)

    def logits_of(which, token: torch.Tensor) -> torch.Tensor:
        with mixed:
            return which(input_ids=token, use_cache=False).logits[:, :-1].float()

    def take(index: int) -> Done:
        token, mask = collate(rounds[index], device)
        with torch.no_grad():
            teacher, reverse = (logits_of(each, token) for each in frozen)
        loss = aligndistil(logits_of(model, token), teacher, reverse, mask)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cases.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        values = {"loss": loss.item(), "grad_norm": norm.item()}
        return Done(values, cases.work(rounds[index]), {"ids": cases.digest(rounds[index])})

    same = {"weights": ", ".join(map(cases.weights_digest, (flags.case, flags.teacher, flags.reverse)))}
    serve(take, packages=PACKAGES, same=same, **describe(device))


if __name__ == "__main__":
    main()
