"""Data that are prepared once: the same trees as from the file, refused where a run asks for others."""

import json
import shutil

import numpy as np
import pytest

from palign.cli import app
from palign.cli import prepare as command
from palign.data.loader import fingerprint
from palign.data.stored import StoredTrees, open_trees, tree_sizes, trees_digest, write_trees
from palign.data.tokenize import TokenTree
from palign.data.tokenizers import ByteTokenizer
from palign.train import once, prepare_once
from palign.train.once import MANIFEST, is_prepared
from palign.train.prepare import HELD_OUT, prepare
from tests.recipes.tiny_runs import config, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 60, prompts=40)


@pytest.fixture(scope="module")
def prepared(pairs):
    place = pairs.parent / "prepared"
    prepare_once.prepare_once(config(pairs), place)
    return place


def tree(id, prompt, *responses, learned=None):
    scores = tuple(float(k) for k in range(len(responses)))
    arrays = [np.asarray(ids, np.int32) for ids in (prompt, *responses)]
    masks = learned and tuple(np.asarray(mask, bool) for mask in learned)
    return TokenTree(arrays[0], tuple(arrays[1:]), scores, id, learned=masks)


TREES = [
    tree(7, [1], [2, 3], [4]), tree(3, [5, 6], [7], [8, 9], [1, 1, 1]),
    tree(9, [1, 2, 3], [4, 5], [6, 7, 8], learned=[[False, True], [True, False, True]]), tree(4, [9], [9]),
]  # fmt: skip


def same(a, b):
    assert (a.id, a.scores, a.mismatched, a.learned is None) == (b.id, b.scores, b.mismatched, b.learned is None)
    for x, y in zip((a.prompt, *a.responses, *a.masks), (b.prompt, *b.responses, *b.masks), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def test_trees_are_read_back_bit_for_bit_in_their_order_and_their_sizes_without_them(tmp_path):
    write_trees(tmp_path, {"train": TREES, "few": TREES[2:]})
    stored = open_trees(tmp_path, "train", trees_digest(TREES))
    assert len(stored) == len(list(stored)) == 4 and isinstance(stored[1:], StoredTrees)
    for one, other in zip([*stored, stored[np.int32(1)], *stored[2:]], [*TREES, TREES[1], *TREES[2:]], strict=True):
        same(one, other)
    assert tree_sizes(stored) == tree_sizes(TREES) and tree_sizes(stored[1:3]) == tree_sizes(TREES[1:3])
    assert trees_digest(stored[2:]) == trees_digest(TREES[2:]) == trees_digest(open_trees(tmp_path, "few", ""))
    next(tmp_path.glob("*train.array_record*")).unlink()  # sizes and digest need no record
    assert tree_sizes(stored)[1] == (2, (1, 2, 3), (1, 2, 3), (0.0, 1.0, 2.0)) and trees_digest(stored)


def test_a_run_on_prepared_data_takes_the_very_steps_of_one_on_the_file(pairs, prepared, tmp_path):
    from_file = prepare(config(pairs), tmp_path / "a", None)
    by_index = prepare(config(prepared), tmp_path / "b", None)
    assert isinstance(by_index.train.trees, StoredTrees) and set(by_index.evals) == {HELD_OUT}
    for one, other in [(from_file.train, by_index.train), (from_file.evals[HELD_OUT], by_index.evals[HELD_OUT])]:
        assert fingerprint(one) == fingerprint(other)
        for a, b in zip(one.trees, other.trees, strict=True):
            same(a, b)
    np.testing.assert_array_equal(from_file.train.row(3).token, by_index.train.row(3).token)
    assert from_file.tokenizer.fingerprint() == by_index.tokenizer.fingerprint()
    assert from_file.counts == by_index.counts


def test_the_steps_of_a_run_are_planned_without_reading_a_token(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(StoredTrees, "__getitem__", lambda *_: pytest.fail("a tree was read"))
    made = prepare(config(prepared), tmp_path, None)
    assert made.train.num_steps == 6 and fingerprint(made.train)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("data.max_length", {"data": {"max_length": 31}}),
        ("data.max_prompt_length", {"data": {"max_prompt_length": 9}}),
        ("data.truncation", {"data": {"truncation": "drop"}}),
        ("data.records", {"data": {"records": "best_response"}}),
        ("data.bad_records", {"data": {"bad_records": "skip"}}),
        ("data.control_text", {"data": {"control_text": "escape"}}),
        ("data.limit", {"data": {"limit": 5}}),
        ("data.score_weights", {"data": {"score_weights": {"x": 1.0}}}),
        ("data.eval_fraction", {"data": {"eval_fraction": 0.3}}),
        ("data.eval_paths", {"data": {"eval_paths": {"x": "y.jsonl"}}}),
        ("data.seed", {"data": {"seed": 1}}),
        ("rollout.max_new_tokens", {"rollout": {"every": 1, "max_new_tokens": 5}}),
        ("tokenizer.model_type", {"tokenizer": {"model_type": "bpe"}}),
        ("tokenizer.vocab_size", {"tokenizer": {"vocab_size": 65}}),
        ("tokenizer.path", {"tokenizer": {"path": "BYTES"}}),
        ("tokenizer.chat_template", {"tokenizer": {"chat_template": "TEMPLATE"}}),
    ],
)
def test_a_setting_that_was_fixed_is_refused_by_its_key(key, change, prepared, tmp_path):
    ByteTokenizer().save(tmp_path / "bytes")
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    places = {"BYTES": str(tmp_path / "bytes"), "TEMPLATE": str(tmp_path / "chat.jinja")}
    if "tokenizer" in change:
        change = {"tokenizer": {name: places.get(given, given) for name, given in change["tokenizer"].items()}}
    with pytest.raises(
        ValueError, match=rf"^config\.{key}( = .*)?: .*prepared was prepared with .* prepare the data again"
    ):
        prepare(config(prepared, **change), tmp_path / "run", None)


