"""Every part of `trainer.engine.deepspeed_shims`: what goes wrong without it, and not with it.

Others are cases of test_parity.py ("unmarked", restarts, shard groups, state in the host's memory), test_held_bytes.py
(networks that are never whole) and test_offload.py (gradients of a state on a disk).
"""

import importlib.metadata
import json
from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import InputError
from tests.parallel import pool
from trainer.engine import deepspeed_shims as shims


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shims")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "compiled"))
        pool.run([pool.Job("shims_worker", (str(folder / "out"),), 2, str(folder / "logs"))], folder)
    assert not (folder / "compiled").exists(), "DeepSpeed compiled something"
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(2)]


def test_orders_of_modules_are_compared_inside_a_stage(answers: list[dict[str, Any]]) -> None:
    first, last = (rank["orders"] for rank in answers)
    assert not first["theirs, stages"]  # rank 0 is whom all others are compared with
    assert last["theirs, stages"]
    for rank in (first, last):
        assert (rank["ours, stages"], rank["ours, replicas"], rank["ours, equal"]) == (False, True, False)


def test_a_mesh_does_not_outlive_its_engine(answers: list[dict[str, Any]]) -> None:
    assert [rank["replicas"] for rank in answers] == [{"left behind": 1, "begun": 2}] * 2


@pytest.mark.parametrize(
    ("version", "fine"),
    [
        ("0.19.8", True),
        ("0.19.11", True),
        ("0.19.8+cpu", True),
        ("0.19.7", False),
        ("0.20.0", False),
        ("1.19.8", False),
    ],
)
def test_another_release_is_refused(version: str, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    if fine:
        shims.check_version()
        return
    with pytest.raises(InputError, match=rf"deepspeed {version} is installed; .*pip install 'deepspeed==0\.19\.8'"):
        shims.check_version()


def test_what_looks_otherwise_is_not_replaced() -> None:
    def seen(param: int, index: int) -> int:
        return param + index

    theirs = SimpleNamespace(reduce=seen)
    with pytest.raises(InputError, match=r"reduce takes 'param index', not 'param': what is put in its place"):
        shims._replace(theirs, "reduce", "param", None)
    with pytest.raises(InputError, match=r"gone takes 'nothing', not 'param'"):
        shims._replace(theirs, "gone", "param", None)
    assert theirs.reduce is seen
    shims._replace(theirs, "reduce", "param index", lambda param, index: param * index)
    assert theirs.reduce(3, 4) == 12
