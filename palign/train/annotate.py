"""Diagnostics of every record of a data file, written beside the record, and a filter by their quantiles."""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from palign.data.loader import Dataset
from palign.data.pack import subset_tree, tree_tokens
from palign.data.quantile_filter import QuantileRange, keep_quantiles, parse_quantile_range
from palign.data.readers import read_records
from palign.data.sources import is_json_lines, open_data
from palign.data.tokenize import TokenTree, tokenize_records
from palign.eval.diagnostics import at_pairs
from palign.eval.displacement import ches, hidden_sums_by_slot, length_normalised_ches
from palign.eval.edit_distance import normalised_edit_distance
from palign.eval.per_target import per_row
from palign.eval.ranking import BETAS, idealised_accuracy_range
from palign.eval.score import as_dataset
from palign.heads.target_values import target_logps
from palign.models.protocol import LanguageModel
from palign.objectives.base import lengths_by_slot, sum_by_slot
from palign.sharding.mesh import make_mesh
from palign.train.metrics import Reporter, say
from palign.train.paths import absolute, write_lines
from palign.train.prepare import has_preference, tokenization_of
from palign.train.sources import Loaded, load_run

KEY = "annotations"
# The annotations that are one number, with whether a reference is needed.
NUMBERS: dict[str, bool] = {
    "ches": False,
    "ches_normalised": False,
    "difficulty": False,
    "margin": False,
    "reward_margin": True,
    "ranked_right": False,
    "chosen_logp": False,
    "rejected_logp": False,
    "edit_distance": False,
}

Annotation = dict[str, Any]


class PairNumbers(NamedTuple):
    """What one model says of an example's best and worst response, 0 = best."""

    logps: np.ndarray  # [2] nats, summed
    lengths: np.ndarray  # [2] tokens
    ches: np.ndarray  # []
    ches_normalised: np.ndarray  # []


class Read(NamedTuple):
    """A data file, as far as it can be annotated."""

    trees: list[TokenTree]  # best and worst response of every example that has a preference
    lines: int  # records of the file
    without_a_preference: int
    dropped: Mapping[str, int]  # reason -> how many
    dropped_lines: list[int]  # from 1


def annotate_run(
    name: str,
    path: epath.PathLike,
    out: epath.PathLike,
    *,
    reference: str = "",
    keep_quantile: str = "",
    filtered: epath.PathLike = "",
) -> dict[str, np.ndarray]:
    """Writes each record of a data file with what a run's model says of its best and its worst response.

    Args:
        name: the run's workdir; `@STEP`, `@last` or `@best` behind it.
        path: the data, `.jsonl` or `.jsonl.gz`.
        out: `.jsonl`; a line for each record: the record as given, and `annotations`, null where it has no preference
            or was dropped.
        reference: another run, for `reward_margin`, and for `difficulty` in place of the run itself.
        keep_quantile: `NAME:LOW:HIGH`, which annotation decides what `filtered` keeps; both or neither.
        filtered: `.jsonl`; the kept records, as given.

    Returns:
        annotation -> its values over the annotated records, in the file's order.

    Raises:
        ValueError: no such run or checkpoint, bad data, file names that cannot be, or nothing to annotate or to keep.
    """
    wanted = _check_wanted(keep_quantile, str(filtered), reference)
    _check_files(path, [out, *([filtered] if filtered else [])])
    records, counts = read_records(path)  # before a model is loaded: a slip in the data is answered at once
    if f"ignored_column/{KEY}" in counts:
        raise ValueError(f"{path}: has a column {KEY!r} already; annotate the file that it was made from")
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    policy = load_run(name, mesh=mesh)
    other = _load_reference(reference, policy, mesh) if reference else None
    read = _tokenise(path, records, counts, policy)
    dataset = _plan(read.trees, policy)
    ours = measure(policy, dataset, mesh, title="annotate")
    theirs = measure(other, dataset, mesh, title="annotate, the reference") if other else None
    annotations = _annotations(read.trees, ours, theirs)
    write_lines(out, _annotated_lines(path, annotations))
    _report(path, out, read, ours if theirs is None else theirs)
    if wanted is not None:
        _filter(path, filtered, wanted, annotations, read)
    return {key: np.asarray([a[key] for a in annotations.values()], np.float64) for key in _given(reference)}


