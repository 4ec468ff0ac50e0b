"""The cached reference: equal to a live one, read back where nothing changed, and computed anew where anything did."""

import dataclasses
import io

import jax
import numpy as np
import pytest

from palign.data.loader import fingerprint
from palign.data.records import make_record
from palign.data.tokenize import tokenize_records
from palign.data.tokenizers import ByteTokenizer, train_sentencepiece
from palign.eval.score import as_dataset
from palign.models.transformer import make_language_model
from palign.train import cached
from palign.train.build import build
from palign.train.cached import cache_reference
from palign.train.loop import run
from palign.train.metrics import read_metrics
from palign.train.sources import load_run
from tests.recipes.tiny_runs import config

DPO = {"loss_type": ["dpo"], "beta": 0.2}
CHUNK = 64
pytestmark = pytest.mark.usefixtures("single")


@pytest.fixture(scope="module")
def built(pairs, sft, tmp_path_factory):
    """A run with a live reference, whose data set has no cached numbers."""
    workdir = tmp_path_factory.mktemp("built") / "run"
    return build(config(pairs, objective=DPO, init_from=str(sft), reference_from=str(sft)), workdir)[0]


@pytest.fixture
def passes(monkeypatch):
    """The names of the data sets that were gone through."""
    seen = []

    def counted(dataset, name, *rest):
        seen.append(name)
        return compute(dataset, name, *rest)

    compute = cached._compute
    monkeypatch.setattr(cached, "_compute", counted)
    return seen


def with_reference(made, workdir, *, dataset=None, params=None):
    workdir.mkdir(exist_ok=True)
    params = made.aux["reference"] if params is None else params
    return cache_reference(dataset or made.data.train, "train", made.lm, params, made.mesh, workdir, chunk=CHUNK)


def test_a_run_with_a_cached_reference_equals_one_with_a_live_one_step_by_step(pairs, sft, tmp_path):
    lines = {}
    for kind in ("live", "cached"):
        settings = config(
            pairs, objective=DPO | {"reference": kind}, reference_from=str(sft), train={"checkpoint_every": 6}
        )
        run(settings, tmp_path / kind)
        lines[kind] = read_metrics(tmp_path / kind)
    assert [line["step"] for line in lines["live"]] == [line["step"] for line in lines["cached"]]
    for live, other in zip(lines["live"], lines["cached"], strict=True):
        assert live.keys() == other.keys()
        for name in live.keys() - {"tokens_per_second"}:
            # Rewards are differences of sequence log-probabilities: it is these that are held to one in a million.
            # Gradients are held to 1e-5, like the parameters below, of which those of later steps are taken.
            size, relative = 20.0 if "rewards/" in name else 1.0, 1e-5 if name == "grad_norm" else 1e-6
            assert other[name] == pytest.approx(live[name], rel=relative, abs=1e-6 * size), name
    trained = [line for line in lines["cached"] if "loss" in line]
    assert all(abs(line["rewards/chosen"]) > 0.01 and line["logps/chosen"] < -10 for line in trained)
    one, other = (jax.device_get(load_run(str(tmp_path / kind)).params) for kind in ("live", "cached"))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(x).max())


def test_every_token_of_every_response_has_its_number(built, sft, tmp_path):
    dataset = with_reference(built, tmp_path / "run")
    loaded = load_run(str(sft))
    for tree, numbers in zip(dataset.trees, dataset.reference_logps, strict=True):
        assert [x.size for x in numbers] == [response.size for response in tree.responses]
        assert all((x < 0).all() and np.isfinite(x).all() for x in numbers)
    # A full softmax over one tree, its second response written behind the prompt as a row of its own.
    tree, numbers = dataset.trees[3], dataset.reference_logps[3]
    alone = dataclasses.replace(
        dataset, trees=[tree._replace(responses=tree.responses[1:], scores=(0.0,))], reference_logps=None
    )
    batch = jax.tree.map(lambda x: x[0], alone.once().step_batch(0, micro_batches=1))
    hidden = loaded.lm.hidden(loaded.params, batch)
    kernel, _, size = loaded.lm.unembed(loaded.params)
    logps = jax.nn.log_softmax((hidden @ kernel)[..., :size], axis=-1)
    row = int(np.flatnonzero((batch.group > 0).any(axis=1))[0])
    ids, first = tree.responses[1], tree.prompt.size - 1
    expected = [logps[row, first + t, token] for t, token in enumerate(ids)]
    np.testing.assert_allclose(numbers[1], expected, rtol=1e-5)


