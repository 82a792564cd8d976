"""Free RAM: of the machine, and of the control groups that a container or a batch system puts around us."""

from __future__ import annotations

import pytest

from cftrain.memory import free_ram


@pytest.fixture
def machine(tmp_path):
    """A root folder with 8 GiB available; `write` adds files."""

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    write("proc/meminfo", "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\nSwapFree: 0 kB\n")
    return tmp_path, write


def test_without_control_groups_it_is_what_the_machine_has(machine):
    assert free_ram(machine[0]) == 8 << 30


def test_the_tightest_group_counts_and_its_page_cache_is_free(machine):
    root, write = machine
    write("proc/self/cgroup", "0::/slurm/job_1/step_0\n")
    write("sys/fs/cgroup/slurm/job_1/step_0/memory.max", "max\n")
    write("sys/fs/cgroup/slurm/job_1/step_0/memory.current", "1000\n")
    write("sys/fs/cgroup/slurm/job_1/memory.max", f"{4 << 30}\n")
    write("sys/fs/cgroup/slurm/job_1/memory.current", f"{3 << 30}\n")
    write("sys/fs/cgroup/slurm/job_1/memory.stat", f"anon 5\ninactive_file {2 << 30}\n")
    assert free_ram(root) == 3 << 30


def test_the_older_kind_of_groups_counts_too(machine):
    root, write = machine
    write("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    write("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", f"{2 << 30}")
    write("sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes", f"{1 << 30}")
    assert free_ram(root) == 1 << 30


def test_a_full_group_leaves_nothing_not_less(machine):
    root, write = machine
    write("proc/self/cgroup", "0::/\n")
    write("sys/fs/cgroup/memory.max", "100")
    write("sys/fs/cgroup/memory.current", "200")
    assert free_ram(root) == 0


def test_this_machine_has_some():
    assert free_ram() > 1 << 20
