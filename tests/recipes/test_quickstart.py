"""The quick start: its configs, its table and page from given scores, and (slowly) all of it at its smallest."""

import json
import re

import pytest

from palign.config.load import resolve_run, to_plain
from palign.data import world
from palign.eval.winrate import Interval
from palign.recipes.quickstart import DEMO, FULL, SMOKE, preference_configs, quickstart, sft_config
from palign.recipes.quickstart_report import LABELS, make_table, write
from palign.recipes.quickstart_scores import CONTROL, Scores
from palign.recipes.world_runs import base_config
from palign.train.build import check_config
from tests.recipes.tiny_runs import one_device

# What would make a page fetch something: attributes with addresses, and the same within styles.
FETCHES = re.compile(
    r"""(?:src|href|srcset|action|data)\s*=\s*["']?(?!["']?(?:#|data:))[^"'\s>]+|@import|url\((?!["']?(?:data:|#))"""
)


def interval(mean):
    return Interval(mean, mean - 0.25, mean + 0.5, 16)


def scores(base, **more):
    values = dict(
        gold=interval(base), win_rate=interval(0.5 + base / 10), kl=interval(base), valid=interval(0.75),
        length=interval(12.5), distinct=0.5, ranking=interval(0.625), tokens_per_second=1234.0,
        trajectory=((0.0, 0.0), (base, base)), texts=tuple(f"text {base} of {i}" for i in range(16)),
    )  # fmt: skip
    return Scores(**values | more)


@pytest.mark.parametrize("size", [SMOKE, DEMO, FULL])
def test_every_stage_of_every_size_is_a_config_that_training_takes(size, tmp_path):
    configs = {"sft": sft_config(tmp_path, size), **preference_configs(tmp_path, size)}
    assert list(configs)[:3] == ["sft", "dpo", "reverse"] and list(configs)[-1] == "aligndistil"
    assert set(size.methods) == configs.keys() - {"sft", "reverse"}
    for config in configs.values():
        run = resolve_run(config)
        check_config(run)
        assert resolve_run(json.loads(json.dumps(to_plain(run)))) == run


def test_reverse_dpo_is_dpo_with_the_worse_preferred_and_aligndistil_reads_both(tmp_path):
    configs = preference_configs(tmp_path, DEMO)
    dpo, reverse = configs["dpo"], configs["reverse"]
    assert reverse["data"] == dpo["data"] | {"records": "reversed"}
    assert {k: v for k, v in reverse.items() if k != "data"} == {k: v for k, v in dpo.items() if k != "data"}
    distilled = configs["aligndistil"]
    assert (distilled["teacher_from"], distilled["reverse_from"], distilled["init_from"]) == ("dpo", "reverse", "sft")
    assert configs["lipo"]["data"]["path"].endswith("lists.jsonl")


def test_making_a_config_does_not_change_the_settings_that_all_share(tmp_path):
    before = json.dumps(base_config(), sort_keys=True)
    sft_config(tmp_path, DEMO)["data"]["path"] = "changed"
    preference_configs(tmp_path, FULL)
    assert json.dumps(base_config(), sort_keys=True) == before


def test_the_table_has_a_row_a_model_and_a_win_rate_for_all_but_sft():
    table = make_table({"sft": scores(0.0), CONTROL: scores(0.1), "dpo": scores(1.0), "lipo": scores(2.0)})
    assert [row.label for row in table.rows] == ["SFT", "SFT again", "DPO", "LiPO-λ"]
    gold, wins = table.columns.index("gold reward"), table.columns.index("win rate")
    assert [row.cells[gold].value for row in table.rows] == [0.0, 0.1, 1.0, 2.0]
    assert (table.rows[2].cells[gold].low, table.rows[2].cells[gold].high) == (0.75, 1.5)
    assert [row.cells[wins].value is None for row in table.rows] == [True, False, False, False]
    assert "16 held-out prompts" in table.caption


