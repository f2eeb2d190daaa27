"""python -m commons.doctor [--json] [--topic TOPIC ... | --failure TEXT]; exit code 1 if something stops training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from commons.doctor.diagnosis import TOPICS, diagnose, explain_failure
from commons.doctor.findings import exit_code
from commons.doctor.machine import Machine
from commons.doctor.report import as_text, print_json, summary, wants_colour
from commons.doctor.torch_build import choose_torch


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m commons.doctor", description="Says why this machine cannot train.")
    parser.add_argument("--json", action="store_true", help="findings as JSON, see commons/doctor/report.py")
    parser.add_argument("--topic", action="append", choices=TOPICS, help="only this topic; may be repeated")
    parser.add_argument(
        "--failure", metavar="TEXT", help="only what may have caused this error message; no word where nothing has"
    )
    parser.add_argument("--torch-for", metavar="VERSION", help=argparse.SUPPRESS)  # install.sh asks
    given = parser.parse_args(arguments)
    if given.torch_for is not None:
        print(*choose_torch(Machine(), given.torch_for), sep="\n")
        return 0
    if given.failure is not None:
        findings = explain_failure(given.failure)
    else:
        findings = diagnose(topics=given.topic or TOPICS)
    if given.json:
        print_json(findings)
    elif given.failure is not None:
        print(as_text(findings, colour=wants_colour(sys.stdout)), end="\n" if findings else "")
    else:
        print(as_text(findings, colour=wants_colour(sys.stdout)))
        print(f"\n{summary(findings)}")
    return exit_code(findings)
