"""The quick start's table and page."""

import json
from collections.abc import Mapping

from etils import epath

from palign.data import world
from palign.eval.winrate import Interval
from palign.recipes.quickstart_scores import CONTROL, Scores
from palign.report.contents import Cell, FrontierPoint, Output, Row, RunReport, Sample, Table, WinRate
from palign.report.page import write_report
from palign.report.table import print_table
from palign.train.metrics import read_metrics
from palign.train.sources import CONFIG

LABELS = {
    "sft": "SFT",
    CONTROL: "SFT again",
    "dpo": "DPO",
    "reverse": "reverse DPO",
    "ipo": "IPO",
    "lipo": "LiPO-λ",
    "aligndistil": "AlignDistil",
}
SHOWN = 12  # prompts whose samples stand side by side


def write(workdir: epath.Path, places: Mapping[str, epath.Path], scores: Mapping[str, Scores]) -> epath.Path:
    """Prints the table and writes `report.html`; returns its path."""
    table = make_table(scores)
    print_table(table)
    page = workdir / "report.html"
    write_report(page, make_report(places, scores, table))
    print(f"report: {page}\nsample from it: python -m palign.cli.generate --workdir={places['dpo']} --prompt=...")
    return page


def make_table(scores: Mapping[str, Scores]) -> Table:
    """A row a model, with 95% intervals."""
    columns = ("gold reward", "win rate", "KL to SFT", "grammatical", "words", "distinct", "ranks right", "train tok/s")
    rows = []
    for name, s in scores.items():
        cells = (
            _cell(s.gold),
            _cell(s.win_rate, percent=True, digits=1) if name != "sft" else Cell(None),
            _cell(s.kl),
            _cell(s.valid, percent=True, digits=1),
            _cell(s.length, digits=1),
            Cell(s.distinct, digits=0, percent=True),
            _cell(s.ranking, percent=True, digits=1),
            Cell(s.tokens_per_second, digits=0),
        )
        rows.append(Row(LABELS[name], cells))
    n = next(iter(scores.values())).gold.n
    return Table(columns, tuple(rows), caption=f"{n} held-out prompts, one sample each, 95% intervals")


def _cell(x: Interval, **how) -> Cell:
    return Cell(x.mean, x.low, x.high, **how)


def make_report(places: Mapping[str, epath.Path], scores: Mapping[str, Scores], table: Table) -> RunReport:
    """The page's contents."""
    methods = [name for name in scores if name not in ("sft", CONTROL)]
    prompts = world.split_prompts(seed=0)[1]
    return RunReport(
        title="palign quick start",
        facts={
            "task": "restaurant reviews; the gold reward is a program that wants them glad, polite and short",
            "labels": "four samples a prompt from the SFT model, ranked with Bradley-Terry noise on gold",
            "grammar": "measured, not rewarded: where it falls while gold rises, the reward is being over-optimised",
        },
        table=table,
        curves=_curves(places),
        frontier=[_point(name, scores[name]) for name in ("sft", *methods)],
        win_rates=[
            WinRate(LABELS[name], w.mean, w.low, w.high, control=name == CONTROL)
            for name in (CONTROL, *methods)
            for w in (scores[name].win_rate,)
        ],
        samples=[
            Sample(prompts[i], {LABELS[name]: _output(prompts[i], scores[name].texts[i]) for name in ("sft", *methods)})
            for i in range(min(SHOWN, len(scores["sft"].texts)))
        ],
        notes=[
            "KL is the sum over a response's tokens of KL(policy ‖ SFT), exact at each token, on the policy's samples.",
            "A draw counts half a win. 'SFT again' is the SFT model's other samples: what no improvement looks like.",
            "'ranks right': of two SFT samples the one with more gold reward has the higher log-probability.",
        ],
        config={name: json.loads((place / CONFIG).read_text()) for name, place in places.items()},
    )


def _point(name: str, s: Scores) -> FrontierPoint:
    return FrontierPoint(
        LABELS[name],
        s.kl.mean,
        s.gold.mean,
        kl_interval=(s.kl.low, s.kl.high),
        gold_interval=(s.gold.low, s.gold.high),
        trajectory=s.trajectory,
    )


def _output(prompt: str, text: str) -> Output:
    return Output(text, gold=world.gold_reward(prompt, text), valid=world.is_grammatical(text))


def _curves(places: Mapping[str, epath.Path]) -> dict:
    """What each stage learned: SFT's loss, the preference methods' held-out accuracy and margin, the divergence."""
    lines = {name: read_metrics(place) for name, place in places.items()}

    def series(metric: str, only: tuple[str, ...]) -> dict:
        found = {name: [(x["step"], x[metric]) for x in lines.get(name, ()) if metric in x] for name in only}
        return {LABELS[name]: tuple(zip(*points, strict=True)) for name, points in found.items() if points}

    ranked = ("dpo", "ipo", "lipo")
    panels = {
        "SFT loss, nats a token": {
            "train": series("loss", ("sft",)).get("SFT"),
            "held-out": series("eval_heldout_loss", ("sft",)).get("SFT"),
        },
        "held-out reward accuracy": series("eval_heldout_rewards/accuracies", ranked),
        "held-out reward margin": series("eval_heldout_rewards/margins", ranked),
        "log-probability of chosen, held-out": series("eval_heldout_logps/chosen", ranked),
        "AlignDistil: KL to the teacher, held-out": series("eval_heldout_divergence", ("aligndistil",)),
    }
    return {title: {k: v for k, v in panel.items() if v} for title, panel in panels.items() if any(panel.values())}