def test_what_only_orders_and_packs_may_change(prepared, tmp_path):
    settings = {"row_length": 128, "packing": "one_per_row", "rows_per_step": 2, "pair_policy": "all"}
    made = prepare(config(prepared, data=settings), tmp_path, None)
    assert made.train.shape.trees == 1 and len(made.train.trees) == 43


def test_the_manifest_says_where_the_trees_are_from_and_what_became_of_the_rows(pairs, prepared):
    manifest = json.loads((prepared / MANIFEST).read_text())
    (file,) = manifest["sources"][str(pairs)]
    assert file["bytes"] == len(pairs.read_bytes()) and len(file["sha256"]) == 64
    assert manifest["read"]["rows"] == 60 and manifest["settings"]["data.max_length"] == 32
    train = manifest["sets"]["train"]
    assert train["trees"] == train["counts"]["records"] == 43
    lengths = open_trees(prepared, "train", "").sizes
    histogram = train["lengths"]["tree"]
    found, _ = np.histogram([size.prompt + sum(size.responses) for size in lengths], bins=histogram["edges"])
    assert found.tolist() == histogram["counts"] and sum(found) == 43


def test_methods_that_change_the_examples_change_those_that_were_prepared(pairs, prepared, tmp_path):
    method = {"objective": {"loss_type": ["kto"]}}
    one, other = (prepare(config(path, **method), tmp_path / path.name, None).train for path in (pairs, prepared))
    assert fingerprint(one) == fingerprint(other) and one.trees[0].mismatched == other.trees[0].mismatched == 1


def test_runs_that_sample_have_their_prompts_prepared(pairs, tmp_path):
    sampling = {"rollout": {"every": 1, "max_new_tokens": 5}, "objective": {"loss_type": ["sft"]}}
    prepare_once.prepare_once(config(pairs, **sampling), tmp_path / "prepared")
    one, other = (
        prepare(config(path, **sampling), tmp_path / str(n), None).train
        for n, path in enumerate((pairs, tmp_path / "prepared"))
    )
    assert fingerprint(one) == fingerprint(other) and [r.size for r in other.trees[0].responses] == [5]


def test_a_directory_in_a_bucket_is_refused(pairs):
    with pytest.raises(ValueError, match=r"^--output=gs://b/prepared: .* local disk"):
        prepare_once.prepare_once(config(pairs), "gs://b/prepared")


