"""Round trips, determinism, saving and loading."""

import json

import pytest

from palign.data.tokenizers import (
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from tests.data.samples import TEXTS, json_model, with_bos

HARD = [
    "", " ", "  two  spaces ", "\n", "\n\n\n", "a\r\nb\tc\0d", "日本語 é e\u0301 😀 \u200d ﷺ",
    "</s> <s> <pad>", "x" * 5000,
    "\n\nHuman: a\n\nAssistant:", "\u2028\u0085\x0b", "http://a.b", " lead", "trail ",
]  # fmt: skip


@pytest.fixture(scope="module", params=["bpe", "unigram", "json", "bytes"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "json":
        return JsonTokenizer(json_model("<bos>", "<eos>"), eos="<eos>", bos="<bos>")
    return train_sentencepiece(TEXTS, vocab_size=330, model_type=request.param)


def test_text_comes_back_exactly(tokenizer):
    for text in TEXTS + HARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_special_ids_are_not_text(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "a b"
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])


def test_a_saved_tokenizer_loads_from_its_directory_its_run_and_its_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run" / "tokenizer")
    for path in (tmp_path / "run", tmp_path / "run" / "tokenizer", tmp_path / "run" / "tokenizer" / tokenizer.FILE):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
        assert [loaded.bos_id, loaded.eos_id, loaded.pad_id] == [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]


def test_a_saved_sentencepiece_model_tells_transformers_to_put_bos_before_a_text(tmp_path):
    trained = train_sentencepiece(TEXTS[1:3], vocab_size=330)
    trained.save(tmp_path)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert said["add_bos_token"] is True and (said["bos_token"], said["eos_token"]) == ("<s>", "</s>")


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "word"])
def test_training_twice_gives_the_same_model(model_type):
    one, other = (train_sentencepiece(TEXTS[1:3], vocab_size=330, model_type=model_type) for _ in range(2))
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != train_sentencepiece(TEXTS[1:2], vocab_size=330, model_type=model_type).fingerprint()


def test_a_newline_is_always_its_own_piece():
    tokenizer = train_sentencepiece(TEXTS, vocab_size=330)
    (newline,) = tokenizer.encode("\n")
    assert tokenizer.encode("?\n\nA")[-3:-1] == [newline, newline]


def test_words_of_a_toy_language_are_one_id_each():
    tokenizer = train_sentencepiece(TEXTS[1:3], vocab_size=330, model_type="word")
    text = "the waiter was not rude ."
    assert len(tokenizer.encode(text)) == 6 and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size < 40
    ids = tokenizer.encode(TEXTS[1])
    assert tokenizer.decode(ids[3:]) == " not good , the waiter was rude ."  # a response alone keeps its space


def test_long_lines_are_not_skipped_in_training():
    word = "extraordinary"
    tokenizer = train_sentencepiece([f" {word}" * 5000], vocab_size=300)
    assert len(tokenizer.encode(f" {word}")) == 1


def test_training_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"vocab_size 100: .* try a larger vocab_size"):
        train_sentencepiece(TEXTS, vocab_size=100)
    with pytest.raises(ValueError, match="expected 'bpe', 'unigram' or 'word'"):
        train_sentencepiece(TEXTS, vocab_size=300, model_type="char")
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece(["", "\n"], vocab_size=300)
    with pytest.raises(ValueError, match="knows no newlines"):
        train_sentencepiece(["a b\nc"], vocab_size=300, model_type="word")


def test_loading_errors_say_where_and_what(tmp_path):
    for content, name, message in [
        (b"x", "a.model", "not a SentencePiece model"),
        (b"{}", "tokenizer.json", "which token ends a text is not said"),
        (b"x", "a.bin", "expected a"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer here"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "none.model")


def test_a_foreign_tokenizer_json_finds_its_special_tokens(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json_model("<s>", "</s>"))
    found = load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_id, found.pad_id) == (None, 1, 1)  # the only usual name; nothing else is guessed
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_id, found.pad_id) == (None, 1, 1)  # named, but nothing puts it before a text
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    assert load_tokenizer(tmp_path).bos_id == 0
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text(with_bos(json_model("<s>", "</s>"), "<s>"))
    assert load_tokenizer(tmp_path).bos_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(ValueError, match="eos token '<none>' is not in"):
        load_tokenizer(tmp_path)


def test_bytes_that_are_no_model_are_refused():
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePieceTokenizer(b"")
