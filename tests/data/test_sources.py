"""The same rows from every kind of place."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from palign.data.readers import read_records
from palign.data.sources import open_source
from tests.data.samples import write_rows

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"é {n}"}],
        "responses": [[{"role": "assistant", "content": text}] for text in ("a", "b", "c")[: n + 1]],
        "scores": [0.5 * k for k in range(n + 1)],
    }
    for n in range(3)
]


def write_parquet(path, rows=ROWS):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_array_record(path):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in ROWS:
        writer.write(json.dumps(row).encode())
    writer.close()
    return path


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1))
    return path


def write_saved(path, shards=((0, 2), (2, 3))):
    """As `datasets.Dataset.save_to_disk` (5.2.0) does, the files that are read."""
    path.mkdir()
    names = [f"data-{n:05d}-of-{len(shards):05d}.arrow" for n in range(len(shards))]
    for name, (start, end) in zip(names, shards, strict=True):
        table = pa.Table.from_pylist(ROWS[start:end])
        with pa.ipc.new_stream(str(path / name), table.schema) as stream:
            stream.write_table(table)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (path / "dataset_info.json").write_text("{}")
    return path


PAIRS = [
    {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": f"é {n}"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "margin": 0.5 + n,
        "tags": ["x", "y"],
    }
    for n in range(3)
]


class Pairs(tfds.core.GeneratorBasedBuilder):
    """PAIRS, as TFDS keeps them."""

    __module__ = "__main__"  # of a package's builder, TFDS 4.9.10 looks for the code with a package it does not require
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        text = tfds.features.Text()
        turns = tfds.features.Sequence({"role": text, "content": text})
        features = {"prompt": turns, "chosen": turns, "rejected": turns, "margin": np.float32}
        features["tags"] = tfds.features.Sequence(text)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(PAIRS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Pairs(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def content(records):
    return [record[:3] for record in records]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return content(read_records(write_rows(tmp_path_factory.mktemp("e") / "d.jsonl", *ROWS))[0])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("d.json", write_json), ("d.parquet", write_parquet), ("d.array_record", write_array_record),
        ("d.array_record-00000-of-00001", write_array_record), ("saved", write_saved),
    ],
)  # fmt: skip
def test_every_kind_of_file_gives_the_rows_of_the_lines(tmp_path, expected, name, write):
    records, counts = read_records(write(tmp_path / name))
    assert content(records) == expected and counts["format/scored list in messages"] == 3
    assert [record.id for record in records] == [0, 1, 2]
    assert [record.where.partition(":")[2] for record in records] == ["row 1", "row 2", "row 3"]


LIVE = """
import json, sys
from datasets import Dataset
Dataset.from_list(json.load(open(sys.argv[1]))).select([2, 0, 1]).save_to_disk(sys.argv[2], num_shards=2)
"""


@pytest.mark.slow
@pytest.mark.skipif("PALIGN_TRANSFORMERS_PYTHON" not in os.environ, reason="names no interpreter that has datasets")
def test_what_the_package_datasets_saved_is_read(tmp_path, expected):
    arguments = [write_json(tmp_path / "d.json"), tmp_path / "saved"]
    subprocess.run([os.environ["PALIGN_TRANSFORMERS_PYTHON"], "-c", LIVE, *map(str, arguments)], check=True)
    assert content(read_records(tmp_path / "saved")[0]) == [expected[n] for n in (2, 0, 1)]


def test_a_directory_is_its_files_in_the_order_of_their_names_and_others_are_counted(tmp_path, expected):
    write_parquet(tmp_path / "b.parquet", ROWS[1:])
    write_rows(tmp_path / "a.jsonl", ROWS[0])
    (tmp_path / "README.md").write_text("")
    records, counts = read_records(tmp_path)
    assert content(records) == expected and counts["ignored_file/README.md"] == 1
    assert [record.where for record in records] == [
        f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.parquet:row 1", f"{tmp_path}/b.parquet:row 2",
    ]  # fmt: skip
    (tmp_path / "c.jsonl").write_text("")  # a shard of 0 bytes
    with pytest.raises(ValueError, match=r"c\.jsonl: has no rows"):
        read_records(tmp_path)


def test_a_glob_is_the_files_that_match_in_order(tmp_path, expected):
    for n in (2, 0, 1):
        (tmp_path / f"part{n}").mkdir()
        write_rows(tmp_path / f"part{n}" / "d.jsonl", ROWS[n])
    assert content(read_records(f"{tmp_path}/part*/d.jsonl")[0]) == expected
    assert content(read_records(f"{tmp_path}/part[01]/*.jsonl")[0]) == expected[:2]
    with pytest.raises(ValueError, match=r"nothing\*: no file matches"):
        read_records(f"{tmp_path}/nothing*")
    write_rows(tmp_path / "a[1].jsonl", ROWS[0])  # a name, not a pattern
    assert content(read_records(tmp_path / "a[1].jsonl")[0]) == expected[:1]


def test_a_file_that_is_not_there_is_said_before_a_row_is_asked_for(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"gone: there is no such file$"):
        open_source(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^org/pairs-v1.0: .* of the Hugging Face Hub is hf:org/pairs-v1.0/SPLIT$"):
        open_source("org/pairs-v1.0")


def test_a_directory_without_data_says_what_it_holds(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"no file in it is named \*.jsonl.*its directories are train"):
        open_source(tmp_path)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds several data sets; name one of its directories: train"):
        open_source(tmp_path)


def test_a_saved_data_set_cannot_name_files_elsewhere(tmp_path):
    saved = write_saved(tmp_path / "saved")
    for name in ("../data.arrow", "/etc/passwd", "gone.arrow", ""):
        (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(ValueError, match="which is no file beside it"):
            read_records(saved)
    for text in ("{}", "[]", "no", '{"_data_files": 3}'):
        (saved / "state.json").write_text(text)
        with pytest.raises(ValueError, match=r"state\.json: lists no data files"):
            read_records(saved)


def test_a_data_set_of_tfds_is_read_by_name_version_and_part_of_a_split(prepared, tmp_path, monkeypatch):
    expected = content(read_records(write_rows(tmp_path / "d.jsonl", *PAIRS))[0])
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(prepared))
    directory = f"{prepared}/pairs/1.2.0"
    for name in ("tfds:pairs/train", "tfds:pairs:1.2.0/train", f"tfds:{directory}/train"):
        records, _ = read_records(name)
        assert sorted(content(records)) == sorted(expected)
        assert records[0].where == f"{name}:row 1"
    halves = [read_records(f"tfds:pairs/train[{part}]")[0] for part in (":34%", "34%:")]
    assert content(halves[0] + halves[1]) == content(records) and len(halves[0]) == 1
    with pytest.raises(ValueError, match=f"holds a TFDS data set; name one of its splits: tfds:{directory}/SPLIT"):
        read_records(directory)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tfds:pairs", r"tfds:pairs: expected tfds:NAME\[:VERSION\]/SPLIT"),
        ("tfds:{directory}/test", r"Unknown split 'test'. Should be one of \['train'\]"),
        ("tfds:{directory}/train[a]", "Error parsing split"),
        ("tfds:no_such_data/train", "Dataset no_such_data not found"),
        (
            "tfds:imdb_reviews/train",
            r"has not been prepared in .*file_format='array_record'\).download_and_prepare\(\)",
        ),
        ("tfds:{record}/train", "was prepared as tfrecord; prepare it with file_format='array_record'"),
        ("hf:org", r"hf:org: expected hf:NAME\[:CONFIG\]/SPLIT"),
    ],
)
def test_a_named_data_set_that_cannot_be_read_is_one_line(prepared, tmp_path, name, message):
    record = tmp_path / "pairs" / "1.2.0"
    record.mkdir(parents=True)
    for file in ("features.json", "dataset_info.json"):
        text = (prepared / "pairs" / "1.2.0" / file).read_text()
        (record / file).write_text(text.replace("array_record", "tfrecord"))
    name = name.format(directory=prepared / "pairs" / "1.2.0", record=record)
    with pytest.raises(ValueError, match=message) as caught:
        read_records(name)
    assert str(caught.value).startswith(f"{name}: ") and str(caught.value).isprintable()


def test_a_data_set_of_hugging_face_is_loaded_by_its_package(expected, monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        if name == "gone":
            raise ConnectionError("offline\nfor long")
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    records, _ = read_records("hf:org/name:config/train[:10%]")
    assert content(records) == expected and records[0].where == "hf:org/name:config/train[:10%]:row 1"
    assert content(read_records("hf:name/test")[0]) == expected
    assert asked == [("org/name", "config", "train[:10%]"), ("name", None, "test")]
    with pytest.raises(ValueError, match=r"^hf:gone/train: ConnectionError: offline$"):
        read_records("hf:gone/train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^hf:a/b: needs a package that is not here: pip install datasets"):
        read_records("hf:a/b")


def test_a_parquet_files_text_that_is_no_utf8_is_one_line(tmp_path):
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    pyarrow.parquet.write_table(pa.table({"text": bad}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d.parquet: damaged, or of another kind \(.*utf-8"):
        read_records(tmp_path / "d.parquet")


def test_damage_inside_a_table_is_one_line(tmp_path):
    for write, name in ((write_parquet, "d.parquet"), (write_array_record, "d.array_record")):
        whole = write(tmp_path / name).read_bytes()
        for place in range(0, len(whole), max(len(whole) // 40, 1)):
            (tmp_path / name).write_bytes(whole[:place] + b"\xa5\x5a\xa5" + whole[place + 3 :])
            try:
                read_records(tmp_path / name, bad_records="skip")
            except ValueError as error:
                assert str(error).startswith(f"{tmp_path / name}") and str(error).isprintable()
