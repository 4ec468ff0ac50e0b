"""How a process finds the others in each environment, which rows it holds, and how it hears of its end."""

import os
import signal
from types import SimpleNamespace

import jax
import pytest

from palign.sharding import processes
from palign.sharding.mesh import make_mesh
from palign.sharding.processes import initialize, local_rows, notice_of_end

SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
XPK = {
    "JAX_COORDINATOR_ADDRESS": "run-slice-job-0-0.run",
    "JAX_COORDINATOR_PORT": "6002",
    "NNODES": "4",
    "NODE_RANK": "3",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.1.1.1", "JOB_COMPLETION_INDEX": "1"}
MARKS = ("SKYPILOT_", "SLURM_", "OMPI_", "JAX_COORDINATOR", "NNODES", "NODE_RANK", "TPU_", "MEGASCALE_", "KUBERNETES_")


@pytest.fixture
def joined(monkeypatch):
    """The calls of `jax.distributed.initialize`, which does nothing; no environment says anything."""
    calls = []
    for name in list(os.environ):
        if name.startswith(MARKS):
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setitem(processes.PRESENT, "TPU VM", lambda environment: False)
    return calls


def setenv(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "name", "place"),
    [
        (SKYPILOT, "SkyPilot", ("10.0.0.1:8476", 2, 1)),
        (SKYPILOT | SLURM, "SkyPilot", ("10.0.0.1:8476", 2, 1)),
        (XPK, "XPK", ("run-slice-job-0-0.run:6002", 4, 3)),
        (XPK | KUBERNETES, "XPK", ("run-slice-job-0-0.run:6002", 4, 3)),
        (SLURM, "SLURM", ()),
        (OPEN_MPI, "Open MPI", ()),
        (GKE, "GKE", ()),
        (GKE | KUBERNETES, "GKE", ()),
        (KUBERNETES, "Kubernetes", ()),
    ],
)
def test_an_environment_is_read_here_or_left_to_jax(environment, name, place, joined, monkeypatch):
    setenv(monkeypatch, environment)
    line = initialize()
    ((args, kwargs),) = joined
    assert args == place and line.startswith("process 0 of 1: ") and line.endswith(f" devices, by {name}")
    assert kwargs["heartbeat_timeout_seconds"] == kwargs["shutdown_timeout_seconds"] == processes.TIMEOUT
    # JAX's own detection would show each process one GPU; what is left to JAX needs it.
    assert ("cluster_detection_method" in kwargs) == bool(place)


def test_jax_itself_finds_what_is_left_to_it(monkeypatch):
    from jax._src.clusters import ClusterEnv

    for environment, place in ((SLURM, ("node1:61447", 2, 0)), (OPEN_MPI, ("10.96.0.1:62624", 2, 1))):
        with monkeypatch.context() as patch:
            setenv(patch, environment)
            found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)
            assert found[:3] == place


def test_flags_win_over_the_environment_and_loopback_does_not_listen_to_the_network(joined, monkeypatch):
    setenv(monkeypatch, SKYPILOT)
    assert initialize("127.0.0.1:99", 3, 2).endswith("by flags")
    initialize("host:99", 3, 0)
    assert [args for args, _ in joined] == [("127.0.0.1:99", 3, 2), ("host:99", 3, 0)]
    assert [kwargs["coordinator_bind_address"] for _, kwargs in joined] == ["127.0.0.1:99", None]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SKYPILOT | {"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.1.1.1"},
    ],
)
def test_a_process_alone_joins_nobody(environment, joined, monkeypatch):
    setenv(monkeypatch, environment)
    assert initialize() == "" and not joined


def test_one_process_is_alone_whatever_the_environment_says(joined, monkeypatch):
    setenv(monkeypatch, SLURM)
    assert initialize(processes=1) == "" and not joined


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SKYPILOT_NODE_RANK": "1"}, "SkyPilot: SKYPILOT_NODE_IPS, SKYPILOT_NUM_NODES is not set"),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "3"}, "has 2 hosts, SKYPILOT_NUM_NODES=3"),
        (SKYPILOT | {"SKYPILOT_NODE_RANK": "first"}, "SKYPILOT_NODE_RANK=first: expected a number"),
        ({k: v for k, v in XPK.items() if k != "NNODES"}, "XPK: NNODES is not set"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, "SLURM: SLURM_STEP_NODELIST, .* begin the command with srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI: OMPI_MCA_orte_hnp_uri, .* give --coordinator"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "GKE: TPU_WORKER_HOSTNAMES, TPU_WORKER_ID is not set"),
    ],
)
def test_an_environment_that_is_set_by_half_is_answered(environment, message, joined, monkeypatch):
    setenv(monkeypatch, environment)
    with pytest.raises(ValueError, match=message):
        initialize()
    assert not joined


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("h:1", None, None), "belong together: give all, or none"),
        (("", 2, 0), "belong together: give all, or none"),
        (("h:1", 2, None), "belong together"),
        (("host", 2, 0), "--coordinator=host: expected HOST:PORT"),
        (("host:port", 2, 0), "--coordinator=host:port: expected HOST:PORT"),
        (("h:1", 2, 2), "--process=2, --processes=2: expected a process from 0 to 1"),
        (("h:1", 2, -1), "--process=-1, --processes=2: expected"),
    ],
)
def test_flags_that_do_not_say_it_all_are_answered(flags, message, joined):
    with pytest.raises(ValueError, match=message):
        initialize(*flags)
    assert not joined


def test_processes_that_do_not_find_one_another_are_answered_in_one_line(joined, monkeypatch):
    setenv(monkeypatch, KUBERNETES)  # without the kubernetes package JAX finds nothing there

    def nothing(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    with pytest.raises(ValueError, match=r"found Kubernetes, but .* coordinator_address .* or --processes=1"):
        initialize()


def test_one_process_holds_all_rows():
    for shape in ({"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}):
        assert local_rows(make_mesh(**shape), 16) == slice(0, 16)


@pytest.mark.parametrize(
    ("pieces", "rows"),
    [
        ([slice(4, 6), slice(6, 8)], slice(4, 8)),
        ([slice(4, 6), slice(4, 6)], slice(4, 6)),  # a tensor axis: two devices share the rows
        ([slice(None)], slice(0, 8)),
    ],
)
def test_the_rows_of_a_process_are_those_of_its_devices(pieces, rows, monkeypatch):
    held = SimpleNamespace(addressable_devices_indices_map=lambda shape: {i: (p,) for i, p in enumerate(pieces)})
    monkeypatch.setattr(processes, "row_sharding", lambda mesh: held)
    assert local_rows(None, 8) == rows


def test_rows_that_do_not_lie_side_by_side_are_refused(monkeypatch):
    pieces = [slice(0, 2), slice(4, 6)]
    held = SimpleNamespace(addressable_devices_indices_map=lambda shape: {i: (p,) for i, p in enumerate(pieces)})
    monkeypatch.setattr(processes, "row_sharding", lambda mesh: held)
    with pytest.raises(ValueError, match=r"config.mesh: process 0 holds rows \[\(0, 2\), \(4, 6\)\]"):
        local_rows(None, 8)


def test_a_process_alone_hears_of_its_end_by_sigterm_and_gives_the_handler_back():
    before = signal.getsignal(signal.SIGTERM)
    with notice_of_end() as told:
        assert not told(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert told(2) and told(3)
    assert signal.getsignal(signal.SIGTERM) is before
