"""From records to data sets: the split, what is cut or dropped and said so, the tokenizer, the vocabulary."""

import json

import numpy as np
import pytest

from palign.config.schema import DataConfig
from palign.data.tokenizers import ByteTokenizer, load_tokenizer, train_sentencepiece
from palign.train.evaluate import evaluate_run
from palign.train.prepare import HELD_OUT, prepare, read_sets, with_vocabulary
from tests.recipes.tiny_runs import config, write_pairs


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", 120, prompts=50)


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.fixture
def of_bytes(tmp_path):
    """A directory with the byte tokenizer: lengths are then plain to see."""
    ByteTokenizer().save(tmp_path / "bytes")
    return tmp_path / "bytes"


def test_records_that_share_a_prompt_are_never_on_both_sides_of_the_split(pairs):
    sets = read_sets(DataConfig(path=str(pairs), eval_fraction=0.3))
    train, held = ({record.prompt for record in sets[name]} for name in ("train", HELD_OUT))
    assert not train & held
    assert len(sets["train"]) + len(sets[HELD_OUT]) == 120
    assert 0.1 < len(sets[HELD_OUT]) / 120 < 0.5
    assert len(sets["train"]) > len(train)  # prompts do come twice


def test_the_split_depends_on_prompt_and_seed_alone(pairs, tmp_path):
    def held(path, seed=0):
        return {r.prompt for r in read_sets(DataConfig(path=str(path), eval_fraction=0.3, seed=seed))[HELD_OUT]}

    lines = pairs.read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[::-1][:100]))
    shared = {json.loads(line)["prompt"] for line in lines[::-1][:100]}
    assert held(tmp_path / "other.jsonl") == held(pairs) & shared
    assert held(pairs, seed=1) != held(pairs)


def test_records_without_a_prompt_are_split_by_what_they_say(tmp_path):
    path = write(tmp_path / "texts.jsonl", *[{"text": f"text {i % 50}"} for i in range(100)])
    sets = read_sets(DataConfig(path=str(path), eval_fraction=0.3))
    train, held = ({record.responses for record in sets[name]} for name in ("train", HELD_OUT))
    assert not train & held and 5 < len(held) < 25


def test_nothing_is_held_out_of_a_fraction_of_0_and_named_sets_are_read_whole(pairs, tmp_path):
    more = write_pairs(tmp_path / "more.jsonl", 7, seed=5)
    sets = read_sets(DataConfig(path=str(pairs), eval_fraction=0.0, eval_paths={"more": str(more)}))
    assert {name: len(part) for name, part in sets.items()} == {"train": 120, "more": 7}


def test_a_set_without_records_is_refused(tmp_path):
    one = write(tmp_path / "one.jsonl", pair("p", " a", " b"))
    with pytest.raises(ValueError, match="the set 'train' has no records"):
        read_sets(DataConfig(path=str(one), eval_fraction=0.999999))


@pytest.mark.parametrize(
    ("records", "responses", "scores"),
    [
        ("all", (" worst", " best", " middle"), (1.0, 3.0, 2.0)),
        ("best_response", (" best",), (3.0,)),
        ("reversed", (" worst", " best", " middle"), (-1.0, -3.0, -2.0)),
        ("grouped", (" worst", " best", " middle"), (1.0, 3.0, 2.0)),
    ],
)
def test_a_stage_takes_from_each_record_what_it_asks_for(records, responses, scores, tmp_path):
    line = {"prompt": "p", "responses": [" worst", " best", " middle"], "scores": [1, 3, 2]}
    path = write(tmp_path / "lists.jsonl", line)
    (record,) = read_sets(DataConfig(path=str(path), eval_fraction=0.0, records=records))["train"]
    assert (record.responses, record.scores) == (responses, scores)


