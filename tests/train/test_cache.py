"""Where bags are kept between epochs: decided from given numbers, so no GPU is needed."""

from __future__ import annotations

import pytest

from cftrain.cache import CachePlan, parse_cache, parse_size, plan_cache, size_text
from cftrain.errors import ConfigError

GB = 10**9


def plan(setting="auto", *, cohort=12 * GB, ram=100 * GB, gpu=None, jobs=1):
    return plan_cache(setting, cohort_bytes=cohort, ram_free=ram, gpu_free=gpu, jobs=jobs)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GB", 8 * GB), ("512MiB", 512 << 20), ("1.5 GB", 1_500_000_000), ("2kb", 2000), ("1TiB", 1 << 40)],
)
def test_sizes_are_read_in_powers_of_ten_or_two(text, nbytes):
    assert parse_size(text, "x") == nbytes


@pytest.mark.parametrize("text", ["8", "GB", "8G", "-1GB", "0GB", "8 gigs", "", "1e3GB"])
def test_what_is_no_size_is_refused_saying_how_to_write_one(text):
    with pytest.raises(ConfigError, match="write it as 8GB or 512MiB"):
        parse_size(text, "x")


@pytest.mark.parametrize("text", ["", "disk", "auto:8GB", "off:1GB", "RAM"])
def test_what_is_no_cache_is_refused_naming_those_there_are(text):
    with pytest.raises(ConfigError, match=r"auto, off, ram\[:SIZE\] or gpu\[:SIZE\]"):
        parse_cache(text)


def test_on_a_cpu_auto_keeps_a_cohort_that_fits_in_ram():
    found = plan()
    assert (found.gpu_bytes, found.ram_bytes) == (0, 12 * GB)
    assert found.why == "cache: 12.0 GB of bags, 100 GB RAM free: all kept in RAM"


def test_a_cohort_that_does_not_fit_is_kept_in_part():
    found = plan(cohort=100 * GB, ram=50 * GB)
    assert found.ram_bytes == 30 * GB  # six tenths of what is free
    assert found.why.endswith("30.0 GB in RAM, 70.0 GB read again every epoch")


def test_on_a_gpu_auto_fills_half_of_it_then_ram_and_reads_the_rest_again():
    found = plan(cohort=57 * GB, ram=15 * GB, gpu=76 * GB)
    assert (found.gpu_bytes, found.ram_bytes) == (38 * GB, 9 * GB)
    assert found.why == (
        "cache: 57.0 GB of bags, 76.0 GB GPU and 15.0 GB RAM free: "
        "38.0 GB on the GPU, 9.0 GB in RAM, 10.0 GB read again every epoch"
    )


def test_a_cohort_that_fits_on_the_gpu_takes_no_ram():
    assert plan(gpu=80 * GB) == CachePlan(
        12 * GB, 0, "cache: 12.0 GB of bags, 80.0 GB GPU and 100 GB RAM free: all kept on the GPU"
    )


def test_ram_leaves_the_gpu_alone():
    assert plan("ram", gpu=80 * GB).gpu_bytes == 0


def test_off_keeps_nothing_and_says_so():
    found = plan("off", gpu=80 * GB)
    assert (found.gpu_bytes, found.ram_bytes) == (0, 0)
    assert "12.0 GB of bags are read again every epoch" in found.why


def test_a_named_size_is_the_limit():
    assert plan("ram:5GB").ram_bytes == 5 * GB
    found = plan("gpu:5GB", gpu=80 * GB)
    assert (found.gpu_bytes, found.ram_bytes) == (5 * GB, 7 * GB)


def test_a_named_size_may_exceed_the_share_that_auto_would_take():
    assert plan("gpu:70GB", cohort=200 * GB, gpu=80 * GB).gpu_bytes == 70 * GB


def test_a_named_size_beyond_what_is_free_is_refused_only_if_the_cohort_needs_it():
    with pytest.raises(ConfigError, match=r"90\.0 GB do not fit, 80\.0 GB are free"):
        plan("gpu:90GB", cohort=200 * GB, gpu=80 * GB)
    assert plan("gpu:90GB", gpu=80 * GB).gpu_bytes == 12 * GB


def test_a_gpu_cache_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="on the CPU; use --cache ram"):
        plan("gpu:8GB")


def test_jobs_share_the_memory_because_each_keeps_bags_of_its_own():
    found = plan(cohort=50 * GB, ram=100 * GB, jobs=4)
    assert found.ram_bytes == 15 * GB
    assert found.why.endswith("in each of 4 jobs")
    assert plan("ram:8GB", jobs=4).ram_bytes == 2 * GB


def test_where_nothing_can_be_kept_that_is_what_is_said():
    assert plan(ram=0).why.endswith("all read again every epoch")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 KB"), (99_940_000, "99.9 MB"), (123 * GB, "123 GB")],
)
def test_bytes_are_written_for_people(nbytes, text):
    assert size_text(nbytes) == text
