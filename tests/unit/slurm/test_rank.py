"""The environment of ranks: their place, their caches, locks that a killed build left, what wins over what."""

import os
import subprocess
import sys
from pathlib import Path

from slurm import rank
from slurm.job import Job

TASK = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip


def test_a_task_is_told_its_place_as_torch_reads_it() -> None:
    assert rank.place(TASK) == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


def test_every_try_meets_at_a_port_of_its_own_below_the_ephemeral_range(tmp_path: Path) -> None:
    job = Job(str(tmp_path), "/code", "python", ["m"], environment={"NCCL_DEBUG": "INFO", "MASTER_PORT": "1"})
    given = {"RANK": "3", "WORLD_SIZE": "9", "PYTHONPATH": "/more", "SLURM_JOB_ID": "1"}
    tries = [rank.of_try(job, f"7.{number}.0", given, ["n1", "n2"], end=99) for number in range(50)]
    ports = {int(own["MASTER_PORT"]) for own in tries}
    assert len(ports) > 45
    assert all(20000 <= port < 32000 for port in ports)
    assert not {"RANK", "WORLD_SIZE"} & set(tries[0])  # of whoever submitted the job
    assert tries[0]["PYTHONPATH"] == "/code:/more"
    assert (tries[0]["MASTER_ADDR"], tries[0]["SLURM_JOB_END_TIME"], tries[0]["NCCL_DEBUG"]) == ("n1", "99", "INFO")
    assert tries[0]["COATNET_HEARTBEAT"] == f"{tmp_path}/heartbeat/7.0.0"
    assert "MALLOC_TRIM_THRESHOLD_" in tries[0]
    assert "MALLOC_TRIM_THRESHOLD_" not in rank.of_try(job, "7", {**given, "SLURM_JOB_GPUS": "0"}, ["n1"])


def test_threads_are_the_task_s_cores_where_it_computes_on_them() -> None:
    assert rank.threads({"SLURM_CPUS_PER_TASK": "12"}) == {"OMP_NUM_THREADS": "12"}
    assert rank.threads({"SLURM_CPUS_PER_TASK": "12", "CUDA_VISIBLE_DEVICES": "0"}) == {"OMP_NUM_THREADS": "1"}


def test_the_lock_of_a_dead_build_goes_and_that_of_a_live_one_stays(tmp_path: Path) -> None:
    from torch.utils.file_baton import FileBaton

    dead, live = (tmp_path / name / "lock" for name in ("dead", "live"))
    for lock in (dead, live):
        lock.parent.mkdir()
    program = (
        f"from torch.utils.file_baton import FileBaton; import os; FileBaton({str(dead)!r}).try_acquire(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program], timeout=120)
    builds = FileBaton(str(live))
    assert builds.try_acquire()
    assert rank.break_locks(str(tmp_path)) == [str(dead)]
    assert (dead.exists(), live.exists()) == (False, True)
    builds.release()


def test_a_rank_is_its_module_with_everything_set(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(
        "import faulthandler, os, sys\n"
        "assert __name__ == '__main__' and faulthandler.is_enabled()\n"
        "print(sys.argv[1:], *(os.environ[name] for name in ('RANK', 'NCCL_DEBUG', 'TORCH_EXTENSIONS_DIR')))\n"
    )
    root = Path(__file__).resolve().parents[3]
    own = {**TASK, "SLURM_PROCID": "0", "PYTHONPATH": f"{root}:{tmp_path}", "PATH": os.environ["PATH"]}
    own |= {"NCCL_DEBUG": "TRACE", "COATNET_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "slurm.rank", "told", "a", "--b"]
    said = subprocess.run(command, env=own, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "['a', '--b'] 0 TRACE" in said
    assert f"{tmp_path}/py3" in said
    assert "environment of the ranks:" in said
    assert "NCCL_DEBUG=TRACE" in said