def test_a_finished_directory_is_left_alone_and_another_is_refused(pairs, prepared, tmp_path, capsys):
    before = {file: file.stat().st_mtime_ns for file in prepared.rglob("*")}
    prepare_once.prepare_once(config(pairs), prepared)
    assert "is prepared already" in capsys.readouterr().err
    assert before == {file: file.stat().st_mtime_ns for file in prepared.rglob("*")}
    with pytest.raises(ValueError, match=r"config.data.max_length = 20: .* was prepared with 32"):
        prepare_once.prepare_once(config(pairs, data={"max_length": 20}), prepared)
    with pytest.raises(ValueError, match=r"config.data.path = .*more.jsonl': .* was prepared with .*pairs.jsonl"):
        prepare_once.prepare_once(config(write_pairs(tmp_path / "more.jsonl", 9)), prepared)
    with pytest.raises(ValueError, match="is prepared already; train on it"):
        prepare_once.prepare_once(config(prepared), tmp_path / "again")


def test_no_path_is_no_prepared_data_wherever_one_stands(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(prepared)
    with pytest.raises(ValueError, match=r"^config.data.path: must be set"):
        prepare(config("", data={"path": ""}), tmp_path / "run", None)
    with pytest.raises(ValueError, match=r"^config.data.path: must be set"):
        prepare_once.prepare_once(config("", data={"path": ""}), tmp_path / "out")


def test_a_source_that_has_changed_is_noticed(tmp_path):
    path, place = write_pairs(tmp_path / "pairs.jsonl", 20), tmp_path / "prepared"
    prepare_once.prepare_once(config(path), place)
    write_pairs(path, 21)
    with pytest.raises(ValueError, match=r"pairs.jsonl has changed since it was prepared"):
        prepare_once.prepare_once(config(path), place)


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    path = write_pairs(tmp_path / "pairs.jsonl", 20)
    tokenise = prepare_once.tokenise

    def slowly(*given):
        made = tokenise(*given)
        write_pairs(path, 21)
        return made

    monkeypatch.setattr(prepare_once, "tokenise", slowly)
    with pytest.raises(ValueError, match=r"pairs.jsonl: changed while being read"):
        prepare_once.prepare_once(config(path), tmp_path / "prepared")
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_what_was_stopped_is_no_data_set_and_the_next_attempt_begins_again(pairs, tmp_path, monkeypatch):
    place = tmp_path / "prepared"

    def killed(*_):
        raise SystemExit  # after the trees, before the manifest

    with monkeypatch.context() as patch:
        patch.setattr(once, "fixed_settings", killed)
        with pytest.raises(SystemExit):
            prepare_once.prepare_once(config(pairs), place)
    assert not place.exists()
    (tmp_path / ".prepared.partial").mkdir()  # what SIGKILL leaves
    (tmp_path / ".prepared.partial" / "dataset_info.json").write_text("{")
    prepare_once.prepare_once(config(pairs), place)
    assert is_prepared(place) and [file.name for file in tmp_path.iterdir()] == ["prepared"]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (MANIFEST, 200, "damaged"),
        ("train.sizes.npz", 200, "'train' cannot be read: File is not a zip file; prepare the data again"),
        ("palign_trees-train.array_record-00000", 70_000, "example [0-9]+ cannot be read"),
        ("palign_trees-train.array_record-00000", 300, "example [0-9]+ cannot be read"),
    ],
)
def test_damage_is_one_line(name, size, message, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    file = tmp_path / "copy" / name
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=message):
        list(prepare(config(tmp_path / "copy"), tmp_path / "run", None).train.trees)


def test_a_mixture_is_prepared_with_its_weights(tmp_path):
    paths = [str(write_pairs(tmp_path / f"{n}.jsonl", 30, seed=n)) for n in range(2)]
    mixed = {"path": "", "mixture": {paths[0]: 1.0, paths[1]: 3.0}}
    prepare_once.prepare_once(config(paths[0], data=mixed), tmp_path / "prepared")
    one = prepare(config(paths[0], data=mixed), tmp_path / "a", None).train
    assert fingerprint(one) == fingerprint(prepare(config(tmp_path / "prepared"), tmp_path / "b", None).train)


def kept(path, cache, **change):
    """A config whose examples are kept."""
    return config(path, **change | {"data": {"cache": str(cache)} | change.get("data", {})})


