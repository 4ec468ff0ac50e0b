"""A plan for the terminal and as JSON."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from palign.plan.cost import Times, Work
from palign.plan.plan import Exchange, Memory, Origin, Plan, Step
from palign.plan.topology import GIB

NESTED: dict[str, Any] = {"origin": Origin, "step": Step, "memory": Memory, "work": Work, "times": Times}


def to_json(plan: Plan) -> str:
    """All figures of a plan; how long compiling took is this machine's business and left out."""
    plain = dataclasses.asdict(plan) | {name: getattr(plan, name)._asdict() for name in NESTED}
    plain["exchanges"] = [exchange._asdict() for exchange in plan.exchanges]
    del plain["compile_seconds"]
    return json.dumps(plain, indent=1) + "\n"


def from_json(text: str) -> Plan:
    """The plan that `to_json` wrote."""
    plain = json.loads(text)
    plain |= {name: made(**plain[name]) for name, made in NESTED.items()}
    plain["exchanges"] = tuple(Exchange(**exchange) for exchange in plain["exchanges"])
    return Plan(**plain | {"faults": tuple(plain["faults"]), "compile_seconds": math.nan})


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints a plan; beside each figure stands whether the compiler said it or it was computed."""
    console = console or Console()
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    config, stage, _ = plan.origin
    console.print(f"[bold]{config}[/bold], stage {stage}, on {plan.topology}: {plan.devices} devices ({mesh})")
    console.print(f"compiled in {plan.compile_seconds:.0f} s with jax {plan.jax_version}")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    for name, value, source in _lines(plan):
        table.add_row(name, value, f"[dim]{source}[/dim]")
    console.print(table)
    for fault in plan.faults:
        console.print(f"[red]fault:[/red] {fault}")


def print_sweep(plans: Sequence[Plan], console: Console | None = None) -> None:
    """Prints what fits, the best first."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("mesh", "remat", "micro-batches", "us a token", "memory", "MFU at most"):
        table.add_column(name, justify="left" if name == "mesh" else "right")
    for plan in plans:
        mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
        remat, micro_batches = str(plan.settings["remat"]), str(plan.settings["micro_batches"])
        time, mfu = f"{1e6 * plan.seconds_per_token:.3g}", f"{plan.mfu(plan.times.overlapped):.0%}"
        table.add_row(mesh, remat, micro_batches, time, _bytes(plan.memory.total), mfu)
    (console or Console()).print(table)


def _lines(plan: Plan) -> list[tuple[str, str, str]]:
    step, memory, work, times = plan.step, plan.memory, plan.work, plan.times
    tree = f"assumed: prompt and {step.responses} response{'s' * (step.responses > 1)} of {step.part} tokens"
    shortest, longest = times.overlapped, times.one_after_another
    peak = "computed, at the chip's peak"
    moved = [(e.kind, f"{e.times:,} times, {_bytes(e.bytes)}, {_bytes(e.moved)} received", e) for e in plan.exchanges]
    return [
        ("model", f"{plan.parameters / 1e9:.3g} B parameters, {plan.settings['dtype']} products", "computed"),
        ("tokens a step", f"{step.tokens:,} ({step.targets:,} targets, {step.examples:,} examples)", tree),
        ("memory: parameters", _bytes(memory.parameters), "computed, per device"),
        ("  optimizer", _bytes(memory.optimizer), "computed"),
        ("  frozen models", _bytes(memory.frozen), "computed"),
        *([("  in the host's", _bytes(memory.host), "computed; its way over is in no time here")] * (memory.host > 0)),
        ("  batch", _bytes(memory.batch), "computed"),
        ("  inside the step", _bytes(memory.temporary), "compiled: activations, gradients, gathered weights"),
        ("  total", f"{_bytes(memory.total)} of {_bytes(memory.available)} ({plan.share:.0%})", "compiled"),
        ("FLOPs", f"{work.flops / 1e12:.3g} T ({work.model_flops / 1e12:.3g} T asked for)", "computed, per device"),
        ("bytes of memory", _bytes(work.memory_bytes), "computed"),
        *((name, text, _source(exchange)) for name, text, exchange in moved),
        ("time: compute", _seconds(times.compute), peak),
        ("  memory", _seconds(times.memory), peak),
        ("  links", _seconds(times.links), f"{peak}, in a ring over all links"),
        ("  network", _seconds(times.network), peak),
        ("step", f"{_seconds(shortest)} to {_seconds(longest)}", "computed: all at once, nothing at once"),
        ("MFU", f"{plan.mfu(shortest):.0%} to {plan.mfu(longest):.0%}", "computed, not measured"),
    ]


def _source(exchange: Exchange) -> str:
    return f"compiled, over the {exchange.over}" + ("" if exchange.counted else "; the heads' trips computed")


def _bytes(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.2f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
