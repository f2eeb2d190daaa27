"""The same model under every plan and layout: a table of how far each is from one fp32 process.

    python -m benchmarks.parity --out parity                             on this machine's GPUs, else on CPU ranks
    python -m benchmarks.parity --ranks 1 2 --device cuda --jobs 4 --out parity
    python -m benchmarks.parity --only "tp_degree 2" -- --compile off    some cases, a flag for all of them

Trains every case of benchmarks/parity_cases.py that so many ranks can run; writes OUT.json (everything measured,
hardware, versions, command, commit) and OUT.md (the tables). Exit code 1 where a case fails or is beyond its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.parity_cases import CASES, COMMON, COMMON_OF_GEMINI, Case, Claim, claims, skips_as_it_must, why_not
from commons.lifecycle.suite_root import SUITE_ROOT, python_path
from commons.reporting.environment import describe_environment

START_SECONDS = 120  # of the ranks, with everything imported
CASE_SECONDS = 90  # at most, with compilation
ERROR_CHARACTERS = 12000  # torchrun's own report comes last

WORKER = ("-m", "benchmarks.parity_worker")


@dataclass(frozen=True)
class Outcome:
    """A case and what was measured of it, or ``{"error": ...}``."""

    ranks: int
    case: Case
    found: dict
    device_type: str

    @property
    def claims(self) -> dict[str, Claim]:
        return claims(self.case, self.found, self.device_type)

    @property
    def holds(self) -> bool:
        if "error" in self.found or self.found["missing"] or not skips_as_it_must(self.case, self.found["skipped"]):
            return False
        return all(claim.holds for claim in self.claims.values())


def run_cases(
    ranks: int,
    cases: Sequence[Case],
    device_type: str,
    folder: Path,
    *,
    flags: str = "",
    keep: Sequence[str] = (),
    worker: Sequence[str] = WORKER,
    tell: Callable[[Case, dict], None] = lambda case, found: None,
) -> list[dict]:
    """Train ``cases`` on ``ranks`` processes; what parity_worker.py measured of each, or its error.

    A case that fails takes its processes down: the ones after it get new ones. No process outlives this call.

    Args:
        folder: for job and results; weights of the cases in ``keep`` stay there.
        worker: what torchrun runs, and what follows the job's file on its command line.
    """
    results: list[dict] = []
    while len(results) < len(cases):
        rest = cases[len(results) :]
        report = folder / f"results{len(results)}.jsonl"
        job = {"device": device_type, "flags": flags, "cases": [asdict(case) for case in rest]}
        job_path = report.with_suffix(".job.json")
        job_path.write_text(json.dumps({**job, "results": str(report), "keep": list(keep)}))
        for case, found in zip(rest, _findings(ranks, [*worker, str(job_path)], report, len(rest)), strict=False):
            tell(case, found)
            results.append(found)
    return results


def run_side_by_side(
    jobs: int,
    ranks: int,
    cases: Sequence[Case],
    device_type: str,
    folder: Path,
    *,
    flags: str = "",
    tell: Callable[[Case, dict], None] = lambda case, found: None,
) -> list[dict]:
    """As run_cases, with ``cases`` dealt out to ``jobs`` groups of ranks that share the devices; ``tell`` is called
    by one of them at a time.
    """
    one_at_a_time = threading.Lock()

    def tell_alone(case: Case, found: dict) -> None:
        with one_at_a_time:
            tell(case, found)

    def run_share(share: int) -> list[dict]:
        own = folder / str(share)
        own.mkdir()
        return run_cases(ranks, cases[share::jobs], device_type, own, flags=flags, tell=tell_alone)

    with ThreadPoolExecutor(jobs) as pool:
        shares = list(pool.map(run_share, range(jobs)))
    return [shares[number % jobs][number // jobs] for number in range(len(cases))]


def _findings(ranks: int, script: Sequence[str], report: Path, count: int) -> Iterator[dict]:
    """What the ranks report of each of ``count`` cases, as it comes; in the place of a missing one what went
    wrong, and nothing after it.
    """
    report.touch()
    told, problem = 0, ""
    for problem in _torchrun(ranks, script, report):  # noqa: B007  (the last one counts)
        for line in report.read_text().splitlines(keepends=True)[told:]:
            if line.endswith("\n"):
                told += 1
                yield json.loads(line)
    if told < count:
        yield {"error": problem or "the ranks ended without a result"}
    elif problem:
        raise RuntimeError(f"all {count} cases on {ranks} ranks are done, but their end went wrong:\n{problem}")


def _torchrun(ranks: int, script: Sequence[str], report: Path) -> Iterator[str]:
    """Run ``script`` on ``ranks`` processes; yields "" whenever ``report`` may have grown, and last what went
    wrong, "" if nothing did. It is ended when nothing comes for too long.
    """
    console = report.with_suffix(".console")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *script]
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    with console.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=SUITE_ROOT,
            env={"OMP_NUM_THREADS": "1", **kept, "PYTHONPATH": python_path(kept)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        size, limit = 0, time.monotonic() + START_SECONDS + CASE_SECONDS
        while process.poll() is None:
            time.sleep(0.2)
            if report.stat().st_size > size:
                size, limit = report.stat().st_size, time.monotonic() + CASE_SECONDS
                yield ""
            if time.monotonic() > limit:
                yield f"{console.read_text()[-ERROR_CHARACTERS:]}\nnothing happened for {CASE_SECONDS} s"
                return
        yield ""
        if process.returncode:
            yield f"{console.read_text()[-ERROR_CHARACTERS:]}\nexit code {process.returncode}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- The tables ---------------------------------------------------------------------------------------------

COLUMNS = ("loss", "gradient norm", "weights")


def case_table(outcomes: Iterable[Outcome]) -> str:
    """A row a case: differences with their bounds, and whether everything holds."""
    heading = ["ranks", "flags", *(cell for name in COLUMNS for cell in (name, "bound")), "skipped steps", "holds"]
    rows = [heading, ["---:", "---", *["---:"] * (2 * len(COLUMNS)), "---:", "---"]]
    for outcome in outcomes:
        flags = f"`{outcome.case.flags.removeprefix('--distplan ')}`"
        if outcome.case.event:
            flags += f", {outcome.case.event}"
        if "error" in outcome.found:
            rows.append([str(outcome.ranks), flags, *["–"] * (2 * len(COLUMNS) + 1), "**failed**"])
            continue
        measured = [outcome.claims[name] for name in COLUMNS]
        cells = [cell for claim in measured for cell in (f"{claim.value:.1e}", f"{claim.bound:.2g}")]
        skipped = str(len(outcome.found["skipped"]) or "")
        verdict = "yes" if outcome.holds else f"**no**: {broken(outcome)}"
        rows.append([str(outcome.ranks), flags, *cells, skipped, verdict])
    return _markdown(rows)


def broken(outcome: Outcome) -> str:
    """Which claims do not hold, in words."""
    told = [f"{n} {c.value:.1e} > {c.bound:.2g}" for n, c in outcome.claims.items() if not c.holds]
    if not skips_as_it_must(outcome.case, outcome.found["skipped"]):
        told.append(f"steps skipped: {outcome.found['skipped']}")
    if outcome.found["missing"]:
        told.append(f"missing: {outcome.found['missing']}")
    return "; ".join(told)


def plan_table(outcomes: Iterable[Outcome]) -> str:
    """A row a plan and precision: the largest differences over its cases."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda o: (o.case.plan, o.case.precision)):
        if "error" not in outcome.found:
            groups.setdefault((outcome.case.plan, outcome.case.precision), []).append(outcome)
    heading = ["plan", "precision", "cases", *(cell for name in COLUMNS for cell in (name, "bound"))]
    rows = [heading, ["---", "---", *["---:"] * (1 + 2 * len(COLUMNS))]]
    for (plan, precision), group in groups.items():
        worst = [max((o.claims[name] for o in group), key=lambda claim: claim.value) for name in COLUMNS]
        cells = [cell for claim in worst for cell in (f"{claim.value:.1e}", f"{claim.bound:.2g}")]
        rows.append([f"`{plan}`", precision, str(len(group)), *cells])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write(out: Path, outcomes: list[Outcome], command: str, environment: dict) -> None:
    """OUT.json and OUT.md; after every case, so that a cut-off run leaves what it has."""
    out.parent.mkdir(parents=True, exist_ok=True)
    cases = [
        {
            "ranks": outcome.ranks,
            **asdict(outcome.case),
            "holds": outcome.holds,
            **({} if "error" in outcome.found else {"bounds": {n: c.bound for n, c in outcome.claims.items()}}),
            **outcome.found,
            **_worst_tensor(outcome.found),
        }
        for outcome in outcomes
    ]
    document = {
        "command": command,
        "common_flags": COMMON,
        "common_flags_of_gemini": COMMON_OF_GEMINI,
        "environment": environment,
        "cases": cases,
    }
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    versions = environment["versions"] or {}
    hardware = ", ".join(dict.fromkeys(environment["gpus"] or [])) or environment["cpu"]
    head = [
        f"`{command}`",
        f"{environment['started_at'][:10]}, commit {environment['commit'] or 'unknown'}, {hardware}, torch"
        f" {versions.get('torch')}, Colossal-AI {versions.get('colossalai')}, transformers"
        f" {versions.get('transformers')}; every case with `{COMMON.removesuffix(' --run_name unused')}`,"
        f" CAI_Gemini's with `{COMMON_OF_GEMINI}` too.",
        f"{sum(outcome.holds for outcome in outcomes)} of {len(outcomes)} cases hold. By plan, the largest of all its"
        " cases:",
    ]
    text = "\n\n".join([*head, plan_table(outcomes), case_table(outcomes)])
    out.with_suffix(".md").write_text(text)


