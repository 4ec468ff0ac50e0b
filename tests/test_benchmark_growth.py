"""The growth figures' arithmetic: exponents, counted operations, token ratios, pictures."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from benchmarks import growth, lists
from benchmarks.contestants import equal_trees

SIZES = (64, 128, 256, 512, 1024)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.7, 2.0])
def test_the_exponent_of_a_power_is_found_whatever_its_constant(power):
    for constant in (1e-6, 3.0):
        assert growth.fit_exponent(SIZES, [constant * x**power for x in SIZES]) == pytest.approx(power, rel=1e-9)


def test_noise_moves_an_exponent_little_and_a_constant_part_lowers_it():
    noise = np.exp(0.05 * np.random.default_rng(0).standard_normal(len(SIZES)))
    assert growth.fit_exponent(SIZES, SIZES * noise) == pytest.approx(1.0, abs=0.06)
    assert 0.3 < growth.fit_exponent(SIZES, [200 + x for x in SIZES]) < 0.7
    # By hand: through two points the slope is the ratio of the logarithms.
    assert growth.fit_exponent((2, 8), (3, 6)) == pytest.approx(0.5)


def counted(name):
    sweep = growth.SWEEPS[name]
    return growth.fit_exponent(sweep.values, [growth.count_flops(growth.point(sweep, x, 0)) for x in sweep.values])


def test_counted_operations_grow_as_the_design_says():
    assert counted("row") == pytest.approx(1.0, abs=1e-6)  # trees do not see each other
    once = growth.fit_exponent(growth.SWEEPS["responses"].values, [1 + k for k in growth.SWEEPS["responses"].values])
    assert once < counted("responses") < 1.0  # nor do responses: tokens grow as 1 + K, the head's targets as K
    assert 1.1 < counted("prompt") < 2.0  # attention's square
    assert 1.5 < counted("width") < 2.0  # weights against attention and head


def test_a_point_is_a_step_of_its_size():
    flags = growth.point(growth.SWEEPS["responses"], 4, seed=7)
    assert (flags.responses, flags.prompt, flags.response, flags.method, flags.seed) == (4, 64, 64, "lipo_lambda", 7)
    batch = equal_trees.pack(flags, equal_trees.draw_trees(flags, 0))
    assert np.sum(batch.group > 0) == 64 + 4 * 64 and np.sum(batch.target_slot > 0) == 4 * 64


def test_every_picture_shows_its_exponents_and_sizes():
    sweep = {"values": [64, 128], "seconds": [[1.0, 2.1], [1.1, 2.0]], "flops": [5.0, 10.0], "label": "tokens"}
    sweep |= {"exponent": {"min": 0.9, "median": 0.97, "max": 1.1}, "flops_exponent": 1.0}
    head = [{"vocabulary": v, "tile": v, "few": 2 * v, "many": 2 * v, "full": 9 * v} for v in (1024, 2048)]
    drawn = growth.draw({"prompt": sweep}, head)
    texts = {
        name: {"".join(node.itertext()) for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
        for name, svg in drawn.items()
    }
    assert {"measured, exponent 0.97", "counted operations, 1.00", "tokens", "64", "128"} <= texts["prompt"]
    assert {"full logits, 8192 targets", "a tile of logits", "1,024", "vocabulary"} <= texts["head"]


@pytest.mark.parametrize(("shape", "ratio"), [((384, 128, 4), 2048 / 896), ((384, 64, 8), 4.0), ((128, 384, 2), 8 / 7)])
def test_a_token_ratio_counts_the_prompt_once_and_once_a_response(shape, ratio):
    assert lists.token_ratio(*shape) == pytest.approx(ratio)