def test_the_page_holds_all_models_and_samples_and_fetches_nothing(tmp_path, capsys):
    places = {}
    for name in ("sft", "dpo", "reverse", "lipo"):
        places[name] = tmp_path / name
        places[name].mkdir()
        (places[name] / "config.json").write_text(json.dumps({"train": {"max_steps": 4}}))
        curves = {"loss": 1.5, "eval_heldout_loss": 2.0, "eval_heldout_logps/chosen": -9.0}
        curves |= {"eval_heldout_rewards/accuracies": 0.5, "eval_heldout_rewards/margins": 0.1}
        lines = [{"step": step, **curves} for step in (1, 2)]
        (places[name] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {"sft": scores(0.0), CONTROL: scores(0.1), "dpo": scores(1.0), "lipo": scores(2.0)}
    page = write(tmp_path, places, found)
    printed, html = capsys.readouterr().out, page.read_text()
    for name in found:
        assert LABELS[name] in printed and LABELS[name] in html
    assert FETCHES.findall(html) == []
    assert world.split_prompts(seed=0)[1][0] in html and "text 2.0 of 0" in html
    for title in ("SFT loss", "held-out reward accuracy", "held-out reward margin"):
        assert title in html
    assert str(page) in printed and "palign.cli.generate" in printed


@pytest.mark.parametrize(
    ("html", "fetched"),
    [
        ('<img src="https://x.org/a.png">', True),
        ("<script src=//x.org/a.js></script>", True),
        ("<link rel=stylesheet href='style.css'>", True),
        ("<style>@import 'x.css'</style>", True),
        ("<p style='background: url(http://x)'>", True),
        ('<a href="#top">up</a><img src="data:image/png;base64,AA"><rect fill="url(#g)">', False),
        ('<svg xmlns="http://www.w3.org/2000/svg">', False),
    ],
)
def test_what_a_page_fetches_is_seen(html, fetched):
    assert bool(FETCHES.findall(html)) == fetched


@pytest.mark.slow
def test_the_quick_start_runs_from_end_to_end_and_a_second_time_trains_nothing(tmp_path, capsys):
    with one_device():
        page = quickstart(tmp_path, SMOKE)
    printed = capsys.readouterr().out
    for label in ("SFT", "SFT again", "DPO", "LiPO-λ", "AlignDistil"):
        assert re.search(rf"^{label}\s+-?\d", printed, re.M), label
    assert page == tmp_path / "report.html" and FETCHES.findall(page.read_text()) == []
    names = {path.name for path in tmp_path.iterdir()}
    assert {"01-sft", "02-sample", "03-dpo", "04-reverse", "05-lipo", "06-aligndistil", "data", "scores.json"} <= names

    pairs = [json.loads(line) for line in (tmp_path / "02-sample" / "pairs.jsonl").read_text().splitlines()]
    lists = [json.loads(line) for line in (tmp_path / "02-sample" / "lists.jsonl").read_text().splitlines()]
    assert len(pairs) == len(lists) == SMOKE.prompts
    for pair, ranked in zip(pairs, lists, strict=True):
        best, worst = (ranked["scores"].index(pick(ranked["scores"])) for pick in (max, min))
        assert pair["prompt"] == ranked["prompt"]
        assert (pair["chosen"], pair["rejected"]) == (ranked["responses"][best], ranked["responses"][worst])
    heldout = set(world.split_prompts(seed=0)[1])
    assert not heldout & {record["prompt"] for record in lists}

    found = json.loads((tmp_path / "scores.json").read_text())
    assert list(found) == ["sft", CONTROL, "dpo", "lipo", "aligndistil"]
    kl = Scores._fields.index("kl")
    assert found["sft"][kl][0] == 0.0 and all(found[name][kl][0] > 0 for name in ("dpo", "lipo", "aligndistil"))

    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.parent != tmp_path}
    scored = (tmp_path / "scores.json").read_text()
    with one_device():
        quickstart(tmp_path, SMOKE)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.parent != tmp_path} == files
    assert (tmp_path / "scores.json").read_text() == scored
    assert capsys.readouterr().out == printed
