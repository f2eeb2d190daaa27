"""README.md and docs/ against the code: tables, commands, links, flags, the list of files, what a run shows."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from mutation.targets import TARGETS
from suite_runs import launch

from benchmarks.images import PANELS, RESULTS
from benchmarks.report.tables import COLUMNS
from benchmarks.sweep.grid import ready_made
from commons.cli.checks import problems
from commons.cli.flags import DOCTOR_FLAGS, read_request
from commons.cli.variables import FLAG_VARIABLES
from commons.config.schema import PLACEMENTS, TrainConfig
from commons.doctor.report import COLOURS, MARGIN
from commons.launch.launcher import JOB_VARIABLES, read_nodes
from commons.lifecycle.outcome import HOW, STOP_SIGNALS
from commons.plans.registry import MODEL_STATES, PLANS
from model_zoo import MODEL_SIZES, parameter_count

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text()
    for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
}
README = PAGES["README.md"]


def section(title: str, page: str = "README.md") -> str:
    """The text under a page's heading, up to the next heading of any level."""
    text = re.sub(r"^```.*?^```$", lambda block: block[0].replace("\n#", "\n\0#"), PAGES[page], flags=re.M | re.S)
    match = re.search(rf"^#+ {re.escape(title)}.*?\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"{page} has no section {title!r}"
    return match.group(1).replace("\0", "")


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, without the heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


# ---- tables


def test_plans() -> None:
    assert {row[0]: row[-1] for row in rows(section("Plans"))} == {
        name: ", ".join(plan.precisions) for name, plan in PLANS.items()
    }


def test_plans_shard_what_the_table_says() -> None:
    for name, *cells, _ in rows(section("Plans")):
        told = {state for state, cell in zip(MODEL_STATES, cells, strict=True) if cell.startswith("sharded")}
        assert told == set(PLANS[name].sharded), name
        assert all(cell.startswith(("sharded", "on every rank")) for cell in cells), name


def test_placements() -> None:
    table = {row[0]: row[1] for row in rows(section("Placement", "docs/plans.md"))}
    assert list(table) == ["static", "auto", "cuda", "cpu", "const"] and set(table) == set(PLACEMENTS)
    for name in ("cuda", "cpu", "const"):
        fractions = ", ".join(f"{fraction:g}" for fraction in PLACEMENTS[name])
        assert f"static {fractions}" in table[name]


def test_sizes() -> None:
    assert rows(section("Sizes", "docs/plans.md")) == [
        [name, str(shape.layers), str(shape.hidden), str(shape.heads), f"{parameter_count(shape):,}"]
        for name, shape in MODEL_SIZES.items()
    ]


def test_model_zoo_prints_its_table() -> None:
    printed = subprocess.run(
        [sys.executable, "model_zoo.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name, shape in MODEL_SIZES.items():
        assert name in printed.stdout and f"{parameter_count(shape):,}" in printed.stdout


@pytest.mark.parametrize(
    ("page", "title", "columns"),
    [
        (
            "README.md",
            "Measured speed",
            ("step, ms", "model TFLOPS a device", "peak memory, MiB"),
        ),
        ("docs/results.md", "One and two H100s", ("step, ms", "model TFLOPS a device", "peak memory, MiB")),
    ],
)
def test_speed_is_what_was_measured(page: str, title: str, columns: tuple[str, ...]) -> None:
    """The table has the chart's first two panels, from the same file."""
    expected = []
    for panel in PANELS[:2]:
        cases = {case["label"]: case for case in json.loads((RESULTS / panel.results).read_text())["cases"]}
        for measured in panel.cases:
            case = cases[measured.case]
            cells = [COLUMNS[column](case["runs"]) for column in columns]
            expected.append([panel.title, str(case["ranks"]), measured.plan, *cells])
    text = section(title, page)
    assert rows(text) == expected
    for panel in PANELS if page == "README.md" else PANELS[:2]:
        environment = json.loads((RESULTS / panel.results).read_text())["environment"]
        assert f"`{environment['commit'][:7]}`" in text, f"{page} does not name the commit of {panel.results}"
        assert f"benchmarks/results/{Path(panel.results).parent}/README.md" in text


def test_parity_table_is_what_was_measured() -> None:
    text = section("On CPU ranks", "docs/parity.md")
    address = re.search(r"\(\.\./(benchmarks/results/\S+/parity\.md)\)", text)
    assert address
    measured = (REPOSITORY / address[1]).read_text()
    by_plan = measured[measured.index("| plan |") : measured.index("| ranks |")]
    assert rows(text) == rows(by_plan)
    on_cpus = {(n, p) for n, plan in PLANS.items() for p in plan.precisions if p != "fp8"}  # which no CPU has
    assert {(row[0], row[1]) for row in rows(text)} == on_cpus
    commit = re.search(r"commit `(\w+)`", text)
    assert commit and f"commit {commit[1]}" in measured


def test_what_the_doctor_said_is_what_was_measured() -> None:
    text = PAGES["docs/troubleshooting.md"]
    summary, block = text.split("<details><summary>")[1].split("```\n")[:2]
    address = re.search(r"`(benchmarks/results/(\d{4}-\d\d-\d\d)-\S+/doctor\.txt)`", summary)
    assert address and address[2] in summary.split("</summary>")[0], "the date stands beside the block"
    assert block == (REPOSITORY / address[1]).read_text()
    *lines, empty, total = block.splitlines()
    heads = [line[: len(MARGIN)] for line in lines if not line.startswith(MARGIN)]
    assert {head.strip() for head in heads} <= set(COLOURS) and all(head.endswith(" ") for head in heads)
    counts = [f"{[head.strip() for head in heads].count(level)} {level}" for level in COLOURS]
    assert not empty and re.match("s?, ".join(counts), total)


def test_run_folder_files() -> None:
    names = {row[0] for row in rows(section("The run's folder", "docs/runs.md"))}
    assert names == {"config.json", "env.json", "metrics.jsonl", "summary.json", "console.log", "auto.json"}


def test_every_end_of_a_run() -> None:
    page = rows(section("How a run ends", "docs/endings.md"))
    table = {name.strip("` "): row for row in page for name in row[0].split(",")}
    assert set(table) == {*HOW, *(signum.name for signum in STOP_SIGNALS)}
    signals = {name for name in table if name.startswith("SIG")}
    listed = [name.strip("` ") for name in table["SIGINT"][0].split(",")]
    codes = [int(code) for code in re.findall(r"\b1[2-4]\d\b", table["SIGINT"][1].partition(":")[2])]
    assert signals == set(listed) and codes == [128 + signal.Signals[name] for name in listed]


# ---- commands


def commands() -> Iterator[tuple[str, str]]:
    """Every command in a bash block, with its page; what ``&&`` joins are two."""
    for page, text in PAGES.items():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in shlex.join(shlex.split(line, comments=True)).split(" '&&' "):
                    if part:
                        yield page, part


def wrong_with(command: str) -> list[str]:
    """What would keep a command from running, on a machine with as many GPUs as it asks for; empty if nothing."""
    words = shlex.split(command)
    words = words[:-1] if words[-1:] == ["&"] else words
    count = next((i for i, word in enumerate(words) if not re.match(r"\w+=", word)), len(words))
    variables, words = dict(word.split("=", 1) for word in words[:count]), words[count:]
    match words:
        case ["bash", "run_gemini.sh", *flags]:
            return wrong_settings(flags, variables)
        case ["bash", "run.sh", *flags]:
            return wrong_settings(flags, {"DISTPLAN": "CAI_Hybrid", "TPDEGREE": "2", "PPDEGREE": "2", **variables})
        case ["torchrun", "--nproc_per_node", ranks, "train_gpt_demo.py", *flags]:
            return wrong_settings(flags, {**variables, "GPUNUM": ranks})
        case ["python", "train_gpt_demo.py", *flags]:
            return wrong_settings(flags, {**variables, "GPUNUM": "1"})
        case ["sbatch", *_]:
            return wrong_slurm_job(words[1:], variables)
        case ["bash", "run_tests.sh", "--mutate", *names]:
            return [f"no module {name}" for name in names if name not in {"planted", *TARGETS}]
        case ["bash", "run_tests.sh", *arguments]:
            files = [word for word in arguments if word.startswith("tests/")]
            return [f"no {name}" for name in files if not (REPOSITORY / name).exists()] + unknown(
                arguments, {"--smoke", "-k", "-m"}
            )
        case ["bash", ".ci/run"] | ["bash", ".ci/run", "lint"]:
            return []
        case ["pip", "install", "-r", name]:
            return [] if (REPOSITORY / name).exists() else [f"no {name}"]
        case ["cd", folder]:
            return [] if (REPOSITORY / folder).is_dir() else [f"no folder {folder}"]
        case ["bash", "benchmark_gemini.sh", *arguments]:
            return wrong_module("benchmarks.sweep", arguments)
        case ["python", "-m", module, *arguments] if module.startswith(("benchmarks.", "commons.")):
            return wrong_module(module, arguments)
        case ["python", "-c", *_] | ["until", *_]:  # of the worked example, which tests/test_training_example.py runs
            return []
    return [f"nobody judges {command!r}: add it to wrong_with"]


# Files of the reader's, which nobody has before the example is run.
NOT_HERE = re.compile(r"--(data|resume|init_from)\b.*(there is no|is not a folder)")


def wrong_settings(flags: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """As the launcher judges flags and variables, but on a machine with the GPUs that they ask for."""
    if flags[:1] == ["--doctor"]:
        return unknown(flags, {word for text in DOCTOR_FLAGS for word in text.split() if word.startswith("--")})
    found = [f"unknown variable {name}" for name in variables if name not in {**FLAG_VARIABLES, **JOB_VARIABLES}]
    line = read_request(flags, variables).line
    config = line.config()
    device_type = "cpu" if config.device == "cpu" else "cuda"
    nodes, wrong_nodes = read_nodes(variables, config.model_parallel_size, device_type)
    gpus = 0 if device_type == "cpu" else nodes.ranks_per_node
    wrong = problems(
        config,
        nodes.world_size,
        device_type,
        gpus,
        PLANS.get(config.distplan),
        local_world_size=nodes.ranks_per_node,
        typed=line.given,
    )
    return [*found, *line.problems, *wrong_nodes, *(problem for problem in wrong if not NOT_HERE.match(problem))]


def wrong_slurm_job(words: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    script = "launchers/slurm.sbatch"
    if script not in words:
        return [f"{script} is not what is submitted"]
    own, flags = words[: words.index(script)], words[words.index(script) + 1 :]
    preset = re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (REPOSITORY / script).read_text(), re.MULTILINE)
    options = dict(preset) | dict(word.removeprefix("--").split("=", 1) for word in own)
    job = {"NNODES": options["nodes"], "GPUNUM": options["gpus-per-node"], "NODE_RANK": "0", "MASTER_ADDR": "node1"}
    strange = [f"unknown option --{name}" for name in options if name not in {"time", *dict(preset)}]
    return [*strange, *wrong_settings(flags, {**job, **variables})]


def wrong_module(module: str, arguments: Sequence[str]) -> list[str]:
    """Its flags are in its --help; benchmarks.sweep takes those of a training too, and its sweep exists."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        return [f"python -m {module} --help: {done.stderr}"]
    known = set(re.findall(r"--[\w-]+", done.stdout))
    if module == "benchmarks.sweep":
        known |= {f"--{name}" for name in TrainConfig().as_dict()}
    found = unknown(arguments, known)
    if module == "benchmarks.sweep" and arguments and not arguments[0].startswith("-"):
        found += [] if arguments[0] in ready_made() else [f"no sweep {arguments[0]}"]
    return found


def unknown(words: Sequence[str], known: set[str]) -> list[str]:
    return [f"unknown flag {word}" for word in words if word.startswith("-") and word not in known]


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_commands_work(page: str, command: str) -> None:
    """Flags and variables exist, and the settings go together."""
    assert not wrong_with(command), f"{page}: {command}"


@pytest.mark.parametrize(
    ("command", "sign"),
    [
        ("GPUNUM=3 TPDEGREE=2 bash run_gemini.sh", "--tp_degree 2"),
        ("GPUNUM=two bash run_gemini.sh", "GPUNUM"),
        ("NNODES=2 NODE_RANK=0 GPUNUM=8 bash run_gemini.sh", "MASTER_ADDR"),
        ("NODES=2 bash run_gemini.sh", "unknown variable NODES"),
        ("bash run_gemini.sh --model_type gpt2_huge", "gpt2_huge"),
        ("bash run_gemini.sh --no_such_flag 1", "--no_such_flag"),
        ("bash run_gemini.sh --distplan CAI_ZeRO1 --placement cpu", "--placement"),
        ("bash run_gemini.sh --doctor --jason", "--jason"),
        ("GPUNUM=6 bash run.sh", "--pp_degree 2"),
        ("torchrun --nproc_per_node 3 train_gpt_demo.py --tp_degree 2", "--tp_degree"),
        ("python train_gpt_demo.py --tp_degree 2", "--tp_degree"),
        ("sbatch --nodes=2 --gpus-per-node=1 launchers/slurm.sbatch --tp_degree 4", "--tp_degree"),
        ("sbatch --node=2 launchers/slurm.sbatch", "--node"),
        ("bash run_tests.sh tests/test_nothing.py", "test_nothing"),
        ("bash run_tests.sh --smok", "--smok"),
        ("bash run_tests.sh --mutate shedule", "shedule"),
        ("python -m benchmarks.sweep plains", "plains"),
        ("bash benchmark_gemini.sh quick --no_such_flag 1", "--no_such_flag"),
        ("python -m benchmarks.parity --to my_parity", "--to"),
        ("python -m benchmarks.nothing", "benchmarks.nothing"),
        ("cd nowhere", "nowhere"),
        ("pip install -r requirements-reports.txt", "requirements-reports.txt"),
        ("make all", "nobody judges"),
    ],
)
def test_wrong_commands_are_noticed(command: str, sign: str) -> None:
    assert sign in "\n".join(wrong_with(command))


# ---- links, flags, words


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not there.exists() or not there.is_relative_to(REPOSITORY) or (anchor and anchor not in anchors(there)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert not broken_links(REPOSITORY / page, PAGES[page])


def test_broken_links_are_noticed() -> None:
    text = "[a](docs/nowhere.md) [b](docs/plans.md#nothing) [c](#no-such-heading) [d](docs/plans.md#sizes) [e](#plans)"
    broken = ["docs/nowhere.md", "docs/plans.md#nothing", "#no-such-heading"]
    assert broken_links(REPOSITORY / "README.md", text) == broken


def test_every_page_is_linked() -> None:
    linked = {row[0] for row in re.findall(r"\((docs/\w[\w-]*\.md)(#[\w-]+)?\)", section("Documentation"))}
    assert linked == set(PAGES) - {"README.md"}


# Not flags of a training.
OTHER_FLAGS = {
    *("help", "doctor", "json", "failure", "dev", "smoke", "list", "mutate"),
    *("only", "out", "retry", "before", "to", "prompt"),
}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/troubleshooting.md"])
def test_flags_exist_and_have_the_defaults_told(page: str) -> None:
    config = TrainConfig()
    code = re.findall(r"`([^`\n]+)`", prose(PAGES[page]))
    flags = {flag for words in code for flag in re.findall(r"(?<![\w-])--([a-z]\w*)", words) if "#SBATCH" not in words}
    assert not {flag for flag in flags - OTHER_FLAGS if not hasattr(config, flag)}
    for flag, value in re.findall(r"`--(\w+)` \(([\d.]+)", PAGES[page]):
        assert float(value) == getattr(config, flag), f"{page}: --{flag} ({value})"


@pytest.mark.parametrize("page", PAGES)
def test_pages_tell_what_is(page: str) -> None:
    """A page says how things are; what they were is in the commits."""
    past = re.search(r"that was before|used to be|any more|previously|formerly", PAGES[page], re.IGNORECASE)
    assert not past, f"{page}: {past and past[0]}"


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160, "move it to docs/"


# ---- the list of files


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
    named, files = tree_paths(section("Every file in a line", "docs/architecture.md")), tracked_files()
    shown_by_their_folder = ("tests/", "benchmarks/", "commons/doctor/")
    modules = {
        name
        for name in files
        if name.endswith(".py")
        and not name.startswith(shown_by_their_folder)
        and Path(name).name not in ("__init__.py", "__main__.py")
    }
    assert not modules - named, f"not in the tree of docs/architecture.md: {sorted(modules - named)}"
    existing = files | {f"{parent}/" for name in files for parent in Path(name).parents}
    assert not named - existing, f"in the tree of docs/architecture.md but not there: {sorted(named - existing)}"


def tree_paths(tree: str) -> set[str]:
    """Whole paths of a tree's lines, which are indented by four spaces per folder."""
    folders: list[str] = []
    paths = set()
    for indent, name in re.findall(r"^( *)([\w./-]+\.(?:py|sh|md|txt|sbatch)|[\w./-]+/)(?= |$)", tree, re.MULTILINE):
        del folders[len(indent) // 4 :]
        paths.add("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


# ---- what a run shows


def outline(console: str) -> list[str]:
    """A run's console from its header on, without what differs from run to run: numbers, device, folder."""
    shown = [line for line in console[console.index("model ") :].splitlines() if line.strip()]
    kept = [line for line in shown if not line.startswith(("device ", "run "))]
    return [" ".join(re.sub(r"\d[\d,.]*(e-\d+)?", "#", line).split()) for line in kept]


def test_the_readme_shows_what_the_screen_shows(tmp_path: Path) -> None:
    """Stale? Paste what `bash run_gemini.sh` prints where there is no GPU."""
    run = launch(tmp_path, "--device", "cpu", ranks=2)
    assert run.returncode == 0, run.console
    shown = README.split("<!-- capture -->")[1].split("```")[1]
    assert outline(shown) == outline(run.console)


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
