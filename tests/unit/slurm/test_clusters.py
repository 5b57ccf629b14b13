"""Cluster profiles: what is read, and how mistakes in them are refused."""

from pathlib import Path

import pytest

from configs.errors import InputError
from slurm import clusters, scheduler, submit
from slurm.clusters import Profile


def test_a_profile_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'partition = "gpu"\nsetup = ["module load cuda"]\ncontainer = "apptainer exec --nv x.sif"\nhang_seconds = 90\n'
        '[environment]\nNCCL_IB_TIMEOUT = 22\n[sbatch]\nexclusive = true\nreservation = "r"\n'
    )
    found = clusters.load(str(path))
    assert (found.name, found.partition, found.setup, found.hang_seconds) == ("mine", "gpu", ("module load cuda",), 90)
    assert (found.environment, found.sbatch) == ({"NCCL_IB_TIMEOUT": "22"}, {"exclusive": True, "reservation": "r"})
    request = submit.Request("run", (2, 4), 8)
    job = submit.describe(tmp_path / "run", ["m"], request, found, tmp_path / "code")
    assert job.container == ["apptainer", "exec", "--nv", "x.sif"]
    assert (job.node_counts, job.beat, job.requeue, job.crashes) == ([2, 4], 90.0, True, 3)


def test_the_network_interface_is_both_libraries(tmp_path: Path) -> None:
    profile = Profile(interface="ib0", environment={"NCCL_SOCKET_IFNAME": "ib1"})
    job = submit.describe(tmp_path, ["m"], submit.Request("run", (1,), 8), profile, tmp_path)
    assert job.environment == {"NCCL_SOCKET_IFNAME": "ib1", "GLOO_SOCKET_IFNAME": "ib0"}


def test_a_chain_and_a_check_do_not_queue_themselves_again() -> None:
    assert submit.Request("run", (1,), 8).requeues(Profile())
    assert not submit.Request("run", (1,), 8, chain=2).requeues(Profile())
    assert not submit.Request("run", (1,), 8, once=True).requeues(Profile())
    assert not submit.Request("run", (1,), 8).requeues(Profile(requeue=False))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('partitoin = "gpu"', "did you mean 'partition'"),
        ('gpus = "yes"', "gpus = 'yes': must be a bool"),
        ("time = 10", "time = 10: must be a str"),
        ('gpu_option = "x"', "gpus_per_node or gres"),
        ('container = "a \'b"', "No closing quotation"),
        ("hang_seconds = -1", "must be at least 0; nearest valid: 0"),
        ("setup = [1]", "must be a list of lines"),
        ("= 1", "cannot be read"),
    ],
)
def test_mistakes_are_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text + "\n")
    with pytest.raises(InputError, match="mine") as error:
        clusters.load(str(path))
    assert said in str(error.value)


def test_an_unknown_profile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match="coatnet cluster init"):
        clusters.load("alps")
    clusters.folder().mkdir(parents=True)
    (clusters.folder() / "alpa.toml").write_text("")
    with pytest.raises(InputError, match="did you mean 'alpa'"):
        clusters.load("alps")
    assert clusters.load("alpa").name == "alpa"
    assert clusters.load("") == Profile()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:05", 7205),
        ("3-00:00:00", 259200),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("UNLIMITED", float("inf")),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: float) -> None:
    assert scheduler.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "1-", "-5"])
def test_what_is_no_time_limit_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="3-00:00:00"):
        scheduler.seconds(text)
