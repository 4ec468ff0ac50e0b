"""Tokenizers behind one small protocol: SentencePiece, `tokenizer.json`, and plain bytes.

`encode` never adds BOS or EOS: where those go is `palign.data.tokenize`'s business alone, so each comes exactly once.
"""

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import sentencepiece
import tokenizers
from etils import epath

EOS_NAMES = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>")
# Inside the name of a control token it keeps `encode_rendered` from reading one, and gives no id itself. It is a
# noncharacter of Unicode, so it stands for nothing in a text.
GUARD = "\ufdd0"
CHAT_TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"


class Tokenizer(Protocol):
    """What palign asks of a tokenizer. Any object with these members will do.

    Attributes:
        vocab_size: ids are 0..vocab_size-1.
        bos_id: id that begins a text, None if the model has none. 0 is a valid id.
        eos_id: id that ends a response.
        eos_ids: all ids that end one, `eos_id` among them.
        pad_id: id that fills up rows; may equal `eos_id`, since padding is told by `Batch.group`, never by id.
        chat_template: the Jinja source that writes out conversations (see `palign.data.chat`), None if there is none.
        special_tokens: what a chat template may read: `{"bos_token": "<s>", ...}`.
        control_tokens: text -> id of the tokens that a chat template writes and nobody else may.
    """

    eos_ids: frozenset[int]
    chat_template: str | None

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def bos_id(self) -> int | None: ...  # noqa: D102
    @property
    def eos_id(self) -> int: ...  # noqa: D102
    @property
    def pad_id(self) -> int: ...  # noqa: D102
    @property
    def special_tokens(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def control_tokens(self) -> Mapping[str, int]: ...  # noqa: D102

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text, without BOS or EOS."""
        ...

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the ids of what a chat template wrote: control tokens become their ids, `GUARD` nothing."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids, special ones left out."""
        ...

    def save(self, directory: epath.PathLike) -> None:
        """Writes what `load_tokenizer(directory)` needs."""
        ...

    def fingerprint(self) -> str:
        """Returns a SHA-256 in hex that changes with anything that changes the ids of a text."""
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
        self.eos_ids = frozenset({self.eos_id})
        self.chat_template: str | None = None

    @property
    def special_tokens(self) -> dict[str, str]:
        """The names of BOS, EOS, padding and unknown, for chat templates."""
        model = self._processor
        ids = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id(), "unk": model.unk_id()}
        return {f"{name}_token": model.id_to_piece(id) for name, id in ids.items() if id >= 0}

    @property
    def control_tokens(self) -> dict[str, int]:
        """The model's control pieces, and those like `<start_of_turn>` that the chat template names."""
        names = re.findall(r"<[^<>\s]+>", self.chat_template or "")
        named = {name: self._processor.piece_to_id(name) for name in names}
        return self._control_pieces | {name: id for name, id in named.items() if id != self._processor.unk_id()}

    @functools.cached_property
    def _control_pieces(self) -> dict[str, int]:
        model = self._processor
        return {model.id_to_piece(id): id for id in range(self.vocab_size) if model.is_control(id)}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text, without BOS or EOS."""
        return self._processor.encode(text)

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the ids of what a chat template wrote; behind a control token no space is put in."""
        return _encode_parts(text, self.control_tokens, self.encode, self._encode_inside)

    def _encode_inside(self, text: str) -> list[int]:
        """Encodes a text that does not begin one: some models put a space before what does."""
        begin, whole = self.encode("\n"), self.encode("\n" + text)
        return whole[len(begin) :] if whole[: len(begin)] == begin else self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids, special ones left out."""
        return self._processor.decode(_checked(ids, self.vocab_size))

    def save(self, directory: epath.PathLike) -> None:
        """Writes `tokenizer.model` and `tokenizer_config.json`, and what belongs to conversations."""
        _write(directory, self.FILE, self._model)
        config = self.special_tokens | {"add_bos_token": self.bos_id is not None}  # transformers adds none by itself
        _write(directory, CONFIG, json.dumps(config, indent=2).encode())
        _write_chat(directory, self)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the model in hex."""
        return hashlib.sha256(self._model).hexdigest()


