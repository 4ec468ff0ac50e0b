"""Writes the table of docs/plan.md from configs/plans/*.json: `python docs/make_plans.py`.

The plans themselves come from `python -m palign.cli.plan ... --json=FILE`.
"""

import pathlib

from palign.plan.plan import Plan
from palign.plan.show import from_json
from palign.plan.topology import GIB

ROOT = pathlib.Path(__file__).parents[1]
PAGE, PLANS = ROOT / "docs" / "plan.md", ROOT / "configs" / "plans"
BEGIN, END = "<!-- docs/make_plans.py writes what follows -->\n", "<!-- up to here -->\n"
COLUMNS = (
    "config, stage",
    "topology",
    "rows x tokens, micro-batches",
    "state GiB",
    "frozen GiB",
    "in the step GiB",
    "total of available GiB",
    "TFLOP",
    "received GiB",
    "step s",
    "MFU at most",
)


def main() -> None:
    """Replaces the table."""
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def with_table(page: str) -> str:
    """The page with the table of the committed plans."""
    before, _, rest = page.partition(BEGIN)
    lines = ["|".join(("", *COLUMNS, "")), "|".join(("", *("---",) * len(COLUMNS), ""))]
    lines += ["|".join(("", *row(from_json(file.read_text(encoding="utf-8"))), "")) for file in sorted(PLANS.glob("*"))]
    return before + BEGIN + "".join(f"{line}\n" for line in lines) + END + rest.partition(END)[2]


def row(plan: Plan) -> tuple[str, ...]:
    """One plan, per device but for the rows."""
    memory, settings, times = plan.memory, plan.settings, plan.times
    gib = [memory.parameters + memory.optimizer, memory.frozen, memory.temporary]
    return (
        f"{pathlib.Path(plan.origin.config).stem}, {plan.origin.stage}",
        plan.topology,
        f"{settings['rows_per_step']} x {settings['row_length']}, {settings['micro_batches']}",
        *(f"{size / GIB:.2f}" for size in gib),
        f"{memory.total / GIB:.2f} of {memory.available / GIB:.2f}",
        f"{plan.work.flops / 1e12:.4g}",
        f"{sum(exchange.moved for exchange in plan.exchanges) / GIB:.1f}",
        f"{times.overlapped:.3g} to {times.one_after_another:.3g}",
        f"{plan.mfu(times.overlapped):.0%}",
    )


if __name__ == "__main__":
    main()
