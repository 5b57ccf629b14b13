"""Tars without an index: drawn at random with repetition, read strictly, seeded by place, refused as they should be."""

import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs import resolve
from configs.errors import InputError
from configs.schema import Augment, Data, Run
from configs.tars import check_tars
from data_pipeline import resample
from data_pipeline.augment import train_view
from data_pipeline.decode import decode
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset
from data_pipeline.mixture import begin, resume
from data_pipeline.order import sample_seed
from data_pipeline.shard import OpenShards
from data_pipeline.stream import Batch, heldout_loader, open_data, train_loader
from trainer.commands.order import order_command

RunOf = Callable[..., Run]
SAMPLES = 60  # said to be an epoch


@pytest.fixture
def tars(dataset: Dataset, tmp_path: Path) -> Path:
    """The data set's training shards, copied without their sidecars, and members nobody asked for."""
    for number, path in enumerate(dataset.split("train").shard_paths):
        copy = tmp_path / f"t-{number:03d}.tar"
        copy.write_bytes(Path(path).read_bytes())
    with tarfile.open(tmp_path / "t-000.tar", "a") as tar:
        (tmp_path / "evil.pyd").write_bytes(b"cos\nsystem\n")
        tar.add(tmp_path / "evil.pyd", "zz/other.pyd")
    return tmp_path


@pytest.fixture
def run(tars: Path, dataset: Dataset, run_of: RunOf) -> Run:
    data = Data(path=f"tars:{tars}/t-*.tar", heldout=dataset.root, tar_samples=SAMPLES, global_batch=12, workers=0)
    return replace(run_of(augment=Augment(randaugment_layers=1, mixup_alpha=0.5)), data=data, runs=str(tars / "runs"))


def _keys(dataset: Dataset) -> dict[str, list[str]]:
    """The keys in each training shard."""
    found = {}
    for path in dataset.split("train").shard_paths:
        with tarfile.open(path) as tar:
            found[path] = [name.rpartition(".")[0] for name in tar.getnames()]
    return found


def batches(run: Run, start: int = 0, steps: int = 3, slices: tuple[tuple[int, int], ...] = ((0, 12),)) -> list[Batch]:
    data = open_data(run)
    return list(train_loader(data, run, begin(run, data.split("train")), slices, start, steps))


