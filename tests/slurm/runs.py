"""Tiny runs of the demo as jobs of the lab's cluster: submitted as a user does, struck, and compared to the end."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.slurm.lab import Lab

ROOT = Path(__file__).resolve().parents[2]
PROFILE = """
gpus = false
partition = "low"
interface = "lo"
signal_seconds = 60
grace_seconds = 20
pause_seconds = 1
{more}
[environment]
{environment}
[sbatch]
exclusive = true
{sbatch}
"""


@dataclass(frozen=True)
class Outcome:
    """A command's exit code and what it printed."""

    code: int
    said: str


@dataclass
class Tiny:
    """A tiny run.

    Attributes:
        folder: the run's.
        steps: of the whole.
        nodes, per_node: what it runs on.
        tree: the code that it is submitted from.
    """

    lab: Lab
    folder: Path
    digits: Path
    steps: int = 24
    nodes: str = "2"
    per_node: int = 1
    words: tuple[str, ...] = ()
    tree: Path = ROOT
    jobs: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Of the commands: SLURM's and this tree's code; faults can be struck."""
        path = os.pathsep.join([str(self.tree), str(Path(__file__).parent / "strike")])
        return {**self.lab.environment, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}

    def profile(self, more: str = "", environment: str = "", sbatch: str = "") -> str:
        """Write the cluster's profile; its path."""
        path = self.folder.parent / f"{self.folder.name}.toml"
        path.write_text(PROFILE.format(more=more, environment=environment, sbatch=sbatch))
        return str(path)

    def command(self, *words: str) -> Outcome:
        """`coatnet WORDS`."""
        done = subprocess.run(
            [sys.executable, "-m", "trainer.cli", *words],
            env=self.environment, cwd=self.folder.parent, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout + done.stderr)

    def settings(self) -> dict[str, object]:
        """What makes the demo tiny."""
        return {
            "data.path": self.digits, "runs": self.folder.parent, "name": self.folder.name, "optim.steps": self.steps,
            "model.resolution": 32, "optim.warmup-steps": 4, "tracking.log-every": 1, "checkpoint.every": 4,
            "norm.replica-batch": 16, "data.global-batch": 32, "cluster.end-time": "2100-01-01",
        }  # fmt: skip

    def submission(self, profile: str, *words: str) -> Outcome:
        """`coatnet submit` of this run."""
        own = [word for name, value in self.settings().items() for word in (f"--{name}", str(value))]
        place = ["--nodes", self.nodes, "--gpus-per-node", str(self.per_node), "--cluster", profile, "--time", "20"]
        return self.command("submit", "demo-digits", *place, *own, "--tracking.no-mlflow", *self.words, *words)

    def submit(self, profile: str, *words: str) -> list[str]:
        """Submit it; the jobs' numbers."""
        outcome = self.submission(profile, *words)
        assert outcome.code == 0, outcome.said
        self.jobs = json.loads((self.folder / "job.json").read_text())["jobs"]
        return self.jobs

    def rows(self) -> list[dict[str, Any]]:
        """The figures of all steps, in the order in which they were made."""
        return [row for row in lines(self.folder / "metrics.jsonl") if "train/loss" in row]

    def losses(self) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm by step; of a step that was made again, the last."""
        return {row["step"]: (row["train/loss"], row["train/grad_norm"]) for row in self.rows()}

    def weights(self) -> list[str]:
        """Checksums of the last checkpoint's tensors, rank by rank."""
        found = sorted((self.folder / "checkpoints" / f"step-{self.steps:08d}").glob("*.safetensors"))
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in found]

    def consumed(self) -> int:
        """Samples that the last checkpoint's data cursor has left behind."""
        state = json.loads((self.folder / "checkpoints" / f"step-{self.steps:08d}" / "state.json").read_text())
        return int(state["order"]["consumed"])

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the supervisor wrote down."""
        return [row for row in lines(self.folder / "events" / "agent.jsonl") if row["event"] == kind]

    def decisions(self) -> list[str]:
        """What the supervisor did after each try."""
        return [row["action"] for row in self.events("decide")]

    def reached(self, step: int, since: float = 0.0) -> bool:
        """Whether a step after so many updates was made, since a time."""
        return any(row["step"] >= step and row["time"] > since for row in self.rows())

    def until_step(self, step: int, since: float = 0.0) -> None:
        """Wait for a step."""
        self.lab.until(lambda: self.reached(step, since), f"step {step} of {self.folder}", self.failed, hurry=True)

    def until_done(self) -> None:
        """Wait for the end of the training and of the job."""
        self.lab.until((self.folder / "done").exists, f"the end of {self.folder}", self.failed, hurry=True)
        self.lab.until(lambda: self.state() == "COMPLETED", "the job's end")

    def failed(self) -> str:
        """Why waiting is of no use any more."""
        over = [state for state in ("FAILED", "CANCELLED", "TIMEOUT") if self.jobs and self.state() == state]
        return f"the job is {over[0]}:\n{self.log()}" if over and len(self.jobs) == 1 else ""

    def state(self) -> str:
        """What the controller says of the (last) job."""
        return self.lab.state(self.jobs[-1])

    def log(self) -> str:
        """The supervisor's own log."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("submitit/*_log.*")))

    def rank(self, number: int) -> int:
        """Process id of a rank of the newest try."""
        name = self.events("try")[-1]["try"]
        deadline = time.monotonic() + 60
        while True:
            for path in Path("/proc").glob("[0-9]*/environ"):
                with contextlib.suppress(OSError):
                    told = path.read_bytes().split(b"\0")
                    wanted = (f"COATNET_TRY={name}".encode(), f"SLURM_PROCID={number}".encode())
                    program, *words = (path.parent / "cmdline").read_bytes().split(b"\0")
                    # srun has the same words behind its own, and the batch script's SLURM_PROCID, which is 0.
                    own = b"slurm.rank" in words and not program.endswith(b"srun")
                    if own and all(word in told for word in wanted):
                        return int(path.parent.name)
            assert time.monotonic() < deadline, f"rank {number} of {name} is not there"
            time.sleep(0.1)

    def strike(self, number: int, what: int = signal.SIGKILL) -> float:
        """Send a rank a signal; when, in unix time."""
        os.kill(self.rank(number), what)
        return time.time()

    def preempt(self) -> float:
        """Have a job of a higher partition take the nodes for a moment; when, in unix time."""
        nodes = ",".join(self.events("try")[-1]["nodes"])
        wanted = ["sbatch", "--parsable", "-p", "main", "-w", nodes, "-N", str(nodes.count(",") + 1), "--exclusive"]
        self.lab.ask(*wanted, "-o", "/dev/null", "--wrap", "sleep 1")
        return time.time()


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(row) for row in rows if row.endswith("}\n")]
