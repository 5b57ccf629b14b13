"""`coatnet eval`: the scores of a run's newest checkpoint on the held-out split."""

import json
import sys
from pathlib import Path

from configs import resolve
from configs.errors import InputError

EVAL_USAGE = """usage: coatnet eval RUN [--json]

Scores the newest verified checkpoint of the run folder RUN on the held-out split, on all devices of this machine."""


def eval_command(arguments: list[str]) -> int:
    """`coatnet eval RUN [--json]`: returns the exit code."""
    names = [word for word in arguments if not word.startswith("-")]
    options = set(arguments) - set(names)
    if options & {"-h", "--help"} or not arguments:
        sys.stdout.write(EVAL_USAGE + "\n")
        return 0
    if options - {"--json"} or len(names) != 1:
        raise InputError(f"coatnet eval takes one run folder and --json, not {' '.join(arguments)}")
    from trainer import cluster
    from trainer.launch import free_port, launch

    folder = Path(names[0])
    if not (folder / "run.json").exists():
        raise InputError(f"{folder}: not a run folder (it has no run.json); `coatnet train` makes them under runs/")
    run = resolve.recorded(folder / "run.json")
    on_cpu = cluster.device_kind(run) == "cpu"
    world = cluster.local_ranks(run)
    patience = run.cluster.timeout
    code = launch(
        ["trainer.evaluation.evaluate_run", str(folder)], world, folder / "logs", free_port(), on_cpu, patience
    )
    if code == 0:
        from trainer.evaluation.evaluate import describe

        scores = json.loads((folder / "evaluation.json").read_text())
        print(json.dumps(scores) if "--json" in options else f"step {scores['step']}: {describe(scores)}")
    return code