def test_samples_are_those_of_the_tars_in_the_views_of_their_places(run: Run, dataset: Dataset) -> None:
    split = dataset.split("train")
    shards = OpenShards(split.shard_paths, split.counts)
    stored = {}
    for shard, count in enumerate(split.counts.tolist()):
        for number in range(count):
            sample = shards.read(shard, number, 3)
            stored[sample.key] = sample
    found = batches(run, 24, 8)
    for batch in found:
        positions = batch.indices_B.numpy()
        assert (batch.seeds_B.numpy() == sample_seed(run.seed, positions // SAMPLES, positions % SAMPLES)).all()
        assert batch.valid_B.all()
        assert batch.kept_B is not None
        for row, key in enumerate(batch.keys):
            assert batch.labels[row].item() == stored[key].labels[0]
            wanted = train_view(decode(stored[key].picture, 10**6), 32, run.augment, int(batch.seeds_B[row]))
            assert torch.equal(batch.images_BCHW[row], wanted)
    assert [batch.indices_B[0].item() for batch in found] == list(range(24, 24 + 96, 12))
    home = {key: path for path, keys in _keys(dataset).items() for key in keys}
    assert len({home[key] for key in found[0].keys[:6]}) > 2  # as many as a tar holds
    counts = Counter(key for batch in found for key in batch.keys)
    assert len(counts) > 30  # shuffled across tars, and
    assert max(counts.values()) > 1  # with repetition


def test_a_run_that_continues_and_other_ranks_and_workers_draw_anew(run: Run) -> None:
    first = [batch.keys for batch in batches(run)]
    assert [batch.keys for batch in batches(run)] == first
    assert [batch.keys for batch in batches(run, 12, 2)] != first[1:]
    left, right = batches(run, slices=((0, 6),)), batches(run, slices=((6, 12),))
    assert [batch.keys for batch in left] != [batch.keys for batch in right]
    data = open_data(run)
    split = data.split("train")
    order, consumed = resume(begin(run, split).state(24, split.fingerprint), split)
    assert (consumed, order.samples) == (24, SAMPLES)


def test_loader_processes_deliver_whole_batches(run: Run) -> None:
    found = batches(replace(run, data=replace(run.data, workers=2)), steps=4)
    assert [batch.indices_B[0].item() for batch in found] == [0, 12, 24, 36]
    assert found[0].keys != found[1].keys  # of two processes


def test_what_is_held_out_is_scored_exactly(run: Run, dataset: Dataset) -> None:
    keys = [
        key
        for batch in heldout_loader(open_data(run), "heldout", run, 0, 1)
        for key, valid in zip(batch.keys, batch.valid_B.tolist(), strict=True)
        if valid
    ]
    assert len(keys) == len(set(keys)) == dataset.split("heldout").samples
    assert "NOT exact" in resample.notice(open_data(run))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.jpg": b"x", "a.cls": b"1"}, "cannot be decoded"),
        ({"a.jpg": b"x"}, "needs labels"),
        ({"a.cls": b"1"}, "needs one member of"),
        ({"a.png": b"x", "a.cls": b"7"}, "must be whole numbers from 0 to 2"),
        ({"a.pth": b"x", "a.pickle": b"y"}, "hold no sample"),
        ({}, "hold no sample"),
    ],
)
def test_damage_stops_or_is_replaced_and_never_hangs(
    run: Run, tmp_path: Path, members: dict[str, bytes], said: str
) -> None:
    bad = tmp_path / "bad.tar"
    with tarfile.open(bad, "w") as tar:
        for name, data in members.items():
            (tmp_path / "member").write_bytes(data)
            tar.add(tmp_path / "member", name)
    only = replace(run, data=replace(run.data, path=f"tars:{bad}"))
    with pytest.raises(DataError, match=said):
        batches(only)
    if "no sample" in said:
        return
    replacing = replace(only, data=replace(only.data, on_damage="replace"))
    with pytest.raises(DataError, match="damaged samples in a row"):
        batches(replacing)
    mixed = replace(replacing, data=replace(replacing.data, path=f"{run.data.path}::{bad}"))
    assert len(batches(mixed, steps=8)) == 8
    lines = (Path(run.folder) / "bad-samples.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert str(bad) in lines[0]


def test_a_torn_tar_and_a_failing_command(run: Run, tars: Path) -> None:
    (tars / "t-001.tar").write_bytes((tars / "t-001.tar").read_bytes()[:3000])
    only = replace(run, data=replace(run.data, path=f"tars:{tars}/t-001.tar"))
    with pytest.raises(DataError, match=r"t-001.tar|unexpected end of data"):
        batches(only)
    replacing = replace(run, data=replace(run.data, on_damage="replace"))
    assert len(batches(replacing, steps=8)) == 8
    assert "t-001.tar" in (Path(run.folder) / "bad-samples.jsonl").read_text()
    for damage in ("stop", "replace"):
        failing = replace(run.data, path="tars:pipe:false", on_damage=damage)
        with pytest.raises(DataError, match="tars:pipe:false"):
            batches(replace(run, data=failing))
    piped = replace(run, data=replace(run.data, path=f"tars:pipe:cat {tars}/t-00{{2..4}}.tar"))
    assert len(resample.expand(piped.data.path.removeprefix("tars:"))) == 3
    assert len(batches(piped)) == 3


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("/nowhere/t-{000..002}.tar", "no such file"), ("/nowhere/*.tar", "no file matches"), ("", "no such file")],
)
def test_a_pattern_of_nothing_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        resample.expand(pattern)


def test_braces_and_patterns(tars: Path) -> None:
    assert resample.expand(f"{tars}/t-{{000..003}}.tar") == [f"{tars}/t-00{n}.tar" for n in range(4)]
    assert resample.expand("http://host/{a,b}.tar") == ["http://host/a.tar", "http://host/b.tar"]
    both = resample.expand(f"{tars}/t-00?.tar::s3://bucket/x.tar")
    assert both[-1] == "s3://bucket/x.tar"
    assert len(both) > 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heldout": ""}, "data.heldout = '': must be the data set"),
        ({"tar_samples": 0}, "data.tar_samples = 0: must be the samples"),
        ({"lanes": 8}, "data.lanes = 8: has no meaning"),
        ({"mixture": ("a:1",)}, "data.mixture = "),
        ({"path": "/data"}, "data.heldout = .*: belongs to data.path = 'tars:PATTERN'"),
        ({"path": "", "heldout": "", "tar_samples": 0, "mixture": ("tars:a:1",)}, "cannot be mixed"),
    ],
)
def test_settings_that_do_not_fit_are_refused(run: Run, changes: dict[str, object], said: str) -> None:
    check_tars(run.data)
    with pytest.raises(InputError, match=said):
        resolve.check(replace(run, data=replace(run.data, **changes)))  # type: ignore[arg-type]


def test_there_is_no_order_to_print(run: Run) -> None:
    words = [f"--data.path={run.data.path}", f"--data.heldout={run.data.heldout}", "--data.tar-samples=60"]
    with pytest.raises(InputError, match="have no order"):
        order_command(["demo-digits", *words, "--step", "1"])
    assert np.array_equal(open_data(run).split("train").counts, [SAMPLES])
