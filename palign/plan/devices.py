"""The devices of a topology that is not there: enough to make a mesh of, and to compile for."""

import math
from typing import Any

import jax
from jax.experimental import topologies

from palign.plan.topology import EXTRAS, Topology, target_description


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Describes the devices of a topology, slice after slice.

    Raises:
        ValueError: the compiler for it is not installed, or it knows no such topology.
    """
    platform = topology.chip.platform
    if platform == "cpu":
        return _host_devices(topology)
    try:
        describe = _describe_gpu if platform == "gpu" else _describe_tpu
        return list(describe(topology).devices)
    except Exception as error:  # whatever a plugin throws
        reason = str(error).partition("\n")[0]
        if _is_missing(reason):
            raise ValueError(
                f"--topology={topology.name}: the compiler for it is not installed; pip install "
                f"'.[{EXTRAS[platform]}]' brings it and needs no accelerator"
            ) from None
        raise ValueError(
            f"--topology={topology.name}: the compiler knows none of this shape ({reason}); one that it knows is "
            f"{topology.chip.example}"
        ) from None


def _host_devices(topology: Topology) -> list[jax.Device]:
    count, devices = math.prod(topology.shape), jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--topology={topology.name}: this process has {len(devices)} CPU devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before it starts"
        )
    return devices[:count]


def _describe_tpu(topology: Topology):
    options: dict[str, Any] = {}
    if topology.chip_name == "v4":
        options["chip_config_name"] = "megacore"
    if topology.per_slice == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    shape = "x".join(map(str, topology.shape))
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{topology.chip_name}:{shape}", **options)


def _describe_gpu(topology: Topology):
    return topologies.get_topology_desc(
        platform="cuda",
        topology=f"1x{topology.slices}x{topology.per_slice}",
        target_config=target_description(topology),
    )


def _is_missing(reason: str) -> bool:
    return "not installed" in reason or "not implemented" in reason
