"""The checks of installed packages: README's case 8."""

from __future__ import annotations

from dataclasses import replace

import pytest
from worlds.fake_machine import FakeMachine
from worlds.sick_machines import found, only, troubles

from commons.doctor import explain_failure, versions
from commons.doctor.machine import Distribution


@pytest.mark.parametrize(
    ("name", "version", "finding_id", "level"),
    [
        ("transformers", "5.0.0", "packages.wrong-version", "error"),
        ("transformers", "4.39.0", "packages.wrong-version", "error"),
        ("transformers", "4.57.1", "packages.untested", "warning"),
        ("colossalai", "0.4.9", "packages.wrong-version", "error"),
        ("numpy", "1.25.0", "packages.wrong-version", "error"),
        ("numpy", "3.0.0", "packages.untested", "warning"),
        ("torch", "2.14.0+cu130", "packages.untested", "warning"),
        ("torch", "2.4.1", "packages.wrong-version", "error"),
    ],
)
def test_case_8_versions(linux: FakeMachine, name: str, version: str, finding_id: str, level: str) -> None:
    linux.distributions = tuple(
        replace(each, version=version) if each.name == name else each for each in linux.distributions
    )
    finding = only(linux)
    assert (finding.id, finding.level) == (finding_id, level)
    assert version in finding.seen
    assert finding.cure.startswith("bash install.sh")
    assert explain_failure("ImportError: cannot import name 'X' from 'transformers'", linux) == [finding]


@pytest.mark.parametrize("version", ["2.5.1", "2.13.0+cpu", "2.13.7", "2.7.1+cu128"])
def test_tested_versions(version: str) -> None:
    assert versions.compare("torch", version, versions.TESTED["torch"], "") is None


def test_two_torches(linux: FakeMachine) -> None:
    linux.with_environment(PYTHONPATH="/opt/other")
    linux.distributions = (Distribution("torch", "2.1.0", "/opt/other"), *linux.distributions)
    trouble = troubles(linux)
    assert list(trouble) == ["packages.wrong-version", "duplicates.twice"]
    assert "duplicates" not in found(linux)
    assert trouble["duplicates.twice"].level == "error"
    assert "2.1.0 in /opt/other; 2.6.0 in /venv/site-packages; PYTHONPATH=" in trouble["duplicates.twice"].seen
    linux.distributions = (Distribution("numpy", "2.0.0", "/opt/other"), *linux.distributions[1:])
    assert (only(linux).id, only(linux).level) == ("duplicates.twice", "warning")


def test_missing_packages(linux: FakeMachine) -> None:
    linux.distributions = tuple(each for each in linux.distributions if each.name != "einops")
    assert only(linux).id == "packages.missing"
    assert "packages" not in found(linux)
    assert "einops" in only(linux).title
