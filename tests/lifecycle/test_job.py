"""A rank's place in its job, from whatever has started it: read at one place, and real ranks that become one job."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, clean_environment, run_processes

from commons.lifecycle.job import FAMILIES, PARTS, TORCH, JobPlace, first_host, read_job

SCRIPT = str(REPOSITORY / "train_gpt_demo.py")
HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29801"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}


def place(**variables: str) -> tuple[int, int, int, int]:
    job = read_job(variables)
    assert job.problems == (), job.problems
    return job.rank, job.local_rank, job.world_size, job.local_world_size


def test_without_a_launcher_it_is_a_job_of_one() -> None:
    assert read_job({}) == JobPlace()
    assert read_job({"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}) == JobPlace(), "meant for other jobs"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1", **HERE}, (0, 0, 1, 1)),
        ({"WORLD_SIZE": "1"}, (0, 0, 1, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", **HERE}, (1, 1, 2, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **HERE}, (1, 1, 2, 2)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}, (3, 1, 4, 2)),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "a"},
            (1, 0, 2, 1),
        ),
        # nothing tells: the same on every rank
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}, (1, 1, 2, 1)),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[1-2]"}, (3, 1, 4, 2)),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "1,3", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[1-2]"}, (3, 1, 4, 3)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NNODES": "1"}, (1, 1, 2, 2)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "MASTER_ADDR": "::1"}, (1, 1, 2, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, (0, 0, 1, 1)),
        # a batch script is no task, though it is numbered
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"}, (0, 0, 1, 1)),
        # mpirun starts its helpers by srun: one task a machine
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_LOCALID": "0",
                "SLURM_JOB_NODELIST": "n[1-2]",
            },
            (3, 1, 4, 2),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, (1, 1, 2, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "localhost"}, (1, 1, 2, 2)),
        # torchrun under srun, which has started one task a machine
        (
            {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_LOCALID": "0",
                "MASTER_ADDR": "n1",
            },
            (3, 1, 4, 2),
        ),
    ],
    ids=str,
)
def test_places(variables: dict[str, str], expected: tuple[int, int, int, int]) -> None:
    assert place(**variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", **HERE}, "RANK=2 is out of range for WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **HERE}, "RANK must be a whole number from 0, got '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "two", **HERE}, "WORLD_SIZE must be a whole number from 0, got 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "0", **HERE}, "WORLD_SIZE=0 is not a number of ranks"),
        ({"RANK": "1"}, "RANK=1 without WORLD_SIZE: set WORLD_SIZE too"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK: set RANK too"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without RANK and WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **HERE}, "LOCAL_RANK=1 exceeds RANK=0"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1", **HERE},
            "LOCAL_RANK=1 is not one of the 1 ranks of this machine",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3", **HERE}, "LOCAL_WORLD_SIZE=3 exceeds WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0", **HERE}, "LOCAL_WORLD_SIZE=0 is not a number"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "without LOCAL_RANK: set LOCAL_RANK"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "2 ranks without MASTER_ADDR: set it"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", **HERE, "MASTER_PORT": "70000"},
            "MASTER_PORT must be a port from 1 to 65535",
        ),
        ({"WORLD_SIZE": "3", **SLURM, "MASTER_ADDR": "a"}, "WORLD_SIZE=3 contradicts the job's launcher"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_one_sentence(variables: dict[str, str], message: str) -> None:
    (problem,) = read_job(variables).problems
    assert message in problem and ": " in problem


def test_where_slurm_s_ranks_meet() -> None:
    job = read_job({**SLURM, "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[03-05,9],big1", "SLURM_NNODES": "4"})
    assert job.master_addr == "node03" and 10_000 <= (job.master_port or 0) < 32_768
    other = read_job({**SLURM, "SLURM_JOB_ID": "4712", "SLURM_JOB_NODELIST": "node[03-05]", "SLURM_NNODES": "4"})
    assert other.master_port != job.master_port, "two jobs may share a machine"
    names = {"a": "a", "a,b": "a", "gpu[7]": "gpu7", "r[1-2]n[3-4],x": "r1n3", "": ""}
    assert {text: first_host(text) for text in names} == names


# ---- one place


def reads(tree: ast.AST, names: set[str]) -> list[str]:
    """The variables of ``names`` that are looked up in a mapping or by getenv."""
    found: list[str] = []
    for node in ast.walk(tree):
        keys: list[ast.expr] = []
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            keys = [node.slice]
        elif isinstance(node, ast.Call):
            named = isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop", "getenv", "setdefault")
            keys = node.args[:1] if named else []
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            keys = [node.left]
        found += [key.value for key in keys if isinstance(key, ast.Constant) and key.value in names]
    return found


PLACE_VARIABLES = {
    *(name for family in (TORCH, *FAMILIES) for part in PARTS for name in getattr(family, part)),
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID",
}


def test_no_other_module_reads_a_rank_s_place() -> None:
    files = [*REPOSITORY.glob("commons/**/*.py"), *REPOSITORY.glob("*.py"), *REPOSITORY.glob("benchmarks/*.py")]
    found = {
        str(path.relative_to(REPOSITORY)): names
        for path in files
        if (names := reads(ast.parse(path.read_text()), PLACE_VARIABLES))
    }
    assert found.pop("commons/lifecycle/job.py") == ["TORCHELASTIC_RUN_ID"], "the others are read by their tables"
    assert found == {}, "ask commons.lifecycle.job.read_job()"


@pytest.mark.parametrize(
    "source", ['os.environ["RANK"]', 'x.get("LOCAL_RANK", "0")', '"WORLD_SIZE" in x', 'getattr(os, "x").getenv("RANK")']
)
def test_a_reader_elsewhere_would_be_seen(source: str) -> None:
    assert len(reads(ast.parse(source), PLACE_VARIABLES)) == 1


# ---- real ranks, started one by one


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


LAUNCHERS = {
    "sbatch": lambda rank: {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"},
    "without LOCAL_RANK": lambda rank: {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
    "srun": lambda rank: {
        "SLURM_PROCID": rank,
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": rank,
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "node[7-8]",
    },
    "srun between machines": lambda rank: {
        "SLURM_PROCID": rank,
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": rank,
        "SLURM_NNODES": "2",
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_JOB_NODELIST": "localhost,node8",
    },
    "Open MPI": lambda rank: {
        "OMPI_COMM_WORLD_RANK": rank,
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": rank,
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "PMI": lambda rank: {"PMI_RANK": rank, "PMI_SIZE": "2", "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": "2"},
}
FLAGS = ("--device=cpu", "--train_step=2", "--warmup_step=1", "--num_layers=1", "--seq_len=16")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_started_one_by_one_are_one_job(tmp_path: Path, launcher: str) -> None:
    """Without a name: the ranks agree on rank 0's, whatever second it is for each."""
    port, ranks = free_port(), []
    for rank in "01":
        ranks.append(
            subprocess.Popen(
                [sys.executable, SCRIPT, f"--log_dir={tmp_path}", *FLAGS],
                env=clean_environment(MASTER_PORT=port, **LAUNCHERS[launcher](rank)),
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    try:
        consoles = [process.communicate(timeout=200)[0] for process in ranks]
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in ranks] == [0, 0], consoles
    (run_dir,) = tmp_path.iterdir()
    assert "-2x1x1-" in run_dir.name
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert "dp 2" in consoles[0] and "dp 2" not in consoles[1]


def test_a_rank_of_one_needs_no_local_rank(tmp_path: Path) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, SCRIPT, f"--log_dir={tmp_path}", *FLAGS]
    returncode, console = run_processes(command, environment=variables)
    assert returncode == 0, console


def test_a_contradiction_ends_with_2(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, f"--log_dir={tmp_path / 'logs'}", *FLAGS]
    returncode, console = run_processes(command, environment={"RANK": "5", "WORLD_SIZE": "2", **HERE}, seconds=60)
    assert returncode == 2 and "RANK=5 is out of range for WORLD_SIZE=2" in console and "Traceback" not in console
    assert list(tmp_path.iterdir()) == []
