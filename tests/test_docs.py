"""README.md against the code: its tables, its commands, its file tree."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commons.cli.flags import judge, read_flags
from commons.cli.variables import FLAG_VARIABLES
from commons.config.schema import PLACEMENTS
from commons.doctor.report import COLOURS, MARGIN
from commons.lifecycle.outcome import HOW, STOP_SIGNALS
from commons.plans.registry import PLANS
from model_zoo import MODEL_SIZES, parameter_count

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()


def section(title: str) -> str:
    """The text under a heading, up to the next heading of any level."""
    match = re.search(rf"^#+ {re.escape(title)}.*?\n(.*?)(?=^#|\Z)", README, re.MULTILINE | re.DOTALL)
    assert match, f"README.md has no section {title!r}"
    return match.group(1)


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, without the heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_plans() -> None:
    assert {row[0]: row[-1] for row in rows(section("Plans"))} == {
        name: ", ".join(plan.precisions) for name, plan in PLANS.items()
    }


def test_placements() -> None:
    table = {row[0]: row[1] for row in rows(section("Placement"))}
    assert list(table) == ["static", "auto", "cuda", "cpu", "const"] and set(table) == set(PLACEMENTS)
    for name in ("cuda", "cpu", "const"):
        fractions = ", ".join(f"{fraction:g}" for fraction in PLACEMENTS[name])
        assert f"static {fractions}" in table[name]


def test_sizes() -> None:
    assert rows(section("Sizes")) == [
        [name, str(shape.layers), str(shape.hidden), str(shape.heads), f"{parameter_count(shape):,}"]
        for name, shape in MODEL_SIZES.items()
    ]


def commands(program: str) -> list[list[str]]:
    """Every command of README.md that starts the program, as words: variables first, then flags."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if program in words:
                found.append(words)
    return found


@pytest.mark.parametrize("words", commands("run_gemini.sh") + commands("train_gpt_demo.py"), ids=" ".join)
def test_commands_are_understood(words: list[str]) -> None:
    """Flags and variables exist, and the settings go together (on as many GPUs as the command wants)."""
    start = next(i for i, word in enumerate(words) if word in ("run_gemini.sh", "train_gpt_demo.py"))
    flags = [word for word in words[start + 1 :] if word != "--doctor"]
    variables = dict(word.split("=", 1) for word in words[:start] if re.fullmatch(r"[A-Z_]+=.*", word))
    launcher_words = {"GPUNUM", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
    assert set(variables) <= {*FLAG_VARIABLES, *launcher_words}
    flags += [f"--{FLAG_VARIABLES[name]}={value}" for name, value in variables.items() if name in FLAG_VARIABLES]
    command_line = read_flags(flags)
    assert not command_line.problems
    ranks = int(variables.get("GPUNUM", "1")) * int(variables.get("NNODES", "1"))
    assert judge is not None and ranks >= 1
    command_line.config().resolve("cuda")


def tracked_files() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.splitlines() if (REPOSITORY / name).exists()}


def test_file_tree_is_complete() -> None:
    """Every module of the suite has a line in the house, and every line is a file or a folder."""
    tree = section("The house")
    named = re.findall(r"^ *([\w./-]+\.(?:py|sh|md|txt|toml)|[\w./-]+/|\.ci/run)(?= |$)", tree, re.MULTILINE)
    files = tracked_files()
    modules = {
        Path(name).name for name in files if name.endswith(".py") and not name.startswith(("tests/", "benchmarks/"))
    }
    modules -= {"__init__.py", "__main__.py"}
    missing = modules - {Path(name).name for name in named} - doctor_modules(files)
    assert not missing, f"not in README.md's tree: {sorted(missing)}"
    existing = {Path(name).name for name in files} | {
        f"{parent.name}/" for name in files for parent in Path(name).parents
    }
    gone = [
        name for name in named if name.removesuffix("/").split("/")[-1] not in {e.removesuffix("/") for e in existing}
    ]
    assert not gone, f"in README.md's tree but not there: {gone}"


def doctor_modules(files: set[str]) -> set[str]:
    """The doctor's own rooms; the tree shows their folder."""
    return {Path(name).name for name in files if name.startswith("commons/doctor/")}


def test_parity_table_is_what_was_measured() -> None:
    text = section("The same model, proved")
    address = re.search(r"\((benchmarks/results/\S+/parity\.md)\)", text)
    assert address
    measured = (REPOSITORY / address[1]).read_text()
    by_plan = measured[measured.index("| plan |") : measured.index("| ranks |")]
    assert rows(text) == rows(by_plan)
    on_cpus = {(n, p) for n, plan in PLANS.items() for p in plan.precisions if p != "fp8"}  # which no CPU has
    assert {(row[0], row[1]) for row in rows(text)} == on_cpus
    commit = re.search(r"commit `(\w+)`", text)
    assert commit and f"commit {commit[1]}" in measured


def test_what_the_doctor_said_is_what_was_measured() -> None:
    summary, block = section("Troubleshooting").split("<details><summary>")[1].split("```\n")[:2]
    address = re.search(r"`(benchmarks/results/(\d{4}-\d\d-\d\d)-\S+/doctor\.txt)`", summary)
    assert address and address[2] in summary.split("</summary>")[0], "the date stands beside the block"
    assert block == (REPOSITORY / address[1]).read_text()
    *lines, empty, total = block.splitlines()
    heads = [line[: len(MARGIN)] for line in lines if not line.startswith(MARGIN)]
    assert {head.strip() for head in heads} <= set(COLOURS) and all(head.endswith(" ") for head in heads)
    counts = [f"{[head.strip() for head in heads].count(level)} {level}" for level in COLOURS]
    assert not empty and re.match("s?, ".join(counts), total)


def test_run_folder_files() -> None:
    names = {row[0] for row in rows(section("What a run leaves"))}
    assert names == {"config.json", "env.json", "metrics.jsonl", "summary.json", "console.log"}


def test_every_end_of_a_run() -> None:
    table = {name.strip("` "): row for row in rows(section("How a run ends")) for name in row[0].split(",")}
    assert set(table) == {*HOW, *(signum.name for signum in STOP_SIGNALS)}
    signals = {name for name in table if name.startswith("SIG")}
    listed = [name.strip("` ") for name in table["SIGINT"][0].split(",")]
    codes = [int(code) for code in re.findall(r"\b1[2-4]\d\b", table["SIGINT"][1].partition(":")[2])]
    assert signals == set(listed) and codes == [128 + signal.Signals[name] for name in listed]


def test_model_zoo_prints_its_table() -> None:
    printed = subprocess.run(
        [sys.executable, "model_zoo.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name, shape in MODEL_SIZES.items():
        assert name in printed.stdout and f"{parameter_count(shape):,}" in printed.stdout


def test_no_private_paths_or_registries() -> None:
    """No path of the machine that it was written on, and no package registry's host, in any file."""
    forbidden = re.compile(
        r"/work/(main|shared|\.library)|/opt/(wheels|pypi)|pypi\.org|files\.pythonhosted|registry\.npmjs"
    )
    for name in tracked_files() - {"tests/test_docs.py"}:
        try:
            text = (REPOSITORY / name).read_text()
        except UnicodeDecodeError:
            continue
        assert not forbidden.search(text), f"{name}: {forbidden.search(text)}"
