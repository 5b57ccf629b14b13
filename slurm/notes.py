"""What the supervisor writes into the run's folder and tells its owner; a disk that is away does not stop it.

Python 3.9 and the standard library only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from slurm.decide import Budget
from slurm.job import Job, write_whole

BUDGET = "budget.json"  # in the supervisor's own folder


class Notes:
    """The notes of one supervisor.

    Attributes:
        place: what every event tells of where it happened.
    """

    def __init__(self, job: Job, environment: Mapping[str, str], aloud: bool) -> None:
        """Make the folders.

        Args:
            job: whose.
            environment: of the command that is told of events.
            aloud: whether the supervisor has a log of its own; else a person reads along.
        """
        self._job, self._environment, self._aloud = job, environment, aloud
        self.folder = Path(job.folder)
        self.place: dict[str, str] = {}
        for path in (job.state, self.folder / "logs", self.folder / "events"):
            path.mkdir(parents=True, exist_ok=True)

    def event(self, kind: str, **facts: object) -> None:
        """A line in events/agent.jsonl, of which this process is the only writer."""
        line = json.dumps({"time": time.time(), "event": kind, **self.place, **facts})
        try:
            with (self.folder / "events" / "agent.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            self.say(f"events/agent.jsonl: {error}: {line}")

    def say(self, text: str) -> None:
        """A line for the job's own log, or for the person who gave the command."""
        to = sys.stdout if self._aloud else sys.stderr
        print(f"[{time.strftime('%FT%T')} try {self.place.get('try', '-')}] {text}", file=to, flush=True)

    def notify(self, event: str, why: str = "") -> None:
        """Run the user's command; what it does is not waited for longer than a minute."""
        if not self._job.notify:
            return
        told = {**self._environment, "COATNET_EVENT": event, "COATNET_RUN": self._job.folder, "COATNET_WHY": why}
        try:
            subprocess.run(self._job.notify, shell=True, env=told, stdin=subprocess.DEVNULL, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            self.say(f"notify: {error}")

    def has(self, name: str) -> bool:
        """Whether a file of the run is there: done, stop."""
        try:
            return (self.folder / name).exists()
        except OSError as error:
            self.say(f"{name}: {error}")
            return False

    def saved(self) -> int:
        """The step of the run's newest checkpoint, 0 for none."""
        try:
            found = [path.parent.name for path in self.folder.glob("checkpoints/step-*/COMPLETE")]
        except OSError as error:
            self.say(f"checkpoints: {error}")
            return 0
        steps = [name.partition("-")[2] for name in found]
        return max((int(step) for step in steps if step.isdecimal()), default=0)

    def load(self) -> Budget:
        """The budget that the last life left; a fresh one where there is none, or none that can be read."""
        try:
            told = json.loads((self._job.state / BUDGET).read_text(encoding="utf-8"))
            slow = {str(host): float(times) for host, times in told["slow_nodes"].items()}
            return Budget(
                int(told["crashes"]), int(told["furthest"]), list(told["bad_nodes"]), slow, int(told["final"])
            )
        except FileNotFoundError:
            return Budget()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.say(f"{BUDGET}: {error}: counted anew")
            return Budget()

    def keep(self, budget: Budget) -> None:
        """Write the budget down for the next life."""
        try:
            write_whole(self._job.state / BUDGET, json.dumps(vars(budget)))
        except OSError as error:
            self.say(f"{BUDGET}: {error}")
