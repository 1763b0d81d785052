"""The code in README.md runs."""

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


def test_there_are_examples():
    assert BLOCKS


@pytest.mark.parametrize("code", BLOCKS)
def test_example(code):
    exec(compile(code, "README.md", "exec"), {})
