"""A report on data before anything is trained on them."""

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from palign.config.load import to_plain
from palign.config.schema import RunConfig
from palign.data.loader import Dataset
from palign.data.pack import tree_tokens
from palign.data.plan import fill_ratio, row_needs
from palign.data.records import Record, RecordError
from palign.data.sources import open_source
from palign.data.stored import TreeSize, tree_sizes
from palign.data.strict_json import as_object, parse_row
from palign.data.tokenize import TokenTree
from palign.data.tokenizers import Tokenizer
from palign.eval.data_statistics import (
    best_and_worst,
    leaks,
    length_differences,
    near_pairs,
    normalised_text,
    repeats,
)
from palign.eval.winrate import mean_interval, wilson_interval
from palign.report.contents import Cell, Histogram, Row, RunReport, Table, Token, TokenSample
from palign.report.page import write_report
from palign.report.table import print_table
from palign.train.metrics import shown
from palign.train.once import Tokenised, is_prepared, read_manifest
from palign.train.prepare import Prepared, data_key, plan_all, read_all, tokenise_sets
from palign.train.prepare_once import inherited_tokenizer

SCHEMA_ROWS = 1000  # rows of each source whose columns are shown
COMPARED, NEAR = 2000, 0.1  # examples whose edit distance is taken, and what counts as near
BINS = 30  # of a histogram, at most
SHOWN, SHOWN_TOKENS = 4, 400  # examples that are shown, and the most tokens of a text


class Inspected(NamedTuple):
    """Data, and what a run would make of them."""

    config: RunConfig
    sets: Mapping[str, Sequence[Record]]
    tokenised: Tokenised
    planned: Prepared | None  # None: no run would take them as they are


def inspect(config: RunConfig, output: epath.PathLike = "") -> RunReport:
    """Reads, tokenises and plans the data of a run, prints what they are, and writes a page where that is asked for.

    Args:
        config: of the run.
        output: the page; "": none.

    Returns:
        What is on the page.

    Raises:
        ValueError: data that no run would take either; of examples that do not fit a row after the report is written.
    """
    if is_prepared(config.data.path):
        source = read_manifest(epath.Path(config.data.path))["path"] or "its sources"
        raise ValueError(f"{data_key(config.data)}: holds tokens, inspect what it was made from: {source}")
    sets, read = read_all(config.data)
    with tempfile.TemporaryDirectory() as workdir:
        inherited = inherited_tokenizer(config, epath.Path(workdir))
        tokenised = tokenise_sets(config, sets, read, epath.Path(workdir), inherited)
    planned, refusal = None, None
    try:
        planned = plan_all(config, tokenised)
    except ValueError as error:
        refusal = error
    report = make_report(Inspected(config, sets, tokenised, planned))
    for heading, table in report.tables.items():
        print(f"\n{heading}")
        print_table(table)
    if output:
        print(f"\npage: {write_report(output, report)}")
    if refusal:
        raise refusal
    return report


def make_report(data: Inspected) -> RunReport:
    """What the page shows."""
    train = data.tokenised.trees["train"]
    return RunReport(
        title="The data",
        facts={
            "path": ", ".join(data.config.data.mixture) or data.config.data.path,
            "format": ", ".join(n.removeprefix("format/") for n in data.tokenised.read if n.startswith("format/")),
            "tokenizer": f"{data.tokenised.tokenizer.vocab_size:,} ids",
        },
        tables={
            "Look at": _odd(data),
            "Sets": _sets(data),
            "Lengths": _lengths(data),
            "Read": _counts(data.tokenised.read),
            "Columns": _columns(data.config),
        },
        histograms=_histograms(tree_sizes(train)),
        token_samples=[_sample(train[i], data.tokenised.tokenizer) for i in _drawn(len(train))],
        notes=[
            "Dropped: too long under data.truncation, or all responses the same tokens; what was skipped or dropped as "
            "it was read stands under Read.",
            "Lengths are in tokens, after truncation. A response's end token counts.",
            "Best and worst are those of an example's scores; an interval is at 95%.",
            f"Nearly the same: fewer than {NEAR:.0%} of the longer one's tokens are edited; of at most {COMPARED:,} "
            "examples, drawn.",
            "Sharing: the tokens of a run if every prompt were written again before each response, over those that "
            "palign writes.",
        ],
        config=to_plain(data.config.data) | {"tokenizer": to_plain(data.config.tokenizer)},
    )