def test_the_cache_is_read_back_and_a_pass_over_the_data_is_not_taken_again(built, passes, tmp_path):
    first = with_reference(built, tmp_path / "run")
    again = with_reference(built, tmp_path / "run")
    assert passes == ["reference_train"]
    assert len(list((tmp_path / "run").glob("reference_*.npy"))) == 1
    for one, other in zip(first.reference_logps, again.reference_logps, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("change", ["reference", "token", "score", "order", "seed"])
def test_the_cache_is_not_read_where_the_reference_or_the_data_changed(change, built, passes, tmp_path):
    with_reference(built, tmp_path / "run")
    data, params = built.data.train, built.aux["reference"]
    if change == "reference":
        params = params | {"embedding": params["embedding"].at[3, 0].add(1e-6)}
    if change == "token":
        changed = data.trees[0].prompt.copy()
        changed[-1] = changed[-1] % 20 + 4
        data = dataclasses.replace(data, trees=[data.trees[0]._replace(prompt=changed), *data.trees[1:]])
    if change == "score":
        data = dataclasses.replace(data, trees=[data.trees[0]._replace(scores=(0.0, 1.0)), *data.trees[1:]])
    if change == "order":
        data = dataclasses.replace(data, trees=data.trees[::-1])
    if change == "seed":
        data = dataclasses.replace(data, seed=9)
    assert change == "reference" or fingerprint(data) != fingerprint(built.data.train)
    with_reference(built, tmp_path / "run", dataset=data, params=params)
    assert passes == ["reference_train", "reference_train"]
    assert len(list((tmp_path / "run").glob("reference_*.npy"))) == 2


SAID = [{"role": "user", "content": "say a pie"}]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("here is a red one", "no")]
SPOKEN = {"max_length": 40, "chat_template": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"}
TEMPLATE = SPOKEN["chat_template"].replace("[", "<")


def _key_of(tokenizer, built, monkeypatch, workdir, *, chat_template, **settings):
    """The name of the cache of one conversation."""
    tokenizer.chat_template, names = chat_template, []
    record = make_record(SAID, ANSWERS, [1, 0], 0, "here:1")
    trees, _ = tokenize_records([record], tokenizer, **settings)
    monkeypatch.setattr(cached, "_compute", lambda *rest: names.append(rest[-1].name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        with_reference(built, workdir, dataset=as_dataset(trees, row_length=128, rows_per_step=1))
    return names[0]


def test_another_tokenizer_template_or_truncation_is_another_cache(built, tmp_path, monkeypatch):
    words = train_sentencepiece(
        ["say a pie here is a red one no [user] [assistant] <user] <assistant]"], vocab_size=300
    )
    variants = [
        (ByteTokenizer(), {"max_length": 64}),
        (words, {"max_length": 64}),
        (ByteTokenizer(), {"max_length": 64, "chat_template": TEMPLATE}),
        (ByteTokenizer(), {"max_length": 40}),
        (ByteTokenizer(), {"max_length": 40, "max_prompt_length": 12, "truncation": "keep_end"}),
    ]
    keys = [_key_of(t, built, monkeypatch, tmp_path, **SPOKEN | settings) for t, settings in variants]
    assert len(set(keys)) == len(variants)
    assert _key_of(ByteTokenizer(), built, monkeypatch, tmp_path, **SPOKEN | variants[0][1]) == keys[0]


def test_a_damaged_cache_is_refused(built, tmp_path):
    with_reference(built, tmp_path / "run")
    (file,) = (tmp_path / "run").glob("reference_*.npy")
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=rf"{file}: is damaged \(.*\); remove it, and it is computed again"):
        with_reference(built, tmp_path / "run")
    np.save(file, np.load(io.BytesIO(whole))[:-1])
    with pytest.raises(ValueError, match=rf"{file}: is damaged \(it holds \d+ of \d+ targets\); remove it"):
        with_reference(built, tmp_path / "run")


def test_a_pass_that_was_killed_goes_on_where_it_was_and_ends_with_the_same_file(built, tmp_path, monkeypatch, capsys):
    """Killed in the third of four parts, and again while the fourth was being written."""
    monkeypatch.setattr(cached, "PART", 8)
    whole = with_reference(built, tmp_path / "straight")
    one_part, save, taken = cached.per_target, cached.np.save, []

    def killed_in_the_third(part, *rest, **kwargs):
        taken.append(part.trees[0].id)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return one_part(part, *rest, **kwargs)

    def cut_off(file, flat):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cached, "per_target", killed_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            with_reference(built, tmp_path / "run")
        with monkeypatch.context() as inner:
            inner.setattr(cached.np, "save", lambda file, flat: (cut_off if len(taken) == 5 else save)(file, flat))
            with pytest.raises(KeyboardInterrupt):
                with_reference(built, tmp_path / "run")
        assert not list((tmp_path / "run").glob(f"reference_train_{'?' * 16}.npy"))
        again = with_reference(built, tmp_path / "run")
    said = capsys.readouterr().err
    assert "goes on, 2 of 4 parts are there" in said and "goes on, 3 of 4 parts are there" in said
    firsts = [tree.id for tree in built.data.train.trees[::8]]
    assert taken == [*firsts[:3], *firsts[2:], firsts[3]]
    files = [sorted((tmp_path / name).glob("reference_*.npy")) for name in ("straight", "run")]
    assert [[file.name for file in side] for side in files] == [[files[0][0].name]] * 2
    assert files[0][0].read_bytes() == files[1][0].read_bytes()
    assert len(again.reference_logps) == len(whole.reference_logps)


def test_another_model_over_the_same_weights_is_another_cache(built, passes, tmp_path, capsys):
    with_reference(built, tmp_path / "run")
    lm = make_language_model(dataclasses.replace(built.config.model, rope_bases=(500.0,)))
    with_reference(built._replace(lm=lm), tmp_path / "run")
    assert passes == ["reference_train"] * 2
    assert "of another model or other data, not read" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_refused(built, tmp_path):
    broken = built.aux["reference"] | {"embedding": built.aux["reference"]["embedding"].at[:, 0].set(np.nan)}
    with pytest.raises(
        ValueError, match=r"caching reference_train: \d+ of \d+ numbers are not finite; look at the model"
    ):
        with_reference(built, tmp_path / "run", params=broken)


def test_held_out_sets_are_cached_too(pairs, sft, tmp_path, passes):
    settings = config(pairs, objective=DPO | {"reference": "cached"}, init_from=str(sft), reference_from=str(sft))
    made, _ = build(settings, tmp_path / "run")
    assert sorted(passes) == ["reference_heldout", "reference_train"]
    assert "reference" not in made.aux  # its weights need not stay in memory
    assert all(data.reference_logps is not None for data in (made.data.train, *made.data.evals.values()))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_run_with_cached_teachers_equals_one_with_live_ones_step_by_step(dtype, pairs, sft, tmp_path):
    run(config(pairs, init_from=str(sft), optimizer={"learning_rate": 0.02}), tmp_path / "other")
    sources = {"init_from": str(sft), "teacher_from": str(tmp_path / "other"), "reverse_from": str(sft)}
    # In bf16 the other packing of a cached teacher rounds its hidden states elsewhere.
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    lines = {}
    for kind in ("live", "cached"):
        objective = {"loss_type": ["aligndistil"], "scale": 1.0, "teachers": kind}
        made = config(pairs, objective=objective, model={"dtype": dtype}, train={"checkpoint_every": 6}, **sources)
        run(made, tmp_path / kind)
        lines[kind] = read_metrics(tmp_path / kind)
    for live, other in zip(lines["live"], lines["cached"], strict=True):
        for name in live.keys() - {"tokens_per_second"}:
            assert other[name] == pytest.approx(live[name], rel=tolerance, abs=1e-5), name
    caches = sorted(path.name.rsplit("_", 1)[0] for path in (tmp_path / "cached").glob("*.npy"))
    assert caches == ["reverse_heldout", "reverse_train", "teacher_heldout", "teacher_train"]
