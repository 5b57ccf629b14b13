"""Checkpoints of one process: what is written is what is read, and damage is found before use."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trainer import checkpoint, durable
from trainer.checkpoint import CheckpointError, SaveError
from trainer.cluster import Member
from trainer.deepspeed_shims import Fragment
from trainer.ema import running_statistics
from trainer.launch import free_port


@pytest.fixture(scope="module")
def member() -> Member:
    """A process group of one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return Member(0, 1, 0, torch.device("cpu"), group)


class Small(nn.Module):
    """Two parameters, a kept buffer and one that is not."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((4, 3), fill))
        self.b = nn.Parameter(torch.arange(5.0) + fill)
        self.register_buffer("seen", torch.full((2,), fill))
        self.register_buffer("index", torch.zeros(2), persistent=False)


def whole(model: nn.Module) -> list[Fragment]:
    """Every parameter as one fragment, its moments twice and thrice its value."""
    parts = []
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        parts.append(Fragment(name, 0, flat, {"exp_avg": flat * 2, "exp_avg_sq": flat * 3}))
    return parts


def saved(root: Path, step: int, member: Member, fill: float = 1.0) -> Path:
    model = Small(fill)
    return checkpoint.save(root, step, {"step": step}, whole(model), running_statistics(model), member)


def test_round_trip_in_other_pieces(tmp_path: Path, member: Member) -> None:
    saved(tmp_path, 7, member, fill=2.5)
    found = checkpoint.newest(tmp_path, member)
    assert found is not None
    assert found.step == 7
    model = Small(0.0)
    flat = model.a.data.view(-1)
    moments = {"exp_avg": torch.zeros(12), "exp_avg_sq": torch.zeros(12)}
    cuts = [(0, 5), (5, 6), (6, 12)]
    parts = [
        Fragment("a", low, flat[low:high], {key: value[low:high] for key, value in moments.items()})
        for low, high in cuts
    ]
    checkpoint.restore(found, parts, running_statistics(model))
    assert torch.equal(model.a.data, torch.full((4, 3), 2.5))
    assert torch.equal(moments["exp_avg_sq"], torch.full((12,), 7.5))
    assert torch.equal(model.get_buffer("seen"), torch.full((2,), 2.5))
    assert torch.equal(model.b.data, torch.arange(5.0))  # no fragment of it was asked for
    checkpoint.load_parameters(found, model)
    assert torch.equal(model.b.data, torch.arange(5.0) + 2.5)


FILES = ("rank-00000.safetensors", "rank-00000.json", "buffers.safetensors", "state.json", "manifest.json", "COMPLETE")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_found_and_the_older_one_taken(
    name: str, damage: str, tmp_path: Path, member: Member, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, 1, member)
    victim = saved(tmp_path, 2, member) / name
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[: len(content) // 2])
    else:
        victim.unlink()
    found = checkpoint.newest(tmp_path, member)
    assert found is not None
    assert found.step == 1
    assert "passed over" in capsys.readouterr().out


def test_none_where_nothing_verifies(tmp_path: Path, member: Member) -> None:
    assert checkpoint.newest(tmp_path / "nowhere", member) is None
    (saved(tmp_path, 3, member) / "COMPLETE").unlink()
    assert checkpoint.newest(tmp_path, member) is None


def test_failed_save_leaves_older_ones_and_no_rest(tmp_path: Path, member: Member) -> None:
    saved(tmp_path, 1, member)
    blocked = tmp_path / "step-00000002"
    blocked.write_text("a file where the folder should go")
    with pytest.raises(SaveError, match="could not save"):
        saved(tmp_path, 2, member)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    blocked.unlink()
    found = checkpoint.newest(tmp_path, member)
    assert found is not None
    assert found.step == 1


def test_full_disk_is_told_to_all_and_leaves_nothing(tmp_path: Path, member: Member) -> None:
    saved(tmp_path, 1, member)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(SaveError, match="File too large"):
            saved(tmp_path, 2, member)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_interrupted_save_does_not_count_and_is_cleared(tmp_path: Path, member: Member) -> None:
    saved(tmp_path, 1, member)
    (tmp_path / "step-00000002.partial").mkdir()
    (tmp_path / "step-00000002.partial" / "rank-00000.safetensors").write_bytes(b"half")
    saved(tmp_path, 2, member)
    checkpoint.prune(tmp_path, keep=5, step=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_prune_keeps_the_newest_complete(tmp_path: Path, member: Member) -> None:
    for step in (1, 2, 3, 4):
        saved(tmp_path, step, member)
    (tmp_path / "step-00000002" / "COMPLETE").unlink()
    checkpoint.prune(tmp_path, keep=2, step=4)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000004"]


def test_prune_never_takes_the_one_just_written(tmp_path: Path, member: Member) -> None:
    for step in (10, 20, 30, 5):  # those of 10 to 30 were damaged and passed over, the run went on from the start
        saved(tmp_path, step, member)
    assert checkpoint.prune(tmp_path, keep=1, step=5) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_another_model_is_refused(tmp_path: Path, member: Member) -> None:
    saved(tmp_path, 1, member)
    found = checkpoint.newest(tmp_path, member)
    assert found is not None
    other = nn.Linear(3, 4)
    with pytest.raises(CheckpointError, match="weight"):
        checkpoint.load_parameters(found, other)
    wide = Small(0.0)
    wide.a = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(CheckpointError, match="holds 12 of the 16 elements of a"):
        checkpoint.load_parameters(found, wide)


def test_manifest_cannot_point_outside(tmp_path: Path, member: Member) -> None:
    folder = saved(tmp_path, 1, member)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../outside"] = manifest["files"].pop("state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "COMPLETE").write_text(durable.sha256(folder / "manifest.json"))
    os.chmod(folder, 0o755)
    assert checkpoint.newest(tmp_path, member) is None
