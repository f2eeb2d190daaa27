"""What mutation testing looks at: a module, and the tests that are to notice what is changed in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One module.

    Attributes:
        path: from the suite's folder.
        tests: pytest's arguments. They start no ranks: every mutant runs them.
        light: neither the module nor its tests import torch.
    """

    path: str
    tests: str
    light: bool = False


NO_RUNS = "-m 'not gpu and not smoke and not slow'"


def target(path: str, *tests: str, keyword: str = "", light: bool = False) -> Target:
    return Target(path, " ".join([*tests, NO_RUNS, *([f"-k '{keyword}'"] if keyword else [])]), light)


LOOP = "tests/training/test_loop.py"
METRICS = "tests/reporting/test_metrics.py"
CONFIG = "tests/cli/test_config.py"
DOCTOR = tuple(
    f"tests/doctor/test_{name}.py"
    for name in ("diagnosis", "driver", "gpu_state", "host", "smi", "torch_build", "packages", "visible_devices")
)

WITHOUT_RANKS = "not torchs_plans and not refused"

# Short names for the command line. Adding a module is one entry.
TARGETS: dict[str, Target] = {
    "record": target("commons/reporting/record.py", METRICS, LOOP, keyword="not real_record"),
    "loop": target("commons/training/loop.py", LOOP, keyword="record and not real"),
    "flops": target("commons/reporting/flops.py", METRICS, LOOP, keyword="flops or rate or record and not real"),
    "summary": target("commons/reporting/summary.py", METRICS, keyword="not flops and not peak_of and not unknown"),
    "peak_rates": target("commons/reporting/peak_rates.py", METRICS, keyword="peak or spelling or row or geforce"),
    "schedule": target("commons/training/schedule.py", LOOP, keyword="learning_rate"),
    "clock": target("commons/training/clock.py", "tests/distributed/test_device.py", keyword="phase or marks or event"),
    "session": target("commons/training/session.py", LOOP, keyword="not real_record"),
    "random_tokens": target(
        "commons/data/random_tokens.py", LOOP, "tests/distributed/test_device.py", keyword="token or batches or drawn"
    ),
    "initial_weights": target(
        "commons/model/initial_weights.py", "tests/model/test_weights.py", LOOP, keyword="weight or decay"
    ),
    "seeding": target("commons/distributed/seeding.py", "tests/distributed/test_seeding.py"),
    "layout": target("commons/distributed/layout.py", "tests/training/test_parity.py", keyword="places or mesh"),
    "auto": target("commons/config/auto.py", "tests/model/test_step_graph.py", keyword=WITHOUT_RANKS),
    "resolved": target("commons/config/resolved.py", CONFIG, "tests/model/test_step_graph.py", keyword=WITHOUT_RANKS),
    "limits": target("commons/cli/limits.py", "tests/cli/test_limits.py", light=True),
    "checks": target("commons/cli/checks.py", CONFIG),
    "output": target("commons/cli/output.py", CONFIG),
    "parity": target(
        "commons/training/parity.py", "tests/training/test_parity.py", keyword="not entry_point and not single_layer"
    ),
    "outcome": target("commons/lifecycle/outcome.py", "tests/lifecycle/test_outcome.py", light=True),
    "writing": target(
        "commons/reporting/writing.py", METRICS, "tests/reporting/test_sinks.py", keyword="json or disk or folder"
    ),
    "smi": target("commons/doctor/smi.py", *DOCTOR, light=True),
    "driver": target("commons/doctor/driver.py", *DOCTOR, light=True),
    "torch_build": target("commons/doctor/torch_build.py", *DOCTOR, light=True),
}
