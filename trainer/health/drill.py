"""Faults of real runs, made on purpose: each hits a tiny run of real processes, which must notice it and go on.

The run is `coatnet train` as anybody starts it, on the demo's digits at 32 pixels. Its own supervisor starts its ranks
again; a fault that ends the command itself is followed by the same command, started by the drill. The losses of all
steps are then held against those of a run that nothing disturbed, or that left the bad batches out from the start; on
CPUs they must be the same to the last bit.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.health import ettr
from trainer.health.faults import AT, CATALOGUE, WITHOUT
from trainer.health.scene import DrillError, Scene

STEPS, EVERY = 40, 5  # of the run; between saves
# So that little training is needed to know what is usual, and only what was put in is a spike.
GUARD = ["--guard.window", "8", "--guard.spike-z", "40", "--guard.drift-every", "5", "--guard.rollback-steps", "2"]
GUARD += ["--guard.skip-batches", "4", "--guard.nonfinite", "rollback", "--guard.spike", "rollback"]
CLOSE = 1e-3  # losses on GPUs, whose kernels add in an order of their own


@dataclass(frozen=True)
class Result:
    """What became of one fault.

    Attributes:
        problem: why it was not survived; empty where it was.
        detection: seconds from the fault until it was acted upon.
        recovery: from then until the next finished step.
        code: exit code of the command that was hit, None where it ran on.
        repeated: steps that were made again.
        losses: "bitwise", or the largest difference to the undisturbed run.
    """

    fault: str
    problem: str = ""
    detection: float | None = None
    recovery: float | None = None
    code: int | None = None
    repeated: int = 0
    losses: str = ""


Losses = dict[int, tuple[float, float]]  # and gradient norms, by step


def practise(name: str, scene: Scene, undisturbed: Losses, exact: bool) -> Result:
    """Put one fault to a run; what became of it."""
    fault = CATALOGUE[name]
    try:
        scene.start()
        scene.until(lambda: any(row["step"] >= AT for row in scene.rows()), f"step {AT}")
        struck = time.time()
        struck = fault.strike(scene) or struck
        code = None
        if fault.codes:
            code = scene.end()
            noticed = time.time()
            if code not in fault.codes:
                raise DrillError(f"ended with exit code {code}, not with {' or '.join(map(str, fault.codes))}")
            scene.mend()
            made = len(scene.rows())
            begun = time.time()
            scene.start()
            scene.until(lambda: len(scene.rows()) > made or scene.events("done"), "the next step")
            if fault.noticed is not None:  # only the next start can see it
                struck, noticed = begun, fault.noticed(scene)
        else:
            tells = fault.noticed
            assert tells is not None
            noticed = scene.until(lambda: tells(scene), "its notice")
            scene.mend()
        back = scene.until(lambda: _first_after(scene, noticed), "the next step", running=False)
        if (ended := scene.end()) != 0:
            raise DrillError(f"the run that went on ended with exit code {ended}")
        losses, problem = compare(scene.losses(), undisturbed, exact)
        repeated = len(scene.rows()) - len(scene.losses())
        return Result(name, problem, noticed - struck, back - noticed, code, repeated, losses)
    except DrillError as error:
        return Result(name, f"{error}; see {scene.folder}.log")
    finally:
        scene.kill()


def compare(found: Losses, wanted: Losses, exact: bool) -> tuple[str, str]:
    """How two runs' losses compare, in words, and what is wrong with that, or nothing."""
    if set(found) != set(wanted):
        return "", f"made the steps {sorted(set(wanted) ^ set(found))} in one run only"
    if found == wanted:
        return "bitwise", ""
    worst = max(abs(found[step][0] - wanted[step][0]) / abs(wanted[step][0]) for step in wanted)
    bad = exact or worst > CLOSE
    return f"within {worst:.1e}", f"the losses differ from the undisturbed run's by {worst:.1e}" if bad else ""


def _first_after(scene: Scene, moment: float) -> float:
    """When the first step after a moment was told of; 0 for not yet."""
    return next((float(row["time"]) for row in scene.rows() if row["time"] > moment), 0.0)


