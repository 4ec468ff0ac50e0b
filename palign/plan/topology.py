"""Accelerators by name: what a chip can do, and how `v5p:4x4x4`, `2xv5e:16x16` or `h100:2x8` is read.

Nothing here imports jax: `environment` must have been set before it is imported.
"""

import math
import os
import pathlib
import re
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device as jax counts them. All rates are peaks, in one direction."""

    platform: str  # tpu, gpu, cpu
    memory: float  # bytes that a program can have
    flops: float  # bfloat16 FLOP/s
    memory_bandwidth: float  # bytes/s
    link: float  # bytes/s received from other chips of the slice or node, all links together
    network: float  # bytes/s received from other slices or nodes
    example: str  # a topology


# Sources. TPU memory: what the compiler of libtpu 0.0.42 reports as available. TPU rates: cloud.google.com/tpu/docs/v4,
# v5e, v5p, v6e and tpu7x; "Gbps" of inter-chip links is one direction, their bidirectional figures are twice it. TPU
# networks: a pod's data-centre bandwidth divided by its chips. GPU: NVIDIA's datasheets of H100 and H200 SXM, dense;
# NVLink's 900 GB/s counts both directions; the network is one 400 Gbit/s adapter a GPU, as in DGX H100.
# [mem] = from memory, not looked up.
CHIPS: dict[str, Chip] = {
    # as one device ("megacore"); link 2400 Gbps [mem], network 50 Gbps [mem]
    "v4": Chip("tpu", 30.75 * GIB, 275e12, 1200e9, 300e9, 6.25e9, "v4:4x4x4"),
    # network 6.4 Tbps / 256
    "v5e": Chip("tpu", 15.75 * GIB, 197e12, 819e9, 200e9, 3.1e9, "v5e:16x16"),
    # network 50 Gbps [mem]
    "v5p": Chip("tpu", 95.74 * GIB, 459e12, 2765e9, 600e9, 6.25e9, "v5p:4x4x4"),
    # network 25.6 Tbps / 256
    "v6e": Chip("tpu", 31.25 * GIB, 918e12, 1640e9, 448e9, 12.5e9, "v6e:16x16"),
    # half of a chip of 2307 TFLOP/s: it is two devices; bandwidth 7380 GB/s, link 600 GB/s and network 100 Gbps [mem]
    "tpu7x": Chip("tpu", 94.75 * GIB, 1153.5e12, 3690e9, 300e9, 6.25e9, "tpu7x:4x4x4"),
    # 80 and 141 GB, less what the driver keeps [mem]; jax takes 0.75 of it unless XLA_CLIENT_MEM_FRACTION says 0.92
    "h100": Chip("gpu", 0.92 * 79.1 * GIB, 989e12, 3350e9, 450e9, 50e9, "h100:2x8"),
    "h200": Chip("gpu", 0.92 * 139.8 * GIB, 989e12, 4800e9, 450e9, 50e9, "h200:8"),
    # forced host devices, which try the machinery: no real chip, its times mean nothing
    "cpu": Chip("cpu", 16 * GIB, 1e11, 1e10, 1e10, 1e9, "cpu:8"),
}

# What a user installs to compile for a platform.
EXTRAS = {"tpu": "tpu", "gpu": "cuda12"}


class Topology(NamedTuple):
    """Devices that work together: slices of a TPU, nodes of GPUs, or devices forced on this host's CPU."""

    name: str  # as it was written
    chip_name: str
    slices: int  # TPU slices or GPU nodes
    shape: tuple[int, ...]  # of one slice or node

    @property
    def chip(self) -> Chip:
        """What each device can do."""
        return CHIPS[self.chip_name]

    @property
    def per_slice(self) -> int:
        """Chips that fast links join."""
        return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
    """Reads a topology's name.

    Args:
        name: `CHIP:SHAPE` or `SLICESxCHIP:SHAPE` for a TPU, `CHIP:GPUS` or `CHIP:NODESxGPUS` for a GPU, `cpu:N`.

    Raises:
        ValueError: it is not one.
    """
    match = re.fullmatch(rf"(?:(\d+)x)?({'|'.join(CHIPS)}):(\d+(?:x\d+)*)", name)
    if match:
        slices, chip, shape = int(match[1] or 1), match[2], tuple(int(n) for n in match[3].split("x"))
        platform = CHIPS[chip].platform
        if platform == "gpu" and slices == 1 and len(shape) <= 2:
            return Topology(name, chip, shape[0] if len(shape) == 2 else 1, shape[-1:])
        if (platform == "tpu" and len(shape) in (2, 3)) or (platform == "cpu" and slices == len(shape) == 1):
            return Topology(name, chip, slices, shape)
    examples = ", ".join(chip.example for chip in CHIPS.values())
    raise ValueError(f"--topology={name}: expected a chip and a shape, such as {examples}, or 2xv5e:16x16 (2 slices)")


def environment(topology: Topology) -> dict[str, str]:
    """Process environment without which ahead-of-time compilation fails or waits; set it before jax is imported."""
    if topology.chip.platform == "cpu":
        count = math.prod(topology.shape)
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    if topology.chip.platform == "gpu":
        # Both would time kernels on a GPU that is not there.
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"}
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud machine's metadata server
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # silences a probe; the topology is named when compiling
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process aborts on the first one's lock file
    }


def prepare_process(topology: Topology) -> None:
    """Sets `environment`; what XLA_FLAGS holds already stays in front."""
    for name, value in environment(topology).items():
        os.environ[name] = f"{os.environ.get(name, '')} {value}".strip() if name == "XLA_FLAGS" else value


def target_description(topology: Topology) -> str:
    """The GPU as XLA describes one to itself."""
    return (pathlib.Path(__file__).parent / "targets" / f"{topology.chip_name}.textproto").read_text()
