"""docs/families.md says what each family supports; here each of its rows is checked on the real class."""

import re
from pathlib import Path

import pytest
from helpers import make_pixart
from tiny import TINY

from dqar import DQARConfig, apply_dqar

ROWS = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \|", Path("docs/families.md").read_text(), re.MULTILINE)
MAKERS = {**TINY, "pixart": lambda: (make_pixart(), None)}


def test_every_tested_family_has_a_row():
    named = [pipeline for pipeline, _, _ in ROWS]
    assert len(set(named)) == len(named)
    assert set(named) == {type(make()[0]).__name__ for make in MAKERS.values()}
    assert {plan for _, plan, _ in ROWS} == {"yes"}


@pytest.mark.parametrize("name", MAKERS)
def test_reuse_is_supported_as_the_table_says(name):
    pipe, _ = MAKERS[name]()
    reuse = {pipeline: own for pipeline, _, own in ROWS}[type(pipe).__name__]
    if reuse == "yes":
        with apply_dqar(pipe, DQARConfig()) as session:
            assert session.attached
    else:
        with pytest.raises(ValueError, match="attention|processor"):
            apply_dqar(pipe, DQARConfig())
