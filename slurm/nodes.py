"""Whether a job's nodes are fit: each answers, the preflight command succeeds there, and none is unlike the others.

Python 3.9 and the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from slurm.logs import last_lines
from slurm.preflight import odd

ANSWER = 90.0  # seconds in which every node must have started a step
PATIENCE = 900.0  # seconds that a preflight command may take
GOOD, BAD = "healthy", "unhealthy"


def unfit(
    hosts: Sequence[str], command: Sequence[str], stem: Path, environment: dict[str, str], srun: Sequence[str] = ()
) -> dict[str, str]:
    """The hosts that are not fit, each with what it said.

    Where no host answers at all the scheduler is the one that does not work: then none is blamed.

    Args:
        hosts: nodes of the job around this process.
        command: words that are run on each, as a step of the job; empty: it is enough that they answer.
        stem: of files with what the nodes say, followed by their names.
        environment: of the step.
        srun: more options for srun, such as the container that the ranks run in.
    """
    script = f"({' '.join(command)}) && echo {GOOD} || echo {BAD}" if command else f"echo {GOOD}"
    words = ["srun", "--overlap", f"--nodes={len(hosts)}", f"--nodelist={','.join(hosts)}", f"--ntasks={len(hosts)}"]
    words += ["--ntasks-per-node=1", "--kill-on-bad-exit=0", f"--output={stem}.%N", *srun, "bash", "-c", script]
    told = {**environment, "COATNET_ASKED_AT": str(time.time())}
    step = subprocess.Popen(words, env=told, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        step.wait(timeout=PATIENCE if command else ANSWER)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(step.pid, signal.SIGKILL)
        step.wait()
    said = {host: last_lines(Path(f"{stem}.{host}"), 1000) for host in hosts}
    if not any(said.values()):
        return {}
    bad = {host: reason(text) for host, text in said.items() if text.splitlines()[-1:] != [GOOD]}
    return bad or odd(said, hosts)


def reason(text: str) -> str:
    """What a node that is not fit said of that: the findings that are bad, else its last words."""
    lines = [line for line in text.splitlines() if line != BAD]
    found = [line.partition("BAD")[2].strip() for line in lines if line.startswith("BAD")]
    return "; ".join(found or lines[-2:]) or "no answer"
