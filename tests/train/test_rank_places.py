"""What each process of a placement group gets, worked out by hand; nothing here starts Ray."""

from __future__ import annotations

import pytest

from cfstore import EngineError
from cftrain.rank_places import Node, Place, Share, environment, own_address, ranks_of, share_of


def node(cpus, gpus=0, address="10.0.0.1"):
    return Node(f"id of {address}", f"host of {address}", address, cpus, gpus)


@pytest.mark.parametrize(
    ("nodes", "workers", "gpu", "cpus", "share"),
    [
        ([(4, 0)], 2, False, None, Share(2, 0)),
        ([(4, 0)], 3, False, None, Share(1, 0)),
        ([(4, 0)], 2, False, 1, Share(1, 0)),
        ([(8, 0), (3, 0)], 3, False, None, Share(3, 0)),  # two on the first, one on the second
        ([(8, 0), (3, 0)], 2, False, None, Share(4, 0)),
        ([(16, 4)], 2, True, None, Share(4, 1)),  # not 8: two GPUs more want theirs
        ([(16, 4), (64, 0)], 4, True, None, Share(4, 1)),
        ([(2, 4)], 2, True, None, Share(1, 1)),
    ],
)
def test_workers_share_the_nodes_evenly(nodes, workers, gpu, cpus, share):
    assert share_of([node(*each) for each in nodes], workers, gpu=gpu, cpus=cpus) == share


@pytest.mark.parametrize(
    ("nodes", "workers", "gpu", "cpus", "asked"),
    [
        ([(4, 0)], 5, False, None, "5 workers of 1 CPU each"),
        ([(4, 0), (4, 0)], 3, False, 3, "3 workers of 3 CPUs each"),
        ([(4, 1)], 2, True, None, "2 workers of 1 CPU and a GPU each"),
        ([(16, 4), (2, 1)], 5, True, 4, "5 workers of 4 CPUs and a GPU each"),
        ([], 1, False, None, "1 workers of 1 CPU each"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_asked_and_what_is_there(nodes, workers, gpu, cpus, asked):
    with pytest.raises(EngineError) as error:
        share_of([node(*each) for each in nodes], workers, gpu=gpu, cpus=cpus)
    assert asked in str(error.value)
    for each in nodes:
        assert f"{each[0]} CPUs, {each[1]} GPUs" in str(error.value)
    assert ("--device cpu" in str(error.value)) == gpu
    assert ("--worker-cpus" in str(error.value)) == bool(cpus)


def test_ranks_of_one_machine_follow_each_other_and_know_their_gpus():
    one, two = node(8, 2, "10.0.0.1"), node(8, 2, "10.0.0.2")
    placed = [Place(one, "1"), Place(two, "0"), Place(one, "0"), Place(two, "GPU-77")]
    order = ranks_of(placed)
    assert order == [0, 2, 1, 3]
    places = [placed[index] for index in order]
    found = [environment(places, rank, 4711, 3) for rank in range(4)]
    assert [each["RANK"] for each in found] == ["0", "1", "2", "3"]
    assert [each["LOCAL_RANK"] for each in found] == ["0", "1", "0", "1"]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["1,0", "1,0", "0,GPU-77", "0,GPU-77"]
    assert {(each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"], each["OMP_NUM_THREADS"]) for each in found} == {
        ("4", "2", "3")
    }
    assert {(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in found} == {("10.0.0.1", "4711")}
    assert [own_address(places, rank) for rank in range(4)] == ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2"]


def test_ranks_on_one_machine_speak_by_loopback_and_see_no_gpu_that_they_have_not():
    places = [Place(node(4)), Place(node(4))]
    found = environment(places, 1, 4711, 1)
    assert found["MASTER_ADDR"] == own_address(places, 1) == "127.0.0.1"
    assert "CUDA_VISIBLE_DEVICES" not in found
