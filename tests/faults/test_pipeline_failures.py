"""A rank of a pipeline that fails ends the attempt within a minute, and is the one that is told of."""

import re
import time
from pathlib import Path

import pytest

from trainer.launch import LOST_PEER, free_port, launch

MINUTE = 60.0
MICRO = 8  # samples

# By the fault: ranks, the one that fails, words of the run, what is said of it. Rank = stage * replicas + replica.
CASES: dict[str, tuple[int, int, tuple[str, ...], str]] = {
    # The last of two stages, both of whose replicas wait for each other too.
    "raises": (4, 2, ("--parallel.zero", "3", "--parallel.recompute", "full"), "ArithmeticError: made to fail"),
    "killed": (2, 0, ("--parallel.zero", "1"), "was killed by SIGKILL"),
    "pixels": (2, 1, ("--parallel.zero", "0"), "shapes cannot be multiplied"),
    "narrow": (2, 0, ("--parallel.zero", "0"), "RuntimeError: between stages 0 and 1: (8, "),
}


def ranks(
    world: int, fault: str, victim: int, words: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> int:
    """The exit code of a run of which one rank has the fault."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = f"--runs {folder} --data.synthetic --model.resolution 32 --tracking.no-mlflow --cluster.device cpu".split()
    run += f"--parallel.pipeline 2 --parallel.micro-batch {MICRO} --norm.replica-batch {MICRO}".split()
    arguments = ["pipeline_rank", str(folder), fault, str(victim), *run, *words]
    return launch(arguments, world, folder / "logs", free_port(), True)


@pytest.mark.parametrize("fault", CASES)
def test_the_rank_that_fails_ends_the_attempt(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    world, victim, words, said = CASES[fault]
    code = ranks(world, fault, victim, words, tmp_path, monkeypatch)
    ended = time.time()
    assert ended - float((tmp_path / "failed").read_text()) < MINUTE
    told = capfd.readouterr().err
    first = next(line for line in told.splitlines() if line.startswith("rank "))
    assert re.match(rf"rank {victim} \(process \d+\) ", first), told
    assert said in told, told
    assert code == (137 if fault == "killed" else 1), told
    if fault != "killed":
        assert re.search(r'^  File ".*", line \d+, in ', told, re.MULTILINE), told
        assert not any(word in told for word in LOST_PEER), told  # of those that only lost it, nothing


def test_ranks_that_were_told_different_layouts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ranks(2, "samples", 1, ("--parallel.zero", "0"), tmp_path, monkeypatch) == 76
    told = capfd.readouterr().err
    assert "the ranks have different layouts: " in told
    assert "micro_batch=16" in told
