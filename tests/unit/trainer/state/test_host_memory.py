"""Room for a copy of the state: taken where there is enough, refused where the machine or a control group has less."""

from pathlib import Path

import pytest
import torch

from trainer.engine.deepspeed_fragments import Fragment
from trainer.state import host_memory, snapshot
from trainer.state.host_memory import HostMemory, available_bytes

CPU = torch.device("cpu")


def part(size: int = 1000) -> snapshot.Snapshot:
    live = torch.arange(float(size))
    return snapshot.of({}, [Fragment("a", 0, live, {"exp_avg": live * 2})], {"n": torch.ones(2)})


def test_a_copy_does_not_follow_the_state() -> None:
    memory, live = HostMemory(CPU), part()
    assert memory.reserve(live) == ""
    copy = memory.copy(live)
    live.kinds["value"][0].zero_()
    live.buffers["n"].zero_()
    assert torch.equal(copy.kinds["value"][0], torch.arange(1000.0))
    assert torch.equal(copy.buffers["n"], torch.ones(2))
    room = copy.kinds["exp_avg"][0].data_ptr()
    assert memory.reserve(live) == ""
    assert memory.copy(live).kinds["exp_avg"][0].data_ptr() == room  # the same memory again


def test_more_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 8500)
    assert "takes 0.00 GB of host memory" in HostMemory(CPU).reserve(part())
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 9000)
    memory = HostMemory(CPU)
    assert memory.reserve(part()) == ""
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 0)
    assert memory.reserve(part()) == ""  # it has its room already
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 9000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert HostMemory(CPU).reserve(part())  # the other rank wants as much


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    """Files as the kernel has them, of version 2 and of version 1."""
    whole = available_bytes(tmp_path, tmp_path / "none")
    assert whole > 1 << 20
    job = tmp_path / "slurm" / "job"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    (tmp_path / "slurm" / "memory.max").write_text("1000000\n")
    (tmp_path / "slurm" / "memory.current").write_text("400000\n")
    (tmp_path / "slurm" / "memory.stat").write_text("anon 1\ninactive_file 1000\nactive_file 2000\n")
    (tmp_path / "two").write_text("0::/slurm/job\n")
    assert available_bytes(tmp_path, tmp_path / "two") == 603_000
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (old.parent / "memory.limit_in_bytes").write_text("700000\n")
    for folder in (old, old.parent):
        (folder / "memory.usage_in_bytes").write_text("500000\n")
        (folder / "memory.stat").write_text("total_inactive_file 500\ntotal_active_file 0\n")
    (tmp_path / "one").write_text("4:memory:/job\n3:cpuset:/\n0::/\n")
    assert available_bytes(tmp_path, tmp_path / "one") == 200_500
