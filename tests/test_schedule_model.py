"""The model of schedules (benchmarks/schedule_model.py) against what pencil and paper say."""

from __future__ import annotations

import math

import pytest
from schedule_model import Lock, Shared, Step, ingest_tasks, makespan, sweep_makespan

WORK = (3.0, 1.0, 4.0, 1.5, 9.0, 2.6)


def cores(n: float = math.inf) -> dict[str, Shared | Lock]:
    return {"cores": Shared(n, 1.0)}


def tasks(*seconds: float) -> list[tuple[Step, ...]]:
    return [(Step("cores", each),) for each in seconds]


def test_one_worker_takes_the_sum():
    assert makespan(tasks(*WORK), 1, cores()) == pytest.approx(sum(WORK))


def test_a_worker_for_each_task_takes_the_longest():
    assert makespan(tasks(*WORK), len(WORK), cores()) == pytest.approx(max(WORK))


def test_two_workers_take_what_is_next_when_they_are_free():
    # 3 | 1, 4 (5) ; 3+1.5 (4.5), then 9 (13.5) ; 5+2.6 (7.6)
    assert makespan(tasks(*WORK), 2, cores()) == pytest.approx(13.5)


def test_no_task_takes_no_time():
    assert makespan([], 3, cores()) == 0


@pytest.mark.parametrize("workers", [1, 2, 5, 6])
def test_cores_shared_by_more_workers_do_no_more_than_they_can(workers):
    seconds = makespan(tasks(*[2.0] * 60), workers, cores(2))
    assert seconds == pytest.approx(60 * 2.0 / min(workers, 2))


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_a_bandwidth_that_all_share_gives_the_bytes_over_it(workers):
    storage = {"read": Shared(100.0)}
    work = [(Step("read", 50.0),)] * 24
    assert makespan(work, workers, storage) == pytest.approx(24 * 50 / 100)
    assert storage["read"].served == 24 * 50


def test_users_of_different_size_leave_a_shared_bandwidth_one_after_the_other():
    # both at 50 until the smaller has its 50 (1 s), then the other alone: 50 left of 100 at 100
    assert makespan([(Step("read", 50.0),), (Step("read", 100.0),)], 2, {"read": Shared(100.0)}) == pytest.approx(1.5)


def test_no_user_is_faster_than_its_own_line():
    assert makespan([(Step("read", 100.0),)] * 3, 3, {"read": Shared(1000.0, 20.0)}) == pytest.approx(5.0)


def test_infinite_bandwidth_takes_no_time():
    shards = [(7e9, work, 2e9) for work in WORK]
    machines = {"read": Shared(), "write": Shared(), "commit": Lock(), **cores()}
    assert makespan(ingest_tasks(shards, 0.0), len(WORK), machines) == pytest.approx(max(WORK))


@pytest.mark.parametrize("workers", [1, 2, 4, 16])
def test_equal_shards_and_a_serial_commit_follow_amdahl(workers):
    """One round: all convert side by side, then commit one after the other."""
    convert, commit = 10.0, 0.5
    machines = {"read": Shared(), "write": Shared(), "commit": Lock(), **cores()}
    seconds = makespan(ingest_tasks([(0, convert, 0)] * workers, commit), workers, machines)
    assert seconds == pytest.approx(convert + workers * commit)


def test_many_workers_are_no_faster_than_the_commits_alone():
    convert, commit, n = 10.0, 0.5, 400
    machines = {"read": Shared(), "write": Shared(), "commit": Lock(), **cores()}
    seconds = makespan(ingest_tasks([(0, convert, 0)] * n, commit), 100, machines)
    assert seconds == pytest.approx(convert + n * commit)  # the lock is never idle after the first round's conversion
    assert machines["commit"].served == pytest.approx(n * commit)
    assert machines["commit"].longest == pytest.approx(99 * commit)


def test_commits_that_grow_with_the_catalog_sum_up():
    machines = {"read": Shared(), "write": Shared(), "commit": Lock(lambda n: 0.1 * n), **cores()}
    seconds = makespan(ingest_tasks([(0, 1.0, 0)] * 20, 0.5), 1, machines)
    assert seconds == pytest.approx(20 * 1.5 + 0.1 * 20 * 19 / 2)


def test_workers_that_begin_late_end_late():
    assert makespan(tasks(*WORK), 1, cores(), start=2.5) == pytest.approx(2.5 + sum(WORK))


@pytest.mark.parametrize(("gain", "expected"), [(1.0, 16.0), (2.0, 8.0), (4.0, 4.0), (99.0, 4.0)])
def test_jobs_on_parts_of_a_gpu_take_the_sum_the_longest_or_what_lies_between(gain, expected):
    assert sweep_makespan([4.0] * 4, 1, 0.25, gain) == pytest.approx(expected)


def test_a_sweep_on_whole_gpus_is_a_list_of_jobs_for_so_many_workers():
    assert sweep_makespan(WORK, 2, 1.0) == pytest.approx(13.5)
    assert sweep_makespan([5.0] * 12, 3, 1.0, start=1.0) == pytest.approx(4 * 6.0)
