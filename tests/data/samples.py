"""What several tests of data share: texts, a tokenizer.json, random trees."""

import gzip
import json

import numpy as np
import tokenizers as hf

from palign.data.tokenize import TokenTree

EOS = 1

TEXTS = [
    "\n\nHuman: how are you?\n\nAssistant:  Fine, thank you. And you?",
    "the food was not good , the waiter was rude .",
    "naïve café",
] * 3


def json_model(*specials):
    """A byte-level BPE in the format of tokenizer.json, trained here."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(vocab_size=320, special_tokens=list(specials), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def write_rows(path, *rows):
    """A file of JSON lines, `.gz` packed; rows of bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def with_bos(model, bos):
    """The same with a post-processor that puts BOS before a text, as the files of Llama and Gemma have one."""
    tokenizer = hf.Tokenizer.from_str(model)
    id = tokenizer.token_to_id(bos)
    tokenizer.post_processor = hf.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, id)])
    return tokenizer.to_str()


def tree(prompt, *responses, scores=None, id=0):
    arrays = [np.array(list(ids), np.int32) for ids in (prompt, *responses)]
    return TokenTree(arrays[0], tuple(arrays[1:]), tuple(map(float, scores or range(len(responses), 0, -1))), id)


def random_tree(rng, id, K=None, longest=12):
    """Distinct tokens everywhere, EOS at each response's end; one in four responses is EOS alone."""
    K = K or int(rng.integers(1, 9))
    lengths = [0 if rng.random() < 0.25 else int(rng.integers(1, longest)) for _ in range(K)]
    token = iter(range(1000 * (id + 1), 1000 * (id + 2)))
    prompt = [next(token) for _ in range(int(rng.integers(1, longest)))]
    responses = [[*(next(token) for _ in range(n)), EOS] for n in lengths]
    return tree(prompt, *responses, scores=rng.integers(0, 4, K).tolist(), id=id)