class JsonTokenizer:
    """A `tokenizer.json` of the `tokenizers` library, with the special tokens that the file itself does not name."""

    FILE = "tokenizer.json"

    def __init__(
        self, model: str, *, eos: str, bos: str | None = None, pad: str | None = None, unk: str | None = None,
        add_bos: bool = True,
    ):  # fmt: skip
        """Takes the file's content and the names of its special tokens.

        Args:
            model: the text of a `tokenizer.json`.
            eos: the token that ends a response.
            bos: the token that begins a text, None if the model uses none.
            pad: the token for padding; None = the EOS token.
            unk: the token for what is not in the vocabulary, None if there is none.
            add_bos: False where `bos` is only a name that chat templates read, and texts begin without it.

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
        self._names = {"eos_token": eos, "bos_token": bos, "pad_token": pad, "unk_token": unk}
        for name, token in self._names.items():
            if token is not None and token not in vocabulary:
                what = name.removesuffix("_token")
                raise ValueError(f"{what} token {token!r} is not in the tokenizer's vocabulary; name one that is")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eos_id: int = vocabulary[eos]
        self.bos_id: int | None = vocabulary[bos] if bos is not None and add_bos else None
        self.pad_id: int = self.eos_id if pad is None else vocabulary[pad]
        self.eos_ids = frozenset({self.eos_id})
        self.chat_template: str | None = None

    @property
    def special_tokens(self) -> dict[str, str]:
        """The names of BOS, EOS, padding and unknown, for chat templates."""
        return {name: token for name, token in self._names.items() if token is not None}

    @property
    def control_tokens(self) -> dict[str, int]:
        """The file's special tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text, without BOS or EOS of its own; special tokens written in the text are read."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the ids of what a chat template wrote."""
        if GUARD not in text:
            return self.encode(text)
        ids = self._guarded.encode(text, add_special_tokens=False).ids
        return [id for id in ids if id < self.vocab_size]

    @functools.cached_property
    def _guarded(self) -> tokenizers.Tokenizer:
        """The tokenizer with one more token, `GUARD`, at which it cuts the text."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.add_special_tokens([tokenizers.AddedToken(GUARD, special=True, normalized=False)])
        return copy

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids, special ones left out."""
        return self._tokenizer.decode(_checked(ids, self.vocab_size), skip_special_tokens=True)

    def save(self, directory: epath.PathLike) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, and what belongs to conversations."""
        _write(directory, self.FILE, self._tokenizer.to_str().encode())
        # For transformers: any class would do that leaves the ids to tokenizer.json.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        _write(directory, CONFIG, json.dumps(self._config | config, indent=2).encode())
        _write_chat(directory, self)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the model and its special tokens in hex."""
        return hashlib.sha256((self._tokenizer.to_str() + json.dumps(self._config)).encode()).hexdigest()

    @property
    def _config(self) -> dict[str, Any]:
        return self._names | {"add_bos_token": self.bos_id is not None}


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then BOS, EOS and padding: needs no training and loses nothing.

    To chat templates they are `<s>`, `</s>` and `<pad>`; in other texts these are the characters that they are.
    """

    FILE = "byte_tokenizer.json"
    vocab_size: int = 259
    bos_id: int | None = 256
    eos_id: int = 257
    pad_id: int = 258
    special_tokens: Mapping[str, str] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    control_tokens: Mapping[str, int] = {"<s>": 256, "</s>": 257, "<pad>": 258}

    def __init__(self) -> None:
        self.eos_ids = frozenset({self.eos_id})
        self.chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        """Returns the bytes of the text."""
        return list(text.encode())

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the bytes of what a chat template wrote, control tokens by their ids."""
        return _encode_parts(text, self.control_tokens, self.encode, self.encode)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the bytes; what is not UTF-8 becomes U+FFFD, special ids are left out."""
        return bytes(i for i in _checked(ids, self.vocab_size) if i < 256).decode(errors="replace")

    def save(self, directory: epath.PathLike) -> None:
        """Writes `byte_tokenizer.json` into the directory, and what belongs to conversations."""
        _write(directory, self.FILE, b'{"type": "bytes"}\n')
        _write_chat(directory, self)

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
            max_sentence_length=max(10, *(len(line.encode()) + 1 for line in lines)), num_threads=1, minloglevel=2,
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
        tokenizer = LOADERS[name](file)
        tokenizer.eos_ids |= _other_eos_ids(file.parent, tokenizer.vocab_size)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    tokenizer.chat_template = _find_chat_template(file.parent)
    return tokenizer


def read_chat_template(path: epath.PathLike) -> str:
    """Reads a chat template from a file.

    Args:
        path: a file of Jinja.

    Returns:
        Its source.

    Raises:
        ValueError: if there is no such file or it is not UTF-8.
    """
    try:
        return epath.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config.tokenizer.chat_template = {str(path)!r}: {_one_line(error)}; name a file") from None


def _find_chat_template(directory: epath.Path) -> str | None:
    """The chat template of a tokenizer's directory: a file of its own, else an entry of tokenizer_config.json."""
    if (directory / CHAT_TEMPLATE).is_file():
        return read_chat_template(directory / CHAT_TEMPLATE)
    entry = _read_json(directory / CONFIG).get("chat_template")
    if isinstance(entry, list):
        named = {one.get("name"): one.get("template") for one in entry if isinstance(one, dict)}
        if "default" not in named:
            raise ValueError(
                f"{directory / CONFIG}: chat_template has {', '.join(map(repr, named)) or 'nothing'} and no 'default'; "
                f"write the one to use into {CHAT_TEMPLATE} beside it"
            )
        entry = named["default"]
    if entry is not None and not isinstance(entry, str):
        raise ValueError(f"{directory / CONFIG}: chat_template is a {type(entry).__name__}; expected a string")
    return entry


