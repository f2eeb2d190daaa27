"""benchmarks.report: what it reads, what it concludes, how sure it is, and the page in a browser where there is one."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import random
import re
import shutil
import statistics
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_images import contrast

from benchmarks.images import PAGES
from benchmarks.report import command
from benchmarks.report.cells import group
from benchmarks.report.conclusions import conclude, plain
from benchmarks.report.difference import compare, student_quantile
from benchmarks.report.figures import INK, PLAN_STYLES, best_choices, figures, work_parts
from benchmarks.report.page import page, read_plotly
from benchmarks.report.reading import read
from benchmarks.report.tables import COLUMNS
from commons.plans.registry import PLANS

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
H100 = "NVIDIA H100 80GB HBM3"


def write_run(
    folder: Path, plan: str = "CAI_Gemini", step: float = 0.1, *, gpus: int = 1, batch: int = 16, memory: float = 1e4,
    card: str = H100, commit: str = "abcdef0123", ended: str = "finished", parity: str = "",
) -> Path:  # fmt: skip
    """A run's folder as a training leaves it, with steps around ``step`` seconds."""
    folder.mkdir(parents=True)
    steps = [
        {"step": n + 1, "loss": 10.0 - 0.1 * n, "step_seconds": step * (3 if n < 2 else 1 + 0.001 * (n % 3 - 1))}
        for n in range(8)
    ]
    tokens = batch * gpus * 1024 / step
    figures = {
        "step_seconds": step, "forward_seconds": step * 0.3, "backward_seconds": step * 0.6,
        "optimizer_seconds": step * 0.05, "tokens_per_second": tokens, "model_tflops_per_device": 50 / step / 10,
        "mfu": 0.5,
    }  # fmt: skip
    spreads = {name: {"median": value, "p10": value, "p90": value} for name, value in figures.items()}
    summary = {"ended": ended, "ended_because": None if ended == "finished" else "CUDA out of memory", "warmup_step": 2,
               "steps_measured": 6, "peak_device_memory_mib": memory, "first_loss": 10.0, **spreads}  # fmt: skip
    settings = {"distplan": plan, "model_type": "gpt2_medium", "num_layers": 24, "hidden_size": 1024, "seq_len": 1024,
                "batch_size": batch, "precision": "bf16", "tp_degree": 1, "pp_degree": 1}  # fmt: skip
    environment = {"device_name": card, "gpus": [card] * gpus, "commit": commit, "gpu_memory_mib": [81559] * gpus,
                   "launcher": f"python -m commons.launch --distplan {plan}", "versions": {"torch": "2.13"},
                   "environment": {"WORLD_SIZE": str(gpus)}}  # fmt: skip
    documents = {"config.json": settings, "env.json": environment, "summary.json": summary}
    if parity:
        documents["parity.json"] = {"verdict": parity}
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Gemini and FSDP on one and two GPUs, three runs each; a cell out of memory, and one that was skipped."""
    out = tmp_path / "sweep"
    for plan, step, memory in (("CAI_Gemini", 0.1, 17000.0), ("Pytorch_FSDP", 0.11, 15000.0)):
        for gpus in (1, 2):
            cell = out / f"{plan}-{gpus}"
            for number in (1, 2, 3):
                write_run(
                    cell / f"run-{number}",
                    plan,
                    step * (1 + 0.001 * number + 0.05 * (gpus - 1)),
                    gpus=gpus,
                    memory=memory,
                )
            write_run(cell / "parity", plan, step * 9, gpus=gpus, parity="holds")
            (cell / "cell.json").write_text(json.dumps({"label": f"{plan} × {gpus}", "gpus": gpus, "skipped": None}))
    large = out / "large"
    write_run(large / "run-1", "Pytorch_DDP", batch=64, ended="failed")
    (large / "run-1.json").write_text('{"exit_code": 1}')
    (large / "cell.json").write_text('{"label": "Pytorch_DDP, batch 64 × 1", "gpus": 1}')
    (out / "larger").mkdir()
    (out / "larger" / "cell.json").write_text('{"label": "Pytorch_DDP, batch 128 × 1", "skipped": "larger: no"}')
    return out


def made(folder: Path, *words: str) -> tuple[int, str]:
    """The exit code, and the page."""
    code = command.main([str(folder), *words])
    return code, (folder / "report.html").read_text()


# ---- what it reads


def test_cells_of_a_sweep(sweep: Path) -> None:
    found = read([sweep])
    cells = {cell.label: cell for cell in group(found.runs)}
    assert not found.problems and len(cells) == 5
    gemini = cells["CAI_Gemini × 2"]
    assert (len(gemini.timed), len(gemini.runs), gemini.parity, gemini.gpus) == (3, 4, "holds", 2)
    assert gemini.median("step_seconds") == pytest.approx(0.1052), "the run beside the reference is not timed"
    assert cells["Pytorch_DDP, batch 64 × 1"].first.state == "out of memory"
    assert [(skip.label, skip.why) for skip in found.skipped] == [("Pytorch_DDP, batch 128 × 1", "larger: no")]


def test_conclusions(sweep: Path) -> None:
    found = read([sweep])
    text = "\n".join(plain(sentence) for sentence in conclude(group(found.runs), found))
    assert f"On 2 × {H100}, gpt2_medium trains fastest with CAI_Gemini × 2: 311,483 tokens/s" in text
    assert re.search(r"That is 10\.0 % \(\+[\d.]+ to \+[\d.]+ % at 99%\) more than the next: Pytorch_FSDP × 2", text)
    assert f"On 1 × {H100}, gpt2_medium needs least memory with Pytorch_FSDP × 1: 15,000 MiB" in text
    assert "2 devices keep 95.2 % of the speed per device of 1" in text and "batch 16 per rank (weak)" in text
    assert "Out of memory: Pytorch_DDP, batch 64 × 1: CUDA out of memory." in text
    assert "Parity with the fp32 reference holds in 4 of 4" in text and "1 configurations were skipped" in text
    for sentence in text.splitlines():
        assert "tokens/s" not in sentence or "parity" in sentence, "parity stands beside every speed"


def test_a_broken_parity_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "a", parity="BROKEN")
    found = read([tmp_path])
    text = "\n".join(plain(sentence) for sentence in conclude(group(found.runs), found))
    assert "holds in 0 of 1" in text and "Parity BROKEN: CAI_Gemini, gpt2_medium × 1" in text


def test_single_runs_of_one_configuration_are_repeats(tmp_path: Path) -> None:
    for number in range(3):
        write_run(tmp_path / f"run{number}", step=0.1 + number / 1000)
    write_run(tmp_path / "other", batch=8)
    cells = group(read([tmp_path]).runs)
    assert [(cell.label, len(cell.timed)) for cell in cells] == [
        ("CAI_Gemini, gpt2_medium, batch 16 × 1", 3),
        ("CAI_Gemini, gpt2_medium, batch 8 × 1", 1),
    ]


def test_trouble_is_told_and_the_rest_is_made(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep / "CAI_Gemini-1" / "run-1" / "summary.json").write_text('{"ended": "fin')
    (sweep / "CAI_Gemini-1" / "run-2" / "summary.json").unlink()
    (sweep / "CAI_Gemini-1" / "run-3" / "parity.json").write_bytes(b"\xff\xfe")
    (sweep / "CAI_Gemini-2" / "run-1" / "trace.json.gz").write_bytes(gzip.compress(b"{}")[:-9])
    with (sweep / "CAI_Gemini-2" / "run-2" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    write_run(tmp_path / "others" / "a", card="NVIDIA A100", commit="1234567")
    write_run(tmp_path / "others" / "b", card="NVIDIA A100", commit="7654321")
    (tmp_path / "empty").mkdir()
    folders = [str(sweep), str(tmp_path / "others"), str(tmp_path / "empty"), str(tmp_path / "nowhere")]
    assert command.main([*folders, "--out", str(tmp_path / "out")]) == 1
    told, text = capsys.readouterr().err, (tmp_path / "out" / "report.html").read_text()
    signs = (
        "run-1/summary.json: unreadable or half-written", "run-2: no summary.json", "run-3/parity.json: unreadable",
        "trace.json.gz: unreadable", "metrics.jsonl: line 9 is half-written", "different cards side by side",
        "mixed commits: 1234567, 7654321", "empty: no run in it", "nowhere: cannot be read",
    )  # fmt: skip
    for sign in signs:
        assert sign in told and sign in text, sign
    assert "trains fastest with" in text and "NVIDIA A100" in text


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path)]) == 2 and "no run in it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_committed_results_are_read() -> None:
    found = read([RESULTS / "2026-11-26-h100-replicated" / "overlap.json"])
    cells = {cell.label: cell for cell in group(found.runs)}
    case = cells["CAI_Gemini, replicated, gpt2_xl × 2"]
    assert not found.problems and (case.plan, case.model, case.gpus) == ("CAI_Gemini", "gpt2_xl", 2)
    runs = json.loads((RESULTS / "2026-11-26-h100-replicated" / "overlap.json").read_text())["cases"]
    expected = next(entry["runs"] for entry in runs if entry["label"] == case.label)
    assert case.median("step_seconds") == statistics.median(run["step_seconds"]["median"] for run in expected)


def test_records_are_read_back(sweep: Path, tmp_path: Path) -> None:
    made(sweep)
    shutil.copy(sweep / "records.json", tmp_path / "mine.json")
    first, again = (
        {c.label: c for c in group(read([path]).runs) if c.timed} for path in (sweep, tmp_path / "mine.json")
    )
    assert {label: cell.values("step_seconds") for label, cell in first.items()} == {
        label: cell.values("step_seconds") for label, cell in again.items()
    }
    assert {cell.parity for cell in again.values()} == {"holds"}


# ---- how sure it is


def test_students_quantiles() -> None:
    """Of the tables in any textbook."""
    for probability, freedom, value in ((0.995, 1, 63.657), (0.995, 2, 9.925), (0.995, 4, 4.604), (0.975, 10, 2.228),
                                        (0.995, 30, 2.750)):  # fmt: skip
        assert student_quantile(probability, freedom) == pytest.approx(value, rel=1e-3)


def noisy(step: float, noise: float, count: int, dice: random.Random) -> list[float]:
    return [step * (1 + dice.gauss(0, noise)) for _ in range(count)]


def test_a_slow_down_of_2_percent_is_found_and_equal_pairs_are_equal() -> None:
    """Five runs each with the noise that H100s show, 0.2 %: all of 20 found, at most one of 20 equal pairs called
    different, for each of ten seeds.
    """
    for seed in range(10):
        dice = random.Random(seed)
        slow = [compare(noisy(0.1, 2e-3, 5, dice), noisy(0.102, 2e-3, 5, dice)) for _ in range(20)]
        assert all(difference.is_different and difference.ratio > 1 for difference in slow)
        equal = [compare(noisy(0.1, 2e-3, 5, dice), noisy(0.1, 2e-3, 5, dice)) for _ in range(20)]
        assert sum(difference.is_different for difference in equal) <= 1, seed


def test_few_runs_are_not_judged_and_agreement_by_chance_proves_nothing() -> None:
    assert not compare([0.1, 0.1], [0.2, 0.2, 0.2]).is_judged
    assert not compare([0.1] * 3, [0.10001] * 3).is_different and compare([0.1] * 3, [0.102] * 3).is_different


def test_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dice = random.Random(1)
    for name, factor in (("before", 1.0), ("after", 1.02)):
        for number in range(5):
            write_run(tmp_path / name / f"slow{number}", step=0.1 * factor * (1 + dice.gauss(0, 2e-3)))
            write_run(tmp_path / name / f"same{number}", "Pytorch_DDP", 0.1 * (1 + dice.gauss(0, 2e-3)))
    words = [str(tmp_path / "after"), "--before", str(tmp_path / "before"), "--out", str(tmp_path / "out")]
    command.main(words)
    shown = capsys.readouterr().out
    assert "1 of 2 configurations differ" in shown
    assert (
        re.search(r"CAI_Gemini, gpt2_medium × 1 is slower by [12]\.\d % \(\+", shown) and "parity not checked" in shown
    )
    assert 'id="changes"' in (tmp_path / "out" / "report.html").read_text()
    write_run(tmp_path / "a100" / "run", card="NVIDIA A100")
    command.main([str(tmp_path / "a100"), "--before", str(tmp_path / "before"), "--out", str(tmp_path / "out")])
    assert "no configuration in common on the same card" in capsys.readouterr().err


# ---- pictures and page


def test_the_front(sweep: Path) -> None:
    cells = [cell for cell in group(read([sweep]).runs) if cell.timed and cell.gpus == 1]
    assert [cell.plan for cell in best_choices(cells)] == ["Pytorch_FSDP", "CAI_Gemini"]
    assert [cell.plan for cell in best_choices([cell for cell in cells if cell.plan == "CAI_Gemini"])] == ["CAI_Gemini"]


def test_every_picture_has_its_table(sweep: Path) -> None:
    drawn = figures(group(read([sweep]).runs), [])
    assert [figure.id for figure in drawn] == ["speed-memory", "scaling", "phases", "memory", "spread", "loss"]
    for figure in drawn:
        assert len(figure.rows) == len(figure.cells) > 0
        assert all(len(row) == len(figure.heads) for row in figure.rows)
        assert "parity" in figure.heads or figure.id == "memory"
        for trace in figure.traces:
            cells = trace["meta"].get("cells")
            assert trace["meta"].get("whole") or not isinstance(cells, list) or len(cells) == len(trace["x"])
    limits = drawn[0].layout["shapes"]
    assert [shape["x0"] for shape in limits] == [81559.0]


def test_the_parts_of_a_traced_step_add_up() -> None:
    work = {"matrix products": 50.0, "attention": 10.0, "communication": 20.0, "not hidden by computation": 5.0,
            "idle": 2.0, "first to last piece of work": 67.0}  # fmt: skip
    parts = work_parts(work)
    hidden = parts.pop("communication and copies hidden")
    assert hidden == 15 and sum(parts.values()) == work["first to last piece of work"]


def test_plotly_takes_the_figures(sweep: Path) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects", reason="pip install -r requirements-report.txt")
    for figure in figures(group(read([sweep]).runs), []):
        graph_objects.Figure(data=figure.traces, layout=figure.layout)


@pytest.mark.parametrize("ground", PAGES.values(), ids=PAGES)
def test_colours_are_legible(ground: str) -> None:
    assert set(PLAN_STYLES) == set(PLANS) and len({symbol for _, symbol in PLAN_STYLES.values()}) == len(PLANS)
    assert contrast(INK, ground) >= 4
    assert all(contrast(colour, ground) >= 3 for colour, _ in PLAN_STYLES.values())


class Checker(HTMLParser):
    """Collects ids and links, and what would ask a network."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.outside: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = {name: value or "" for name, value in attrs}
        self.ids += [facts["id"]] if "id" in facts else []
        self.links += [facts["href"]] if tag == "a" else []
        self.outside += [value for name in ("src", "href") if (value := facts.get(name, "")) and value[0] not in "#d"]
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page(sweep: Path) -> None:
    (sweep / "CAI_Gemini-1" / "cell.json").write_text('{"label": "</script><b>", "gpus": 1}')
    found = read([sweep])
    cells = group(found.runs)
    text = page(cells, found, conclude(cells, found), figures(cells, []), "var Plotly;")
    checker = Checker()
    checker.feed(text)
    assert not checker.open and not checker.outside and len(set(checker.ids)) == len(checker.ids)
    assert {link[1:] for link in checker.links} <= set(checker.ids)
    assert text.count('role="img" aria-label=') == 6 and "<b>" not in text.replace("&lt;b&gt;", "")
    for fact in ("abcdef0", "python -m commons.launch --distplan CAI_Gemini", "CAI_Gemini-2/run-3", "torch 2.13", H100):
        assert fact in text


