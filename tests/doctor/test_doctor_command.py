"""`python -m commons.doctor` as real processes on this machine, and what it may import."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from worlds.sick_machines import DOCTOR, REPOSITORY, check_schema, needs_torch, run_doctor

from commons.doctor import Machine
from commons.doctor.processes import run_process


def test_only_the_standard_library() -> None:
    """At the top of no file anything else, and torch only in probes.py, which runs in child processes."""
    for path in DOCTOR.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in (each.split(".")[0] for each in names):
                allowed = name in sys.stdlib_module_names or name == "commons"
                assert allowed or (name == "torch" and path.name == "probes.py"), (path.name, name)


def test_old_pythons_can_read_the_first_files() -> None:
    """Neither f-strings nor annotations in what an old Python reads before it is refused."""
    for path in (REPOSITORY / "commons" / "__init__.py", DOCTOR / "__main__.py", DOCTOR / "__init__.py"):
        text = path.read_text()
        text.encode("ascii")
        for node in ast.walk(ast.parse(text)):
            assert not isinstance(node, ast.JoinedStr | ast.AnnAssign | ast.NamedExpr), path
            if isinstance(node, ast.FunctionDef):
                assert node.returns is None
                assert not any(argument.annotation for argument in node.args.args)


@pytest.mark.parametrize("name", ["python3.9", "python3.8", "python3.6"])
def test_old_pythons_get_a_sentence(name: str) -> None:
    path = shutil.which(name)
    works = path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
    if not path or not works:
        pytest.skip(f"no {name} here")
    done = subprocess.run(
        [path, "-B", "commons/doctor", "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: this suite needs Python 3.10 or newer; this is Python")
    assert "Traceback" not in done.stderr


needs_no_gpu = pytest.mark.skipif(bool(Machine().which("nvidia-smi")), reason="for machines without a GPU")


@needs_torch
def test_real_run() -> None:
    """The whole doctor on this machine."""
    done = run_doctor("--json")
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    check_schema(answer)
    assert done.returncode == answer["exit_code"]
    by_id = {finding["id"]: finding for finding in answer["findings"]}
    assert not [name for name in by_id if name.endswith("unchecked")]
    assert by_id["torch-import"]["level"] == "ok"


def test_real_run_where_nothing_is_installed() -> None:
    done = run_doctor("--json", python=(sys.executable, "-S", "-s"))
    answer = json.loads(done.stdout)
    check_schema(answer)
    ids = {finding["id"] for finding in answer["findings"]}
    assert "packages.missing" in ids
    assert "torch-import" not in ids
    assert done.returncode == 1


def test_text_of_a_real_run_and_wrong_flags() -> None:
    done = run_doctor("--topic", "host")
    assert done.returncode == 0, done.text
    assert re.search(r"^\d+ ok, \d+ warnings?, 0 errors\. Nothing here stops a training run$", done.stdout, re.M)
    assert "\x1b" not in done.stdout
    wrong = run_doctor("--topic", "colour")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


@needs_no_gpu
def test_why_no_gpu_is_quick_and_leaves_torch_alone() -> None:
    code = """
        import sys, time
        started = time.perf_counter()
        from commons.doctor import why_no_gpu
        cause, cure = why_no_gpu()
        assert time.perf_counter() - started < 2, time.perf_counter() - started
        assert "torch" not in sys.modules
        print(cause)
    """
    done = run_process([sys.executable, "-c", textwrap.dedent(code)], dict(os.environ), 30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and done.stdout.count("\n") == 1
