"""docs/families.md says what each family supports; here each of its rows is checked on the real class."""

import re
from pathlib import Path
from typing import get_args

import pytest
from helpers import make_pixart
from tiny import TINY, drawn

from dqar import DQARConfig, Probe, apply_dqar
from dqar.config import ReuseTarget

ROWS = re.findall(
    r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", Path("docs/families.md").read_text(), re.MULTILINE
)
MAKERS = {**TINY, "pixart": lambda: (make_pixart(), None)}


def test_every_tested_family_has_a_row():
    named = [pipeline for pipeline, *_ in ROWS]
    assert len(set(named)) == len(named)
    assert set(named) == {type(make()[0]).__name__ for make in MAKERS.values()}
    assert {plan for _, plan, *_ in ROWS} == {"yes"}


@pytest.mark.parametrize("name", MAKERS)
def test_trace_and_reuse_are_supported_as_the_table_says(name):
    pipe, call = MAKERS[name]()
    [(trace, reuse)] = [cells for pipeline, _, *cells in ROWS if pipeline == type(pipe).__name__]
    accepted = []
    for target in get_args(ReuseTarget):
        try:
            with apply_dqar(pipe, DQARConfig(reuse_target=target)) as session:
                assert session.attached
        except ValueError as error:
            assert re.search("attention|processor", str(error))
        else:
            accepted.append(f"`{target}`")
    assert (", ".join(accepted) or "no") == reuse
    measured = {"no": 0, "yes": 1, "by modality": 3}[trace]
    if measured and call:
        config = DQARConfig(schedule="none", reuse_target="output", probe=Probe(record=True))
        with apply_dqar(pipe, config) as session:
            drawn(pipe, call(0), steps=2)
        assert session.trace.to_pandas().filter(like="entropy").notna().any().sum() == measured
    assert (trace == "no") == (reuse == "no")
