"""How long the planner takes to look at every layout of a run, up to 4,096 GPUs. No torch.

    python tests/benchmarks/enumeration.py [FOLDER]

Each round makes a planner anew and lists its candidates, alternated over the cases. What depends on the network alone
(`models.cost`, `models.traffic`) is kept in the process and was counted before the rounds; "command" is a process of
`coatnet plan` from start to end, which counts it too. The limit is 2 s for 4,096 GPUs.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from configs import resolve  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.machine import devices, environment  # noqa: E402
from trainer.planning import answer  # noqa: E402
from trainer.planning.choose import Planner  # noqa: E402
from trainer.planning.data_set import Size  # noqa: E402
from trainer.planning.machines import Machines  # noqa: E402

ROUNDS = 7
LIMIT = 2.0  # seconds
COUNTS = (8, 512, 4096)
# recipe, other global batch (0: its own), pixels, classes
RUNS = (
    ("coatnet0-in1k-224", 0, 224, 1000),
    ("coatnet5-jft300m-224", 0, 224, 18_291),
    ("coatnet7-jft3b-224", 0, 224, 29_593),
    ("coatnet7-jft3b-224", 65_536, 512, 29_593),  # more micro-batches, and less fits
)


def planner(recipe: str, batch: int, size: int, classes: int, count: int) -> Planner:
    """A planner of a recipe for so many H100s, at assumed speeds."""
    run = resolve.load(recipe)
    run = replace(
        run,
        model=replace(run.model, resolution=size),
        data=replace(run.data, global_batch=batch or run.data.global_batch),
    )
    machines = Machines(devices.DEVICES["h100"], count, 8, 50e9)
    with tempfile.TemporaryDirectory() as nothing:
        return answer.planner_of(
            run, Size(3_000_000_000, classes, ""), machines, answer.rates_of(run, machines, Path(nothing))
        )


def enumerated(*case: str | int) -> float:
    """Seconds of a planner and all its candidates."""
    start = time.perf_counter()
    planner(*case).candidates()  # type: ignore[arg-type]
    return time.perf_counter() - start


def commanded(recipe: str, count: int) -> float:
    """Seconds of the whole command."""
    words = [sys.executable, "-m", "trainer.cli", "plan", recipe, "--gpus", str(count), "--gpu", "h100"]
    start = time.perf_counter()
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(folder: Path) -> None:
    """Measure and write."""
    cases: dict[str, Callable[[], float]] = {}
    layouts: dict[str, int] = {}
    for recipe, batch, size, classes in RUNS:
        for count in COUNTS:
            name = f"{recipe}{f' at {size} px, batch {batch}' if batch else ''}, {count} GPUs"
            cases[name] = partial(enumerated, recipe, batch, size, classes, count)
            layouts[name] = len(planner(recipe, batch, size, classes, count).candidates())
    cases["command, coatnet7-jft3b-224, 4096 GPUs"] = partial(commanded, "coatnet7-jft3b-224", 4096)
    samples = bench.alternate(cases, ROUNDS)
    most = {name: max(taken) for name, taken in samples.items()}
    wide = max((name for name in most if name.endswith("4096 GPUs")), key=most.__getitem__)
    record = bench.Record(
        name="planner-enumeration",
        command="python tests/benchmarks/enumeration.py",
        facts=environment.facts("cpu"),
        config={"rounds": ROUNDS, "device": "h100", "layouts": layouts, "limit of 4096 GPUs, s": LIMIT},
        unit="s",
        samples=samples,
        summary={
            **{
                name: f"{median(taken):.2f} s" + (f", {layouts[name]} layouts" if name in layouts else "")
                for name, taken in samples.items()
                if name.endswith("4096 GPUs")
            },
            "the slowest round of 4,096 GPUs": f"{most[wide]:.2f} s ({wide}; limit {LIMIT:g} s)",
        },
    )
    print("\n".join(f"{key}: {value}" for key, value in record.summary.items()))
    print(record.write(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "records")
