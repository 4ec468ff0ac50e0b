"""Real preference files, all the way to batches. They lie outside the repository; without them these tests skip."""

import pathlib

import numpy as np
import pytest

from palign.data.loader import Dataset, batches
from palign.data.pack import row_shape
from palign.data.plan import fill_ratio, fit_trees, plan_epochs, row_needs
from palign.data.readers import read_records
from palign.data.tokenize import tokenize_records
from palign.data.tokenizers import train_sentencepiece

FOLDER = pathlib.Path(__file__).parents[2].parent / "shared" / "data"


def read(name):
    if not (FOLDER / name).is_file():
        pytest.skip(f"{name} is not beside the repository in shared/data")
    records, counts = read_records(FOLDER / name)
    texts = [record.prompt + response for record in records for response in record.responses]
    tokenizer = train_sentencepiece(texts, vocab_size=2048)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts[::7])
    return records, counts, tokenizer


def run(trees, shape, pair_policy):
    """Builds every batch of an epoch and returns the fill, the ids seen and the targets listed."""
    needs = row_needs(trees, layout="packed", pair_policy=pair_policy)
    plan = plan_epochs(needs, shape, rows_per_step=4, epochs=1, seed=0)
    data = Dataset(trees, shape, plan, pair_policy, "packed", 0)
    ids, targets = [], 0
    for _, batch in batches(data, start_step=0, micro_batches=2):
        ids += batch.example_id[batch.example_id >= 0].tolist()
        targets += int((batch.target_slot > 0).sum())
    assert sorted(ids) == [tree.id for tree in trees]
    assert targets == needs.targets.sum()
    return fill_ratio(plan, needs, shape)


def test_dialogue_pairs_with_implicit_prompts():
    records, counts, tokenizer = read("hh_harmless.jsonl.gz")
    assert (counts["rows"], counts["records"], counts["identical"], counts["blank_responses"]) == (1734, 1734, 0, 3)
    assert all(record.prompt.endswith("\n\nAssistant:") for record in records)
    trees, counts = tokenize_records(records, tokenizer, max_length=512)
    assert counts["records"] + counts["dropped_prompt_too_long"] + counts["dropped_identical"] == 1734
    ended = sum(ids[-1] == tokenizer.eos_id for tree in trees for ids in tree.responses)
    assert ended == counts["responses"] - counts["truncated"]
    assert run(trees, row_shape(1024, responses=2), "best_worst") > 0.98


def test_ragged_lists_many_of_which_exceed_a_short_row():
    records, counts, tokenizer = read("alpaca_eval_lists.jsonl.gz")
    assert counts["records"] == 403 == counts["ignored_column/generators"]
    assert {len(record.responses) for record in records} == {2, 3, 4, 6, 8}
    assert np.mean([len(set(record.scores)) < len(record.scores) for record in records]) > 0.2  # ties
    trees, _ = tokenize_records(records, tokenizer, max_length=512)
    shape = row_shape(1024, responses=8, pair_policy="all")
    with pytest.raises(ValueError, match="policy 'subset'"):
        fit_trees(trees, shape, layout="packed")
    fitted, counts = fit_trees(trees, shape, layout="packed", oversize="subset")
    removed = sum(len(tree.responses) for tree in trees) - sum(len(tree.responses) for tree in fitted)
    assert counts["oversize_responses_removed"] == removed > 0
    assert run(fitted, shape, "all") > 0.8
    assert run(trees, row_shape(4096, responses=8, pair_policy="adjacent"), "adjacent") > 0.95
