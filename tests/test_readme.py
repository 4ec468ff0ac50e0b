"""The README's Python runs as it stands and prints what stands below it."""

import contextlib
import io
import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_snippets_print_what_the_page_says():
    blocks = re.findall(r"```python\n(.*?)```\n\n((?:    .*\n)*)", README.read_text(), flags=re.S)
    assert len(blocks) >= 3
    names = {}
    for source, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, str(README), "exec"), names)
        assert printed.getvalue().split() == expected.split(), source
