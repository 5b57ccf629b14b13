"""One rank that walks several runs one after the other in one process group, and writes what it saw of each."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from configs import resolve
from trainer import cluster
from trainer.health.stopping import StopFlag

Case = dict[str, Any]  # "run", as JSON, and what the work wants beside it


def walk(
    cases_file: str, out_file: str, work: Callable[[Case, cluster.Member, StopFlag], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Do the work for every case of a file, write the answers to OUT.RANK, and leave the group."""
    cases: dict[str, Case] = json.loads(Path(cases_file).read_text())
    first = resolve.from_json(json.dumps(next(iter(cases.values()))["run"]))
    stop = StopFlag()
    member = cluster.join(replace(first, parallel=replace(first.parallel, pipeline=1)))
    torch.set_num_threads(1)
    answers = {name: work(case, member, stop) for name, case in cases.items()}
    Path(f"{out_file}.{member.rank}").write_text(json.dumps(answers))
    cluster.leave()
    return answers
