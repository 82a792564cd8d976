"""Bags on a device. The CPU stands in for the GPU: same code, same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cfstore
from cfstore import Bag, SlideBags
from cftrain.device import HostMemory, SlideCache, free_gpu, on_device

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["float16", "float32", "int8"])
def slide(request, demo_store, tmp_path_factory):
    """A slide as a reader gives it, of each stored precision."""
    base = tmp_path_factory.mktemp(request.param)
    source = demo_store.sql("SELECT source FROM bags WHERE scale = 20 ORDER BY slide_id").to_pylist()[0]["source"]
    store = cfstore.open(base / "store", create=True)
    folder = source.rsplit("/", 1)[0]
    store.ingest(folder, cfstore.IngestOptions(encoder="toy", scale=20, cohort="DEMO", dtype=request.param))
    slide_id = store.sql("SELECT slide_id FROM bags ORDER BY 1").to_pylist()[0]["slide_id"]
    return store.reader("toy", [20], [slide_id]).read(slide_id)


@pytest.mark.parametrize("keep", [False, True], ids=["passing", "kept"])
def test_features_on_the_device_are_the_dequantised_ones_bit_for_bit(slide, keep):
    features = on_device(slide, CPU, keep=keep).bags[20].features()
    expected = slide.dequantised().bags[20].features
    np.testing.assert_array_equal(features.numpy(), expected)
    assert features.numpy().dtype == expected.dtype


def test_int8_stays_int8_on_the_device_and_is_made_numbers_anew_each_time(slide):
    bag = on_device(slide, CPU, keep=True).bags[20]
    if bag.affine is None:
        assert bag.features() is bag.rows
        return
    assert bag.rows.element_size() == 1
    first = bag.features()
    first.zero_()
    np.testing.assert_array_equal(bag.features().numpy(), slide.dequantised().bags[20].features)


def test_what_is_kept_has_memory_of_its_own(slide):
    own = SlideBags(slide.slide_id, slide.encoder, {20: Bag(slide.bags[20].features.copy(), None)})
    kept, passing = (on_device(own, CPU, keep=keep).bags[20].rows for keep in (True, False))
    before = kept.clone()
    own.bags[20].features[:] = 0
    torch.testing.assert_close(kept, before)
    assert not passing.any()


def test_a_cache_keeps_what_came_first_up_to_its_limit():
    cache = SlideCache(CPU, 10)
    assert cache.reserve("a", 6)
    assert not cache.reserve("b", 5)
    assert cache.reserve("c", 4)
    cache.put("a", {})
    assert "a" in cache
    assert "c" not in cache


def test_room_that_was_not_used_comes_back_and_used_room_does_not():
    cache = SlideCache(CPU, 10)
    cache.reserve("a", 6)
    cache.put("a", {})
    cache.reserve("b", 4)
    cache.release(["a", "b"])
    assert not cache.reserve("c", 5)
    assert cache.reserve("c", 4)


def test_a_slide_without_room_is_let_go():
    cache = SlideCache(CPU, 10)
    cache.put("a", {})
    assert "a" not in cache


class FakeEvent:
    def __init__(self):
        self.done = self.waited = False

    def query(self):
        return self.done

    def synchronize(self):
        self.waited = self.done = True


def test_host_memory_is_held_until_its_copies_are_done_in_order():
    events = [FakeEvent() for _ in range(3)]
    coming = iter(events)
    host = HostMemory(lambda: next(coming))
    for i in range(3):
        host.hold([i])
    events[1].done = True
    host.release()
    assert len(host._held) == 3  # the first is not copied yet
    events[0].done = True
    host.release()
    assert [slides for _, slides in host._held] == [[2]]


def test_too_many_copies_are_waited_for():
    events = [FakeEvent() for _ in range(6)]
    coming = iter(events)
    host = HostMemory(lambda: next(coming))
    for i in range(6):
        host.hold([i])
    host.release()
    assert [event.waited for event in events] == [True, True, False, False, False, False]


def test_the_cpu_has_no_gpu_memory():
    assert free_gpu(CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_features_reach_a_gpu_as_they_are_stored(slide):
    features = on_device(slide, torch.device("cuda"), keep=True).bags[20].features()
    np.testing.assert_allclose(features.cpu().numpy(), slide.dequantised().bags[20].features, rtol=1e-6)
