"""A command in the background by submitit's local executor: from the copy of the code, deaf to hang-ups."""

import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from configs.errors import InputError
from slurm import local

PROGRAM = """
import json, os, signal, sys, time
told = {"words": sys.argv[1:], "here": __file__, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()}
told["hangup"] = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
print(json.dumps(told), flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(3)
"""


@pytest.mark.parametrize("gpus", [None, "0,1"])
def test_a_command_in_the_background(gpus: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    code = tmp_path / "code"
    code.mkdir()
    (code / "background_program.py").write_text(PROGRAM)
    root = str(Path(__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", root)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if gpus is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    job = local.send(tmp_path / "jobs", ["background_program", "0.5", "word"], code)
    assert os.environ["PYTHONPATH"] == root
    log = tmp_path / "jobs" / f"{job}_0_log.out"
    deadline = time.monotonic() + 60
    while not (log.exists() and '"words"' in log.read_text()):
        assert time.monotonic() < deadline, [path.read_text() for path in (tmp_path / "jobs").glob("*.err")]
        time.sleep(0.05)
    told = json.loads(next(line for line in log.read_text().splitlines() if line.startswith("{")))
    assert told["words"] == ["0.5", "word"]
    assert told["here"] == str(code / "background_program.py")
    assert told["gpus"] == gpus
    assert told["hangup"]
    psutil.wait_procs([psutil.Process(told["pid"])] if psutil.pid_exists(told["pid"]) else [], timeout=60)


def test_submitit_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[slurm\]'"):
        local.send(tmp_path, ["x"], tmp_path)
