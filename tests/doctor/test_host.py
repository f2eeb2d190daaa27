"""The checks of the host's memory: README's case 10; advice that fits the machine."""

from __future__ import annotations

import pytest
from worlds.fake_machine import GIB, FakeMachine
from worlds.sick_machines import found, limited, only, troubles

from commons.doctor import explain_failure, host
from commons.doctor.machine import Disk


def test_case_10_small_shared_memory(linux: FakeMachine) -> None:
    linux.write("/.dockerenv")
    linux.disks["/dev/shm"] = Disk(64 << 20, 64 << 20)
    finding = only(linux)
    assert (finding.id, finding.level) == ("shm.small", "warning")
    assert finding.cure.startswith("docker run --shm-size=8g")
    assert explain_failure("Bus error (core dumped)", linux) == [finding]


def test_case_10_killed_for_lack_of_memory(wsl: FakeMachine) -> None:
    wsl.write("/proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n")
    wsl.write("/proc/self/cgroup", "0::/init.scope\n")
    wsl.write("/sys/fs/cgroup/cgroup.controllers", "memory")
    wsl.write("/sys/fs/cgroup/init.scope/memory.events", "oom 1\noom_kill 3\noom_group_kill 0\n")
    trouble = troubles(wsl)
    assert list(trouble) == ["memory.little", "cgroup.oom-kills"]
    assert "3 process" in trouble["cgroup.oom-kills"].title
    opens_it = 'cmd.exe /c "notepad %UserProfile%\\.wslconfig"   # write below [wsl2]: memory=12GB'
    assert all(finding.cure.startswith(opens_it) for finding in trouble.values())
    assert explain_failure("exitcode: -9 (SIGKILL)", wsl) == list(trouble.values())
    assert "cgroup" not in found(wsl)
    wsl.write("/.dockerenv")
    assert troubles(wsl)["memory.little"].cure.startswith(opens_it), "no limit of the container to raise"
    wsl.write("/sys/fs/cgroup/memory.max", f"{2 * GIB}\n")
    assert troubles(wsl)["memory.little"].cure.startswith("docker run --memory=7g")


def test_control_group_of_version_2(linux: FakeMachine) -> None:
    linux.write("/proc/self/cgroup", "0::/a/b\n")
    linux.write("/sys/fs/cgroup/cgroup.controllers", "cpu memory pids")
    linux.write("/sys/fs/cgroup/a/b/memory.max", "max\n")
    linux.write("/sys/fs/cgroup/a/memory.max", f"{4 * GIB}\n")
    linux.write("/sys/fs/cgroup/a/memory.current", f"{GIB}\n")
    assert host.control_group(linux) == host.ControlGroup(2, 4 * GIB, "/sys/fs/cgroup/a/memory.max", GIB, 0)
    trouble = troubles(linux)
    assert list(trouble) == ["memory.little"]
    assert found(linux)["cgroup"].seen == "control group version 2: memory 4.0 GiB"
    assert "3.0 GiB are left" in trouble["memory.little"].seen
    linux.write("/sys/fs/cgroup/a/b/memory.events", "oom_kill 2\n")
    trouble = troubles(linux)
    assert list(trouble) == ["memory.little", "cgroup.oom-kills"]
    assert trouble["cgroup.oom-kills"].seen.endswith(": memory 4.0 GiB")
    assert "cgroup" not in found(linux)


