"""Faults planted on purpose, one at a time, and the tests that notice them: python tests/mutation/planted.py [WORD]

For the modules that need ranks, where mutation testing would take days: at least one fault per claim of the README and
per kind of wrong change that tests once missed. ``bash run_tests.sh --mutate planted`` plants all of them, with a WORD
those whose line has it; a fault that its tests do not notice is told, and the exit code is 1. Each is planted in a copy
of the working tree. tests/test_mutation.py sees to it that every fault still fits the code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 400


@dataclass(frozen=True)
class Fault:
    """One wrong change.

    Attributes:
        kind: of claim that it breaks.
        what: it makes wrong.
        file: that it is in.
        right, wrong: the text that stands there once, and what takes its place.
        tests: pytest's arguments for those that notice it.
    """

    kind: str
    what: str
    file: str
    right: str
    wrong: str
    tests: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


def faults_of(kind: str, file: str, tests: str, *changes: tuple[str, str, str]) -> list[Fault]:
    """Of one file, noticed by the same tests. ``changes``: what is wrong, the right text, the wrong one."""
    return [Fault(kind, what, file, right, wrong, tests) for what, right, wrong in changes]


TORCH, LOOP = "commons/plans/torch_native.py", "commons/training/loop.py"
FAULTS: list[Fault] = [
    # ---- the record and what is made of it
    *faults_of(
        "record",
        "commons/reporting/flops.py",
        "tests/training/test_loop.py tests/reporting/test_metrics.py -k 'record or rates'",
        ("TFLOPS per device are those of all devices", "/ devices / TERA", "/ TERA"),
    ),
    *faults_of(
        "record",
        "commons/training/session.py",
        "tests/training/test_loop.py -k 'record or header'",
        (
            "ranks of tensor and pipeline parallelism count as data-parallel ones",
            "config.grad_accum * config.data_parallel_size(self.device.world_size)",
            "config.grad_accum * self.device.world_size",
        ),
        ("tokens/s leave out accumulation", "config.batch_size * config.grad_accum *", "config.batch_size *"),
    ),
    *faults_of(
        "record",
        LOOP,
        "tests/training/test_loop.py -k record",
        ("the time is that of the fastest rank", "slowest = max(ranks", "slowest = min(ranks"),
        (
            "memory is that of the rank with least",
            "max((getattr(seen, name), rank)",
            "min((getattr(seen, name), rank)",
        ),
        ("stages without a loss count in its mean", "if session.has_loss(rank)}", "}"),
    ),
    *faults_of(
        "record",
        "commons/training/clock.py",
        "tests/distributed/test_device.py",
        (
            "the backward pass of a captured graph begins where its launch did",
            "self._now() if at is None else at",
            "self._now()",
        ),
    ),
    *faults_of(
        "record",
        "commons/reporting/summary.py",
        "tests/reporting/test_metrics.py",
        (
            "the host's peak in a warm-up step is lost",
            '_peak(records, "host_memory_mib"',
            '_peak(measured, "host_memory_mib"',
        ),
    ),
    # ---- what a run and its reference share
    *faults_of(
        "shared with the reference",
        "commons/training/schedule.py",
        "tests/training/test_loop.py -k learning_rate",
        ("the warm-up begins at 0", "config.lr * step /", "config.lr * (step - 1) /"),
        ("the cosine does not end at a tenth", "0.1 + 0.45", "0.2 + 0.4"),
    ),
    *faults_of(
        "shared with the reference",
        "commons/data/random_tokens.py",
        "tests/training/test_loop.py -k copy",
        (
            "every copy of the model draws the same data",
            "first = start + data_parallel_rank * batch_size",
            "first = start",
        ),
    ),
    *faults_of(
        "shared with the reference",
        "commons/model/initial_weights.py",
        "tests/training/test_loop.py -k decays",
        (
            "biases and norms decay too",
            '"params": vectors, "weight_decay": 0.0',
            '"params": vectors, "weight_decay": weight_decay',
        ),
    ),
    *faults_of(
        "shared with the reference",
        "commons/model/initial_weights.py",
        "tests/model/test_weights.py",
        ("parameters of one shape begin alike", "folded(seed) ^ zlib.crc32(name.encode())", "folded(seed)"),
    ),
    # ---- what the README promises besides
    *faults_of(
        "README",
        "commons/lifecycle/outcome.py",
        "tests/lifecycle/test_outcome.py",
        ("a signal's exit code is its number", "128 + signum)", "signum)"),
    ),
    *faults_of(
        "README",
        "commons/cli/flags.py",
        "tests/cli/test_config.py -k 'all_problems or only_rank_0'",
        ("settings that cannot work end with 1", "CONFIG_ERROR = 2", "CONFIG_ERROR = 1"),
    ),
    *faults_of(
        "README",
        "commons/reporting/flops.py",
        "tests/reporting/test_metrics.py -k 'rates or flops'",
        ("MFU is in percent", "model_tflops_per_device * TERA /", "100 * model_tflops_per_device * TERA /"),
        ("FLOPs leave attention out", "+ 12.0 * shape.layers * shape.hidden * seq_len", ""),
    ),
    # ---- what is sharded, and what is sent
    *faults_of(
        "sharding",
        TORCH,
        "tests/plans/test_sharding.py -k Pytorch",
        ("Pytorch_ZeRO shards no optimizer states", 'if kind == "zero":', 'if kind == "none":'),
        ("Pytorch_DDP sends at every micro-batch", "nullcontext() if last else self.model.no_sync()", "nullcontext()"),
        (
            "Pytorch_FSDP sends at every micro-batch",
            "set_requires_gradient_sync(last)",
            "set_requires_gradient_sync(True)",
        ),
        ("Pytorch_FSDP gathers the whole model at once", "for block in model.transformer.h:", "for block in []:"),
    ),
    *faults_of(
        "sharding",
        "commons/plans/registry.py",
        "tests/plans/test_sharding.py -k CAI",
        ("CAI_ZeRO2 keeps whole gradients", "            _zero(2),", "            _zero(1),"),
    ),
    *faults_of(
        "sharding",
        "commons/plans/colossal/boosted.py",
        "tests/plans/test_sharding.py -k CAI",
        (
            "CAI_ZeRO1 sends at every micro-batch",
            "nullcontext() if last or not self._no_sync else",
            "nullcontext() if True else",
        ),
        ("--max_prefetch does nothing", "max_prefetch=config.max_prefetch if", "max_prefetch=0 if"),
    ),
    *faults_of(
        "sharding",
        "commons/plans/colossal/hybrid.py",
        "tests/plans/test_sharding.py -k Hybrid",
        ("CAI_Hybrid shards nothing", "zero_stage=config.zero_stage if", "zero_stage=0 if"),
    ),
    *faults_of(
        "sharding",
        "commons/config/resolved.py",
        "tests/plans/test_sharding.py -k Gemini",
        (
            "--placement offloads nothing",
            "**{name: getattr(self, name) for name in FRACTIONS}",
            "**dict(zip(FRACTIONS, (1.0, 0.0, 0.0)))",
        ),
    ),
    # ---- captured passes
    *faults_of(
        "captured passes",
        TORCH,
        "tests/model/test_step_graph.py tests/plans/test_torch_native.py -k 'captured_steps_of or shard'",
        (
            "the optimizer lets go of the gradients that replays write",
            "            parameter.grad = gradient  # where the graph writes it",
            "            pass",
        ),
        (
            "FSDP's optimizer goes on with the gradients of the step before",
            "            shard.grad = None if parameter.grad is None else parameter.grad.to_local()",
            "            shard.grad = shard.grad if shard.grad is not None else parameter.grad.to_local()",
        ),
    ),
    *faults_of(
        "captured passes",
        "commons/config/resolved.py",
        "tests/model/test_step_graph.py -k 'auto_captures or config_json'",
        (
            "every plan needs copies to capture",
            'self.distplan == "CAI_Gemini" and self.data_parallel_size(world_size) > 1',
            "True",
        ),
    ),
    # ---- bounds
    *faults_of(
        "bounds",
        "commons/training/parity.py",
        "tests/training/test_parity.py",
        (
            "--check_parity lets bf16 differ by a hundred times as much",
            "(Rounding(1e-4, 8e-3), Rounding(1e-2, 0.4, ceiling=5e-2))",
            "(Rounding(1e-2, 8e-1), Rounding(1.0, 40.0, ceiling=5.0))",
        ),
    ),
    *faults_of(
        "bounds",
        "commons/ops/activation_checkpointing.py",
        "tests/ops/test_recompute.py",
        (
            "selective recomputes attention",
            "        aten._scaled_dot_product_flash_attention_for_cpu.default,\n",
            "",
        ),
    ),
    # ---- edges
    *faults_of(
        "edges",
        "commons/cli/checks.py",
        "tests/cli/test_config.py",
        (
            "the last step cannot be traced",
            "config.trace_step > config.train_step",
            "config.trace_step >= config.train_step",
        ),
        (
            "a warm-up of all steps is refused",
            "config.lr_warmup_step > config.train_step",
            "config.lr_warmup_step >= config.train_step",
        ),
        (
            "no step need be left after the warm-up",
            "config.warmup_step >= config.train_step",
            "config.warmup_step > config.train_step",
        ),
    ),
    *faults_of(
        "edges",
        "commons/cli/output.py",
        "tests/cli/test_config.py",
        ("a name of exactly the longest length is refused", "len(name) > MAX_RUN_NAME", "len(name) >= MAX_RUN_NAME"),
    ),
    *faults_of(
        "edges",
        "commons/doctor/torch_build.py",
        "tests/doctor/test_torch_build.py",
        ("a driver for CUDA 12.0 counts as too old", "if newest < (12, 0):", "if newest <= (12, 0):"),
        ("a driver for CUDA 13.0 gets torch for CUDA 12", "if newest < (13, 0):", "if newest <= (13, 0):"),
    ),
    *faults_of(
        "edges",
        "commons/doctor/smi.py",
        "tests/doctor",
        ("a branch is not known by its own number", "if each <= branch]", "if each < branch]"),
        ("branch 525 is not known", "525: (12, 0), ", ""),
        ("branch 580 is not known", ", 580: (13, 0),", ","),
    ),
    # ---- what the user had set
    *faults_of(
        "the user's own settings",
        "commons/launch/launcher.py",
        "tests/launch/test_user_settings.py",
        (
            "their OMP_NUM_THREADS is replaced",
            'os.environ.setdefault("OMP_NUM_THREADS", str(threads))',
            'os.environ["OMP_NUM_THREADS"] = str(threads)',
        ),
        ("their GLOO_SOCKET_IFNAME is replaced", 'if name and "GLOO_SOCKET_IFNAME" not in os.environ:', "if name:"),
    ),
    *faults_of(
        "the user's own settings",
        "commons/lifecycle/suite_root.py",
        "tests/launch/test_user_settings.py",
        ("their PYTHONPATH is lost", '*filter(None, [environ.get("PYTHONPATH")])', ""),
    ),
    *faults_of(
        "the user's own settings",
        "commons/launch/stop_signals.py",
        "tests/launch/test_launcher.py -k ignored",
        ("the launcher hears a signal that nohup ignores", " if signal.getsignal(signum) is not signal.SIG_IGN]", "]"),
    ),
    *faults_of(
        "the user's own settings",
        "commons/lifecycle/guard.py",
        "tests/launch/test_user_settings.py",
        ("a rank hears a signal that nohup ignores", "if signal.getsignal(signum) is not signal.SIG_IGN:", "if True:"),
    ),
    # ---- moments
    *faults_of(
        "moments",
        "commons/lifecycle/guard.py",
        "tests/launch/test_watch.py",
        ("a signal in the last step makes a failure of a finished run", "if heard and step < self.steps:", "if heard:"),
    ),
    *faults_of(
        "moments",
        "commons/launch/agent.py",
        "tests/launch/test_agent.py",
        (
            "a signal before the ranks start is not heard until they run",
            "        self._raise_what_was_kept()\n        self._begin(self._attempt)",
            "        self._begin(self._attempt)",
        ),
    ),
    *faults_of(
        "moments",
        "commons/launch/watch.py",
        "tests/launch/test_watch.py tests/launch/test_life.py -k 'blame or suspended'",
        (
            "a launcher that was suspended takes its ranks for hung",
            "            self._awake_since = now  # this",
            "            pass  # this",
        ),
        ("of ranks in different steps the one that is ahead is blamed", "fewest = min(", "fewest = max("),
    ),
    *faults_of(
        "moments",
        "commons/reporting/run_log.py",
        "tests/reporting/test_run_folder.py tests/reporting/test_attempts.py",
        (
            "files of another run of that name stay",
            "                path.unlink(missing_ok=True)",
            "                pass",
        ),
    ),
    *faults_of(
        "moments",
        "commons/reporting/run_folder.py",
        "tests/reporting/test_run_folder.py",
        ("two runs may share a folder", "        return False\n", "        return True\n"),
    ),
]


def rot(fault: Fault) -> str:
    """Why a fault cannot be planted any more; "" where it can."""
    found = (REPOSITORY / fault.file).read_text().count(fault.right)
    return "" if found == 1 else f"{fault}: {fault.right!r} stands {found} times in {fault.file}"


def copy_of_the_suite(folder: Path) -> Path:
    """The working tree's files, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