def scene_of(name: str, folder: Path, ranks: int, digits: Path, steps: int = STEPS) -> Scene:
    """A run named after its fault, with a copy of the data set."""
    data = folder / "data" / name
    shutil.copytree(digits, data, dirs_exist_ok=True)
    words = ["--data.path", str(data), "--runs", str(folder), "--name", name, "--model.resolution", "32"]
    words += ["--optim.steps", str(steps), "--optim.warmup-steps", "4", "--checkpoint.every", str(EVERY)]
    words += ["--tracking.log-every", "1", "--tracking.no-mlflow", "--data.workers", "1"]
    words += [*(["--cluster.ranks", str(ranks)] if ranks else []), *GUARD]
    return Scene(folder / name, data, words)


def drill(names: list[str], folder: Path, ranks: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Practise faults in `folder`, one after the other.

    Args:
        ranks: processes of the run; 0: what `coatnet train` takes here.
        say: takes what is going on.

    Returns:
        {"device", "ranks", "results": [Result as dict], "costs", "ettr": {"drill", "7.9 h", "1 h"}}; costs and ettr are
        None where no fault ended the ranks.

    Raises:
        DrillError: the run fails without a fault too.
    """
    from data_pipeline.building import demo

    demo.digits(folder / "digits")
    start, calm = undisturbed("undisturbed", folder, ranks, None, say)
    exact, others = start["device"] == "cpu", calm
    if any(CATALOGUE[name].without for name in names):
        _, others = undisturbed("without", folder, ranks, {"skipped": list(WITHOUT)}, say)
    results: list[Result] = []
    for name in names:
        fault = CATALOGUE[name]
        if start["world"] < fault.ranks:
            say(f"{name}: left out, it needs {fault.ranks} ranks (--ranks)")
            continue
        say(f"{name}: {fault.purpose}")
        scene = scene_of(name, folder, ranks, folder / "digits")
        scene.harm = fault.harm(start["world"] - 1) if fault.harm is not None else None
        results.append(practise(name, scene, others if fault.without else calm, exact))
    rows = [vars(result) for result in results]
    return {"device": start["device"], "ranks": start["world"], "results": rows, **_ratios(folder, results)}


def undisturbed(
    name: str, folder: Path, ranks: int, harm: dict[str, Any] | None, say: Callable[[str], object]
) -> tuple[dict[str, Any], Losses]:
    """The event of its start, and the losses, of a run to compare with.

    Args:
        harm: no more than batches that it leaves out.

    Raises:
        DrillError: it fails, or its guard acts.
    """
    say("the undisturbed run" + (" without the batches that a rollback leaves out" if harm else ""))
    scene = scene_of(name, folder, ranks, folder / "digits")
    scene.harm = harm
    scene.start()
    try:
        if (code := scene.end()) != 0:
            raise DrillError(f"the undisturbed run ended with exit code {code}; see {scene.folder}.log")
        if scene.events("rollback"):
            raise DrillError(f"the undisturbed run was rolled back; see {scene.folder}.log")
    finally:
        scene.kill()
    return scene.events("start")[0], scene.losses()


def _ratios(folder: Path, results: list[Result]) -> dict[str, Any]:
    """What the faults that ended the ranks cost on average, and the ratios foretold from that."""
    costs, ratios = [], []
    for result in results:
        found = ettr.measure(folder / result.fault)
        if found is not None and found.attempts > 1 and not result.problem:
            own = found.costs
            costs.append(ettr.Costs(result.detection or 0.0, own.restart, own.stall, own.write))
            ratios.append(found.ratio)
    if not costs:
        return {"costs": None, "ettr": None}
    whole = ettr.average(costs)
    foretold = {f"{hours:g} h": ettr.foretell(whole, hours * 3600) for hours in ettr.HOURS}
    return {"costs": vars(whole), "ettr": {"drill": sum(ratios) / len(ratios), **foretold}}
