"""Mutation testing itself (tests/mutation): its faults fit the code, its tables name what is there."""

from __future__ import annotations

import re

import pytest
from mutation.equivalent import EQUIVALENT
from mutation.planted import FAULTS, Fault, rot
from mutation.targets import TARGETS
from suite_runs import REPOSITORY


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_every_planted_fault_fits_the_code(fault: Fault) -> None:
    assert not rot(fault)
    assert fault.right != fault.wrong
    named = re.findall(r"tests/[\w/]+(?:\.py)?", fault.tests)
    assert named and all((REPOSITORY / name).exists() for name in named)


def test_planted_faults_are_told_apart() -> None:
    assert len({str(fault) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_there(name: str) -> None:
    target = TARGETS[name]
    assert (REPOSITORY / target.path).is_file()
    named = re.findall(r"tests/[\w/]+(?:\.py)?", target.tests)
    assert named and all((REPOSITORY / each).exists() for each in named)


@pytest.mark.parametrize(("path", "before", "after"), EQUIVALENT, ids=str)
def test_what_cannot_be_noticed_is_of_lines_that_are_there(path: str, before: str, after: str) -> None:
    lines = {line.strip() for line in (REPOSITORY / path).read_text().splitlines()}
    assert before in lines and before != after and len(EQUIVALENT[path, before, after]) > 10
