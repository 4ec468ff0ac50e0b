"""Tokenizers behind one small protocol: SentencePiece, `tokenizer.json`, and plain bytes.

`encode` never adds BOS or EOS: where those go is `palign.data.tokenize`'s business alone, so each comes exactly once.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import sentencepiece
import tokenizers
from etils import epath

EOS_NAMES = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>")


class Tokenizer(Protocol):
    """What palign asks of a tokenizer. Any object with these members will do.

    Attributes:
        vocab_size: ids are 0..vocab_size-1.
        bos_id: id that begins a text, None if the model has none. 0 is a valid id.
        eos_id: id that ends a response.
        pad_id: id that fills up rows; may equal `eos_id`, since padding is told by `Batch.group`, never by id.
    """

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def bos_id(self) -> int | None: ...  # noqa: D102
    @property
    def eos_id(self) -> int: ...  # noqa: D102
    @property
    def pad_id(self) -> int: ...  # noqa: D102

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text, without BOS or EOS."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids, special ones left out."""
        ...

    def save(self, directory: epath.PathLike) -> None:
        """Writes what `load_tokenizer(directory)` needs."""
        ...

    def fingerprint(self) -> str:
        """Returns a SHA-256 in hex that changes with anything that changes ids."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model. SentencePiece writes spaces as U+2581, so that character in a text decodes as a space."""

    FILE = "tokenizer.model"

    def __init__(self, model: bytes):
        """Takes the serialized model.

        Args:
            model: the bytes of a `.model` file.

        Raises:
            ValueError: if the bytes are no model or it has no EOS.
        """
        if not model:
            raise ValueError("not a SentencePiece model: it holds no bytes")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {_one_line(error)}") from None
        if self._processor.eos_id() < 0:
            raise ValueError("this SentencePiece model has no EOS; train it with an eos_id")
        self._model = model
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        self.bos_id: int | None = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text, without BOS or EOS."""
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids, special ones left out."""
        return self._processor.decode(_checked(ids, self.vocab_size))

    def save(self, directory: epath.PathLike) -> None:
        """Writes `tokenizer.model` into the directory."""
        _write(directory, self.FILE, self._model)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the model in hex."""
        return hashlib.sha256(self._model).hexdigest()


class JsonTokenizer:
    """A `tokenizer.json` of the `tokenizers` library, with the special tokens that the file itself does not name."""

    FILE = "tokenizer.json"
    CONFIG = "tokenizer_config.json"

    def __init__(self, model: str, *, eos: str, bos: str | None = None, pad: str | None = None):
        """Takes the file's content and the names of its special tokens.

        Args:
            model: the text of a `tokenizer.json`.
            eos: the token that ends a response.
            bos: the token that begins a text, None if the model uses none.
            pad: the token for padding; None = the EOS token.

        Raises:
            ValueError: if the text is no tokenizer or a token is not in its vocabulary.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"not a tokenizer.json: {_one_line(error)}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        for name, token in (("eos", eos), ("bos", bos), ("pad", pad)):
            if token is not None and token not in vocabulary:
                raise ValueError(f"{name} token {token!r} is not in the tokenizer's vocabulary; name one that is")
        self._config = {"eos_token": eos, "bos_token": bos, "pad_token": pad}
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eos_id: int = vocabulary[eos]
        self.bos_id: int | None = None if bos is None else vocabulary[bos]
        self.pad_id: int = self.eos_id if pad is None else vocabulary[pad]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text, without BOS or EOS of its own; special tokens written in the text are read."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids, special ones left out."""
        return self._tokenizer.decode(_checked(ids, self.vocab_size), skip_special_tokens=True)

    def save(self, directory: epath.PathLike) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` into the directory."""
        _write(directory, self.FILE, self._tokenizer.to_str().encode())
        _write(directory, self.CONFIG, json.dumps(self._config, indent=2).encode())

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the model and its special tokens in hex."""
        return hashlib.sha256((self._tokenizer.to_str() + json.dumps(self._config)).encode()).hexdigest()


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then BOS, EOS and padding: needs no training and loses nothing."""

    FILE = "byte_tokenizer.json"
    vocab_size: int = 259
    bos_id: int | None = 256
    eos_id: int = 257
    pad_id: int = 258

    def encode(self, text: str) -> list[int]:
        """Returns the bytes of the text."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the bytes; what is not UTF-8 becomes U+FFFD, special ids are left out."""
        return bytes(i for i in _checked(ids, self.vocab_size) if i < 256).decode(errors="replace")

    def save(self, directory: epath.PathLike) -> None:
        """Writes `byte_tokenizer.json` into the directory."""
        _write(directory, self.FILE, b'{"type": "bytes"}\n')

    def fingerprint(self) -> str:
        """Returns a constant SHA-256 in hex."""
        return hashlib.sha256(b"palign bytes, bos 256, eos 257, pad 258").hexdigest()


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int, model_type: str = "bpe") -> SentencePieceTokenizer:
    """Trains a SentencePiece model whose text comes back exactly; the same texts give the same model.

    Texts are taken as they are: no Unicode normalisation, no spaces added or removed, and a newline is a piece of its
    own, so no piece straddles two lines. Types `bpe` and `unigram` fall back to bytes for what they have not seen;
    `word` has one id for each word between spaces and one unknown id; it is for toy languages of single lines.

    Args:
        texts: what to train on.
        vocab_size: the most ids to use, special ones and the 256 bytes included; small data may give fewer.
        model_type: "bpe", "unigram" or "word".

    Returns:
        The tokenizer: pad 0, BOS 1, EOS 2, unknown 3.

    Raises:
        ValueError: for an unknown type, no text at all, a newline for a `word` tokenizer, or a vocabulary too small for
            the characters.
    """
    if model_type not in ("bpe", "unigram", "word"):
        raise ValueError(f"model_type is {model_type!r}; expected 'bpe', 'unigram' or 'word'")
    word, texts = model_type == "word", list(texts)
    lines = [line for text in texts for line in text.split("\n")]
    if word and len(lines) > len(texts):
        raise ValueError("a 'word' tokenizer knows no newlines and a text has one; use model_type 'bpe' or 'unigram'")
    if not any(lines):
        raise ValueError("there is no text to train a tokenizer on; pass at least one non-empty text")
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=filter(None, lines), model_writer=writer, model_type=model_type, vocab_size=vocab_size,
            byte_fallback=not word, character_coverage=1.0 if word else 0.9995,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            hard_vocab_limit=False, user_defined_symbols=[] if word else ["\n"], pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            max_sentence_length=max(len(line.encode()) for line in lines) + 1, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(
            f"cannot train a {model_type} tokenizer with vocab_size {vocab_size}: {_one_line(error)}; "
            "bytes alone take 256 ids: try a larger vocab_size"
        ) from None
    return SentencePieceTokenizer(writer.getvalue())


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """Loads a tokenizer from a file, or from the file that a directory holds.

    Args:
        path: a `.model` file, a `tokenizer.json` (its special tokens are read from `tokenizer_config.json` beside it),
            or a directory with one of these in it or in its `tokenizer/`: what `save` wrote, a run, or a converted
            model.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if there is no such file, or the special tokens cannot be told.
    """
    path = epath.Path(path)
    if path.is_dir():
        places = [path / folder / name for folder in ("", "tokenizer") for name in LOADERS]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise ValueError(f"{path}: no tokenizer here; expected one of {', '.join(LOADERS)} in it or in tokenizer/")
    else:
        file = path
    if not file.is_file():
        raise ValueError(f"{file}: there is no such tokenizer file")
    name = SentencePieceTokenizer.FILE if file.suffix == ".model" else file.name
    if name not in LOADERS:
        raise ValueError(f"{file}: expected a *.model file or one of {', '.join(LOADERS)}")
    try:
        return LOADERS[name](file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _load_sentencepiece(file: epath.Path) -> Tokenizer:
    return SentencePieceTokenizer(file.read_bytes())


def _load_json(file: epath.Path) -> Tokenizer:
    model = file.read_text(encoding="utf-8")
    config_file = file.with_name(JsonTokenizer.CONFIG)
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    eos, bos, pad = (_token_name(config.get(f"{name}_token")) for name in ("eos", "bos", "pad"))
    if eos is None:
        named = [name for name in EOS_NAMES if json.dumps(name, ensure_ascii=False) in model]
        if len(named) != 1:
            raise ValueError(
                f"which token ends a text is not said (found {', '.join(named) or 'no usual name'}); write "
                f'{{"eos_token": "..."}} into {config_file.name} beside it'
            )
        eos = named[0]
    return JsonTokenizer(model, eos=eos, bos=bos, pad=pad)


def _load_bytes(file: epath.Path) -> Tokenizer:
    return ByteTokenizer()


# File name -> loader, in the order in which a directory is searched.
LOADERS: dict[str, Callable[[epath.Path], Tokenizer]] = {
    JsonTokenizer.FILE: _load_json,
    SentencePieceTokenizer.FILE: _load_sentencepiece,
    ByteTokenizer.FILE: _load_bytes,
}


def _token_name(entry: Any) -> str | None:
    """Returns a token of tokenizer_config.json, written as a string or as an object with its content."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in ids]
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise ValueError(f"id {bad} is outside the vocabulary 0..{vocab_size - 1}; were padded logits sampled?")
    return ids


def _write(directory: epath.PathLike, name: str, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{name}.{os.getpid()}"
    temporary.write_bytes(content)
    temporary.replace(directory / name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
