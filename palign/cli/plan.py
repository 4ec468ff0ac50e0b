"""Say what a training step needs of a pod, before there is one: memory per chip, collectives, a bound on its time.

python -m palign.cli.plan --config=configs/dpo_8b.py --topology=v5p:4x4x4

The step is compiled ahead of time for the topology; no accelerator and no data are needed. `--sweep` tries mesh shapes,
rematerialisation and micro-batches and writes the best config that fits to `--output`.
"""

import argparse
import pathlib
from collections.abc import Sequence

from palign.cli import app
from palign.plan.topology import parse_topology, prepare_process


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, prepares the process for its topology, and plans."""
    parser, overrides = _parser(), tuple(a.removeprefix("--config.") for a in arguments if a.startswith("--config."))
    given = parser.parse_args([a for a in arguments if not a.startswith("--config.")])
    for name in ("axes", "output"):
        if getattr(given, name) and not given.sweep:
            raise ValueError(f"--{name} has no effect without --sweep; remove it, or sweep")
    topology = parse_topology(given.topology)
    prepare_process(topology)  # before anything imports jax

    from palign.config.load import load_plain, resolve_recipe
    from palign.plan.plan import Origin, make_plan
    from palign.plan.show import print_plan, to_json
    from palign.plan.sweep import sweep, write_config

    plain = load_plain(given.config, overrides)
    stages = resolve_recipe(plain, name=pathlib.Path(given.config.partition(":")[0]).stem).stages
    stage = given.stage or list(stages)[-1]
    if stage not in stages:
        raise ValueError(f"--stage={stage}: the config has {', '.join(stages)}")
    config, origin = stages[stage], Origin(given.config, stage, overrides)
    if given.sweep:
        prefix = f"stages.{stage}." if plain.get("stages") else ""
        axes = (given.axes or "fsdp").split(",")
        plan = sweep(config, topology, origin, axes=axes, prefix=prefix, responses=given.responses)[0]
    else:
        plan = make_plan(config, topology, origin, responses=given.responses)
    if given.output:
        write_config(plan, load_plain(given.config, plan.origin.overrides), pathlib.Path(given.output))
    print_plan(plan)
    if given.json:
        pathlib.Path(given.json).write_text(to_json(plan), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = app.parser("palign.cli.plan", __doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument("--topology", required=True, help="such as v5e:16x16, 2xv5e:16x16, h100:2x8 or cpu:8")
    parser.add_argument("--stage", default="", help="of a recipe; the last one if not named")
    parser.add_argument("--responses", type=int, default=0, help="of an example, which the data would say")
    parser.add_argument("--json", default="", metavar="FILE", help="write the figures there too")
    parser.add_argument("--sweep", action="store_true", help="try meshes, rematerialisation and micro-batches")
    parser.add_argument("--axes", default="", help="of the mesh that --sweep tries: fsdp (default), context, tensor")
    parser.add_argument("--output", default="", metavar="FILE", help="write the sweep's best config there")
    parser.add_argument("--config.KEY", metavar="VALUE", help="override a setting, e.g. --config.mesh.fsdp=8")
    return parser


if __name__ == "__main__":
    raise SystemExit(app.run(main))
