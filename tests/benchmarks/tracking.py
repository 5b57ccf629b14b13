"""What tracking costs a step: the trainer's loop with MLflow in four states, alternated in one run.

    python tests/benchmarks/tracking.py [--ranks N] [--rounds N] [--steps N] [--out FOLDER]

off: no process carries anything. server: one carries every line to an MLflow server on this machine. down: to an
address where nobody listens. silent: to one that takes connections and never answers. A line is written after every
step, ten times as often as by default; the machine's figures every second. Ranks are real processes; with as many as
there are cores, the process that carries has none to itself.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from configs import resolve  # noqa: E402
from configs.schema import Run  # noqa: E402
from tests.benchmarks.overhead import run_of, timed, trainer_steps  # noqa: E402
from tests.pages import servers  # noqa: E402
from trainer import cluster  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.health import pulse  # noqa: E402
from trainer.health.goodput import Clock  # noqa: E402
from trainer.launch import free_port, launch  # noqa: E402
from trainer.machine import environment  # noqa: E402
from trainer.machine import watch as machine  # noqa: E402
from trainer.session import Session  # noqa: E402
from trainer.tracking.track import CarryProcess  # noqa: E402
from trainer.train import prepare  # noqa: E402

CASES = ("off", "server", "down", "silent")
SETTLE = 5.0  # seconds in which the process imports MLflow and finds its server, or none
PATIENCE = 1.0  # seconds it has to end, where the server does not answer


def tracked(run: Run, uri: str) -> Run:
    """The run with its lines at that MLflow; nowhere if there is none."""
    wish = replace(run.tracking, mlflow=bool(uri), uri=uri, log_every=1, system_every=1.0)
    return replace(run, tracking=wish)


def case_of(
    session: Session, uri: str, measure: Callable[[], float], steps: int, spent: list[float]
) -> Callable[[], float]:
    """Seconds a step while another process carries the run's lines to `uri`.

    Args:
        measure: makes the steps.
        steps: their number.
        spent: takes the processor time of this rank for each, which other programs on the machine hardly change.
    """

    def timing() -> float:
        run, folder = tracked(session.run, uri), session.folder
        writer = None
        if session.member.first:
            (folder / "run.json").write_text(resolve.to_json(run))
            writer = CarryProcess(run, folder) if uri else None
        time.sleep(SETTLE)
        began = time.process_time()
        seconds = measure()
        spent.append((time.process_time() - began) / steps)
        if writer is not None:
            writer.close(PATIENCE)
        return seconds

    return timing


def as_rank(run_file: str, uris: dict[str, str], rounds: int, steps: int, out: str) -> None:
    """One rank: measure the cases in turn; the first one writes the seconds per step."""
    run = resolve.from_json(Path(run_file).read_text())
    local_rank = cluster.local_rank()
    member = cluster.join(run)
    clock = Clock(member.world, time.time_ns())
    with pulse.beating(clock, member, local_rank) as beats:
        session = prepare(tracked(run, ""), member, clock, beats)
        measure = timed(steps, trainer_steps(session, steps))
        measure()
        spent: dict[str, list[float]] = {name: [] for name in uris}
        cases = {name: case_of(session, uri, measure, steps, spent[name]) for name, uri in uris.items()}
        with machine.watched(session.folder, 1.0, lambda: session.step, session.meter.energy):
            samples = bench.alternate(cases, rounds)
        if member.first:
            samples |= {f"{name}, processor": values for name, values in spent.items()}
            Path(out).write_text(json.dumps({"device": member.device_name, "samples": samples}))
        session.line.close()
        cluster.leave()


@contextmanager
def addresses(folder: Path) -> Iterator[dict[str, str]]:
    """Where the lines of each case go."""
    with (
        servers.mlflow_server(folder, f"sqlite:///{folder}/mlflow.db") as server,
        socket.create_server(("127.0.0.1", 0), backlog=512) as silent,
    ):
        down = f"http://127.0.0.1:{free_port()}"
        yield {"off": "", "server": server.uri, "down": down, "silent": f"http://127.0.0.1:{silent.getsockname()[1]}"}


def compared(ours: list[float], plain: list[float]) -> str:
    """How much more than without tracking, round by round: the median, and the middle half."""
    ratios = sorted(a / b - 1 for a, b in zip(ours, plain, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return f"{bench.median_ratio(ours, plain) - 1:+.1%} ({low:+.1%} to {high:+.1%})"


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description="what tracking costs a step")
    parser.add_argument("--ranks", type=int, default=0, help="processes; 0: one per GPU, or two on a CPU")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=10, help="of each case in a round")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "records", help="folder of the record")
    parser.add_argument("--rank", nargs=3, metavar=("RUN", "URIS", "OUT"), help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.rank:
        as_rank(words.rank[0], json.loads(words.rank[1]), words.rounds, words.steps, words.rank[2])
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = words.ranks or (torch.cuda.device_count() if device == "cuda" else 2)
    with tempfile.TemporaryDirectory() as folder, addresses(Path(folder)) as uris:
        run = run_of("nano", ranks, device, folder)
        run_file, out, logs = Path(folder) / "run.json", Path(folder) / "samples.json", Path(folder) / "logs"
        run_file.write_text(resolve.to_json(run))
        command = ["tests.benchmarks.tracking", "--rank", str(run_file), json.dumps(uris), str(out)]
        command += ["--rounds", str(words.rounds), "--steps", str(words.steps)]
        if launch(command, ranks, logs, free_port(), device == "cpu"):
            raise RuntimeError((logs / "rank-00000.log").read_text())
        found = json.loads(out.read_text())
    samples, plain = found["samples"], statistics.median(found["samples"]["off"])
    summary = {"step without tracking": f"{plain:.3f} s on {ranks} ranks"}
    for name in CASES[1:]:
        processor = compared(samples[f"{name}, processor"], samples["off, processor"])
        summary[name] = f"{compared(samples[name], samples['off'])} of the step, {processor} of its processor time"
    summary["rounds"] = f"{words.rounds}; in brackets the middle half of them"
    record = bench.Record(
        name=f"tracking-{ranks}-ranks",
        command=" ".join(["python tests/benchmarks/tracking.py", *sys.argv[1:]]),
        facts=environment.facts(found["device"]),
        config=resolve.flat(tracked(run, "MLflow")),
        unit="seconds per step",
        samples=samples,
        summary=summary,
    )
    print(json.dumps(summary, indent=1))
    print(f"wrote {record.write(words.out)}")


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(ROOT)
    main()
