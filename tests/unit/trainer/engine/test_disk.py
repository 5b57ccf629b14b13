"""State on a disk: what is missing is named before a run starts, averages lie in files, all is deleted at the end."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs import resolve
from configs.errors import InputError
from configs.schema import Parallel, Run
from trainer.commands.train import check_before_start
from trainer.engine import disk
from trainer.engine.deepspeed_config import Weights, deepspeed_config, folder, weights
from trainer.launch import rank_environment, with_rooms
from trainer.plan import layout


def run_on(path: Path, name: str = "here") -> Run:
    return Run(recipe="r", name=name, parallel=Parallel(offload="nvme", offload_path=str(path)))


@pytest.fixture
def equipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all tools were there."""
    monkeypatch.setattr(disk, "_tools", lambda: {"C++ compiler": True})


def test_missing_tools_are_named_with_what_installs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "c-plus-plus-of-nobody")
    with pytest.raises(InputError, match=r"no C\+\+ compiler.*apt-get install g\+\+ libaio-dev.*nearest valid: 'cpu'"):
        disk.check(run_on(tmp_path), 0)


def test_it_is_refused_before_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_tools", lambda: {"libaio.h": False})
    run = resolve.load("demo-digits")
    run = replace(run, data=replace(run.data, synthetic=True), tracking=replace(run.tracking, mlflow=False))
    run = replace(run, parallel=replace(run.parallel, zero=3, offload="nvme", offload_path=str(tmp_path)))
    with pytest.raises(InputError, match=r"there is no libaio\.h"):
        check_before_start(run, 1)


@pytest.mark.usefixtures("equipped")
def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(InputError, match=r"parallel.offload_path = '/proc/none': cannot be written"):
        disk.check(run_on(Path("/proc/none")), 0)


@pytest.mark.usefixtures("equipped")
def test_too_small_a_disk_is_refused(tmp_path: Path) -> None:
    disk.check(run_on(tmp_path), 1 << 20)
    with pytest.raises(InputError, match=r"need 1000000.0 GB there, .* are free; nearest valid: a folder on a larger"):
        disk.check(run_on(tmp_path), 10**15)


def test_a_compilation_that_does_not_end_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 0.01)
    with pytest.raises(InputError, match=r"not compiled within 0.01 s; .*the file `lock` in a folder async_io"):
        disk.prepare(run_on(tmp_path))


def test_averages_lie_in_files_of_the_rank_until_it_ends(tmp_path: Path) -> None:
    run = run_on(tmp_path)
    room = disk.keeper(run, 3)
    values = [torch.randn(5000), torch.randn(7)]
    kept = [room(value) for value in values]
    for value in kept:
        value.add_(1)
    files = sorted(folder(run).rglob("*.average"))
    assert len(files) == 2
    for value, file in zip(values, files, strict=True):
        assert torch.equal(torch.from_file(str(file), size=len(value)), value + 1)
    disk.clear(run, 2)
    assert all(file.exists() for file in files)
    disk.clear(run, 3)
    assert not any(tmp_path.iterdir())


def test_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    assert folder(run_on(tmp_path)) == folder(run_on(tmp_path))
    assert folder(run_on(tmp_path)) != folder(run_on(tmp_path, "there"))


def test_buffers_follow_from_the_largest_weight() -> None:
    run = resolve.load("coatnet7-jft3b-224")
    run = replace(run, parallel=replace(run.parallel, offload="nvme", offload_path="/local"))
    blocks = weights(run, 1000, 0, 10**6)
    assert blocks.largest == 3072 * 4 * 3072
    for replicas in (1, 8):
        zero = deepspeed_config(run, layout(run, replicas), blocks)["zero_optimization"]
        share = -(-blocks.largest // replicas)
        assert zero["offload_param"]["buffer_size"] == share
        assert zero["sub_group_size"] == max(8 << 20, share)
        assert zero["offload_param"]["nvme_path"] == zero["offload_optimizer"]["nvme_path"] == str(folder(run))


def test_without_offload_the_json_has_no_such_section() -> None:
    config = deepspeed_config(Run(), layout(Run(), 1), Weights(10**6, 10**5))
    assert "aio" not in config
    assert not [name for name in config["zero_optimization"] if name.startswith("offload")]


HOLDS = """
import os, sys
from configs import resolve
from trainer.engine import disk
disk.keep_no_memory(resolve.from_json(sys.argv[1]))
pieces = [bytearray(b"x") * (1 << 20) for _ in range(100)]
del pieces
print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
"""


def test_only_such_a_run_gives_its_memory_back() -> None:
    """Under the thresholds that ranks on a CPU are started with."""
    environment = rank_environment(1, 1, True, with_rooms())
    held = []
    for offload in ("nvme", "none"):
        run = Run(recipe="r", parallel=Parallel(offload=offload, offload_path="/local"))
        words = [sys.executable, "-c", HOLDS, resolve.to_json(run)]
        held.append(int(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout))
    assert held[1] - held[0] > 80 << 20, held