def _other_eos_ids(directory: epath.Path, vocab_size: int) -> frozenset[int]:
    """The ids at which generation_config.json ends a response."""
    file = directory / GENERATION_CONFIG
    given = _read_json(file).get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for id in ids:
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < vocab_size:
            raise ValueError(f"{file.name}: eos_token_id {id!r} is not an id of the tokenizer, 0 to {vocab_size - 1}")
    return frozenset(ids)


def _load_sentencepiece(file: epath.Path) -> Tokenizer:
    return SentencePieceTokenizer(file.read_bytes())


def _load_json(file: epath.Path) -> Tokenizer:
    model = file.read_text(encoding="utf-8")
    config = _read_json(file.with_name(SPECIAL_TOKENS)) | _read_json(file.with_name(CONFIG))
    eos, bos, pad, unk = (_token_name(config.get(f"{name}_token")) for name in ("eos", "bos", "pad", "unk"))
    if eos is None:
        named = [name for name in EOS_NAMES if json.dumps(name, ensure_ascii=False) in model]
        if len(named) != 1:
            raise ValueError(
                f"which token ends a text is not said (found {', '.join(named) or 'no usual name'}); write "
                f'{{"eos_token": "..."}} into {CONFIG} beside it'
            )
        eos = named[0]
    tokenizer = JsonTokenizer(model, eos=eos, bos=bos, pad=pad, unk=unk)
    add_bos = config.get("add_bos_token")
    if add_bos is None:  # as in transformers: what the file itself puts before a text
        add_bos = tokenizers.Tokenizer.from_str(model).encode("a").ids[:1] == [tokenizer.bos_id]
    return tokenizer if add_bos else JsonTokenizer(model, eos=eos, bos=bos, pad=pad, unk=unk, add_bos=False)


def _load_bytes(file: epath.Path) -> Tokenizer:
    return ByteTokenizer()


# File name -> loader, in the order in which a directory is searched.
LOADERS: dict[str, Callable[[epath.Path], Tokenizer]] = {
    JsonTokenizer.FILE: _load_json,
    SentencePieceTokenizer.FILE: _load_sentencepiece,
    ByteTokenizer.FILE: _load_bytes,
}


def _read_json(file: epath.Path) -> dict[str, Any]:
    """Returns the object that a file holds, an empty one if there is no file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name}: not JSON ({_one_line(error)})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file.name}: holds a {type(found).__name__}; expected an object")
    return found


def _token_name(entry: Any) -> str | None:
    """Returns a token of tokenizer_config.json, written as a string or as an object with its content."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in ids]
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise ValueError(f"id {bad} is outside the vocabulary 0..{vocab_size - 1}; were padded logits sampled?")
    return ids


def _encode_parts(
    text: str, control: Mapping[str, int], encode: Callable[[str], list[int]], encode_inside: Callable[[str], list[int]]
) -> list[int]:
    """Cuts a rendered text at control tokens and guards, and encodes the parts; only the first one begins a text."""
    longest_first = sorted(map(re.escape, control), key=len, reverse=True)
    ids: list[int] = []
    for number, part in enumerate(re.split(f"({'|'.join([*longest_first, GUARD])})", text)):
        if part in control:
            ids.append(control[part])
        elif part and part != GUARD:
            ids += encode_inside(part) if number else encode(part)
    return ids


def _write_chat(directory: epath.PathLike, tokenizer: Tokenizer) -> None:
    """Writes the chat template and, where there are several, the ids that end a response."""
    if tokenizer.chat_template is not None:
        _write(directory, CHAT_TEMPLATE, tokenizer.chat_template.encode())
    if tokenizer.eos_ids > {tokenizer.eos_id}:
        content = {"eos_token_id": sorted(tokenizer.eos_ids)}
        _write(directory, GENERATION_CONFIG, json.dumps(content).encode())


def _write(directory: epath.PathLike, name: str, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{name}.{os.getpid()}"
    temporary.write_bytes(content)
    temporary.replace(directory / name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
