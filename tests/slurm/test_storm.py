"""One run through much of what can happen, on two nodes: it ends as an undisturbed one does, bit by bit."""

from collections.abc import Callable

import pytest

from tests.slurm.conftest import Make, equal
from tests.slurm.runs import Tiny
from tests.slurm.strike.sitecustomize import HANG_IN_C, RAISE

pytestmark = [pytest.mark.slurm, pytest.mark.slow]  # three minutes; with `make slow-slurm`


def test_a_run_survives_what_happens_to_it(tiny: Make, undisturbed: Callable[..., Tiny]) -> None:
    run = tiny("run", steps=60)
    run.submit(run.profile(more='notify = "echo $COATNET_EVENT >>$COATNET_RUN/told"'))
    run.until_step(5)
    struck = run.strike(1, RAISE)
    run.until_step(15, struck)
    struck = run.strike(0)
    run.until_step(25, struck)
    struck = run.strike(0, HANG_IN_C)
    run.until_step(35, struck)
    struck = run.preempt()
    run.until_step(45, struck)
    run.until_done()
    assert run.decisions() == ["again", "again", "again", "requeue", "finish"]
    assert [(row["code"], row["hung"]) for row in run.events("ended")][:2] == [(1, False), (137, False)]
    hung = run.events("hung")
    assert [row["ranks"] for row in hung] == [[0]]
    assert "hang_in_c" in hung[0]["named"]
    assert "1 of 2 ranks wait in gloo:" in hung[0]["named"]
    assert "RuntimeError: a fault, on purpose" in run.log()
    assert (run.folder / "told").read_text().split() == ["start", *["fault"] * 4, "start", "done"]
    equal(run, undisturbed(steps=60))
