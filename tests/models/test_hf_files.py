"""Files of models that are broken or hostile: one line each, and nothing else is opened."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from palign.models.hf import checked_tensors, describe, is_hf
from palign.models.hf_files import find_tensors, inside, read_header, read_json
from tests.models.test_hf import HF, MODELS, copy, tensors

INDEX = "model.safetensors.index.json"


def check(place):
    return checked_tensors(place, describe(place))


def write(place, header, data=b"", length=None):
    """A safetensors file from the bytes or the content of its header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(header) if length is None else length) + header + data
    (place / "model.safetensors").write_bytes(content)


def rewrite(place, change):
    safetensors.numpy.save_file(change(tensors(place)), place / "model.safetensors")


def change_index(place, change):
    index = json.loads((place / INDEX).read_text())
    change(index["weight_map"])
    (place / INDEX).write_text(json.dumps(index))


def without(found, name):
    return {key: value for key, value in found.items() if key != name}


NORM, ONE = "model.norm.weight", {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
SECOND = "model-00002-of-00003.safetensors"


def cut(place):
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def only_pickle(place):
    (place / "model.safetensors").rename(place / "pytorch_model.bin")


def lead_out(place):
    outside = place.parent / "secret.safetensors"
    shutil.move(place / "model.safetensors", outside)
    os.symlink(outside, place / "model.safetensors")


BROKEN = {
    "a tensor is missing": (
        "llama2",
        lambda p: rewrite(p, lambda f: without(f, NORM)),
        "'model.norm.weight' is missing",
    ),
    "a tensor too many": ("llama2", lambda p: rewrite(p, lambda f: f | {"x": f[NORM]}), "tensor 'x' is none of what"),
    "another shape": (
        "llama2",
        lambda p: rewrite(p, lambda f: f | {NORM: f[NORM][:4]}),
        r"'model.norm.weight' has shape \(4,\), by config.json it has \(8,\)",
    ),
    "integers": (
        "llama2",
        lambda p: rewrite(p, lambda f: f | {NORM: f[NORM].astype(np.int8)}),
        "'model.norm.weight' is I8; palign reads F32, BF16, F16: save the model unquantised",
    ),
    "cut off": ("llama2", cut, "the header describes .* bytes of tensors, the file has .*; fetch it again"),
    "empty": ("llama2", lambda p: (p / "model.safetensors").write_bytes(b""), "0 bytes cannot hold a header"),
    "a header of 2^60 bytes": ("llama2", lambda p: write(p, {}, length=2**60), "cannot hold a header of"),
    "a header that is no JSON": ("llama2", lambda p: write(p, b"{]"), "header: not JSON that palign reads"),
    "a header that is no UTF-8": ("llama2", lambda p: write(p, b'{"\xff": 1}'), "header: not JSON that palign reads"),
    "a header nested deep": ("llama2", lambda p: write(p, b'{"a":' + b"[" * 100_000), "header: not JSON"),
    "a list as header": ("llama2", lambda p: write(p, b"[]"), "header: expected a JSON object"),
    "a key twice": ("llama2", lambda p: write(p, b'{"a": 1, "a": 2}'), "the key 'a' stands there twice"),
    "an entry without offsets": ("llama2", lambda p: write(p, {"a": {"dtype": "F32", "shape": [1]}}), "'a': expected"),
    "a negative size": ("llama2", lambda p: write(p, {"a": ONE | {"shape": [-1]}}, b"1234"), "cannot be"),
    "a boolean size": ("llama2", lambda p: write(p, {"a": ONE | {"shape": [True]}}, b"1234"), "cannot be"),
    "a fractional size": ("llama2", lambda p: write(p, {"a": ONE | {"shape": [1.0]}}, b"1234"), "cannot be"),
    "offsets out of the file": (
        "llama2",
        lambda p: write(p, {"a": ONE | {"shape": [2], "data_offsets": [0, 8]}}, b"1234"),
        "the header describes 8 bytes of tensors, the file has 4",
    ),
    "overlapping offsets": (
        "llama2",
        lambda p: write(p, {"a": ONE, "b": ONE}, b"1234"),
        "'b' begins at byte 0, the tensor before it ends at 4",
    ),
    "a hole between tensors": (
        "llama2",
        lambda p: write(p, {"a": ONE | {"data_offsets": [4, 8]}}, b"12345678"),
        "'a' begins at byte 4, the tensor before it ends at 0",
    ),
    "a shape that is not its bytes": (
        "llama2",
        lambda p: write(p, {"a": ONE | {"shape": [3]}}, b"1234"),
        r"\[3\] F32 are not the 4 bytes of its place",
    ),
    "no weights": ("llama2", lambda p: (p / "model.safetensors").unlink(), "no safetensors of a model here; expected"),
    "a pickle": ("llama2", only_pickle, r"opens no pickles \(pytorch_model.bin\); load it with transformers and save"),
    "a link out of the directory": ("llama2", lead_out, "'model.safetensors' does not name a file in it"),
    "a file and an index": (
        "llama3",
        lambda p: shutil.copy(HF / "llama2" / "model.safetensors", p),
        "holds both model.safetensors and model.safetensors.index.json",
    ),
    "a file of the index is missing": ("llama3", lambda p: (p / SECOND).unlink(), "which is not there; fetch"),
    "an index that leads out": (
        "llama3",
        lambda p: change_index(p, lambda places: places.update({NORM: "../llama2/model.safetensors"})),
        "does not name a file in it",
    ),
    "an index to an absolute path": (
        "llama3",
        lambda p: change_index(p, lambda places: places.update({NORM: "/etc/x.safetensors"})),
        "does not name a file in it",
    ),
    "an index to a pickle": (
        "llama3",
        lambda p: change_index(p, lambda places: places.update({NORM: "model.bin"})),
        "weight_map names 'model.bin'; expected files",
    ),
    "an index that misses a tensor": (
        "llama3",
        lambda p: change_index(p, lambda places: places.pop(NORM)),
        "holds 'model.norm.weight', which .* places in 'no file'",
    ),
    "an index with a tensor of no file": (
        "llama3",
        lambda p: change_index(p, lambda places: places.update({"x": SECOND})),
        f"'x' is not in '{SECOND}', where the index places it",
    ),
    "an index without a map": ("llama3", lambda p: (p / INDEX).write_text("{}"), "expected weight_map"),
    "an index with a number": ("llama3", lambda p: (p / INDEX).write_text('{"weight_map": {"a": 1}}'), "weight_map"),
    "a config that is no JSON": ("llama2", lambda p: (p / "config.json").write_text("{"), "config.json: not JSON"),
    "a config with NaN": ("llama2", lambda p: (p / "config.json").write_text('{"a": NaN}'), "NaN is no number of JSON"),
    "no config": ("llama2", lambda p: (p / "config.json").unlink(), "config.json: there is no such file"),
    "a config of 2 MB": ("llama2", lambda p: (p / "config.json").write_text(" " * 2_000_000), "expected at most 1,000"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_one_line_with_the_file(case, tmp_path):
    name, break_it, message = BROKEN[case]
    place = copy(name, tmp_path)
    break_it(place)
    with pytest.raises(ValueError, match=message) as raised:
        check(place)
    assert "\n" not in str(raised.value) and str(place) in str(raised.value) and len(str(raised.value)) < 600


def test_old_files_may_hold_rotary_frequencies_that_nobody_reads(tmp_path):
    place = copy("llama2", tmp_path)
    rewrite(place, lambda found: found | {"model.layers.0.self_attn.rotary_emb.inv_freq": found[NORM]})
    assert check(place).keys() > tensors(HF / "llama2").keys()


@pytest.mark.parametrize("name", MODELS)
def test_the_library_of_the_format_reads_the_same_tensors(name):
    found = find_tensors(HF / name)
    wanted = tensors(HF / name)
    assert {key: tensor.shape for key, tensor in found.items()} == {key: x.shape for key, x in wanted.items()}


def test_the_cache_of_the_hub_is_followed_and_nothing_beyond_it(tmp_path):
    repository = epath.Path(tmp_path / "models--org--name")
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(HF / "llama2", blobs)
    for name in ("config.json", "model.safetensors"):
        os.symlink(f"../../blobs/{name}", snapshot / name)
    assert check(snapshot).keys() == tensors(HF / "llama2").keys()
    os.symlink(HF / "llama2" / "config.json", snapshot / "outside.json")
    with pytest.raises(ValueError, match=r"'outside.json' does not name a file in it"):
        inside(snapshot, "outside.json")


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".", "", "a\0b", "a\n", "-x", ".hidden"])
def test_names_that_are_more_than_a_file_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="does not name a file in it"):
        inside(epath.Path(tmp_path), name)


