"""Hugging Face models: what transformers computed with them, on every mesh, and back to the same bytes."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from palign.config.schema import LoraConfig
from palign.data.tokenize import TokenTree
from palign.heads.targets import finish_logits
from palign.models import hf, hf_export
from palign.models.hf import describe, load_weights
from palign.models.hf_config import computed
from palign.models.hf_export import export_adapter, export_model
from palign.models.lora import add_lora, merge
from palign.models.transformer import make_language_model
from palign.sharding.mesh import make_mesh
from palign.sharding.rules import parameter_shardings
from tests.compiled import uncached
from tests.trees import make_batch

HF = epath.Path(pathlib.Path(__file__).parents[1] / "fixtures" / "hf")
EXPECTED = np.load(HF / "expected.npz")
MODELS = sorted(EXPECTED.files[1:])


def load(directory, model=None, mesh=None, dtype=""):
    model = model or describe(directory).model
    mesh = mesh or make_mesh(data=1, devices=jax.devices()[:1])
    shapes = jax.eval_shape(make_language_model(model).init, jax.random.key(0))
    target = lambda shape, place: jax.ShapeDtypeStruct(shape.shape, dtype or shape.dtype, sharding=place)
    return load_weights(directory, jax.tree.map(target, shapes, parameter_shardings(mesh, shapes)))


def tensors(directory):
    """All tensors of a directory, by the library of the format."""
    return {k: v for f in directory.glob("*.safetensors") for k, v in safetensors.numpy.load_file(f).items()}


def copy(name, tmp_path):
    return epath.Path(shutil.copytree(HF / name, tmp_path / name))


def same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@functools.cache
def rows():
    """The fixtures' token ids as rows of one tree each."""
    trees = [TokenTree(ids[:-1], (ids[-1:],), (0.0,), i) for i, ids in enumerate(EXPECTED["token"].astype(np.int32))]
    return make_batch(trees, rows=2, used=2, tokens=16)


def outputs(model, params):
    """Logits at every position, or the values of a reward model."""
    lm = make_language_model(model)

    @jax.jit
    def run(params, batch):
        hidden = lm.hidden(params, batch)
        if lm.values:
            return lm.values(params, hidden)
        kernel, softcap, vocab_size = lm.unembed(params)
        raw = jnp.matmul(hidden, kernel, precision="highest").reshape(-1, kernel.shape[1])
        return finish_logits(raw, softcap, vocab_size).reshape(*hidden.shape[:2], -1)[..., :vocab_size]

    return np.asarray(run(params, rows()))


