"""Which exit code of a step's tasks says why it ended."""

import pytest

from slurm.spawn import telling_code

STOPPED = (
    "srun: error: n1: tasks 0-1: Exited with exit code 75\nsrun: launch/slurm: _step_signal: Terminating StepId=1.0\n"
)


@pytest.mark.parametrize(
    ("said", "code", "telling"),
    [
        ("", 0, 0),
        ("srun: error: something of the network\n", 1, 1),
        ("srun: error: n2: task 1: Exited with exit code 9\nsrun: error: n1: task 0: Terminated\n", 143, 9),
        ("srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 1\n", 137, 137),
        ("srun: error: n1: task 0: Terminated\nsrun: error: n2: tasks 1-3: Exited with exit code 76\n", 143, 76),
        (STOPPED + "srun: error: n2: task 2: Killed\n", 137, 75),
        ("srun: error: n1: task 0: Segmentation fault (core dumped)\n", 139, 139),
        ("srun: error: n1: task 0: Some other signal\n", 150, 150),
    ],
)
def test_the_task_that_failed_first_or_says_most(said: str, code: int, telling: int) -> None:
    assert telling_code(said, code) == telling
