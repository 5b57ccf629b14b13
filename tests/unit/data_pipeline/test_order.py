"""The order of samples: exact, elastic, cheap at any size, and never changed by accident."""

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from data_pipeline.order import Order, keyed, permute, sample_seed
from data_pipeline.permutation import restore

shards = st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(any)
sizes = st.integers(1, 60)
JFT = Order(np.full(300_000, 10_000), seed=5, block=4096, lanes=720, piece=8192)


def pairs(order: Order, start: int, stop: int) -> list[tuple[int, int]]:
    """(shard, sample) of the global indices [start, stop)."""
    _, shard, sample = order.lookup(np.arange(start, stop))
    return list(zip(shard.tolist(), sample.tolist(), strict=True))


@given(counts=shards, seed=st.integers(0, 2**31 - 1), block=sizes, lanes=st.integers(1, 800), piece=sizes)
@settings(max_examples=150, deadline=None)
def test_every_epoch_is_a_permutation(counts: list[int], seed: int, block: int, lanes: int, piece: int) -> None:
    order = Order(np.array(counts), seed, block, lanes, piece)
    every = [(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    for epoch in (0, 1, 7):
        assert sorted(pairs(order, epoch * len(every), (epoch + 1) * len(every))) == every


@given(counts=shards, block=sizes, lanes=st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_lanes_are_the_closed_form_and_are_used_up_exactly(counts: list[int], block: int, lanes: int) -> None:
    # With pieces of one sample nothing is mixed inside a lane, and a single lane is the epoch's line itself.
    line = pairs(Order(np.array(counts), 1, block, 1, 1), 0, sum(counts))
    order = Order(np.array(counts), 1, block, lanes, 1)
    edges = [-(-lane * block // order.lanes) for lane in range(order.lanes + 1)]
    queues = [line[low * len(line) // block : high * len(line) // block] for low, high in pairwise(edges)]
    expected = []
    for _ in range(len(line) // block):
        for lane, queue in enumerate(queues):
            taken = edges[lane + 1] - edges[lane]
            expected += queue[:taken]
            del queue[:taken]
    rest = len(line) % block
    shares = [high * rest // block - low * rest // block for low, high in pairwise(edges)]
    assert [len(queue) for queue in queues] == shares
    assert pairs(order, 0, len(line)) == expected + [pair for queue in queues for pair in queue]


def test_a_batch_runs_on_over_the_end_of_an_epoch() -> None:
    order = Order(np.array([7, 6]), seed=2, block=5, lanes=2, piece=3)
    epoch, shard, sample = order.lookup(np.arange(10, 15))
    assert epoch.tolist() == [0, 0, 0, 1, 1]
    assert list(zip(shard.tolist(), sample.tolist(), strict=True)) == pairs(order, 10, 13) + pairs(order, 13, 15)


def test_epochs_and_seeds_differ() -> None:
    counts = np.full(6, 10)
    orders = [
        pairs(Order(counts, seed, 8, 3, 16), 60 * epoch, 60 * epoch + 60) for seed in (0, 1) for epoch in range(3)
    ]
    assert len({tuple(order) for order in orders}) == 6


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection_and_restore_its_inverse(size: int, seed: int) -> None:
    index = np.arange(size)
    sizes, key = np.full(size, size), np.full(size, keyed(9, seed, np.zeros(1, dtype=np.int64))[0])
    image = permute(index, sizes, key)
    assert sorted(image.tolist()) == index.tolist()
    assert (restore(image, sizes, key) == index).all()


@given(counts=shards, seed=st.integers(0, 2**31 - 1), block=sizes, lanes=st.integers(1, 800), piece=sizes)
@settings(max_examples=100, deadline=None)
def test_find_is_the_inverse_of_lookup(counts: list[int], seed: int, block: int, lanes: int, piece: int) -> None:
    order = Order(np.array(counts), seed, block, lanes, piece)
    positions = np.concatenate([np.arange(2 * order.samples), 9 * order.samples + np.arange(order.samples)])
    assert (order.find(*order.lookup(positions)) == positions).all()


@given(g=st.lists(st.integers(0, 40 * 3_000_000_000), min_size=1, max_size=50))
@settings(max_examples=15, deadline=None)
def test_find_is_the_inverse_of_lookup_at_jft_scale(g: list[int]) -> None:
    positions = np.array(g)
    assert (JFT.find(*JFT.lookup(positions)) == positions).all()


@pytest.mark.parametrize("place", [(-1, 0, 0), (0, -1, 0), (0, 2, 0), (0, 0, -1), (0, 0, 5), (0, 1, 3)])
def test_a_sample_that_is_not_there_is_not_found(place: tuple[int, int, int]) -> None:
    order = Order(np.array([5, 3]), 0, 4, 2, 2)
    with pytest.raises(InputError, match="within the data set"):
        order.find(*(np.array([number]) for number in place))


def test_permute_is_even_handed() -> None:
    keys = keyed(9, 0, np.arange(3000))
    images = permute(np.zeros(3000, dtype=np.int64), np.full(3000, 10), keys)
    hits = np.bincount(images, minlength=10)
    assert hits.min() > 230  # 300 +- 16 each
    assert hits.max() < 370


def shards_of_rank(order: Order, rank: int, world: int, steps: range) -> list[set[int]]:
    """The shards that a rank reads in each step: slots [rank * B / W, (rank + 1) * B / W) of the global batch."""
    low, high = rank * order.block // world, (rank + 1) * order.block // world
    read = (order.lookup(np.arange(step * order.block + low, step * order.block + high))[1] for step in steps)
    return [set(found.tolist()) for found in read]


@pytest.mark.parametrize(("world", "lanes", "node_shards"), [(8, 90, 1440), (16, 45, 720), (24, 30, 480), (80, 9, 144)])
def test_a_rank_opens_few_shards_and_a_node_downloads_its_own(world: int, lanes: int, node_shards: int) -> None:
    # Where the world divides the lanes: V / W lanes a rank, and 8 ranks of a node read 8 / W of all 1,440 shards.
    order = Order(np.full(1440, 70), seed=0, block=5040, lanes=720, piece=70)  # two shards fill a lane exactly
    epoch = range(order.samples // order.block)
    node = [shards_of_rank(order, rank, world, epoch) for rank in range(8)]
    assert lanes * world == 720
    assert max(len(step) for rank in node for step in rank) == lanes  # pieces of a shard's size: one a lane at a time
    assert {len(set().union(*rank)) for rank in node} == {2 * lanes}
    assert len({shard for rank in node for step in rank for shard in step}) == node_shards


def test_where_the_world_does_not_divide_the_lanes_neighbours_share_one() -> None:
    order = Order(np.full(1440, 70), seed=0, block=5040, lanes=720, piece=70)
    whole = [set().union(*shards_of_rank(order, rank, 7, range(order.samples // order.block))) for rank in range(7)]
    assert sorted(map(len, whole)) == [206, 206, *[208] * 5]  # 103 lanes, and one more inside: ceil(V / W) + 1
    assert sum(map(len, whole)) == 1440 + 6 * 2  # each of the 6 borders cuts through one lane


def test_the_next_epoch_moves_a_rank_by_the_partial_block_only() -> None:
    order = Order(np.full(1440, 71), seed=0, block=5040, lanes=720, piece=70)  # 20 full blocks and 1,440 samples more
    start = -(-order.samples // order.block)
    seconds = shards_of_rank(order, 3, 8, range(start, start + 19))
    assert order.samples % order.block
    assert len(set().union(*seconds)) <= 3 * (90 + 2)  # of 1,440


def test_300_thousand_shards_fit_in_200_megabytes() -> None:
    script = """
import numpy as np
from data_pipeline.order import Order
counts = np.full(300_000, 10_000)
order = Order(counts, seed=5, block=4096, lanes=720, piece=8192)
for start in (0, 2_999_999_000, 30_000_000_000_123):
    epoch, shard, sample = order.lookup(np.arange(start, start + 4096))
    assert (epoch == (start + np.arange(4096)) // 3_000_000_000).all()
    assert 0 <= shard.min() and shard.max() < 300_000 and 0 <= sample.min() and sample.max() < 10_000
    assert len(set(zip(shard.tolist(), sample.tolist()))) == 4096
status = open('/proc/self/status').read()  # ru_maxrss would hold the parent's peak
print(status.partition('VmHWM:')[2].split()[0])
"""
    peak = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(peak.stdout) * 1024 < 200e6


def test_version_1_is_pinned() -> None:
    small = Order(np.array([5, 3, 9, 1, 7]), seed=11, block=8, lanes=3, piece=4)
    epoch, shard, sample = small.lookup(np.arange(20, 32))
    assert epoch.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert shard.tolist() == [2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 4]
    assert sample.tolist() == [0, 1, 8, 7, 6, 1, 3, 2, 1, 3, 2, 6]
    _, shard, sample = JFT.lookup(np.array([0, 1, 4095, 4096, 2_999_999_999, 3_000_000_000, 123_456_789_012]))
    assert shard.tolist() == [44446, 44446, 7759, 44446, 174708, 257608, 102807]
    assert sample.tolist() == [2763, 289, 4264, 6044, 9992, 4510, 8191]
    assert sample_seed(7, np.array([0, 0, 3]), np.array([0, 1, 99])).tolist() == [
        950514275814347771,
        3603448856455959885,
        1694565344664292895,
    ]


def test_state_resumes_the_same_order() -> None:
    order = Order(np.array([9, 4, 8]), seed=6, block=5, lanes=2, piece=3)
    state = json.loads(json.dumps(order.state(37, "abc")))
    again, consumed = Order.resume(state, np.array([9, 4, 8]), "abc")
    assert consumed == 37
    assert pairs(again, 37, 80) == pairs(order, 37, 80)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2 (here 1)"),
        ({"fingerprint": "xyz"}, "fingerprint 'xyz' (here 'abc')"),
        ({"samples": 22}, "samples 22 (here 21)"),
        ({"block": "5"}, "not a whole number: block"),
        ({"consumed": -1}, "must not be negative"),
        ({"lanes": 0}, "must be at least 1"),
    ],
)
def test_a_foreign_state_is_refused(change: dict[str, object], said: str) -> None:
    order = Order(np.array([9, 4, 8]), seed=6, block=5, lanes=2, piece=3)
    with pytest.raises(InputError) as refusal:
        Order.resume(order.state(37, "abc") | change, np.array([9, 4, 8]), "abc")
    assert said in str(refusal.value)


@pytest.mark.parametrize("counts", [[], [0, 0], [3, -1]])
def test_impossible_counts_are_refused(counts: list[int]) -> None:
    with pytest.raises(InputError):
        Order(np.array(counts, dtype=np.int64), 0, 4, 2, 2)


def test_numbers_beyond_64_bits_are_refused() -> None:
    with pytest.raises(InputError, match="2\\*\\*63"):
        Order(np.array([3_000_000_000]), seed=0, block=2**33, lanes=1, piece=1)


def test_seeds_are_distinct_and_not_negative() -> None:
    seeds = sample_seed(0, np.repeat(np.arange(10), 1000), np.tile(np.arange(1000), 10))
    assert seeds.min() >= 0
    assert len(np.unique(seeds)) == 10_000
    assert (seeds != sample_seed(1, np.repeat(np.arange(10), 1000), np.tile(np.arange(1000), 10))).all()
