"""A real SLURM cluster of four nodes on this machine, for the tests that are marked `slurm`, and tiny runs on it."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.building import demo
from tests.slurm import lab as laboratory
from tests.slurm.lab import Lab
from tests.slurm.runs import Tiny

Make = Callable[..., Tiny]


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The cluster, started once. Where there can be none the tests skip; with COATNET_SLURM=1, as in CI, they fail."""
    obstacle = laboratory.obstacle()
    if obstacle:
        reason = f"NO SLURM CLUSTER, NOTHING OF SUBMISSION AND RECOVERY WAS TESTED: {obstacle}"
        if os.environ.get("COATNET_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    running = laboratory.start()
    try:
        yield running
    finally:
        laboratory.end(running)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's shards of real digits."""
    out = tmp_path_factory.mktemp("data") / "digits"
    demo.digits(out)
    return out


@pytest.fixture
def tiny(lab: Lab, digits: Path, tmp_path: Path) -> Iterator[Make]:
    """Makes tiny runs; whatever a test leaves is cleaned up: jobs, broken nodes."""

    def make(name: str = "run", **fields: object) -> Tiny:
        return Tiny(lab, tmp_path / name, digits, **fields)  # type: ignore[arg-type]

    yield make
    lab.heal()


@pytest.fixture(scope="session")
def undisturbed(lab: Lab, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """Tiny runs that nothing happens to, each layout once."""
    made: dict[tuple[object, ...], Tiny] = {}

    def run(**fields: object) -> Tiny:
        key = tuple(sorted(fields.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            made[key] = Tiny(lab, folder, digits, **fields)  # type: ignore[arg-type]
            made[key].submit(made[key].profile())
            made[key].until_done()
        return made[key]

    return run


def equal(run: Tiny, other: Tiny) -> None:
    """Hold that a run made the same steps from the same samples to the same weights, bit by bit, and lost none."""
    assert sorted(run.losses()) == list(range(1, run.steps + 1))
    assert run.losses() == other.losses()
    assert run.weights() == other.weights() != []
    assert run.consumed() == other.consumed() == run.steps * 32


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Writes down that a test's run came to its end, how soon what struck it was noticed, and a step made again.

    One file for each row, in the folder that COATNET_MEASURED names; tests/benchmarks/slurm_recovery.py reads them.
    """

    def write(run: Tiny, struck: float = math.inf) -> None:
        noticed = [row["time"] for kind in ("hung", "ended") for row in run.events(kind) if row["time"] > struck]
        begun = [row["time"] for row in run.events("try") if row["time"] > struck]
        again = [row["time"] for row in run.rows() if begun and row["time"] > begun[0]]
        hung = [row["named"] for row in run.events("hung") if row["time"] > struck]
        told = {
            "row": request.node.name,
            "noticed": min(noticed) - struck if noticed else None,
            "step": again[0] - struck if again else None,
            "named": hung[0] if hung else "",
        }
        folder = os.environ.get("COATNET_MEASURED")
        print(told)
        if folder:
            (Path(folder) / f"{request.node.name}.json").write_text(json.dumps(told, indent=1))

    return write