def measure(model: Loaded, dataset: Dataset, mesh: Mesh, *, title: str) -> list[PairNumbers]:
    """Computes the numbers of every example's pair, in one forward pass.

    Args:
        model: of a run.
        dataset: examples with one pair each, as `as_dataset` plans them.
        mesh: the devices.
        title: of the progress bar.

    Returns:
        One entry for each example, in the data's order.
    """
    found: dict[int, PairNumbers] = {}
    with Reporter(title, dataset.num_steps) as progress:
        for values, row, members in per_row(
            dataset, _pair_numbers(model.lm), model.params, mesh, advance=progress.advance
        ):
            for p in np.flatnonzero(row.pairs[:, 0]):
                example = (row.pairs[p, 0] - 1) // row.valid.shape[-1]
                found[int(members[example])] = PairNumbers(*(numbers[p] for numbers in values))
    return [found[i] for i in range(len(dataset.trees))]


@functools.cache
def _pair_numbers(lm: LanguageModel) -> Callable:
    def numbers(params, batch):
        hidden = lm.hidden(params, batch)
        logps = sum_by_slot(target_logps(hidden, lm.unembed(params), batch), batch)
        lengths = at_pairs(lengths_by_slot(batch), batch)
        sums = at_pairs(hidden_sums_by_slot(hidden, batch), batch)
        found = PairNumbers(at_pairs(logps, batch), lengths, ches(sums), length_normalised_ches(sums, lengths))
        return jax.tree.map(lambda values: values.reshape(*batch.pairs.shape[:2], *values.shape[1:]), found)

    return numbers


def _check_wanted(keep_quantile: str, filtered: str, reference: str) -> QuantileRange | None:
    if bool(keep_quantile) != bool(filtered):
        raise ValueError("--keep_quantile says what is kept and --filtered where: give both or neither")
    if not keep_quantile:
        return None
    try:
        wanted = parse_quantile_range(keep_quantile)
    except ValueError as error:
        raise ValueError(f"--keep_quantile={keep_quantile}: {error}") from None
    if wanted.name not in _given(reference):
        needs = " needs --reference" if wanted.name in NUMBERS else f" is none of {', '.join(_given(reference))}"
        raise ValueError(f"--keep_quantile={keep_quantile}: {wanted.name!r}{needs}")
    return wanted


def _given(reference: str) -> list[str]:
    """The annotations that are made."""
    return [key for key, needs in NUMBERS.items() if reference or not needs]


def _check_files(path: epath.PathLike, outs: Sequence[epath.PathLike]) -> None:
    if not is_json_lines(path):
        raise ValueError(f"{path}: annotations are written into lines; expected a file named *.jsonl or *.jsonl.gz")
    taken = {absolute(path)}
    for out in map(epath.Path, outs):
        if out.suffix != ".jsonl":
            raise ValueError(f"{out}: expected a file named *.jsonl to write to")
        if absolute(out) in taken:
            raise ValueError(f"{out}: is read or written already; name another file")
        taken.add(absolute(out))


def _load_reference(name: str, policy: Loaded, mesh: Mesh) -> Loaded:
    other = load_run(name, mesh=mesh)
    if other.tokenizer.fingerprint() != policy.tokenizer.fingerprint():
        raise ValueError(f"--reference={name}: was trained with another tokenizer than the run; name one of its family")
    return other


def _tokenise(path, records, counts, policy: Loaded) -> Read:
    data = policy.config.data
    all_trees, dropped = tokenize_records(
        records, policy.tokenizer, max_length=data.max_length, **tokenization_of(data)
    )
    # Tokenised with all its responses, as in training: where the prompt ends depends on them.
    trees = [subset_tree(tree, 2, seed=0) for tree in all_trees if has_preference(tree)]
    if not trees:
        raise ValueError(f"{path}: no record has two responses of different scores, so there is nothing to annotate")
    if dropped["truncated"]:
        say(f"{path}: {dropped['truncated']:,} responses cut to config.data.max_length of the run")
    lost = {record.id for record in records} - {tree.id for tree in all_trees}
    return Read(
        trees,
        counts["records"] + counts["identical"],
        len(all_trees) - len(trees) + counts["identical"],
        {reason: count for reason, count in dropped.items() if count and reason.startswith(("dropped_", "skipped/"))},
        sorted(line + 1 for line in lost),
    )


