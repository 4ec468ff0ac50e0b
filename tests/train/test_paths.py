"""Workdirs and data in a bucket: here a folder that is reached as `gs://` and, like a bucket, cannot be appended to."""

import gzip
import json
import pathlib
from types import SimpleNamespace

import fsspec
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem

from palign.config.load import resolve_run
from palign.data.readers import read_records
from palign.data.tokenizers import ByteTokenizer, load_tokenizer
from palign.report.contents import RunReport
from palign.report.page import write_report
from palign.train import loop
from palign.train.annotate import annotate_run
from palign.train.cached import _load, _restored, _save
from palign.train.evaluate import evaluate_run
from palign.train.lock import run_lock
from palign.train.metrics import MetricWriter, read_metrics
from palign.train.paths import absolute, is_local
from palign.train.sources import load_run
from tests.recipes.tiny_runs import one_device, plain, write_pairs

BUCKET = epath.Path("gs://bucket")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What `gs://bucket` is."""

    class FakeBucket(LocalFileSystem):
        protocol = ("gcs", "gs")

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).replace("gs://", f"{tmp_path}/"))

        def glob(self, path, **kwargs):  # as gcsfs: without the protocol
            return [found.removeprefix(f"{tmp_path}/") for found in super().glob(path, **kwargs)]

        def _open(self, path, mode="rb", **kwargs):
            assert mode in ("rb", "wb"), f"a bucket has no mode {mode}"
            return super()._open(path, mode, **kwargs)

    fake = FakeBucket(auto_mkdir=True, skip_instance_cache=True)
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: fake)
    assert fsspec.filesystem("file") is not fake
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


def test_a_buckets_path_is_not_local_and_is_absolute_as_it_is():
    assert not is_local(BUCKET) and str(absolute(BUCKET / "run")) == "gs://bucket/run"
    assert is_local("run") and str(absolute("run")) == str(pathlib.Path("run").absolute())


def test_data_is_read_from_a_bucket_packed_or_not(folder):
    file = write_pairs(folder / "pairs.jsonl", 9)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    expected, _ = read_records(file)
    for name in ("pairs.jsonl", "packed.jsonl.gz"):
        found, _ = read_records(f"gs://bucket/{name}")
        assert [record._replace(where="") for record in found] == [record._replace(where="") for record in expected]
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"text": "a"}]), folder / "packed.parquet")
    for pattern in ("p*s.jsonl", "pack*.jsonl.gz"):
        assert len(read_records(f"gs://bucket/{pattern}")[0]) == 9
    assert len(read_records("gs://bucket/packed.parquet")[0]) == 1
    assert len(read_records("gs://bucket")[0]) == 19
    with pytest.raises(ValueError, match=r"gs://bucket/pair.jsonl: there is no such file; did you mean 'pairs.jsonl'"):
        read_records("gs://bucket/pair.jsonl")


def test_a_tokenizer_a_page_and_a_cache_are_kept_in_a_bucket(folder):
    ByteTokenizer().save(BUCKET / "run")
    assert load_tokenizer("gs://bucket/run").fingerprint() == ByteTokenizer().fingerprint()
    write_report(BUCKET / "run" / "report.html", RunReport("title"))
    assert "title" in (folder / "run" / "report.html").read_text()
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    _save(BUCKET / "run" / "reference.npy", values)
    np.testing.assert_array_equal(_restored(_load(BUCKET / "run" / "reference.npy")), values)
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        "byte_tokenizer.json", "reference.npy", "report.html",
    ]  # fmt: skip


def test_metrics_reach_a_bucket_at_every_flush_and_go_on_there(folder):
    writer = MetricWriter(BUCKET / "run", start_step=0)
    writer.write(1, {"loss": 1.0})
    assert not (folder / "run" / "metrics.jsonl").exists()
    writer.flush()
    assert read_metrics(BUCKET / "run") == [{"step": 1, "loss": 1.0}]
    writer.write(2, {"loss": 0.5})
    writer.close()
    again = MetricWriter(BUCKET / "run", start_step=1)  # step 2 is taken again
    again.write(2, {"loss": 0.25})
    again.close()
    assert [line["loss"] for line in read_metrics(BUCKET / "run")] == [1.0, 0.25]
    assert len(list((folder / "run" / "tensorboard").iterdir())) >= 1


def test_a_lock_in_a_bucket_refuses_a_second_run_and_goes_with_the_first(folder):
    with run_lock(BUCKET / "run"):
        owner = json.loads((folder / "run" / "run.lock").read_text())
        (folder / "run" / "run.lock").write_text(json.dumps(owner | {"pid": 1}))  # lives everywhere
        with pytest.raises(ValueError, match=r"gs://bucket/run: process 1 on .* is at work in it"):
            run_lock(BUCKET / "run").__enter__()
    assert not (folder / "run" / "run.lock").exists()


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_disk(folder, tmp_path, monkeypatch):
    from orbax.checkpoint._src.path import gcs_utils

    # Orbax asks the bucket itself what it is, and writes arrays through TensorStore's own driver.
    monkeypatch.setattr(gcs_utils, "get_bucket", lambda name: SimpleNamespace())
    monkeypatch.setattr(
        gcs_utils,
        "get_kvstore_for_gcs",
        lambda path: {"driver": "file", "path": str(path).replace("gs://", f"{tmp_path}/")},
    )
    disk = epath.Path(tmp_path / "disk")
    train = {"max_steps": 4, "eval_every": 2, "checkpoint_every": 2}
    with one_device():
        for place, real in ((BUCKET, folder), (disk, tmp_path / "disk")):
            data = write_pairs(real / "pairs.jsonl", 60, prompts=40)
            sources = {"init_from": str(place / "sft"), "reference_from": f"{place / 'sft'}@last"}
            cached = {"loss_type": ["dpo"], "reference": "cached"}
            loop.run(resolve_run(plain(place / "pairs.jsonl", train=train)), place / "sft")
            loop.run(resolve_run(plain(place / data.name, train=train, objective=cached, **sources)), place / "dpo")
            loop.run(resolve_run(plain(place / data.name, train=train, objective=cached, **sources)), place / "dpo")
        one, two = (load_run(str(place / "dpo")).params for place in (BUCKET, disk))
        jax.tree.map(np.testing.assert_array_equal, one, two)
        assert evaluate_run("gs://bucket/dpo") == evaluate_run(str(disk / "dpo"))
        annotate_run("gs://bucket/sft", "gs://bucket/pairs.jsonl", "gs://bucket/annotated.jsonl")
    assert len((folder / "annotated.jsonl").read_text().splitlines()) == 60
    assert [line["step"] for line in read_metrics(BUCKET / "dpo")] == [
        line["step"] for line in read_metrics(disk / "dpo")
    ]
    assert not (folder / "dpo" / "run.lock").exists()