def _odd(data: Inspected) -> Table:
    """What usually is a mistake: how many, of how many, and where the first is."""
    train, trees = data.sets["train"], data.tokenised.trees["train"]
    sizes, where = tree_sizes(trees), {record.id: record.where for record in train}
    near = near_pairs(trees, most=COMPARED, below=NEAR, seed=data.config.data.seed)
    lists = [i for i, size in enumerate(sizes) if len(size.scores) > 1]
    ties = [i for i in lists if len(set(sizes[i].scores)) < len(sizes[i].scores)]
    equal = [i for i in ties if len(set(sizes[i].scores)) == 1]
    kept = {tree.id for tree in trees}
    dropped = [record for record in train if record.id not in kept]
    counts = data.tokenised.counts["train"]

    def of_trees(label: str, found: Sequence[int], total: int) -> Row:
        return _found(label, len(found), total, where[trees[found[0]].id] if found else "")

    def of_records(label: str, found: Sequence[int], records: Sequence[Record]) -> Row:
        return _found(label, len(found), len(records), records[found[0]].where if found else "")

    rows = [
        of_records("records that were there before", repeats((r.prompt, r.responses, r.scores) for r in train), train),
        of_records("prompts that were there before", repeats(r.prompt for r in train), train),
        of_trees("best and worst nearly the same", near.near, near.examined),
        of_trees("two responses of one score", ties, len(lists)),
        of_trees("all responses of one score", equal, len(lists)),
        _found("records dropped", len(dropped), len(train), dropped[0].where if dropped else ""),
        _found("responses cut", counts["truncated"], counts["responses"]),
        _found("prompts cut", counts["prompts_cut"], len(trees)),
    ]
    for name, records in data.sets.items():
        if name != "train":
            exact = leaks(records, train, lambda prompt: prompt)
            rows.append(of_records(f"{name}: prompt is trained on", exact, records))
            loose = leaks(records, train, normalised_text)
            rows.append(of_records(f"{name}: prompt is, but for case and marks", loose, records))
    return Table(("found", "of", "share", "first at"), rows, label="train, if not said otherwise")


def _found(label: str, count: int, total: int, where: str = "") -> Row:
    share = Cell(count / total if total else None, digits=1, percent=True)
    place = Cell(epath.Path(where).name if where else None)
    return Row(label, (Cell(float(count), digits=0), Cell(float(total), digits=0), share, place))


def _sets(data: Inspected) -> Table:
    rows = []
    datasets = {"train": data.planned.train, **data.planned.evals} if data.planned else {}
    for name, trees in data.tokenised.trees.items():
        dataset = datasets.get(name)
        sizes = tree_sizes(dataset.trees if dataset else trees)
        shared = sum(tree_tokens(size.prompt, size.responses, "packed") for size in sizes)
        unshared = sum(tree_tokens(size.prompt, size.responses, "unshared") for size in sizes)
        cells = (
            Cell(float(len(sizes)), digits=0),
            Cell(float(sum(len(size.responses) for size in sizes)), digits=0),
            Cell(float(shared), digits=0),
            Cell(float(sum(map(sum, (size.targets for size in sizes)))), digits=0),
            Cell(unshared / shared, digits=2),
            Cell(float(dataset.num_steps) if dataset else None, digits=0),
            Cell(_full(dataset) if dataset else None, percent=True, digits=0),
        )
        rows.append(Row(name, cells))
    columns = ("examples", "responses", "tokens", "targets", "sharing", "steps", "rows full")
    return Table(columns, rows, label="set")


def _full(dataset: Dataset) -> float:
    needs = row_needs(dataset.trees, layout=dataset.layout, pair_policy=dataset.pair_policy)
    return fill_ratio(dataset.plan, needs, dataset.shape)


def _lengths(data: Inspected) -> Table:
    rows = []
    for name, trees in data.tokenised.trees.items():
        sizes = tree_sizes(trees)
        for what, values in _lengths_of(sizes).items():
            figures = (np.mean(values), *np.quantile(values, (0.5, 0.95, 1.0)))
            rows.append(Row(f"{name}: {what}", tuple(Cell(float(figure), digits=0) for figure in figures)))
        differences = length_differences(sizes)
        if differences.size:
            mean, quantiles = mean_interval(differences), np.quantile(differences, (0.5, 0.95, 1.0))
            cells = (Cell(mean.mean, mean.low, mean.high, digits=1), *(Cell(float(q), digits=0) for q in quantiles))
            rows.append(Row(f"{name}: best minus worst", cells))
            longer = wilson_interval(int((differences > 0).sum()) + (differences == 0).sum() / 2, differences.size)
            share = Cell(longer.mean, longer.low, longer.high, digits=1, percent=True)
            rows.append(Row(f"{name}: best is longer", (share, Cell(None), Cell(None), Cell(None))))
    return Table(("mean", "50%", "95%", "most"), rows, label="tokens")


