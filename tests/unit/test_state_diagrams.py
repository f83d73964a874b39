"""The diagrams of the consensus in storaged/README.md show what the tables in the code say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

import storaged
from storaged.meta.consensus.reader import READ_TRANSITIONS
from storaged.meta.consensus.states import TRANSITIONS

README = Path(storaged.__file__).parent / "README.md"
TABLES = (TRANSITIONS, READ_TRANSITIONS)


def diagrams() -> list[set[tuple[str, str, str]]]:
    """(state, event, state after) of each diagram, without its beginning and ends."""
    drawn = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", README.read_text(), re.DOTALL)
    return [
        {
            (state, event, after)
            for state, after, events in re.findall(r"^ +(\w+) --> (\w+): (.+)$", diagram, re.MULTILINE)
            for event in events.split(", ")
        }
        for diagram in drawn
    ]


@pytest.mark.parametrize("number", range(len(TABLES)))
def test_a_diagram_and_its_table_are_the_same(number: int) -> None:
    table: Mapping[Any, Mapping[IntEnum, Sequence[IntEnum]]] = TABLES[number]
    transitions = {
        (state.name, event.name.lower(), after.name)
        for state, events in table.items()
        for event, states in events.items()
        for after in states
    }
    assert diagrams()[number] == transitions