@pytest.fixture
def tokenised(monkeypatch):
    """The configs that were tokenised, one after another."""
    done, tokenise = [], prepare_once.tokenise
    monkeypatch.setattr(prepare_once, "tokenise", lambda *given: done.append(given[0]) or tokenise(*given))
    return done


def test_a_run_keeps_its_examples_for_others_and_takes_the_very_steps_of_one_that_does_not(pairs, tmp_path, tokenised):
    plain = prepare(config(pairs), tmp_path / "plain", None)
    for run in ("a", "b"):
        made = prepare_once.prepare_cached(kept(pairs, tmp_path / "cache"), tmp_path / run, None)
        assert fingerprint(made.train) == fingerprint(plain.train) and made.counts == plain.counts
        assert made.tokenizer.fingerprint() == plain.tokenizer.fingerprint()
    (tmp_path / "b" / "config.json").write_text("{}")  # goes on: its tokenizer is in the workdir
    again = prepare_once.prepare_cached(kept(pairs, tmp_path / "cache"), tmp_path / "b", None)
    assert fingerprint(again.train) == fingerprint(plain.train) and len(tokenised) == 1
    other = {"data": {"rows_per_step": 2, "packing": "one_per_row"}}  # decides no example
    assert prepare_once.prepare_cached(kept(pairs, tmp_path / "cache", **other), tmp_path / "c", None).train.num_steps
    assert len(tokenised) == 1 and [file.name[:6] for file in (tmp_path / "cache").iterdir()] == ["pairs-"]


def test_whatever_decides_the_examples_is_another_entry_of_the_cache(tmp_path, tokenised, monkeypatch):
    path, cache, places = write_pairs(tmp_path / "pairs.jsonl", 20), tmp_path / "cache", tmp_path / "tokenizer"
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    ByteTokenizer().save(places)
    by_bytes = {"tokenizer": {"path": str(places)}, "data": {"max_length": 512, "row_length": 1024}}
    chat = {**by_bytes, "tokenizer": {"path": str(places), "chat_template": str(template)}}
    cut = {**by_bytes, "data": {**by_bytes["data"], "truncation": "drop"}}
    changes = {"": {}, "tokenizer": by_bytes, "template": chat, "truncation": cut}

    def entries(name):
        prepare_once.prepare_cached(kept(path, cache, **changes[name]), tmp_path / str(len(tokenised)), None)
        return len(list(cache.iterdir()))

    assert [entries(name) for name in changes] == [1, 2, 3, 4]
    template.write_text("{% for m in messages %}> {{ m.content }}{% endfor %}")
    assert entries("template") == 5
    write_pairs(path, 21)
    assert entries("truncation") == 6
    monkeypatch.setattr(prepare_once.palign.data, "__path__", [str(tmp_path)])  # another palign, one without code
    assert entries("truncation") == 7


def test_what_cannot_be_kept_is_refused(pairs, prepared, tmp_path):
    for path, cache, message in [
        (prepared, tmp_path / "c", r"^config.data.cache = .* has no effect on data that are prepared"),
        (pairs, "gs://b/c", r"^config.data.cache=gs://b/c: .* local disk"),
        ("tfds:no_such/train", tmp_path / "c", r"^config.data.cache: tfds:no_such/train has a name and no files here"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare_once.prepare_cached(kept(path, cache), tmp_path / "run", None)


def test_the_command_refuses_examples_that_no_row_of_its_config_holds(pairs, tmp_path):
    with pytest.raises(ValueError, match=r"^config.data.row_length, config.data.oversize \(train\): .* do not fit"):
        prepare_once.prepare_once(config(pairs, data={"row_length": 16, "block": 16}), tmp_path / "prepared")
    assert not list(tmp_path.iterdir())


def test_the_command_prepares_and_says_so(pairs, tmp_path, capsys):
    (tmp_path / "c.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({'tokenizer': {'model_type': 'word', 'vocab_size': 64}})\n"
    )
    arguments = [f"--config={tmp_path / 'c.py'}", f"--config.data.path={pairs}", f"--output={tmp_path / 'out'}"]
    assert app.run(command.main, arguments) == 0
    assert "examples" in (said := capsys.readouterr()).out and "tok/s" in said.err and is_prepared(tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    assert app.run(command.main, [*arguments[:2], f"--output={tmp_path / 'other'}"]) == 2
    assert "is there already" in capsys.readouterr().err
