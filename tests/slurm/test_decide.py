"""What the supervisor does after each kind of end, and how its budget is charged."""

import pytest

from slurm.decide import UNKNOWN, Budget, Ended, decide

TABLE = {
    "finished": (Ended(0, done=True), "finish", 0),
    "finished although killed after": (Ended(137, done=True), "finish", 0),
    "a check of some steps": (Ended(0), "finish", 0),
    "bad input": (Ended(76), "finish", 76),
    "diverged": (Ended(77), "finish", 77),
    "time limit told by the ranks, no scheduler": (Ended(75, outside=UNKNOWN), "requeue", 0),
    "stop file": (Ended(75, wanted=True, outside="RUNNING"), "finish", 75),
    "time limit": (Ended(75, asked="time", outside="RUNNING"), "requeue", 0),
    "time limit, ranks stuck": (Ended(137, asked="time", outside="RUNNING"), "requeue", 0),
    "preempted, batch signalled": (Ended(75, asked="term", outside="RUNNING"), "requeue", 0),
    "preempted, steps signalled": (Ended(75, outside="RUNNING", preempted=True), "requeue", 0),
    "preempted while starting": (Ended(143, outside="RUNNING", preempted=True), "requeue", 0),
    "preempted while stuck": (Ended(137, hung=True, outside="RUNNING", preempted=True), "requeue", 0),
    "stopped by themselves before the end": (Ended(75, outside="RUNNING"), "requeue", 0),
    "one fails, and takes starting ones along": (Ended(143, outside="RUNNING"), "again", 0),
    "cancelled": (Ended(75, asked="term", outside="COMPLETING"), "leave", 75),
    "cancelled, steps only": (Ended(75, outside="COMPLETING"), "leave", 75),
    "cancelled while stuck": (Ended(137, asked="term", outside="COMPLETING"), "leave", 75),
    "Ctrl-C on one machine": (Ended(75, asked="term"), "finish", 75),
    "node lost": (Ended(1, lost=("n2",), outside="RUNNING"), "requeue", 0),
    "raised": (Ended(1, outside="RUNNING"), "again", 0),
    "killed": (Ended(137, outside="RUNNING"), "again", 0),
    "hung": (Ended(137, hung=True, outside="RUNNING"), "again", 0),
    "hung, left politely": (Ended(75, hung=True, outside="RUNNING"), "again", 0),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_end_has_its_consequence(name: str) -> None:
    ended, action, code = TABLE[name]
    decision = decide(ended, Budget(), crashes=3, requeue=True)
    assert (decision.action, decision.code) == (action, code)
    assert decision.why


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row[1] == "requeue"])
def test_a_chain_goes_on_in_its_next_job(name: str) -> None:
    decision = decide(TABLE[name][0], Budget(), crashes=3, requeue=False)
    assert (decision.action, decision.code) == ("finish", 75)


@pytest.mark.parametrize("code", [1, 137])
def test_a_crash_loop_gives_up_with_its_own_code(code: int) -> None:
    budget = Budget()
    actions = [decide(Ended(code, saved=7), budget, crashes=3, requeue=True) for _ in range(4)]
    assert [decision.action for decision in actions] == ["again", "again", "again", "finish"]
    assert actions[-1].code == code


def test_progress_gives_the_budget_back() -> None:
    budget = Budget()
    for saved in (10, 10, 10, 11, 11, 11, 500):
        assert decide(Ended(1, saved=saved), budget, crashes=3, requeue=True).action == "again"
    assert budget.crashes == 1
    # An older checkpoint after a damaged one is no progress.
    for _ in range(2):
        assert decide(Ended(1, saved=20), budget, crashes=3, requeue=True).action == "again"
    assert decide(Ended(1, saved=20), budget, crashes=3, requeue=True).action == "finish"


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row[1] in ("requeue", "leave")])
def test_what_is_nobodys_fault_costs_nothing(name: str) -> None:
    budget = Budget(crashes=3, furthest=5)
    decide(TABLE[name][0], budget, crashes=3, requeue=True)
    assert budget == Budget(crashes=3, furthest=5)
