"""Several processes that train one model: how they find one another, and what each of them holds.

Every process runs the same program on its own devices. Process 0 alone prints and writes; checkpoints are written by
all. What stands on disk is read by all, after `wait_for_all`.
"""

import contextlib
import functools
import importlib.util
import itertools
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from palign.sharding.mesh import row_sharding

TIMEOUT = 30  # seconds until a process that says nothing counts as lost, and that an orderly end may take
Environment = Mapping[str, str]


class Place(NamedTuple):
    """A process among all."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int


def initialize(coordinator: str = "", processes: int | None = None, process: int | None = None) -> str:
    """Joins the processes of one run; call it before anything asks JAX for its devices.

    What is given wins; else the environment says it: SkyPilot's and XPK's is read here; SLURM, Open MPI, GKE,
    Kubernetes and TPU VMs are left to `jax.distributed.initialize`. With one process nothing happens.

    Args:
        coordinator: host:port of process 0.
        processes: how many; 1 stays alone whatever the environment says.
        process: which of them this is, from 0.

    Returns:
        One line that says who this process is; "" where it is the only one.

    Raises:
        ValueError: some of the three are given, the environment is set by half, or the others were not found.
    """
    if processes == 1:
        return ""
    place, how = _given(coordinator, processes, process), "flags"
    if place is None:
        how = next((name for name, present in PRESENT.items() if present(os.environ)), "")
        place = READ[how](os.environ) if how in READ else None
    if not how or (place is not None and place.processes == 1):
        return ""
    try:
        _join(place)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"found {how}, but the processes did not find one another: {error}; give --coordinator, --processes and "
            "--process, or --processes=1"
        ) from None
    local, everywhere = jax.local_device_count(), jax.device_count()
    return (
        f"process {jax.process_index()} of {jax.process_count()}: {local} of {everywhere} {jax.default_backend()} "
        f"devices, by {how}"
    )


def _join(place: Place | None) -> None:
    join = functools.partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=TIMEOUT, shutdown_timeout_seconds=TIMEOUT
    )
    if place is None:
        join()
        return
    host = place.coordinator.rpartition(":")[0]
    # The service asks for no password: on loopback it must not listen to the network. "deactivate": JAX's detection
    # would otherwise show each process one GPU alone.
    bind = place.coordinator if host in ("localhost", "127.0.0.1", "[::1]") else None
    join(*place, coordinator_bind_address=bind, cluster_detection_method="deactivate")


def _given(coordinator: str, processes: int | None, process: int | None) -> Place | None:
    if not coordinator and processes is None and process is None:
        return None
    if not coordinator or processes is None or process is None:
        raise ValueError("--coordinator=HOST:PORT, --processes=N and --process=I belong together: give all, or none")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator={coordinator}: expected HOST:PORT of process 0")
    if not 0 <= process < processes:
        raise ValueError(f"--process={process}, --processes={processes}: expected a process from 0 to {processes - 1}")
    return Place(coordinator, processes, process)


def _whole(environment: Environment, system: str, names: tuple[str, ...], remedy: str) -> None:
    if missing := [name for name in names if not environment.get(name)]:
        raise ValueError(f"{system}: {', '.join(missing)} is not set, so a process cannot tell the others; {remedy}")


def _number(environment: Environment, name: str) -> int:
    if not environment[name].isdigit():
        raise ValueError(f"{name}={environment[name]}: expected a number")
    return int(environment[name])


BY_FLAGS = "give --coordinator, --processes and --process"


def _skypilot(environment: Environment) -> Place:
    _whole(environment, "SkyPilot", ("SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"), BY_FLAGS)
    hosts, count = environment["SKYPILOT_NODE_IPS"].split(), _number(environment, "SKYPILOT_NUM_NODES")
    if len(hosts) != count:
        raise ValueError(f"SkyPilot: SKYPILOT_NODE_IPS has {len(hosts)} hosts, SKYPILOT_NUM_NODES={count}; {BY_FLAGS}")
    return Place(f"{hosts[0]}:8476", count, _number(environment, "SKYPILOT_NODE_RANK"))


def _xpk(environment: Environment) -> Place:
    _whole(environment, "XPK", ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "NNODES", "NODE_RANK"), BY_FLAGS)
    address = f"{environment['JAX_COORDINATOR_ADDRESS']}:{environment['JAX_COORDINATOR_PORT']}"
    return Place(address, _number(environment, "NNODES"), _number(environment, "NODE_RANK"))


def _slurm(environment: Environment) -> bool:
    if environment.get("SLURM_NTASKS", "1") == "1":
        return False
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    _whole(environment, "SLURM", names, "begin the command with srun, or give --processes=1")
    return True


def _open_mpi(environment: Environment) -> bool:
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") == "1":
        return False
    names = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    _whole(environment, "Open MPI", names, BY_FLAGS)  # version 5 no longer says where process 0 is
    return True


def _gke_tpu(environment: Environment) -> bool:
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) == 1 and environment.get("MEGASCALE_NUM_SLICES", "1") == "1":
        return False
    _whole(environment, "GKE", ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"), BY_FLAGS)
    return True


def _kubernetes(environment: Environment) -> bool:
    return "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment


def _tpu_vm(environment: Environment) -> bool:
    """A TPU VM says in its metadata server, not in the environment, who the others are: JAX asks it."""
    chips = [*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev").glob("vfio/[0-9]*")]
    asked = "TPU_SKIP_MDS_QUERY" not in environment and "TPU_WORKER_HOSTNAMES" not in environment
    return asked and bool(chips) and importlib.util.find_spec("libtpu") is not None


# In this order: SkyPilot may run on SLURM or Kubernetes, XPK on Kubernetes.
PRESENT: dict[str, Callable[[Environment], bool]] = {
    "SkyPilot": lambda environment: "SKYPILOT_NODE_RANK" in environment,
    "XPK": lambda environment: "NODE_RANK" in environment and "JAX_COORDINATOR_ADDRESS" in environment,
    "SLURM": _slurm,
    "Open MPI": _open_mpi,
    "GKE": _gke_tpu,
    "Kubernetes": _kubernetes,
    "TPU VM": _tpu_vm,
}
READ: dict[str, Callable[[Environment], Place]] = {"SkyPilot": _skypilot, "XPK": _xpk}


def is_main() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns once every process has called it with the same name; nothing to wait for where there is one."""
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def notice_of_end() -> Iterator[Callable[[int], bool]]:
    """Notices that the machine is about to be taken away: SIGTERM, which inside does not end the process.

    Yields:
        A function of the number of steps done, to be called after each: whether to stop now. All processes are told
        at the same step, whichever of them got the signal.
    """
    told = threading.Event()
    if jax.process_count() > 1:  # JAX has its own handler then, and agrees on the step

        def told_together(step: int) -> bool:
            if multihost_utils.reached_preemption_sync_point(step):
                told.set()
            return told.is_set()

        yield told_together
        return
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda step: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def local_rows(mesh: Mesh, num_rows: int) -> slice:
    """Which of a batch's rows the devices of this process hold.

    Args:
        mesh: the devices of all processes.
        num_rows: of the global batch, a multiple of the devices that rows are spread over.

    Raises:
        ValueError: they do not lie side by side.
    """
    pieces = row_sharding(mesh).addressable_devices_indices_map((num_rows,)).values()
    held = sorted({piece[0].indices(num_rows)[:2] for piece in pieces if piece is not None})
    if any(end != start for (_, end), (start, _) in itertools.pairwise(held)):
        raise ValueError(
            f"config.mesh: process {jax.process_index()} holds rows {held}, which do not lie side by side; the devices "
            "of a process must be neighbours along data and fsdp"
        )
    return slice(held[0][0], held[-1][1])
