"""What the checks of a machine make of what they measure; an all-reduce over real processes that play nodes."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.finding import worst
from trainer import cli
from trainer.commands import doctor as cli_doctor
from trainer.commands.config import resolve_command
from trainer.commands.train import write_run
from trainer.launch import free_port
from trainer.machine import doctor, links

H100 = 989.4e12


@pytest.mark.parametrize(
    ("speeds", "peaks", "bad"),
    [
        ([650e12, 640e12, 660e12], [H100] * 3, []),
        ([650e12, 300e12, 660e12], [H100] * 3, [1]),
        ([50e12, 52e12, 51e12], [None] * 3, []),
        ([50e12, 30e12, 51e12], [None] * 3, [1]),
        ([], [], []),
    ],
)
def test_a_slow_gpu_is_told(speeds: list[float], peaks: list[float | None], bad: list[int]) -> None:
    found = doctor.judge_matmuls(speeds, peaks)
    assert [number for number, finding in enumerate(found) if finding.level == "bad"] == bad
    assert len(found) == len(speeds)


@pytest.mark.parametrize("nodes", range(1, 10))
def test_two_rounds_give_every_node_other_partners(nodes: int) -> None:
    rounds = links.pairs(nodes)
    for one in rounds:
        flat = [node for pair in one for node in pair]
        assert len(flat) == len(set(flat))  # all pairs of a round at once
        assert set(flat) <= set(range(nodes))
    if nodes > 2:
        partners: dict[int, set[int]] = {node: set() for node in range(nodes)}
        for first, second in (pair for one in rounds for pair in one):
            partners[first].add(second)
            partners[second].add(first)
        alone = [node for node, found in partners.items() if len(found) < 2]
        assert len(alone) <= (2 if nodes % 2 else 0)
        assert all(partners.values())


@pytest.mark.parametrize(("nodes", "slow"), [(nodes, slow) for nodes in (8, 9) for slow in range(nodes)])
def test_the_slow_node_is_found_and_no_other(nodes: int, slow: int) -> None:
    pairs = [pair for one in links.pairs(nodes) for pair in one]
    speeds = {pair: 1e9 if slow in pair else 20e9 + 1e8 * pair[0] for pair in pairs}
    assert links.slow_nodes(speeds) == [slow]


def test_equal_links_and_a_single_pair_blame_nobody() -> None:
    pairs = [pair for one in links.pairs(5) for pair in one]
    assert links.slow_nodes(dict.fromkeys(pairs, 1e9)) == []
    assert links.slow_nodes({(0, 1): 1e6}) == []


def test_processes_that_play_three_nodes(tmp_path: Path, repository: Path) -> None:
    meet = f"127.0.0.1:{free_port()}"

    def node(number: int) -> dict[str, object]:
        out = tmp_path / f"{number}.json"
        place = {
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            links.NODE: str(number),
            links.NODES: "3",
            links.MEET: meet,
        }
        variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repository), "GLOO_SOCKET_IFNAME": "lo", **place}
        command = [sys.executable, "-m", "trainer.machine.links", str(out)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, object] = json.loads(out.read_text())
        return found

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(node, range(3)))
    assert [one.pop("node") for one in found] == [0, 1, 2]
    assert found[0] == found[1] == found[2]  # all come to the same result
    assert found[0]["ranks"] == 3
    table = found[0]["pairs"]
    assert isinstance(table, list)
    assert [row[:2] for row in table] == [[0, 1], [1, 2]]
    assert all(row[2] > 0 for row in table)


def test_a_node_of_a_run_is_examined_without_torch(tmp_path: Path, repository: Path) -> None:
    run = resolve_command("demo-digits", ["--data.synthetic", "--runs", str(tmp_path), "--name", "run"])
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", run)
    code = (
        "import sys; from trainer import cli; code = cli.main(sys.argv[1:]); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "doctor", "--node", str(tmp_path / "run")]
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repository), "COATNET_RANKS": "2"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.strip().splitlines()[-1] == "False"
    assert done.stdout.startswith("facts: {")


def test_data_that_cannot_be_reached_is_bad(tmp_path: Path) -> None:
    run = resolve_command("demo-digits", ["--data.path", str(tmp_path / "nowhere"), "--runs", str(tmp_path)])
    found = cli_doctor.examine_node(run, tmp_path)
    assert worst(found) == "bad"
    assert [finding.name for finding in found if finding.level == "bad"] == ["data"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--node"], "takes one run folder"),
        (["a", "b"], "takes one run folder"),
        (["--verbose"], "--verbose is no option"),
        (["nowhere"], "not a run folder"),
        (["--cluster"], "wants the name of a profile"),
        (["--cluster", "nowhere"], "nowhere"),
    ],
)
def test_wrong_words_are_named(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        cli_doctor.doctor_command(words)


def test_help_names_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--help"]) == 0
    assert "--links RUN" in capsys.readouterr().out