def test_code_of_a_model_is_never_run(tmp_path):
    place = copy("llama2", tmp_path)
    (place / "modeling_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}))
    with pytest.raises(ValueError, match="auto_map"):
        check(place)
    assert not (tmp_path / "ran").exists()


def test_a_run_is_no_hugging_face_model(tmp_path):
    place = epath.Path(tmp_path)
    assert not is_hf(place)
    (place / "config.json").write_text('{"model": {}}')
    assert not is_hf(place) and is_hf(HF / "llama2")


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_header_is_read_as_the_library_reads_it_or_refused_in_one_line(tmp_path_factory, data):
    file = epath.Path(tmp_path_factory.getbasetemp()) / "any.safetensors"
    content = bytearray((HF / "llama_reward" / "model.safetensors").read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, 8 + length))
        stop = start + data.draw(st.integers(0, 4))
        content[start:stop] = data.draw(st.binary(max_size=4) | st.sampled_from([b"0", b"-", b'"', b"[", b"1", b"9"]))
    file.write_bytes(bytes(content))
    try:
        found = read_header(file)
    except ValueError as error:
        assert "\n" not in str(error) and str(file) in str(error)
        return
    wanted = safetensors.numpy.load_file(file)
    assert {key: tensor.shape for key, tensor in found.items()} == {key: x.shape for key, x in wanted.items()}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.text(max_size=12) | st.sampled_from(["../a.safetensors", "a.safetensors", "a.bin", ".", "model.safetensors"])


@given(JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(NAMES, NAMES | JSON, max_size=3)}))
@settings(max_examples=200, deadline=None)
def test_any_index_is_refused_in_one_line(tmp_path_factory, content):
    place = epath.Path(tmp_path_factory.getbasetemp()) / "any"
    place.mkdir(exist_ok=True)
    (place / INDEX).write_text(json.dumps(content))
    if isinstance(content, dict) and content.get("weight_map") == {}:
        assert find_tensors(place) == {}
        return
    with pytest.raises(ValueError) as raised:
        find_tensors(place)
    assert "\n" not in str(raised.value) and str(place) in str(raised.value)


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_json_or_one_line(tmp_path_factory, content):
    file = epath.Path(tmp_path_factory.getbasetemp()) / "any.json"
    file.write_bytes(content)
    try:
        assert isinstance(read_json(file), dict)
    except ValueError as error:
        assert "\n" not in str(error) and str(file) in str(error)
