"""Mixtures: exact shares, exact epochs of every data set, a cursor that knows its data sets, one label space."""

import io
import json
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import resolve
from configs.errors import InputError
from configs.schema import Augment, Cluster, Data, Model, Run
from data_pipeline import mixture
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.manifest import Dataset, Source, Split
from data_pipeline.merge import merge
from data_pipeline.mixture import Mixture
from data_pipeline.order import Order
from data_pipeline.stream import heldout_loader, open_data, train_loader

parts = st.lists(
    st.tuples(st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any), st.integers(1, 7)),
    min_size=1,
    max_size=4,
)
sizes = st.integers(1, 30)


def sources_of(counts: list[list[int]], weights: list[int]) -> tuple[Source, ...]:
    first = np.cumsum([0, *map(len, counts)]).tolist()
    return tuple(
        Source(first[d], 3, (0, 1, 2), f"set {d}", weight, sum(counts[d]), f"print {d}")
        for d, weight in enumerate(weights)
    )


def mixture_of(given: list[tuple[list[int], int]], seed: int = 1, block: int = 12, lanes: int = 3) -> Mixture:
    counts, weights = [each for each, _ in given], [weight for _, weight in given]
    return Mixture(sources_of(counts, weights), np.concatenate(counts), seed, block, lanes, 4)


@given(given=parts, seed=st.integers(0, 2**31 - 1), block=sizes, lanes=sizes)
@settings(max_examples=80, deadline=None)
def test_every_cycle_has_the_exact_shares_and_every_prefix_is_one_of_each(
    given: list[tuple[list[int], int]], seed: int, block: int, lanes: int
) -> None:
    mixed, weights = mixture_of(given, seed, block, lanes), [weight for _, weight in given]
    source, own = mixed.origin(np.arange(20 * sum(weights)))
    for cycle in source.reshape(20, -1):
        assert np.bincount(cycle, minlength=len(weights)).tolist() == weights
    for number in range(len(weights)):
        assert own[source == number].tolist() == list(range(20 * weights[number]))


