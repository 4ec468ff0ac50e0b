"""Models whose every response is listed: the enumeration against a recursion, errors, and the page that shows it."""

import contextlib
import dataclasses
import doctest
import importlib
import io
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from palign.eval import enumerate as enumerate_module
from palign.eval import optima as optima_module
from palign.eval.enumerate import all_responses, along_responses, model_logps
from palign.eval.optima import compare_lists, compare_pairs, soft_values
from palign.models.transformer import make_language_model
from palign.sharding.mesh import make_mesh
from tests.trees import TINY

# One program each instead of an operation at a time: compiling is most of what these tests do.
response_logps, back_up = jax.jit(enumerate_module.response_logps), jax.jit(enumerate_module.back_up)
conditional_logits = jax.jit(enumerate_module.conditional_logits)

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def walk(table, prefixes, longest, prefix=(), logp=0.0):
    """Every response below a prefix with its log-probability, by recursion; 0 ends a turn."""
    row = log_softmax(table[prefixes.index(prefix)])
    for token, step in enumerate(row):
        response = (*prefix, token)
        if token == 0 or len(response) == longest:
            yield response, logp + step
        else:
            yield from walk(table, prefixes, longest, response, logp + step)


@pytest.mark.parametrize(("vocab", "longest"), [(2, 1), (2, 4), (3, 3), (4, 2)])
def test_every_response_is_listed_once_with_its_probability(vocab, longest):
    space = all_responses(vocab, longest)
    table = 3 * draw(vocab, space.num_states, vocab)
    found = dict(walk(table, space.prefixes, longest))
    assert len(set(space.responses)) == space.num_responses == len(found)
    np.testing.assert_array_equal(space.lengths, [len(response) for response in space.responses])
    logps = response_logps(space, jnp.asarray(table))
    assert logps.dtype == jnp.float64
    np.testing.assert_allclose(logps, [found[response] for response in space.responses], rtol=1e-13)
    assert np.exp(logps).sum() == pytest.approx(1.0, abs=1e-13)


def test_any_end_of_turn_will_do_and_leading_axes_are_prompts():
    space = all_responses(3, 2, eos=2)
    assert set(space.responses) == {(2,), (0, 2), (1, 2), (0, 0), (0, 1), (1, 0), (1, 1)}
    tables = jnp.asarray(draw(2, 2, 4, 3, 3))
    together = response_logps(space, tables)
    assert together.shape == (2, 4, 7)
    np.testing.assert_allclose(together[1, 2], response_logps(space, tables[1, 2]), rtol=1e-15)
    np.testing.assert_allclose(conditional_logits(space, together), jax.nn.log_softmax(tables), rtol=1e-13, atol=1e-14)


def test_conditional_logits_give_a_distribution_exactly_also_where_responses_are_hopeless():
    space = all_responses(3, 3)
    logps = log_softmax(60 * draw(3, space.num_responses))
    table = conditional_logits(space, jnp.asarray(logps + 7.0))
    np.testing.assert_allclose(logsumexp(table, axis=-1), 0.0, atol=1e-12)
    np.testing.assert_allclose(response_logps(space, table), logps, rtol=1e-13)


def test_a_response_pulls_at_the_states_that_it_passes():
    space = all_responses(3, 2)
    table = draw(4, 3, 3)
    gradient = jax.jacobian(lambda z: response_logps(space, z))(jnp.asarray(table))
    for n, response in enumerate(space.responses):
        expected = np.zeros((3, 3))
        for t, token in enumerate(response):
            s = space.prefixes.index(response[:t])
            expected[s] = np.eye(3)[token] - softmax(table[s])
        np.testing.assert_allclose(gradient[n], expected, atol=1e-14)
    passed = along_responses(space, jnp.arange(3.0))
    np.testing.assert_array_equal(
        passed, [sum(space.prefixes.index(r[:t]) for t in range(len(r))) for r in space.responses]
    )


def test_the_responses_of_a_language_model_are_enumerated_through_its_forward_pass():
    with jax.enable_x64(False):
        lm = make_language_model(dataclasses.replace(TINY, vocab_size=3, num_layers=1, tie_embedding=False))
        params = jax.jit(lambda key: jax.tree.map(lambda x: 8 * x, lm.init(key)))(jax.random.key(0))
        prompts = [np.array([1, 2, 1]), np.array([2])]
        found = model_logps(lm, params, prompts, all_responses(3, 3), make_mesh(data=1, devices=jax.devices()[:1]))
    assert found.shape == (2, 15)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1.0, atol=1e-5)  # the model computes in float32
    assert np.abs(found[0] - found[1]).max() > 0.1  # the prompt matters
    with pytest.raises(ValueError, match=r"model_logps: the model has 3 tokens, the space 4"):
        model_logps(lm, params, prompts, all_responses(4, 2), make_mesh(data=1, devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: all_responses(1, 2), r"all_responses got vocab_size=1, max_length=2, eos=0; expected at least two"),
        (lambda: all_responses(11, 7), r"give 11111111 responses; expected at most 1000000. Take a smaller"),
        (
            lambda: response_logps(all_responses(3, 2), jnp.zeros((3, 4))),
            r"logits has shape \[3, 4\]; expected \[..., 3",
        ),
        (lambda: conditional_logits(all_responses(3, 2), jnp.zeros(())), r"logps has shape \[\]; expected \[..., 7\]"),
        (
            lambda: soft_values(all_responses(3, 2), jnp.zeros((3, 3)), beta=0.0),
            r"back_up: beta is 0.0; expected",
        ),
        (lambda: compare_lists(jnp.zeros(3), jnp.zeros(3), size=4), r"comparisons of 4 among 3 responses; expected"),
        (lambda: compare_lists(jnp.zeros(40), jnp.zeros(40), size=4), r"are 2193360; expected at most 1000000"),
        (lambda: compare_pairs(jnp.zeros((3, 2)), jnp.zeros(3)), r"preference has shape \[3, 2\]; expected \[3, 3\]"),
    ],
)
def test_bad_input_is_named_with_a_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("module", [enumerate_module, optima_module], ids=["enumerate", "optima"])
def test_the_examples_in_the_docstrings_print_what_they_say(module):
    with jax.enable_x64(False):
        found = doctest.testmod(module)
    assert found.attempted > 15 and not found.failed


def test_the_snippet_of_the_page_prints_what_it_says():
    page = (DOCS / "exact.md").read_text(encoding="utf-8")
    source, expected = re.search(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)*)", page, flags=re.S).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "exact.md", "exec"), {})
    assert printed.getvalue().split() == expected.split()


def test_the_tables_of_the_page_are_what_the_functions_give(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    script = importlib.import_module("make_exact")
    page = (DOCS / "exact.md").read_text(encoding="utf-8")
    world = script.make_world(2, script.MANY)
    assert f"\n| 0.5 | {script.nats(script.teacher_gap(world, script.theorem1, 0.5))} |" in page
    gap = script.nats(script.teacher_gap(script.make_world(), script.theorem1, script.BETA / script.BETA0))
    assert f"\n| `aligndistil_theorem1` | {gap} |" in page