SLOW = ("llama2", "llama_reward", "qwen3_reward")  # whose parts are all in others


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS])
def test_a_model_computes_what_transformers_computes(name):
    found = outputs(describe(HF / name).model, load(HF / name))
    assert np.abs(EXPECTED[name]).max() > 0.5
    np.testing.assert_allclose(found, EXPECTED[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_goes_back_to_the_same_tensors_and_the_same_config(name, tmp_path):
    described, origin = describe(HF / name), json.loads((HF / name / "config.json").read_text())
    params, kept, made = load(HF / name), epath.Path(tmp_path / "kept"), epath.Path(tmp_path / "made")
    for place, config in ((kept, origin), (made, {"eos_token_id": 2})):
        place.mkdir()
        written = export_model(place, described.model, params, config)
        found, wanted = tensors(place), tensors(HF / name)
        assert {k: (v.dtype, v.tobytes()) for k, v in found.items()} == {
            k: (v.dtype, v.tobytes()) for k, v in wanted.items()
        }
        assert written == (described.architecture, len(wanted), sum(v.size for v in wanted.values()), written.bytes)
        assert describe(place).family is described.family
        assert computed(describe(place).model) == computed(described.model)
    assert json.loads((kept / "config.json").read_text()) == origin
    assert json.loads((made / "config.json").read_text())["eos_token_id"] == 2


def test_weights_are_rounded_once_and_large_models_are_cut_into_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_export, "FILE_BYTES", 1000)
    place, params = epath.Path(tmp_path), load(HF / "qwen3")
    written = export_model(place, describe(HF / "qwen3").model, params, {}, dtype="bfloat16")
    files = sorted(f.name for f in place.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((place / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files and index["metadata"]["total_size"] == written.bytes
    wanted = {k: v.astype(jnp.bfloat16) for k, v in tensors(HF / "qwen3").items()}
    found = tensors(place)
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in wanted.items()}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    same(load(place), rounded)
    assert {x.dtype for x in jax.tree.leaves(load(place, dtype="bfloat16"))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen2_reward"])
def test_a_mesh_gets_the_same_weights_in_their_places(name, monkeypatch):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with uncached():
        found = load(HF / name, mesh=mesh)
        same(jax.device_get(found), jax.device_get(load(HF / name)))
    places = parameter_shardings(mesh, found)
    assert jax.tree.map(lambda x: x.sharding, found) == places
    monkeypatch.setattr(hf, "GROUP_BYTES", 1)  # a layer at a time
    same(load(HF / name), jax.device_get(found))


def test_two_layers_at_a_time_reach_an_odd_number(monkeypatch):
    whole = load(HF / "gemma3")
    layers = sum(x.nbytes for x in jax.tree.leaves(whole["layers"]))
    monkeypatch.setattr(hf, "GROUP_BYTES", layers // 3 * 2)
    same(load(HF / "gemma3"), whole)


def test_the_vocabulary_is_padded_with_zeros_as_the_run_wishes():
    model = dataclasses.replace(describe(HF / "llama2").model, vocab_multiple=8)
    params, stored = load(HF / "llama2", model), tensors(HF / "llama2")
    for leaf, name in ((params["embedding"], "model.embed_tokens.weight"), (params["unembedding"].T, "lm_head.weight")):
        assert leaf.shape == (24, 8)
        np.testing.assert_array_equal(leaf[:21], stored[name])
        assert not leaf[21:].any()


def add_head(place, head):
    found = tensors(place)
    safetensors.numpy.save_file(found | {"lm_head.weight": head(found)}, place / "model.safetensors")


def test_a_tied_head_may_be_stored_again_but_not_another_one(tmp_path):
    place = copy("smollm", tmp_path)
    add_head(place, lambda found: found["model.embed_tokens.weight"])
    same(load(place), load(HF / "smollm"))
    add_head(place, lambda found: found["model.embed_tokens.weight"] + 1)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding.* tie_word_embeddings = true"):
        load(place)


def test_half_precision_files_are_read(tmp_path):
    place = copy("llama2", tmp_path)
    halves = {name: x.astype(np.float16) for name, x in tensors(place).items()}
    safetensors.numpy.save_file(halves, place / "model.safetensors")
    params = load(place)
    np.testing.assert_array_equal(params["embedding"][:21], halves["model.embed_tokens.weight"].astype(np.float32))


def test_weights_of_another_model_are_refused_by_the_parameter():
    model = dataclasses.replace(describe(HF / "llama2").model, hidden_dim=16)
    with pytest.raises(ValueError, match=r"parameter layers/mlp/down/kernel is \(2, 12, 8\) by its .* \(2, 16, 8\) by"):
        load(HF / "llama2", model)
    with pytest.raises(ValueError, match=r"parameter value_head/kernel is absent by its config.json and \(8, 1\) by"):
        load(HF / "llama2", dataclasses.replace(describe(HF / "llama2").model, value_head=1))


def check_adapter(place, base, merged):
    """That base and factors, put together as PEFT does, are the merged weights."""
    settings = json.loads((place / "adapter_config.json").read_text())
    scale, targets = settings["lora_alpha"] / settings["r"], {"down_proj", "o_proj", "q_proj"}
    assert set(settings["target_modules"]) == targets
    factors = safetensors.numpy.load_file(place / "adapter_model.safetensors")
    for name, weight in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if module.rpartition(".")[2] in targets:
            change = scale * factors.pop(f"{module}.lora_B.weight") @ factors.pop(f"{module}.lora_A.weight")
            assert np.abs(change).max() > 1e-3
            weight = weight + change
        # Sums of products up to 30, where one unit in the last place is 2e-6.
        np.testing.assert_allclose(merged[name], weight, rtol=2.4e-7, atol=1e-6)
    return factors


@pytest.mark.parametrize("name", ["qwen3", "qwen2_reward"])
def test_factors_are_exported_as_the_product_that_is_added_to_the_base(name, tmp_path):
    described, lora = describe(HF / name), LoraConfig(rank=2, alpha=6.0, targets=("query", "output", "down"))
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    shapes = jax.eval_shape(add_lora(make_language_model(described.model), lora).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    factors = jax.device_put(drawn, parameter_shardings(mesh, shapes))
    adapter, merged = epath.Path(tmp_path / "adapter"), epath.Path(tmp_path / "merged")
    for place in (adapter, merged):
        place.mkdir()
    export_adapter(adapter, described.model, lora, factors, {}, base="models/base")
    export_model(merged, described.model, jax.jit(merge, static_argnums=2)(load(HF / name), factors, lora), {})
    base = {k: v for k, v in tensors(HF / name).items() if k != "score.weight"}
    left = check_adapter(adapter, base, tensors(merged))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    if described.model.value_head:
        assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["score"]
        np.testing.assert_array_equal(left.pop("base_model.model.score.weight"), tensors(merged)["score.weight"])
    assert not left and settings["base_model_name_or_path"] == "models/base"