def _plan(trees: list[TokenTree], policy: Loaded) -> Dataset:
    """Rows of the run's length, or longer where a pair needs it."""
    data = policy.config.data
    longest = max(tree_tokens(tree.prompt.size, [r.size for r in tree.responses], "packed") for tree in trees)
    row_length = max(data.row_length, -(-longest // data.block) * data.block)
    return as_dataset(trees, row_length=row_length, rows_per_step=data.rows_per_step, block=data.block)


def _annotations(
    trees: Sequence[TokenTree], ours: Sequence[PairNumbers], theirs: Sequence[PairNumbers] | None
) -> dict[int, Annotation]:
    """Record id -> its annotations."""
    made = {}
    with Reporter("annotate, edit distances", len(trees), unit="pairs/s") as progress:
        for i, tree in enumerate(trees):
            made[tree.id] = _annotation(tree, ours[i], theirs[i] if theirs is not None else None)
            progress.advance(i + 1, 1.0)
    return made


def _annotation(tree: TokenTree, ours: PairNumbers, theirs: PairNumbers | None) -> Annotation:
    best, worst = (tree.responses[k] for k in (int(np.argmax(tree.scores)), int(np.argmin(tree.scores))))
    chosen, rejected = ours.logps
    reference = (ours if theirs is None else theirs).logps
    found = {
        "ches": _number(ours.ches),
        "ches_normalised": _number(ours.ches_normalised),
        "difficulty": _number(reference[1] - reference[0]),
        "margin": _number(chosen - rejected),
        "ranked_right": bool(chosen >= rejected),
        "chosen_logp": _number(chosen),
        "rejected_logp": _number(rejected),
        "lengths": [int(length) for length in ours.lengths],
        "edit_distance": round(normalised_edit_distance(best, worst), 6),
    }
    if theirs is not None:
        found["reward_margin"] = _number((chosen - rejected) - (reference[0] - reference[1]))
    return found


def _number(value: Any) -> float | None:
    """The shortest decimal that is this number in single precision; JSON has no NaN, so that becomes null."""
    return float(str(np.float32(value))) if np.isfinite(value) else None


def _raw_lines(path: epath.PathLike) -> Iterator[tuple[int, bytes]]:
    """Yields (record id, line) of a file that `read_records` has accepted."""
    with open_data(epath.Path(path)) as file:
        for id, raw in enumerate(file):
            if raw.strip():
                yield id, raw.strip()


def _annotated_lines(path: epath.PathLike, annotations: Mapping[int, Annotation]) -> Iterator[bytes]:
    # Written into the line as it stands: read and written again, numbers and escapes would change their form.
    for id, raw in _raw_lines(path):
        yield raw[:-1].rstrip() + f', "{KEY}": {json.dumps(annotations.get(id))}}}'.encode()


def _report(path: epath.PathLike, out: epath.PathLike, read: Read, reference: Sequence[PairNumbers]) -> None:
    reasons = ", ".join(f"{name.removeprefix('dropped_').replace('_', ' ')} {n:,}" for name, n in read.dropped.items())
    say(
        f"{out}: {read.lines:,} records, {len(read.trees):,} annotated, {read.without_a_preference:,} without a "
        f"preference, {len(read.dropped_lines):,} dropped" + (f" ({reasons})" if reasons else "")
    )
    if read.dropped_lines:
        say(f"{path}: dropped lines {_ranges(read.dropped_lines)}")
    found = idealised_accuracy_range(jnp.stack([numbers.logps for numbers in reference]))
    say(
        f"idealised ranking accuracy of DPO (beta {min(BETAS):g} to {max(BETAS):g}): {float(found.minimum):.1%} to "
        f"{float(found.maximum):.1%}, median {float(found.median):.1%}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """`3, 7-9` for 3, 7, 8, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _filter(path, filtered, wanted: QuantileRange, annotations: Mapping[int, Annotation], read: Read) -> None:
    ids = list(annotations)
    values = [annotations[id][wanted.name] for id in ids]
    numbers = np.asarray([math.nan if value is None else value for value in values], np.float64)
    kept = keep_quantiles(numbers, low=wanted.low, high=wanted.high)
    if not kept.mask.any():
        raise ValueError(f"--keep_quantile={wanted.name}:{wanted.low:g}:{wanted.high:g}: keeps no record; widen it")
    chosen = {id for id, keep in zip(ids, kept.mask, strict=True) if keep}
    write_lines(filtered, (raw for id, raw in _raw_lines(path) if id in chosen))
    present = int(np.isfinite(numbers).sum())
    say(
        f"{filtered}: {len(chosen):,} kept ({wanted.name} from {kept.lower:.6g} to {kept.upper:.6g}), "
        f"{present - len(chosen):,} dropped, {read.lines - present:,} without a value left out"
    )
