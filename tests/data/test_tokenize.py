"""BOS and EOS once, one split for all responses, nothing cut or dropped without a count."""

import numpy as np
import pytest

from palign.data.records import make_record
from palign.data.tokenize import add_mismatched, tokenize_record, tokenize_records
from palign.data.tokenizers import ByteTokenizer, JsonTokenizer, train_sentencepiece
from tests.data.samples import TEXTS, json_model, random_tree


class Words:
    """One id a word between single spaces, two ids for special tokens that may be written in the text."""

    vocab_size = 100

    def __init__(self, bos_id=0, eos_id=1, pad_id=1):
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.eos_ids = frozenset({eos_id})
        self.ids = {"<bos>": 0, "<eos>": 1}

    def encode(self, text):
        return [self.ids.setdefault(word, len(self.ids)) for word in text.split(" ") if word]


class Merging:
    """Characters, except that every occurrence of a merged string is one id: worst cases at the seam."""

    vocab_size, bos_id, eos_id, pad_id, eos_ids = 1000, 997, 998, 998, frozenset({998})

    def __init__(self, *merges):
        self.merges = merges

    def encode(self, text):
        ids = []
        while text:
            merge = next((m for m in self.merges if text.startswith(m)), text[0])
            ids.append(500 + self.merges.index(merge) if merge in self.merges else ord(merge) % 500)
            text = text[len(merge) :]
        return ids


def record(prompt, *responses, scores=None, id=0):
    return make_record(prompt, list(responses), scores or list(range(len(responses))), id, f"f:{id}")


TOKENIZERS = {
    "bpe": train_sentencepiece(TEXTS, vocab_size=330),
    "unigram": train_sentencepiece(TEXTS, vocab_size=330, model_type="unigram"),
    "bytes": ByteTokenizer(),
    "json": JsonTokenizer(json_model("<bos>", "<eos>"), eos="<eos>", bos="<bos>"),
    "json without bos": JsonTokenizer(json_model("<eos>"), eos="<eos>"),
}
CASES = [
    ("a", (" b", " c")), ("a ", ("b", "c")), ("http:", ("//", "s")), ("x", ("", "y")), ("日", ("本", "語", "")),
    ("é", ("\u0301", "e")), ("\n\nHuman: how\n\nAssistant:", (" Fine", " Fine, thank you.", "\n")),
    ("the fo", ("od", "ot")),
]  # fmt: skip


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize(("prompt", "responses"), CASES)
def test_prompt_and_response_are_the_joint_tokenisation(tokenizer, prompt, responses):
    tree = tokenize_record(record(prompt, *responses), tokenizer)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text, ids in zip(responses, tree.responses, strict=True):
        joint = [*begin, *tokenizer.encode(prompt + text), tokenizer.eos_id]
        assert [*tree.prompt, *ids] == joint
        assert tokenizer.decode(joint) == prompt + text
        assert joint.count(tokenizer.eos_id) == 1 and joint.count(tokenizer.bos_id) == len(begin)
    assert tree.prompt.dtype == np.int32 and all(ids.dtype == np.int32 for ids in tree.responses)
    assert [*begin, *tokenizer.encode(prompt)][: tree.prompt.size] == tree.prompt.tolist()


def test_a_merge_at_the_seam_moves_the_split_for_all_responses():
    tokenizer = Merging("http://", ": ")
    tree = tokenize_record(record("see http:", "//", " no", "x"), tokenizer)
    see = [ord(c) for c in "see "]
    assert tree.prompt.tolist() == [997, *see]
    assert tree.responses[0].tolist() == [500, 998]
    assert tree.responses[1].tolist() == [*(ord(c) for c in "http"), 501, ord("n"), ord("o"), 998]
    assert tree.responses[2].tolist() == [*(ord(c) for c in "http:x"), 998]


@pytest.mark.parametrize("bos_id", [0, None, 50])
@pytest.mark.parametrize("pad_id", [0, 1, 60])
def test_bos_and_eos_come_once_whatever_their_ids(bos_id, pad_id):
    tree = tokenize_record(record("a b ", "c", "d <eos>", ""), Words(bos_id, pad_id=pad_id))
    assert tree.prompt.tolist() == ([] if bos_id is None else [bos_id]) + [2, 3]
    assert [ids.tolist() for ids in tree.responses] == [[4, 1], [5, 1], [1]]


def test_bos_written_by_a_template_is_not_repeated():
    tree = tokenize_record(record("<bos> a ", "b", "c"), Words())
    assert tree.prompt.tolist() == [0, 2]


def test_an_empty_response_after_a_prompt_that_ends_in_eos_still_ends_a_turn():
    tree = tokenize_record(record("a <eos> ", "", "b"), Words())
    assert tree.prompt.tolist() == [0, 2, 1]
    assert [ids.tolist() for ids in tree.responses] == [[1], [3, 1]]


def test_the_first_token_of_a_text_is_its_prompt():
    tree = tokenize_record(record("", "a b c"), Words(bos_id=None))
    assert (tree.prompt.tolist(), tree.responses[0].tolist()) == ([2], [3, 4, 1])
    tree = tokenize_record(record("", "a b c"), Words())
    assert (tree.prompt.tolist(), tree.responses[0].tolist()) == ([0], [2, 3, 4, 1])
    tree = tokenize_record(record("", "a"), Words(bos_id=None))
    assert (tree.prompt.tolist(), tree.responses[0].tolist()) == ([2], [1])
    tree = tokenize_record(record("", "<bos> a"), Words())
    assert (tree.prompt.tolist(), tree.responses[0].tolist()) == ([0], [2, 1])