def _lengths_of(sizes: Sequence[TreeSize]) -> dict[str, list[int]]:
    """What is measured -> tokens. Best and worst are told apart where there is a preference."""
    compared = [size for size in sizes if max(size.scores) > min(size.scores)]
    found = {"prompt": [size.prompt for size in sizes]}
    if compared:
        ends = [[size.responses[i] for i in best_and_worst(size.scores)] for size in compared]
        found |= {"best response": [end[0] for end in ends], "worst response": [end[1] for end in ends]}
    else:
        found["response"] = [length for size in sizes for length in size.responses]
    return found | {"whole example": [tree_tokens(size.prompt, size.responses, "packed") for size in sizes]}


def _histograms(sizes: Sequence[TreeSize]) -> dict[str, dict[str, Histogram]]:
    lengths = _lengths_of(sizes)
    responses = {name: values for name, values in lengths.items() if "response" in name}
    panels: dict[str, dict[str, Sequence[float]]] = {
        "tokens of a prompt": {"prompt": lengths["prompt"]},
        "tokens of a response": dict(responses),
        "tokens of a whole example": {"whole example": lengths["whole example"]},
    }
    if scores := [score for size in sizes for score in size.scores]:
        panels["scores"] = {"score": scores}
    if (differences := length_differences(sizes)).size:
        panels["tokens of best minus worst"] = {"difference": differences.tolist()}
    return {title: _binned(series) for title, series in panels.items()}


def _binned(series: Mapping[str, Sequence[float]]) -> dict[str, Histogram]:
    """Histograms over edges that all series share; a bin holds as many whole numbers as any other."""
    values = np.concatenate([np.asarray(value, np.float64) for value in series.values()])
    edges = np.histogram_bin_edges(values, BINS)
    if np.ptp(values) > 1 and (values == np.rint(values)).all():
        edges = np.arange(values.min(), values.max() + 1 + (width := -(-(np.ptp(values) + 1) // BINS)), width)
    return {name: (edges.tolist(), np.histogram(value, edges)[0].tolist()) for name, value in series.items()}


def _counts(counts: Mapping[str, int]) -> Table:
    rows = [Row(shown(name), (Cell(float(n), digits=0),)) for name, n in counts.items()]
    return Table(("count",), rows, label="what was read")


def _columns(config: RunConfig) -> Table:
    """Which columns the first rows have, and of what kinds."""
    paths = [*(config.data.mixture or [config.data.path]), *config.data.eval_paths.values()]
    found: dict[str, dict[str, int]] = {}
    total = 0
    for row in itertools.chain.from_iterable(itertools.islice(_rows(path), SCHEMA_ROWS) for path in paths):
        total += 1
        for name, value in row.items():
            kinds = found.setdefault(name, {})
            kinds[_kind(value)] = kinds.get(_kind(value), 0) + 1
    rows = [
        Row(name, (Cell(", ".join(kinds)), Cell(float(sum(kinds.values())), digits=0))) for name, kinds in found.items()
    ]
    return Table(("kinds", "rows"), rows, label="column", caption=f"of the first {total:,} rows")


def _rows(path: str) -> Iterator[Mapping[str, Any]]:
    for where, raw in open_source(path).rows:
        try:
            yield parse_row(raw, where) if isinstance(raw, bytes) else as_object(raw, where)
        except RecordError:  # counted by its reason where it was read
            continue


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"list of {_kind(value[0])}" if value else "empty list"
    kinds = {str: "text", bool: "true or false", int: "number", float: "number", dict: "object", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def _drawn(count: int) -> list[int]:
    return sorted(np.random.default_rng(0).choice(count, min(count, SHOWN), replace=False).tolist())


def _sample(tree: TokenTree, tokenizer: Tokenizer) -> TokenSample:
    names = {id: name for name, id in tokenizer.control_tokens.items()}
    learned = np.zeros(tree.prompt.size, bool)
    parts = {"prompt": _tokens(tree.prompt, learned, tokenizer, names)}
    for k, (response, mask, score) in enumerate(zip(tree.responses, tree.masks, tree.scores, strict=True), 1):
        parts[f"response {k}, score {score:g}"] = _tokens(response, mask, tokenizer, names)
    return TokenSample(f"Example {tree.id}", parts)


def _tokens(ids: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer, names: Mapping[int, str]) -> list[Token]:
    """The ids as pieces of text; a byte of a character that is not whole yet, or a control token, is special."""
    tokens, begin = [], 0  # of what has been shown
    for i, id in enumerate(ids[:SHOWN_TOKENS].tolist()):
        text = tokenizer.decode(ids[begin : i + 1].tolist())
        target = bool(learned[i])
        if id in names:
            tokens.append(Token(names[id], target, special=True))
            begin = i + 1
        elif not text or text.endswith("\ufffd"):
            tokens.append(Token("·", target, special=True))
        else:
            tokens.append(Token(text, target))
            begin = i + 1
    if ids.size > SHOWN_TOKENS:
        tokens.append(Token(f" {ids.size - SHOWN_TOKENS:,} more", special=True))
    return tokens