def run_tests(folder: Path, arguments: str) -> tuple[int, str]:
    """pytest's exit code, and what it printed; 124 where it took longer than SECONDS."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    words = f'exec "{sys.executable}" -m pytest -q -x -p no:cacheprovider -m "not gpu and not smoke" {arguments}'
    try:
        done = subprocess.run(
            ["bash", "-c", words], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return 124, ""
    return done.returncode, done.stdout + done.stderr


def noticed_by(fault: Fault, folder: Path) -> str:
    """The first test that fails with ``fault`` in the copy in ``folder``; "" if none does."""
    path = folder / fault.file
    text = path.read_text()
    path.write_text(text.replace(fault.right, fault.wrong))
    try:
        code, output = run_tests(folder, fault.tests)
    finally:
        path.write_text(text)
    if code not in (0, 1, 124):  # no test ran
        raise RuntimeError(f"{fault}: pytest ended with {code}:\n{output[-2000:]}")
    failed = [line.split()[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return "" if code == 0 else (failed[0] if failed else "a time limit")


def plant(faults: Iterable[Fault]) -> list[Fault]:
    """Plant each, tell what notices it; returns those that nothing did."""
    unnoticed = []
    with tempfile.TemporaryDirectory(prefix="planted_") as folder:
        copy = copy_of_the_suite(Path(folder))
        for fault in faults:
            test = noticed_by(fault, copy)
            print(f"{'noticed' if test else 'NOT NOTICED'}  {fault}  {test}", flush=True)
            if not test:
                unnoticed.append(fault)
    return unnoticed


def main(words: Sequence[str]) -> int:
    chosen = [fault for fault in FAULTS if all(word in f"{fault} {fault.file}" for word in words)]
    if not chosen:
        print(f"no fault has {' '.join(words)}", file=sys.stderr)
        return 2
    unnoticed = plant(chosen)
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
