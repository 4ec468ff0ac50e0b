"""A careful plain PyTorch loop: transformers' Llama, SDPA, logits at response tokens only, the fused AdamW.

--compile             model, head and loss under `torch.compile`
--checkpointing       each layer computed again in the backward, to save memory
--reference=cached    the reference's log-probabilities are computed once, before
"""

import argparse
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from benchmarks import cases
from benchmarks.contestants.padded import pad
from benchmarks.worker import Done, serve

PACKAGES = ("transformers", "torch", "numpy")


class Inputs(NamedTuple):
    """All chosen, then all rejected; what predicts a response's token stands at `(row, column)`."""

    token: torch.Tensor  # [B, S]
    row: torch.Tensor  # [N]
    column: torch.Tensor  # [N]
    target: torch.Tensor  # [N]


def collate(pairs: Sequence[cases.Pair], device: str) -> Inputs:
    batch = pad(pairs)
    row, column = np.nonzero(batch.response[:, 1:])
    arrays = (batch.token, row, column, batch.token[row, column + 1])
    return Inputs(*(torch.from_numpy(array).long().to(device) for array in arrays))


def sequence_logps(model, inputs: Inputs) -> torch.Tensor:
    """Log-probability of each response, `[B]` nats. No mask but the causal one: padding is at the end."""
    hidden = model.model(input_ids=inputs.token, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[inputs.row, inputs.column])
    logps = -F.cross_entropy(logits, inputs.target, reduction="none")
    return torch.zeros(len(inputs.token), device=logps.device).index_add(0, inputs.row, logps)


def dpo(model, inputs: Inputs, reference: torch.Tensor) -> torch.Tensor:
    chosen, rejected = (sequence_logps(model, inputs) - reference).chunk(2)
    return -F.logsigmoid(cases.BETA * (chosen - rejected)).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--case", type=pathlib.Path, required=True)
    parser.add_argument("--batch", type=int, required=True, help="pairs of a step")
    parser.add_argument("--reference", choices=("live", "cached"), default="live")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    flags = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = cases.read_rounds(flags.case)
    model = load(flags.case, device)
    frozen = load(flags.case, device).requires_grad_(False)
    if flags.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    mixed = torch.autocast(device, torch.bfloat16, enabled=cases.read_dtype(flags.case) == "bfloat16")
    loss_of, logps_of = (torch.compile(f) if flags.compile else f for f in (dpo, sequence_logps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=cases.LEARNING_RATE, weight_decay=0.0, fused=True)

    def reference_of(inputs: Inputs) -> torch.Tensor:
        with torch.no_grad(), mixed:
            return logps_of(frozen, inputs)

    cached: dict[tuple[int, int], torch.Tensor] = {}
    if flags.reference == "cached":
        for index, pairs in enumerate(rounds):
            for first in range(0, len(pairs), flags.batch):
                cached[index, first] = reference_of(collate(pairs[first : first + flags.batch], device))
        del frozen

    def take(index: int) -> Done:
        slots, pairs = 0, rounds[index]
        for first in range(0, len(pairs), flags.batch):
            inputs = collate(pairs[first : first + flags.batch], device)
            slots += inputs.token.numel()
            reference = cached[index, first] if cached else reference_of(inputs)
            with mixed:
                loss = loss_of(model, inputs, reference)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cases.MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        work = cases.work(pairs) | {"slots": slots}
        return Done({"loss": loss.item(), "grad_norm": norm.item()}, work, {"ids": cases.digest(pairs)})

    serve(take, packages=PACKAGES, same={"weights": cases.weights_digest(flags.case)}, **describe(device))


def load(case: pathlib.Path, device: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(case, dtype=torch.float32, attn_implementation="sdpa").to(device)


def describe(device: str) -> dict:
    """For `serve`: the accelerator's name and its peak."""
    if device == "cpu":
        return {}
    return {"device": torch.cuda.get_device_name(), "device_peak": torch.cuda.max_memory_allocated}


if __name__ == "__main__":
    main()
