"""The README's Python runs as it stands and prints what stands below it."""

import contextlib
import io
import pathlib
import re

import jax

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_snippets_for_borrowers_print_what_the_page_says():
    section = README.read_text().partition("### 1.")[2].partition("### 2.")[0]
    blocks = re.findall(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)*)", section, flags=re.S)
    assert len(blocks) == 3
    names = {}
    for source, expected in blocks:
        printed = io.StringIO()
        # A user has not told jax to be strict, and Flax is not.
        with contextlib.redirect_stdout(printed), jax.numpy_rank_promotion("allow"):
            exec(compile(source, str(README), "exec"), names)
        assert printed.getvalue().split() == expected.split(), source
