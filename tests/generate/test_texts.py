"""From prompts as text to samples as text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.config.schema import ModelConfig
from palign.data.records import Message
from palign.data.tokenizers import ByteTokenizer
from palign.generate.texts import as_row, as_text, check_instructions, generate
from palign.models.transformer import make_language_model

PROMPTS = ["of middling", "é", "the longest one", "short", ""]
SETTINGS = dict(max_new_tokens=6, batch_size=2, seed=4)


@functools.cache
def model():
    config = ModelConfig(
        vocab_size=259, num_layers=1, dim=16, num_heads=2, num_key_heads=1, hidden_dim=16, tie_embedding=False,
        remat="none", dtype="float32",
    )  # fmt: skip
    lm = make_language_model(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    return lm, jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def sample(prompts, **settings):
    return generate(*model(), ByteTokenizer(), prompts, **SETTINGS | settings)


@functools.cache
def greedy():
    return sample(PROMPTS, temperature=0.0)


class Watcher:
    def __init__(self):
        self.seen = []

    def advance(self, done: int, amount: float) -> None:
        self.seen.append((done, amount))


def test_results_come_in_the_order_of_the_prompts_whatever_their_lengths():
    backwards = sample(PROMPTS[::-1], temperature=0.0)
    assert [row[0].ids.tolist() for row in greedy()] == [row[0].ids.tolist() for row in backwards[::-1]]
    assert len({tuple(row[0].ids) for row in greedy()}) == len(PROMPTS)


def test_neither_the_batch_nor_the_padding_of_a_prompt_changes_its_greedy_sample():
    alone = sample(PROMPTS[3:4], temperature=0.0)
    assert alone[0][0].ids.tolist() == greedy()[3][0].ids.tolist()
    assert alone[0][0].logp == pytest.approx(greedy()[3][0].logp, rel=1e-5)


def test_the_same_seed_gives_the_same_samples_and_another_seed_others():
    first, again, other = sample(PROMPTS), sample(PROMPTS), sample(PROMPTS, seed=5)
    ids = [[row[0].ids.tolist() for row in rows] for rows in (first, again, other)]
    assert ids[0] == ids[1]
    assert sum(a != b for a, b in zip(ids[0], ids[2], strict=True)) > len(PROMPTS) / 2  # short ones are alike by chance


def test_every_batch_draws_from_random_numbers_of_its_own():
    same = sample(["again"] * 4)
    assert len({tuple(row[0].ids) for row in same}) == 4


def test_a_sample_that_ended_has_eos_among_its_ids_and_not_in_its_text():
    class Ends(ByteTokenizer):
        eos_id = int(greedy()[0][0].ids[2])  # a token that is drawn, but not at once

    rows = generate(*model(), Ends(), PROMPTS, **SETTINGS | {"temperature": 0.0})
    drawn = [sample for row in rows for sample in row]
    assert drawn[0].finished and not all(s.finished for s in drawn)
    for s in drawn:
        assert s.finished == (s.ids[-1] == Ends.eos_id)
        assert s.finished or s.ids.size == 6
        text = s.ids[:-1] if s.finished else s.ids
        assert Ends.eos_id not in text
        assert s.text == ByteTokenizer().decode(text)


def test_progress_counts_prompts_and_the_tokens_of_real_prompts_only():
    watcher = Watcher()
    rows = sample(PROMPTS, temperature=0.0, progress=watcher)
    assert [done for done, _ in watcher.seen] == [2, 4, 5]
    assert sum(amount for _, amount in watcher.seen) == sum(row[0].ids.size for row in rows)


def test_a_conversation_is_continued_behind_its_template_and_ends_with_its_turn():
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    said = (Message("user", "short"),)
    written, plain = (
        generate(*model(), each, [prompt], temperature=0.0, **SETTINGS)
        for each, prompt in ((tokenizer, said), (ByteTokenizer(), "short:"))
    )
    assert written[0][0].ids.tolist() == plain[0][0].ids.tolist()
    tokenizer.eos_ids |= {int(plain[0][0].ids[1])}
    ended = generate(*model(), tokenizer, [said], temperature=0.0, **SETTINGS)[0][0]
    assert ended.finished and ended.ids.tolist() == plain[0][0].ids[:2].tolist()
    assert as_row(said, [ended]) == {
        "prompt": [{"role": "user", "content": "short"}],
        "responses": [[{"role": "assistant", "content": ended.text}]],
        "scores": [ended.logp],
    }
    assert as_text(said) == "user: short\nassistant: " and as_row("short", [ended])["responses"] == [ended.text]


def test_an_empty_prompt_needs_a_tokenizer_with_bos():
    class NoBos(ByteTokenizer):
        bos_id = None

    assert greedy()[PROMPTS.index("")][0].ids.size > 0
    with pytest.raises(ValueError, match="empty prompt needs a tokenizer with BOS"):
        generate(*model(), NoBos(), ["fine", ""])


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_refused_by_name(batch_size):
    with pytest.raises(ValueError, match=f"^batch_size = {batch_size}: expected 1 or more"):
        sample(PROMPTS, batch_size=batch_size)


def test_ids_that_the_tokenizer_does_not_have_are_not_sampled():
    """Models round their vocabulary up; with equal logits most of these draws would be beyond the tokenizer's."""
    config = ModelConfig(vocab_size=2000, num_layers=1, dim=8, num_heads=1, num_key_heads=1, hidden_dim=8, remat="none")
    lm = make_language_model(config)
    params = jax.tree.map(jnp.zeros_like, lm.init(jax.random.key(0)))
    (drawn,) = generate(lm, params, ByteTokenizer(), ["p"], samples=8, **SETTINGS)
    assert max(max(sample.ids) for sample in drawn) < ByteTokenizer().vocab_size


def test_judges_of_instructions_get_one_question_and_one_output_each():
    check_instructions(["short", (Message("user", "short"),)], 1)
    with pytest.raises(ValueError, match=r"^a prompt has messages of system, user; --format=alpaca_eval has one"):
        check_instructions(["short", (Message("system", "Be brief."), Message("user", "short"))], 1)
