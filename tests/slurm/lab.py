"""The cluster that tests run jobs on, and the ways to break it: `tests/slurm/cluster/*.sh` from Python."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent / "cluster"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd")
LIMIT = 300.0  # seconds that anything may take


def obstacle() -> str:
    """Why no cluster can be started on this machine; empty where one can."""
    if os.geteuid():
        return "it needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (`make test-slurm` installs Debian's packages)"
    return ""


@dataclass(frozen=True)
class Lab:
    """A running cluster.

    Attributes:
        folder: everything of it.
    """

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """In which SLURM's commands talk to it."""
        return {**os.environ, "LAB": str(self.folder), "SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *words: str) -> str:
        """What a command of SLURM prints; asked again where a busy machine has the controller drop the connection."""
        for _ in range(3):
            done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=120)
            if "Connection reset" not in done.stderr and "timed out" not in done.stderr:
                break
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def node(self, *words: str) -> str:
        """Break or mend a node: `node.sh`."""
        return self.ask(str(SCRIPTS / "node.sh"), *words)

    def state(self, job: str) -> str:
        """What the controller says of a job."""
        told = self.ask("scontrol", "-o", "show", "job", job).split()
        return next(word.partition("=")[2] for word in told if word.startswith("JobState="))

    def heal(self) -> None:
        """Every node is there again, and no job."""
        if self.ask("squeue", "-h"):
            subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=self.environment, timeout=60)
            subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=60)
            self.until(lambda: not self.ask("squeue", "-h"), "every job's end")
        self.until(self._whole, "4 nodes")

    def _whole(self) -> bool:
        """Whether all nodes are idle; those that are broken are mended."""
        states = dict(line.split() for line in self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines())
        for node, state in states.items():
            if state not in ("idle", "completing"):
                self.node("restore", node)
        return list(states.values()) == ["idle"] * 4

    def until(
        self, there: Callable[[], object], what: str, hopeless: Callable[[], str] = str, hurry: bool = False
    ) -> None:
        """Wait for something.

        Args:
            what: to come, for the message.
            hopeless: says why there is no use in waiting any more, or nothing.
            hurry: jobs that were queued again start at once.
        """
        deadline = time.monotonic() + LIMIT
        while not there():
            assert time.monotonic() < deadline, f"{what}: not within {LIMIT:.0f} s"
            reason = hopeless()
            assert not reason, f"{what}: {reason}"
            if hurry:
                self.node("hurry")
            time.sleep(0.3)


def start() -> Lab:
    """Start a cluster, or take the one of `with.sh` around this process."""
    lab = Lab(Path(os.environ.get("LAB", "")))
    if os.environ.get("LAB") and (lab.folder / "run" / "slurmctld.pid").exists():
        return lab
    lab = Lab(Path(os.environ.get("TMPDIR", "/tmp")) / f"coatnet-slurm-{os.getpid()}")
    subprocess.run([str(SCRIPTS / "up.sh")], env=lab.environment, check=True, timeout=LIMIT)
    return lab


def end(lab: Lab) -> None:
    """End a cluster that `start` started; one of `with.sh` goes on."""
    if os.environ.get("LAB") != str(lab.folder):
        subprocess.run([str(SCRIPTS / "down.sh"), "--purge"], env=lab.environment, check=True, timeout=LIMIT)