def test_without_plotly_there_are_tables(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(command, "read_plotly", lambda: None)
    code, text = made(sweep)
    assert code == 1 and "pip install -r requirements-report.txt" in capsys.readouterr().err
    assert "The pictures need plotly" in text and "<details open>" in text and 'class="chart"' not in text


def test_the_same_input_gives_the_same_bytes_and_200_runs_are_quick(tmp_path: Path) -> None:
    for number in range(200):
        write_run(tmp_path / f"{number:03}", list(PLANS)[number % 7], 0.1 + number % 10 / 500, gpus=2 ** (number % 4))
    start = time.monotonic()
    _, text = made(tmp_path)
    assert time.monotonic() - start < 60, "5 s on a machine that does nothing else"
    assert len(text.encode()) < 5_000_000 and made(tmp_path)[1] == text
    markdown = (tmp_path / "report.md").read_text()
    assert all(column in markdown for column in COLUMNS) and "Pytorch_FSDP" in markdown
    with (tmp_path / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 200 and {line["commit"] for line in lines} == {"abcdef0"}
    assert float(lines[0]["step_seconds"]) > 0 and lines[0]["command"].startswith("python -m commons.launch")


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
NEEDS = [name for name in ("playwright", "plotly") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(NEEDS) or BROWSER is None, reason=f"needs a Chromium and {', '.join(NEEDS) or 'nothing else'}")
def test_in_a_browser(sweep: Path) -> None:
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    assert read_plotly()
    made(sweep)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for scheme, width in (("light", 1200), ("dark", 1200), ("light", 390)):
            tab = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}).new_page()
            said: list[str] = []
            requests: list[str] = []
            tab.on("console", lambda message, said=said: said.append(message.text))
            tab.on("pageerror", lambda error, said=said: said.append(str(error)))
            tab.on("request", lambda request, requests=requests: requests.append(request.url))
            tab.goto((sweep / "report.html").as_uri())
            tab.wait_for_function("document.body.dataset.drawn == 6")
            drawn = tab.evaluate("[...document.querySelectorAll('.chart')].every(c => c.querySelector('.main-svg'))")
            assert drawn and not said and len(requests) == 1
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing hangs over the edge"
        box = tab.locator('input[value="Pytorch_FSDP"]')
        box.focus()
        tab.keyboard.press("Space")  # a filter, from the keyboard
        assert not tab.locator("#table tbody tr", has_text="Pytorch_FSDP").first.is_visible()
        names = tab.evaluate("document.querySelector('#phases .chart').data[0].y")
        assert names and not any("FSDP" in name for name in names)
        tab.locator("#table th button", has_text="step, ms").focus()
        tab.keyboard.press("Enter")
        assert tab.locator('#table th[aria-sort="ascending"]').count() == 1
        tab.locator(".conclusions a").first.click()
        assert tab.locator("section:target details[open]").count() == 1
        browser.close()
