"""The cluster itself: nodes with names of their own, accounting, fake GPUs, the hosts file."""

from pathlib import Path

import pytest

from tests.slurm.lab import Lab

pytestmark = pytest.mark.slurm


def test_two_nodes_run_a_step(lab: Lab) -> None:
    wanted = ("-N2", "--ntasks-per-node=2", "--gpus-per-node=2", "-w", "n[2-3]")
    told = lab.ask("srun", *wanted, "bash", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES")
    assert sorted(told.splitlines()) == ["n2 0,1", "n2 0,1", "n3 0,1", "n3 0,1"]


def test_accounting_remembers_a_job(lab: Lab, tmp_path: Path) -> None:
    job = lab.ask("sbatch", "--parsable", f"--output={tmp_path}/out", "--wrap", "exit 3")
    lab.until(lambda: lab.ask("sacct", "-nPX", "-j", job, "-o", "State,ExitCode") == "FAILED|3:0", "the job's record")


def test_the_hosts_file_has_one_marked_block(lab: Lab) -> None:
    lines = Path("/etc/hosts").read_text().splitlines()
    begin, end = lines.index("# coatnet cluster begin"), lines.index("# coatnet cluster end")
    assert lines[begin + 1 : end] == [f"127.0.10.{node} n{node}" for node in range(1, 5)]