def test_control_group_of_version_1(linux: FakeMachine) -> None:
    linux.write("/proc/self/cgroup", "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n3:pids:/docker/abc\n0::/x\n")
    # the container sees its own group at the root of the mount, not at the host's path
    limit = "/sys/fs/cgroup/memory/memory.limit_in_bytes"
    linux.write(limit, f"{2 * GIB}\n")
    linux.write("/sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
    assert host.control_group(linux) == host.ControlGroup(1, 2 * GIB, limit, GIB, 0)
    assert only(linux).id == "memory.little"


def test_version_1_without_limits(linux: FakeMachine) -> None:
    linux.write("/proc/self/cgroup", "5:memory:/\n4:cpu:/\n")
    linux.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert host.control_group(linux) == host.ControlGroup(1)
    assert found(linux)["cgroup"].seen == "control group version 1: no limit of memory"
    assert troubles(linux) == {}


@pytest.mark.parametrize(
    ("marks", "environment", "cure"),
    [
        (["/.dockerenv"], {"limit": "1"}, "docker run --memory=8g"),
        (["/run/.containerenv"], {"limit": "1"}, "podman run --memory=8g"),
        ([], {"SLURM_JOB_ID": "1", "limit": "1"}, "sbatch --mem=8G"),
        ([], {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "6000"}, "sbatch --mem=12G"),
        ([], {"limit": "1"}, "echo 8G | sudo tee /sys/fs/cgroup/memory.max"),
        ([], {}, "ps -eo rss,pid,user,args --sort=-rss | head"),
    ],
)
def test_more_memory(linux: FakeMachine, marks: list[str], environment: dict[str, str], cure: str) -> None:
    linux.write("/proc/meminfo", "MemTotal: 65000000 kB\nMemAvailable: 1000000 kB\n")
    if environment.pop("limit", ""):
        limited(linux, 3 * GIB)
    for mark in marks:
        linux.write(mark)
    assert only(linux.with_environment(**environment)).cure.startswith(cure)


# the present limit and the host's memory, in GiB -> the limit that helps; None: there is no more to give
LIMITS = [
    (128, 512, 256),
    (128, 160, 160),
    (128, 130, None),
    (128, 128, None),
    (2, 512, 8),
    (1, 1.9, None),
    (30, 64, 60),
]


@pytest.mark.parametrize(("limit", "total", "better"), LIMITS)
@pytest.mark.parametrize("place", ["docker", "podman", "kubernetes", "slurm", "systemd"])
def test_a_limit_is_only_ever_raised(
    linux: FakeMachine, place: str, limit: float, total: float, better: int | None
) -> None:
    """A rank killed for memory: the advice is more than the present limit, no more than the machine has, or other."""
    kilobytes = int(total * GIB) // 1024
    linux.write("/proc/meminfo", f"MemTotal: {kilobytes} kB\nMemAvailable: {kilobytes} kB\n")
    limited(linux, int(limit * GIB), kills=1)
    marks = {"docker": "/.dockerenv", "podman": "/run/.containerenv"}
    variables = {"kubernetes": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "slurm": {"SLURM_JOB_ID": "7"}}
    if place in marks:
        linux.write(marks[place])
    linux.with_environment(**variables.get(place, {}))
    cure = troubles(linux)["cgroup.oom-kills"].cure
    if better is None:
        assert cure.startswith("ps -eo rss") and "--batch_size 1" in cure
        return
    expected = {
        "docker": f"docker run --memory={better}g --memory-swap={better}g ...",
        "podman": f"podman run --memory={better}g --memory-swap={better}g ...",
        "kubernetes": f"kubectl set resources deployment NAME --limits=memory={better}Gi   # or in the pod's own file",
        "slurm": f"sbatch --mem={better}G ..."
        if better < int(total)
        else "sbatch --mem=0 ...   # all of the node's memory",
        "systemd": f"echo {better}G | sudo tee /sys/fs/cgroup/memory.max",
    }
    assert cure == expected[place]


@pytest.mark.parametrize(("total", "memory"), [(7, 11), (3, 8), (15.5, 24), (63, 95)])
def test_wsl_gets_more_than_it_has(wsl: FakeMachine, total: float, memory: int) -> None:
    wsl.write("/proc/meminfo", f"MemTotal: {int(total * GIB) // 1024} kB\nMemAvailable: 1000000 kB\n")
    assert f"memory={memory}GB (now {total:.1f} GiB;" in only(wsl).cure


@pytest.mark.parametrize(
    ("shm", "total", "size"),
    [
        (64, 512, 8),
        (64, 10, 5),
        (16 << 10, 512, 32),
        (16 << 10, 40, 20),
        (30 << 10, 62, None),
        (64, 1, None),
        (0, 62, 8),
    ],
)
@pytest.mark.parametrize("mark", ["/.dockerenv", "/run/.containerenv", ""])
def test_shared_memory_is_only_ever_enlarged(
    linux: FakeMachine, mark: str, shm: int, total: int, size: int | None
) -> None:
    """By more than it has (MiB), within half of the host's memory (GiB); else it is told what fills it."""
    kilobytes = total * GIB // 1024
    linux.write("/proc/meminfo", f"MemTotal: {kilobytes} kB\nMemAvailable: {kilobytes} kB\n")
    linux.disks["/dev/shm"] = Disk(shm << 20, 1 << 20) if shm else None
    if mark:
        linux.write(mark)
    cure = troubles(linux)["shm.small"].cure
    if size is None:
        assert cure.startswith("ls -lS /dev/shm | head")
    elif mark:
        engine = "docker" if "docker" in mark else "podman"
        assert cure == f"{engine} run --shm-size={size}g ...   # or: --ipc=host"
    else:
        assert cure == f"sudo mount -o remount,size={size}G /dev/shm"


def test_shared_memory_of_a_pod(linux: FakeMachine) -> None:
    linux.disks["/dev/shm"] = Disk(64 << 20, 64 << 20)
    cure = only(linux.with_environment(KUBERNETES_SERVICE_HOST="10.0.0.1")).cure
    assert cure.startswith("kubectl edit deployment NAME   # mount an emptyDir")