def test_truncation_cuts_the_end_counts_it_and_writes_no_eos():
    trees, counts = tokenize_records([record("a b ", "c d e", "f", "g h")], Words(), max_length=5)
    assert [ids.tolist() for ids in trees[0].responses] == [[4, 5], [7, 1], [8, 9]]
    assert counts == {
        "records": 1, "responses": 3, "truncated": 2,
        "prompts_cut": 0, "control_text": 0, "dropped_too_long": 0,
        "dropped_prompt_too_long": 0, "dropped_no_prompt": 0, "dropped_identical": 0,
    }  # fmt: skip


LONG = [record("a b c d e ", "f g h i", "j", id=0), record("a ", "b", "c", id=1)]


def test_a_prompt_over_its_own_limit_is_dropped_or_loses_its_beginning():
    trees, counts = tokenize_records(LONG, Words(), max_length=9, max_prompt_length=4)
    assert [tree.id for tree in trees] == [1] and counts["dropped_prompt_too_long"] == 1
    trees, counts = tokenize_records(LONG, Words(), max_length=9, max_prompt_length=4, truncation="keep_end")
    assert trees[0].prompt.tolist() == [0, 4, 5, 6]  # BOS, and what stands right before the answer
    assert [ids.tolist() for ids in trees[0].responses] == [[7, 8, 9, 10, 1], [11, 1]]
    assert counts["prompts_cut"] == 1 and counts["truncated"] == 0
    trees, counts = tokenize_records(LONG, Words(), max_length=6, max_prompt_length=4, truncation="keep_end")
    assert [ids.tolist() for ids in trees[0].responses] == [[7, 8], [11, 1]]
    assert counts["prompts_cut"] == 1 and counts["truncated"] == 1
    trees, counts = tokenize_records(
        LONG[:1], Words(bos_id=None), max_length=9, max_prompt_length=2, truncation="keep_end"
    )
    assert trees[0].prompt.tolist() == [5, 6]


def test_a_record_of_which_anything_is_too_long_is_dropped_if_so_told():
    trees, counts = tokenize_records(LONG, Words(), max_length=8, truncation="drop")
    assert [tree.id for tree in trees] == [1] and counts["dropped_too_long"] == 1 and counts["truncated"] == 0
    trees, counts = tokenize_records(LONG, Words(), max_length=6, truncation="drop")
    assert counts["dropped_prompt_too_long"] == 1
    assert len(tokenize_records(LONG, Words(), max_length=11, truncation="drop")[0]) == 2


def conversation(*turns):
    return make_record([], [[{"role": role, "content": content} for role, content in turns]], [0.0], 0, "f:1")


def test_a_conversation_is_cut_behind_something_learned():
    tokenizer = JsonTokenizer(json_model("<s>", "</s>"), eos="</s>", bos="<s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else ' ') }}{% endfor %}"
    )
    one = conversation(("user", "a"), ("assistant", "bcd"), ("user", "efgh"), ("assistant", "i"))
    (whole,), _ = tokenize_records([one], tokenizer, max_length=99)
    P, (mask,) = whole.prompt.size, whole.learned
    assert tokenizer.decode(whole.responses[0][mask]) == "bcdi" and mask.sum() == 6
    for length in range(P + 1, P + mask.size + 1):
        ((tree,), counts) = tokenize_records([one], tokenizer, max_length=length)
        kept = tree.masks[0]
        assert kept[-1] and kept.sum() == mask[: length - P].sum() and tree.responses[0].size <= length - P
        assert counts["truncated"] == (length < P + mask.size)


def test_a_mismatched_response_brings_along_what_is_learned_of_it():
    trees = [
        random_tree(np.random.default_rng(i), i, K=2)._replace(prompt=np.arange(3, dtype=np.int32)) for i in range(3)
    ]
    masks = tuple(np.arange(ids.size) % 2 == 0 for ids in trees[1].responses)
    trees[1] = trees[1]._replace(learned=masks)
    added, _ = add_mismatched(trees, max_length=6)
    assert added[2].learned is None
    assert [mask.tolist() for mask in added[0].learned] == [
        *([True] * ids.size for ids in trees[0].responses), masks[0][:3].tolist(),
    ]  # fmt: skip
    assert [mask.tolist() for mask in added[1].learned[:2]] == [mask.tolist() for mask in masks]
    assert added[1].learned[2].all() and added[1].learned[2].size == added[1].responses[2].size


def test_what_is_dropped_is_counted():
    records = [
        record("a b c d ", "e", id=0),  # BOS + 4: no room
        record("a ", "b c d e", "b c d f", id=1),  # the same once they are cut
        record("a ", "b", "c", id=2),
        record("a ", "b", "b", id=3),
    ]
    trees, counts = tokenize_records(records, Words(), max_length=5)
    assert [tree.id for tree in trees] == [2]
    assert counts["dropped_prompt_too_long"] == 1 and counts["dropped_identical"] == 2 and counts["records"] == 1
    trees, counts = tokenize_records([record("", "a", "b"), records[2]], Words(bos_id=None), max_length=5)
    assert counts["dropped_no_prompt"] == 1 and len(trees) == 1
    with pytest.raises(ValueError, match="dropped_prompt_too_long 1"):
        tokenize_records(records[:1], Words(), max_length=5)
    with pytest.raises(ValueError, match="max_length is 1"):
        tokenize_records(records, Words(), max_length=1)


def test_scores_are_rounded_to_single_precision_so_that_ties_agree():
    tree = tokenize_record(record("a ", "b", "c", scores=[0.1, 0.1 + 1e-12]), Words())
    assert tree.scores[0] == tree.scores[1] == float(np.float32(0.1))