@given(given=parts, seed=st.integers(0, 2**31 - 1), block=sizes, lanes=sizes)
@settings(max_examples=40, deadline=None)
def test_every_data_set_has_its_own_exact_epochs(
    given: list[tuple[list[int], int]], seed: int, block: int, lanes: int
) -> None:
    mixed, first = mixture_of(given, seed, block, lanes), 0
    longest = max(sum(counts) / weight for counts, weight in given)
    positions = np.arange(int(2 * longest + 2) * sum(weight for _, weight in given))  # two epochs of each at least
    source, own = mixed.origin(positions)
    epoch, shard, sample = mixed.lookup(positions)
    assert (epoch == positions // mixed.samples).all()
    for number, (counts, _) in enumerate(given):
        every = [(first + shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
        mine = source == number
        seen = list(zip(shard[mine].tolist(), sample[mine].tolist(), strict=True))
        assert sorted(seen[: len(every)]) == sorted(seen[len(every) : 2 * len(every)]) == every
        found = mixed.find(own[mine] // len(every), shard[mine], sample[mine])
        assert found.tolist() == positions[mine].tolist()
        first += len(counts)


@given(given=parts, seed=st.integers(0, 2**31 - 1), start=st.integers(0, 10**15))
@settings(max_examples=40, deadline=None)
def test_a_lookup_depends_on_the_position_alone(given: list[tuple[list[int], int]], seed: int, start: int) -> None:
    mixed, positions = mixture_of(given, seed), start + np.arange(60)
    whole = np.stack(mixed.lookup(positions))
    shuffled = np.random.default_rng(seed).permutation(60)
    assert (np.stack(mixed.lookup(positions[shuffled])) == whole[:, shuffled]).all()
    assert (np.stack([np.stack(mixed.lookup(p[None]))[:, 0] for p in positions[::7]], 1) == whole[:, ::7]).all()


def test_many_scattered_cycles_are_opened_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = mixture_of([([50], 3), ([40], 2)])
    positions = np.random.default_rng(0).integers(0, 10**9, 500)
    whole = np.stack(mixed.lookup(positions))
    monkeypatch.setattr(mixture, "OPENED", 17)  # three cycles of 5 at a time
    assert (np.stack(mixed.lookup(positions)) == whole).all()


def test_a_rank_stays_in_its_lanes_where_the_cycle_divides_the_batch() -> None:
    mixed = mixture_of([([50] * 48, 2), ([50] * 24, 1)], block=48, lanes=24)
    assert [order.block for order in mixed.orders] == [32, 16]
    read: set[int] = set()
    for step in range(48 * 50 // 32):
        _, shard, _ = mixed.lookup(np.arange(step * 48 + 12, step * 48 + 24))  # rank 1 of 4
        read |= set(shard.tolist())
    # A quarter of each data set's lanes, 6 and 4, holds a quarter of its shards; the smaller has begun its second epoch
    # by then, with other shards.
    assert len({shard for shard in read if shard < 48}) <= 48 // 4 + 2
    assert len({shard for shard in read if shard >= 48}) <= 2 * (24 // 4 + 2)


def test_version_1_is_pinned() -> None:
    mixed = mixture_of([([5, 3, 9], 3), ([1, 7], 2)], seed=11, block=10)
    source, own = mixed.origin(np.arange(10))
    epoch, shard, sample = mixed.lookup(np.arange(20, 32))
    assert source.tolist() == [0, 1, 1, 0, 0, 0, 1, 0, 0, 1]
    assert own.tolist() == [0, 0, 1, 1, 2, 3, 2, 4, 5, 3]
    assert epoch.tolist() == [(20 + n) // 25 for n in range(12)]
    assert shard.tolist() == [2, 4, 4, 1, 1, 0, 0, 4, 4, 0, 0, 4]
    assert sample.tolist() == [4, 0, 3, 1, 0, 4, 3, 4, 5, 1, 0, 1]


def split_of(given: list[tuple[list[int], int]]) -> Split:
    counts, weights = [each for each, _ in given], [weight for _, weight in given]
    samples = sum(map(sum, counts))
    return Split("train", "x", samples, np.concatenate(counts), "whole", (), (), sources_of(counts, weights))


TWO = [([9, 4, 8], 3), ([5, 6], 2)]


def test_state_resumes_the_same_mixture() -> None:
    run = Run(seed=6, data=Data(global_batch=10, lanes=2, piece=3))
    begun = mixture.begin(run, split_of(TWO))
    state = json.loads(json.dumps(begun.state(37, "whole")))
    again, consumed = mixture.resume(state, split_of(TWO))
    assert consumed == 37
    positions = np.arange(37, 120)
    assert (np.stack(again.lookup(positions)) == np.stack(begun.lookup(positions))).all()


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ([([9, 4, 8], 1), ([5, 6], 2)], "data set 1 (set 0): weight 3 (here 1)"),
        ([([9, 4, 8], 3), ([5, 7], 2)], "data set 2 (set 1): samples 11 (here 12)"),
        ([([9, 4, 8], 3)], "2 data sets (here 1)"),
    ],
)
def test_another_mixture_is_refused_with_what_differs(here: list[tuple[list[int], int]], said: str) -> None:
    state = mixture_of(TWO).state(37, "whole")
    with pytest.raises(InputError, match="written for another mixture") as refusal:
        mixture.resume(state, split_of(here))
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2 (here 1)"),
        ({"mixture": 2}, "mixture 2 (here 1)"),
        ({"fingerprint": "other labels"}, "fingerprint 'other labels' (here 'whole')"),
        ({"sources": "nonsense"}, "no list of tables"),
        ({"block": "5"}, "not a whole number: block"),
        ({"consumed": -1}, "must not be negative"),
    ],
)
def test_a_foreign_state_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as refusal:
        mixture.resume(mixture_of(TWO).state(37, "whole") | change, split_of(TWO))
    assert said in str(refusal.value)


def test_one_data_set_and_a_mixture_do_not_continue_each_other() -> None:
    alone = replace(split_of(TWO), sources=())
    with pytest.raises(InputError, match="written for one data set \\(here a mixture\\)"):
        mixture.resume(Order(alone.counts, 0, 5, 2, 3).state(5, "whole"), split_of(TWO))
    with pytest.raises(InputError, match="written for a mixture \\(here one data set\\)"):
        mixture.resume(mixture_of(TWO).state(5, "whole"), alone)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (("a",), "'a': must be PATH:WEIGHT, the weight a whole number from 1 to 999999999; nearest valid: 'a:1'"),
        (("a:0",), "nearest valid: 'a:1'"),
        (("a:1.5",), "must be PATH:WEIGHT"),
        ((":3",), "must be PATH:WEIGHT"),
        (("a:1", "b:2", "a:2"), "must name a data set once; nearest valid: ('a:2', 'b:2')"),
        (("a:5000", "b:1"), "must add up to at most 4096; nearest valid: ('a:4093', 'b:1')"),
    ],
)
def test_wrong_entries_are_refused(entries: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError) as refusal:
        Data(mixture=entries)
    assert said in str(refusal.value)


def test_entries_travel_through_the_run_file() -> None:
    run = Run(recipe="x", data=Data(mixture=("http://host:80/set:5000", "b:10000")))
    assert resolve.from_json(resolve.to_json(run)) == run


def pictures(name: str, labels: list[tuple[int, ...]]) -> list[Picture]:
    """A picture of one colour for each of `labels`, its key saying what it carries."""

    def encoded(shade: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (shade % 256, 30, 60)).save(file, format="PNG")
        return file.getvalue()

    keys = [f"{name}/{number}-{'-'.join(map(str, found))}" for number, found in enumerate(labels)]
    return [Picture(keys[n], "png", found, keys[n], partial(encoded, n)) for n, found in enumerate(labels)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    """60 pictures of single labels a, b, c, and 25 of several labels d, b."""
    folder = tmp_path_factory.mktemp("mixture")
    ones: list[tuple[int, ...]] = [(number % 3,) for number in range(60)]
    some: list[tuple[int, ...]] = [((), (0,), (1,), (0, 1))[number % 4] for number in range(25)]
    first = write_dataset(pictures("one", ones), folder / "first", ["a", "b", "c"], "single", {"of": "one"}, 6)
    return first, write_dataset(pictures("some", some), folder / "second", ["d", "b"], "multi", {"of": "some"}, 5)


def run_of(two: tuple[Dataset, Dataset]) -> Run:
    entries = (f"{two[0].root}:20", f"{two[1].root}:10")
    data = Data(path="unused", mixture=entries, global_batch=12, workers=0, lanes=4, piece=4)
    return Run(seed=3, model=Model(resolution=32), data=data, augment=Augment(), cluster=Cluster(device="cpu"))


def test_label_spaces_are_merged_by_name(two: tuple[Dataset, Dataset]) -> None:
    merged = open_data(run_of(two))
    train = merged.split("train")
    assert (merged.vocabulary, merged.label_kind) == (("a", "b", "c", "d"), "multi")
    assert [(s.first_shard, s.classes, s.translate, s.weight) for s in train.sources] == [
        (0, 3, (0, 1, 2), 2),
        (len(two[0].split("train").counts), 2, (3, 1), 1),
    ]
    for name in ("train", "heldout"):
        assert merged.split(name).samples == sum(one.split(name).samples for one in two)
        paths = [path for one in two for path in one.split(name).shard_paths]
        assert (
            list(merged.split(name).shard_paths)
            == [merged.split(name).shard_paths[n] for n in range(len(paths))]
            == paths
        )
        assert [merged.split(name).rows[n] for n in range(-len(paths), 0)] == list(merged.split(name).rows)
    assert merge([two[0]], [5]).label_kind == "single"
    assert merge([two[1], two[0]], [1, 2]).vocabulary == ("d", "b", "a", "c")
    assert merge([two[1], two[0]], [1, 2]).split("train").fingerprint != train.fingerprint


def test_label_counts_are_what_to_expect_of_as_many_draws(two: tuple[Dataset, Dataset]) -> None:
    merged = open_data(run_of(two))
    assert merged.label_counts is not None
    n, shares = merged.split("train").samples, {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}
    for dataset, share in zip(two, (2 / 3, 1 / 3), strict=True):
        assert dataset.label_counts is not None
        for name, count in zip(dataset.vocabulary, dataset.label_counts, strict=True):
            shares[name] += share * n * count / dataset.split("train").samples
    assert merged.label_counts == tuple(round(value) for value in shares.values())
    assert merge([two[0], replace(two[1], label_counts=None)], [1, 1]).label_counts is None


def test_one_data_set_under_two_names_and_one_without_training_split_are_refused(two: tuple[Dataset, Dataset]) -> None:
    with pytest.raises(InputError, match=r"elsewhere and .*first are the same data set"):
        merge([two[0], replace(two[0], root="elsewhere")], [1, 2])
    without = replace(two[1], splits={"heldout": two[1].split("heldout")})
    with pytest.raises(InputError, match="has no split 'train'"):
        merge([two[0], without], [1, 1])
    only = replace(two[1], splits={"train": two[1].split("train")})
    assert merge([two[0], only], [1, 1]).split("heldout").samples == two[0].split("heldout").samples


def names_in(key: str) -> set[str]:
    """The names of the labels that a picture's key says it carries."""
    folder, _, name = key.partition("/")
    numbers = [int(word) for word in name.split("-")[1:] if word]
    return {("abc" if folder == "one" else "db")[number] for number in numbers}


def test_the_stream_of_a_mixture_is_exact_and_labelled(two: tuple[Dataset, Dataset]) -> None:
    run = run_of(two)
    merged = open_data(run)
    train = merged.split("train")
    order = mixture.begin(run, train)
    whole = list(train_loader(merged, run, order, [(0, 12)], 0, 30))
    for batch in whole:
        assert Counter(key.partition("/")[0] for key in batch.keys) == {"one": 8, "some": 4}  # 2:1 in every batch
        for key, labels in zip(batch.keys, batch.labels.tolist(), strict=True):
            assert {merged.vocabulary[label] for label in labels if label >= 0} == names_in(key)
    for folder, dataset in (("one", two[0]), ("some", two[1])):
        n = dataset.split("train").samples
        seen = [key for batch in whole for key in batch.keys if key.startswith(folder)]
        assert len(set(seen[:n])) == n
        assert sorted(seen[:n]) == sorted(seen[n : 2 * n])
    halves = [list(train_loader(merged, run, order, [slot], 12 * 5, 3)) for slot in ((0, 6), (6, 12))]
    for step, parts in enumerate(zip(*halves, strict=True), 5):  # two ranks, resumed at step 5
        assert whole[step].keys == parts[0].keys + parts[1].keys
        assert torch.equal(whole[step].images_BCHW, torch.cat([part.images_BCHW for part in parts]))
        assert torch.equal(whole[step].seeds_B, torch.cat([part.seeds_B for part in parts]))


def test_held_out_samples_of_all_data_sets_come_once_and_translated(two: tuple[Dataset, Dataset]) -> None:
    merged = open_data(run_of(two))
    keys = []
    for batch in heldout_loader(merged, "heldout", run_of(two), 0, 1):
        for key, labels, valid in zip(batch.keys, batch.labels.tolist(), batch.valid_B.tolist(), strict=True):
            assert {merged.vocabulary[label] for label in labels if label >= 0} == names_in(key)
            keys += [key] * valid
    assert len(set(keys)) == len(keys) == merged.split("heldout").samples