def _worst_tensor(found: dict) -> dict:
    """In the place of every tensor's distance the largest, and whose it is."""
    if "weights" not in found:
        return {}
    name = max(found["weights"], key=found["weights"].__getitem__)
    return {"weights": found["weights"][name], "worst_tensor": name}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--ranks", type=int, nargs="+", choices=CASES, help="default: all that the machine can run")
    parser.add_argument("--out", type=Path, default=Path("parity"), help="files to write, without their ending")
    parser.add_argument("--jobs", type=int, default=1, help="cases that are trained at the same time")
    parser.add_argument("--only", default="", help="cases whose text holds this")
    parser.add_argument("flags", nargs="*", help="after --, of train_gpt_demo.py, for all cases")
    arguments = parser.parse_args(argv)

    from commons.distributed.device import detect_type

    device_type = detect_type(arguments.device)
    wanted = arguments.ranks or list(CASES)
    possible = [ranks for ranks in wanted if ranks <= _most_ranks(device_type)]
    for ranks in sorted(set(wanted) - set(possible)):
        print(f"left out: {len(CASES[ranks])} cases on {ranks} ranks, for {_most_ranks(device_type)} GPUs", flush=True)
    command = shlex.join(["python", "-m", "benchmarks.parity", *(sys.argv[1:] if argv is None else argv)])
    import torch  # noqa: F401  (the description names the GPUs where torch is there to ask)

    environment = describe_environment(None)
    outcomes: list[Outcome] = []
    for ranks in possible:
        chosen = [case for case in CASES[ranks] if arguments.only in str(case)]
        cases = [case for case in chosen if why_not(case, device_type) is None]
        for reason in dict.fromkeys(why_not(case, device_type) for case in chosen if case not in cases):
            print(f"left out: {reason}", flush=True)

        def tell(case: Case, found: dict, ranks: int = ranks) -> None:
            outcome = Outcome(ranks, case, found, device_type)
            outcomes.append(outcome)
            outcomes.sort(key=lambda outcome: (outcome.ranks, CASES[outcome.ranks].index(outcome.case)))
            verdict = "failed" if "error" in found else "holds" if outcome.holds else broken(outcome)
            print(f"{ranks} ranks: {case}: {verdict}", flush=True)
            write(arguments.out, outcomes, command, environment)

        with tempfile.TemporaryDirectory() as folder:
            flags, jobs = shlex.join(arguments.flags), max(1, arguments.jobs)
            run_side_by_side(jobs, ranks, cases, device_type, Path(folder), flags=flags, tell=tell)
    return 0 if outcomes and all(outcome.holds for outcome in outcomes) else 1


def _most_ranks(device_type: str) -> int:
    import torch

    return torch.cuda.device_count() if device_type == "cuda" else max(CASES)


if __name__ == "__main__":
    sys.exit(main())
