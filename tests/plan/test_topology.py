"""Names of topologies, and what a process needs before it imports jax."""

import subprocess
import sys

import pytest

from palign.plan.topology import CHIPS, environment, parse_topology, target_description


@pytest.mark.parametrize(
    ("name", "slices", "per_slice"),
    [
        ("v5p:4x4x4", 1, 64),
        ("2xv5e:16x16", 2, 256),
        ("v5e:1x1", 1, 1),
        ("h100:8", 1, 8),
        ("h200:2x8", 2, 8),
        ("cpu:8", 1, 8),
    ],
)
def test_a_name_says_slices_and_chips(name, slices, per_slice):
    topology = parse_topology(name)
    assert (topology.slices, topology.per_slice) == (slices, per_slice)


@pytest.mark.parametrize("name", ["v5p", "v9:2x2", "v5e:16", "2xh100:8", "h100:2x2x2", "cpu:2x4", "v5e:axb", ""])
def test_another_name_is_answered_with_examples(name):
    with pytest.raises(ValueError, match=r"^--topology=.*expected a chip and a shape.*v5p:4x4x4.*h100:2x8"):
        parse_topology(name)


def test_every_chip_has_an_example_an_environment_and_a_gpu_its_description():
    for name, chip in CHIPS.items():
        topology = parse_topology(chip.example)
        assert topology.chip_name == name and environment(topology)["JAX_PLATFORMS"] == "cpu"
        if chip.platform == "gpu":
            assert "core_count: 132" in target_description(topology)


def test_the_environment_is_known_before_jax_is_imported():
    code = "import sys, palign.cli.plan; print(sorted({'jax', 'numpy', 'flax'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"
