"""The generators need torch or rax and are run by hand: pytest must not import them for doctests."""

import jax
import pytest

collect_ignore = ["make_rax_fixture.py", "make_trl_fixture.py", "make_trl_losses.py"]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