def test_pairs_of_one_prompt_are_one_list_where_that_is_asked_for(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", pair("p", " a", " b"), pair("q", " x", " y"), pair("p", " b", " c"))
    records = read_sets(DataConfig(path=str(path), eval_fraction=0.0, records="grouped"))["train"]
    assert [(record.responses, record.scores) for record in records] == [
        ((" a", " b", " c"), (2.0, 1.0, 0.0)), ((" x", " y"), (1.0, 0.0)),
    ]  # fmt: skip
    assert "2 grouped pairs, 1 lists, 0 ungrouped pairs" in capsys.readouterr().err


def test_sources_are_mixed_by_weight_and_said_so_and_no_prompt_is_on_both_sides(of_bytes, tmp_path, capsys):
    large = write(tmp_path / "a.jsonl", *(pair(f"a{n}", " good", " bad") for n in range(80)))
    small = write(tmp_path / "b.jsonl", *(pair(f"{'a' if n % 2 else 'b'}{n}", " well", " ill") for n in range(20)))
    run = config(
        tmp_path / "x.jsonl",
        tokenizer={"path": str(of_bytes)},
        data={"path": "", "mixture": {str(large): 1, str(small): 3}, "eval_fraction": 0.2},
        train={"max_steps": 0, "epochs": 2},
    )
    sets = read_sets(run.data)
    ids = [record.id for part in sets.values() for record in part]
    assert sorted(ids) == list(range(100)) and not {r.prompt for r in sets["train"]} & {
        r.prompt for r in sets[HELD_OUT]
    }
    assert all(record.source == (record.id >= 80) for part in sets.values() for record in part)
    data = prepare(run, tmp_path / "run", None)
    epoch = data.train.plan.members[: len(data.train.trees)]
    from_small = np.mean([data.train.trees[i].id >= 80 for i in epoch])
    assert from_small == pytest.approx(0.75, abs=0.01)
    said, of_small = capsys.readouterr().err, sum(tree.id >= 80 for tree in data.train.trees)
    assert f"{round(0.75 * len(epoch))} examples of an epoch are from {small}, which has {of_small}" in said
    np.testing.assert_array_equal(np.sort(data.evals[HELD_OUT].plan.members), np.arange(len(sets[HELD_OUT])))


def test_bad_records_are_skipped_where_that_is_asked_for(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", pair("p", " a", " b"), pair("p", 3, " b"), pair("", " a", " b"))
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: response 1 is int 3"):
        read_sets(DataConfig(path=str(path), eval_fraction=0.0))
    sets = read_sets(DataConfig(path=str(path), eval_fraction=0.0, bad_records="skip"))
    assert len(sets["train"]) == 1
    assert "1 skipped/wrong type, 1 skipped/blank prompt" in capsys.readouterr().err


def test_held_out_records_whose_prompts_are_trained_on_are_counted(pairs, tmp_path, capsys):
    more = write(tmp_path / "more.jsonl", json.loads(pairs.read_text().splitlines()[0]), pair("new", " a", " b"))
    read_sets(DataConfig(path=str(pairs), eval_fraction=0.0, eval_paths={"more": str(more)}))
    assert "more: 1 of 2 records have a prompt that is trained on" in capsys.readouterr().err


def test_what_is_identical_truncated_or_dropped_is_counted_on_the_terminal(of_bytes, tmp_path, capsys):
    path = write(
        tmp_path / "pairs.jsonl",
        pair("ask", " fine", " bad"),
        pair("ask", " the same", " the same"),  # identical as text
        pair("ask", " " + "long" * 5, " short"),  # one response is cut
        pair("a prompt that leaves no room", " x", " y"),
        pair("ask", " begins alike and ends so", " begins alike and not so"),  # identical once cut
    )
    run = config(path, tokenizer={"path": str(of_bytes)}, data={"eval_fraction": 0.0, "max_length": 16})
    prepared = prepare(run, tmp_path / "run", None)
    said = capsys.readouterr().err
    for count in (
        "5 rows", "4 records", "1 identical", "2 records, 4 responses", "1 truncated", "1 dropped prompt too long",
        "1 dropped identical", "0 dropped no prompt",
    ):  # fmt: skip
        assert count in said, (count, said)
    assert [tree.id for tree in prepared.train.trees] == [0, 2]
    assert max(tree.prompt.size + r.size for tree in prepared.train.trees for r in tree.responses) == 16


TURNS = "{% for m in messages %}<s>{{ m.role + ' ' + m.content }}{{ eos_token }}{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<s>assistant {% endif %}"


def test_conversations_are_written_out_by_the_template_that_the_config_names(tmp_path, capsys):
    def turn(role, content):
        return {"role": role, "content": content}

    rows = [pair([turn("user", text)], [turn("assistant", f"{text} .")], [turn("assistant", "no")]) for text in "abcd"]
    rows.append(pair([turn("user", "</s>")], [turn("assistant", "yes")], [turn("assistant", "no")]))
    path, template = write(tmp_path / "chats.jsonl", *rows), tmp_path / "template.jinja"
    settings = dict(tokenizer={"model_type": "bpe", "vocab_size": 300}, data={"eval_fraction": 0.0, "max_length": 50})
    with pytest.raises(ValueError, match=r"no chat template; name the file of one \(Jinja\) in config.tokenizer"):
        prepare(config(path, **settings), tmp_path / "none", None)
    settings["tokenizer"]["chat_template"] = str(template)
    with pytest.raises(ValueError, match=r"config.tokenizer.chat_template = .* No such file"):
        prepare(config(path, **settings), tmp_path / "none", None)
    template.write_text(TEMPLATE)
    with pytest.raises(ValueError, match=r"chats.jsonl:5: a message has the control token '</s>'"):
        prepare(config(path, **settings), tmp_path / "run", None)
    settings["data"]["bad_records"] = "skip"
    prepared = prepare(config(path, **settings), tmp_path / "run", None)
    assert "4 records, 8 responses" in (said := capsys.readouterr().err) and "1 skipped/control text" in said
    tokenizer, tree = prepared.tokenizer, prepared.train.trees[0]
    assert tokenizer.decode(tree.prompt) == "user aassistant " and tokenizer.decode(tree.responses[0]) == "a ."
    assert [ids[-1] for ids in tree.responses] == [tokenizer.eos_id] * 2 and tree.prompt[0] == tokenizer.bos_id
    assert load_tokenizer(tmp_path / "run").chat_template == TEMPLATE


def test_room_for_a_sample_follows_a_conversation_too(tmp_path):
    answer = [{"role": "assistant", "content": "another"}]
    rows = [{"prompt": [{"role": "user", "content": f"{text} ?"}], "completion": answer} for text in "abc"]
    path, template = write(tmp_path / "asked.jsonl", *rows), tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    run = config(
        path, tokenizer={"model_type": "bpe", "vocab_size": 300, "chat_template": str(template)},
        data={"eval_fraction": 0.0}, rollout={"every": 1, "max_new_tokens": 5},
    )  # fmt: skip
    prepared = prepare(run, tmp_path / "run", None)
    for tree, text in zip(prepared.train.trees, "abc", strict=True):
        assert prepared.tokenizer.decode(tree.prompt) == f"user {text} ?assistant "
        assert [ids.size for ids in tree.responses] == [5] and tree.learned is None


def test_a_list_longer_than_a_row_is_an_error_that_names_the_row_length_and_subset_counts_it(
    of_bytes, tmp_path, capsys
):
    fits = {"prompt": "p", "responses": [" a", " b", " c", " d"], "scores": [1, 2, 3, 4]}
    long = {"prompt": "p" * 10, "responses": [f" {c}" + "x" * 20 for c in "abcd"], "scores": [1, 4, 3, 2]}
    path = write(tmp_path / "lists.jsonl", fits, long)
    settings = dict(tokenizer={"path": str(of_bytes)}, data={"eval_fraction": 0.0, "max_length": 64})
    # BOS and prompt are 11 tokens, each response 22 and EOS: 103, in blocks of 32.
    with pytest.raises(ValueError, match=r"1 of 2 trees do not fit a row of 64 tokens.*\(example 1 .* 128 tokens"):
        prepare(config(path, **settings), tmp_path / "run", None)
    settings["data"] |= {"oversize": "subset"}
    prepared = prepare(config(path, **settings), tmp_path / "run", None)
    assert "1 oversize trees, 2 oversize responses removed" in capsys.readouterr().err
    assert [tree.scores for tree in prepared.train.trees] == [(1.0, 2.0, 3.0, 4.0), (1.0, 4.0)]


def test_a_row_holds_one_example_where_packing_is_off(pairs, tmp_path):
    run = config(pairs, data={"packing": "one_per_row"}, train={"max_steps": 0, "epochs": 2})
    train = prepare(run, tmp_path / "run", None).train
    sizes = [train.plan.row(i).size for i in range(len(train.plan.epoch_of_row))]
    assert set(sizes) == {1} and len(sizes) == 2 * len(train.trees)
    assert train.shape.trees == 1


def test_epochs_and_steps_decide_how_long_a_run_is(pairs, tmp_path):
    def steps(**train):
        plan = prepare(config(pairs, train=train), tmp_path / "run", None).train.plan
        return plan.num_steps, int(plan.epoch_of_row.max())

    one = steps(max_steps=0, epochs=1)
    assert one[0] > 1 and one[1] == 0
    assert abs(steps(max_steps=0, epochs=3)[0] - 3 * one[0]) <= 2
    assert steps(max_steps=1, epochs=3) == (1, 0)
    num_steps, last_epoch = steps(max_steps=one[0] * 4)
    assert num_steps == one[0] * 4 and last_epoch >= 3  # as many epochs as the steps take


def test_held_out_sets_are_gone_through_once_in_order(pairs, tmp_path):
    held = prepare(config(pairs), tmp_path / "run", None).evals[HELD_OUT]
    np.testing.assert_array_equal(np.sort(held.plan.members), np.arange(len(held.trees)))


def test_a_tokenizer_is_trained_on_the_training_texts_alone(pairs, tmp_path):
    held = read_sets(DataConfig(path=str(pairs), eval_fraction=0.2))[HELD_OUT][0]
    path = tmp_path / "marked.jsonl"
    path.write_text(pairs.read_text().replace(f'"{held.prompt}", "chosen": "', f'"{held.prompt}", "chosen": " zebra'))
    assert "zebra" in path.read_text()
    tokenizer = prepare(config(path), tmp_path / "run", None).tokenizer
    unknown = tokenizer.encode(" never seen")[-1]
    assert tokenizer.encode(" zebra")[-1] == unknown != tokenizer.encode(" soup")[-1]


def test_the_tokenizer_comes_from_the_run_itself_then_the_config_then_the_run_it_starts_from(pairs, of_bytes, tmp_path):
    inherited = tmp_path / "sft"
    texts = ["the words of another run", "soup and pie"]
    train_sentencepiece(texts, vocab_size=64, model_type="word").save(inherited)
    words = load_tokenizer(inherited).fingerprint()

    run = config(pairs)
    assert prepare(run, tmp_path / "a", inherited).tokenizer.fingerprint() == words
    assert load_tokenizer(tmp_path / "a").fingerprint() == words  # kept, so that the run stands alone
    named = config(pairs, tokenizer={"path": str(of_bytes)}, data={"row_length": 96})
    assert prepare(named, tmp_path / "b", inherited).tokenizer.vocab_size == 259
    trained = prepare(run, tmp_path / "c", None).tokenizer.fingerprint()
    assert trained not in (words, ByteTokenizer().fingerprint())
    (tmp_path / "c" / "config.json").write_text("{}")  # the run has begun
    assert prepare(run, tmp_path / "c", inherited).tokenizer.fingerprint() == trained


def test_the_model_takes_the_tokenizers_vocabulary_and_never_a_smaller_one(tmp_path):
    path, tokenizer = tmp_path / "none.jsonl", ByteTokenizer()
    assert with_vocabulary(config(path), tokenizer).model.vocab_size == 259
    assert with_vocabulary(config(path, model={"vocab_size": 300}), tokenizer).model.vocab_size == 300
    with pytest.raises(
        ValueError, match=r"config.model.vocab_size = 258: the tokenizer has 259 ids, .* use 0 for a new model"
    ):
        with_vocabulary(config(path, model={"vocab_size": 258}), tokenizer)


def test_prompts_alone_are_for_runs_that_sample(of_bytes, tmp_path):
    path = write(tmp_path / "prompts.jsonl", *({"prompt": f"ask {n}"} for n in range(8)))
    settings = dict(tokenizer={"path": str(of_bytes)}, data={"eval_fraction": 0.0})
    with pytest.raises(ValueError, match=r"prompts.jsonl': 8 rows are prompts alone, and only a run that samples"):
        prepare(config(path, **settings), tmp_path / "run", None)
    sampling = config(path, **settings, rollout={"every": 1, "max_new_tokens": 5})
    train = prepare(sampling, tmp_path / "run", None).train
    assert [tree.responses[0].size for tree in train.trees] == [5] * 8


def test_no_data_is_refused_by_key(tmp_path):
    with pytest.raises(ValueError, match=r"^config.data.path: must be set"):
        prepare(config(tmp_path / "x.jsonl", data={"path": ""}), tmp_path / "run", None)
    with pytest.raises(ValueError, match="not the workdir of a run"):
        evaluate_run(str(tmp_path))
