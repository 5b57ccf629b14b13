"""Checkpoints of one process: what is written is what is read, and damage is found before use."""

import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.cluster import Member
from trainer.engine.deepspeed_fragments import Fragment
from trainer.engine.ema import running_statistics
from trainer.state import checkpoint, durable, snapshot
from trainer.state.checkpoint import SaveError
from trainer.state.sources import CheckpointError, Sources


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


FILES = (
    "rank-00000.safetensors",
    "rank-00000.json",
    "buffers-00.safetensors",
    "state.json",
    "manifest.json",
    "COMPLETE",
)


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


def test_another_releases_format_is_refused_not_passed_over(tmp_path: Path, member: Member) -> None:
    saved(tmp_path, 1, member)
    folder = saved(tmp_path, 2, member)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 2}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "COMPLETE").write_text(durable.sha256(folder / "manifest.json"))
    with pytest.raises(durable.FormatError, match="has format 2, this program reads 1"):
        checkpoint.newest(tmp_path, member)


def test_the_state_is_that_of_the_moment(tmp_path: Path, member: Member) -> None:
    """A thread writes it later, when what it refers to has gone on."""
    used: list[int] = [1]
    part = snapshot.of({"step": 3, "used": used}, [], {})
    used.append(2)
    path, _ = checkpoint.commit(tmp_path, 3, part, member)
    assert json.loads((path / "state.json").read_text())["used"] == [1]


def test_an_element_that_is_held_twice_is_refused(tmp_path: Path, member: Member) -> None:
    parts = [Fragment("a", 0, torch.ones(4), {}), Fragment("a", 3, torch.ones(4), {})]
    path = checkpoint.save(tmp_path, 1, {"step": 1}, parts, {}, member)
    with pytest.raises(CheckpointError, match="elements of a from 3 on once more"):
        Sources(path)


MANY, EACH = 8, 4 << 20  # pieces and elements of each: 128 MB


@pytest.mark.parametrize("share", [1, 8])
def test_restoring_needs_no_more_than_the_own_pieces(share: int, tmp_path: Path, member: Member) -> None:
    """Of a checkpoint in large files an eighth is read with an eighth of the memory."""
    parts = [Fragment(f"p{number}", 0, torch.full((EACH,), float(number)), {}) for number in range(MANY)]
    checkpoint.save(tmp_path, 1, {"step": 1}, parts, {}, member)
    found = checkpoint.newest(tmp_path, member)
    assert found is not None
    mine = [Fragment(f"p{number}", EACH // share, part.value[: EACH // share], {}) for number, part in enumerate(parts)]
    mine = mine if share > 1 else parts
    peak = Peak()
    checkpoint.restore(found, mine, {})
    assert peak.growth() < 3 * 4 * EACH // share  # a stretch under way and its copy; the whole would be 8 x 4 x EACH
    assert all(bool((part.value == number).all()) for number, part in enumerate(mine))


class Peak:
    """How much the memory of this process grows, but for pages of files, which the system takes back as it likes."""

    def __init__(self) -> None:
        self._most, self._ended = 0, threading.Event()
        self._before = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def growth(self) -> int:
        """Bytes at the highest point since the beginning."""
        self._ended.set()
        self._thread.join()
        return self._most - self._before

    def _watch(self) -> None:
        while not self._ended.wait(0.0005):
            self._most = max(self._most, self._now())

    def _now(self) -> int:
        return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


def test_manifest_cannot_point_outside(tmp_path: Path, member: Member) -> None:
    folder = saved(tmp_path, 1, member)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../outside"] = manifest["files"].pop("state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "COMPLETE").write_text(durable.sha256(folder / "manifest.json"))
    os.chmod(folder, 0o755)
    assert checkpoint.newest(tmp_path, member) is None
