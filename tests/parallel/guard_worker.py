"""One rank that trains several runs, one after the other, with something wrong put into each.

    python -m tests.parallel.guard_worker CASES.json OUT        (RANK, WORLD_SIZE, MASTER_* set)

The whole road is walked, as `coatnet train` does; only the process group is kept from one run to the next.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

from configs import resolve
from tests.parallel import cases
from trainer import cluster, train
from trainer.health.guard import Guard
from trainer.health.sabotage import Harm, Saboteur
from trainer.health.stopping import StopFlag


def late(lag: int, make: Callable[..., Guard], *args: Any) -> Guard:
    """A guard whose numbers arrive so many steps after their own."""
    made = make(*args)
    made._lag, made.delay = lag, 1 + lag
    return made


def trained(case: cases.Case, base: cluster.Member, stop: StopFlag) -> dict[str, Any]:
    """One run: its exit code, and the global indices of each step."""
    run = resolve.from_json(json.dumps(case["run"]))
    member = cluster.in_mesh(base, run.parallel.pipeline, timedelta(seconds=run.cluster.timeout))
    saboteur = Saboteur(Harm.of(case["harm"]), member.rank)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(cluster, "join", return_value=member))
        stack.enter_context(mock.patch.object(cluster, "leave"))
        stack.enter_context(saboteur.at_work())
        stack.enter_context(mock.patch.object(train, "Guard", partial(late, case["lag"], saboteur.guard)))
        code = train.train(run, stop)
    return {"code": code, "seen": saboteur.seen}


def main(cases_file: str, out_file: str) -> None:
    """Run every case and let each rank write what it saw. A single case ends with its own code."""
    answers = cases.walk(cases_file, out_file, trained)
    if len(answers) == 1:
        sys.exit(next(iter(answers.values()))["code"])


if __name__ == "__main__":
    main(*sys.argv[1:])
