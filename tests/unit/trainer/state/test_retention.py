"""Which checkpoints stay, what is never deleted, and what is said of the room on the disk."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from configs.schema import Checkpoint
from trainer.cluster import Member
from trainer.engine.deepspeed_fragments import Fragment
from trainer.state import checkpoint, retention


def saved(root: Path, step: int, member: Member) -> Path:
    """A checkpoint of one tensor."""
    return checkpoint.save(root, step, {"step": step}, [Fragment("a", 0, torch.ones(9), {})], {}, member)


def steps(root: Path) -> list[int]:
    return sorted(retention.step_of(path) for path in retention.found(root) if (path / "COMPLETE").exists())


def test_interrupted_save_does_not_count_and_is_cleared(tmp_path: Path, member: Member) -> None:
    saved(tmp_path, 1, member)
    (tmp_path / "step-00000002.partial").mkdir()
    (tmp_path / "step-00000002.partial" / "rank-00000.safetensors").write_bytes(b"half")
    saved(tmp_path, 2, member)
    retention.prune(tmp_path, Checkpoint(keep=5), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_prune_keeps_the_newest_complete(tmp_path: Path, member: Member) -> None:
    for step in (1, 2, 3, 4):
        saved(tmp_path, step, member)
    (tmp_path / "step-00000002" / "COMPLETE").unlink()
    retention.prune(tmp_path, Checkpoint(keep=2), 4)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000004"]


def test_prune_never_takes_the_one_just_written(tmp_path: Path, member: Member) -> None:
    for step in (10, 20, 30, 5):  # those of 10 to 30 were damaged and passed over, the run went on from the start
        saved(tmp_path, step, member)
    assert retention.prune(tmp_path, Checkpoint(keep=1), 5) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_rules_add_up() -> None:
    scores = {4: {"eval/top1": 0.9}, 6: {"eval/top1": 0.9}, 8: {"eval/top1": 0.2}, 99: {"eval/top1": 1.0}}
    wish = Checkpoint(keep=2, keep_every=5, keep_best="eval/top1")
    found = retention.reasons([2, 4, 5, 6, 8, 10, 11], wish, scores)
    assert found == {10: ["newest", "every"], 11: ["newest"], 5: ["every"], 6: ["best"]}  # of equals the newer
    lowest = retention.reasons([4, 6, 8, 11], Checkpoint(keep=1, keep_best="eval/top1", keep_best_mode="min"), scores)
    assert lowest == {11: ["newest"], 8: ["best"]}


def test_the_best_one_stays_while_others_go(tmp_path: Path, member: Member) -> None:
    wish = Checkpoint(keep=1, keep_best="eval/top1")
    for step, score in ((1, 0.5), (2, 0.8), (3, 0.6), (4, float("nan"))):
        saved(tmp_path, step, member)
        assert retention.write_score(tmp_path, step, {"eval/top1": score}) == ""
        assert retention.prune(tmp_path, wish, step) == []
    assert steps(tmp_path) == [2, 4]
    assert retention.read_scores(tmp_path) == {2: {"eval/top1": 0.8}, 3: {"eval/top1": 0.6}, 4: {}}


def test_damaged_scores_are_told(tmp_path: Path, member: Member) -> None:
    saved(tmp_path, 1, member)
    retention.write_score(tmp_path, 1, {"eval/top1": 0.5})
    text = (tmp_path / retention.SCORES).read_text()
    (tmp_path / retention.SCORES).write_text(text.replace("0.5", "0.9"))
    assert retention.read_scores(tmp_path) == {}
    (told,) = retention.prune(tmp_path, Checkpoint(), 1)
    assert "the best checkpoint so far is not known" in told


def test_none_goes_while_the_best_is_not_known(tmp_path: Path, member: Member) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step, member)
    (tmp_path / retention.SCORES).write_text("{")
    retention.prune(tmp_path, Checkpoint(keep=1, keep_best="eval/top1"), 3)
    assert steps(tmp_path) == [1, 2, 3]
    retention.prune(tmp_path, Checkpoint(keep=1), 3)
    assert steps(tmp_path) == [3]


def test_the_only_one_left_is_read_back_first(tmp_path: Path, member: Member) -> None:
    saved(tmp_path, 1, member)
    file = saved(tmp_path, 2, member) / "rank-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"!")  # as a disk that stores something else does
    (told,) = retention.prune(tmp_path, Checkpoint(keep=1), 2)
    assert "reads back wrong (rank-00000.safetensors" in told
    assert steps(tmp_path) == [1, 2]
    file.write_bytes(content)
    assert retention.prune(tmp_path, Checkpoint(keep=1), 2) == []
    assert steps(tmp_path) == [2]


def test_one_that_another_process_reads_stays(tmp_path: Path, member: Member) -> None:
    for step in (1, 2):
        saved(tmp_path, step, member)
    code = "import sys; from pathlib import Path; from trainer.state import retention\n"
    code += "held = retention.hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(tmp_path / "step-00000001")]
    reader = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "held\n"
    (told,) = retention.prune(tmp_path, Checkpoint(keep=1), 2)
    assert "is being read and stays until the next save" in told
    assert steps(tmp_path) == [1, 2]
    with pytest.raises(checkpoint.SaveError, match="is being read and cannot be replaced"):
        saved(tmp_path, 1, member)
    assert checkpoint.damage(tmp_path / "step-00000001") == ""
    reader.communicate()
    assert retention.prune(tmp_path, Checkpoint(keep=1), 2) == []
    assert steps(tmp_path) == [2]


def test_a_reader_waits_for_one_who_deletes(tmp_path: Path, member: Member) -> None:
    path = saved(tmp_path, 1, member)
    held: list[retention.Hold] = []
    with retention.alone(path) as unread:
        assert unread
        reader = threading.Thread(target=lambda: held.append(retention.hold(path)))
        reader.start()
        reader.join(0.3)
        assert not held
        (path / "COMPLETE").unlink()
    reader.join(10)
    assert held[0]._file is None  # it is gone: nothing was held


def test_a_kill_while_one_takes_the_place_of_another_is_put_right(tmp_path: Path, member: Member) -> None:
    path = saved(tmp_path, 1, member)
    shutil.copytree(path, path.with_suffix(".replaced"))
    (path / "COMPLETE").unlink()
    retention.clear(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert checkpoint.damage(path) == ""


def test_room_is_foretold_until_the_first_one_goes(tmp_path: Path, member: Member) -> None:
    wish, free = Checkpoint(keep=3), shutil.disk_usage(tmp_path).free
    assert retention.coming(tmp_path, wish) == 4
    assert retention.forecast(tmp_path, 1000, 4) == ""
    assert "room for 2 more, but 4 come before an old one goes" in retention.forecast(tmp_path, free // 3, 4)
    assert "the next save will fail" in retention.forecast(tmp_path, free * 2)
    for step in range(1, 6):
        saved(tmp_path, step, member)
    assert retention.coming(tmp_path, wish) == 1


def test_scores_that_cannot_be_written_end_nothing(tmp_path: Path) -> None:
    (tmp_path / f"{retention.SCORES}.tmp").mkdir()
    assert "does not know step 3" in retention.write_score(tmp_path, 3, {"eval/top1": 0.5})
