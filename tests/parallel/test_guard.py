"""What is put wrong into real runs of several processes is found, named, and undone to the bit."""

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from configs import resolve
from configs.guard import Guard
from configs.schema import (
    Augment,
    Checkpoint,
    Cluster,
    Data,
    Evaluate,
    Model,
    Norm,
    Optim,
    Parallel,
    Precision,
    Run,
    Tracking,
)  # fmt: skip
from data_pipeline.building.build import Picture, write_dataset
from trainer.launch import free_port, launch

BATCH, STEPS, BAD = 24, 14, 8  # samples; updates; number of the batch that something is wrong with, from 0
WATCH = Guard(window=8, rollback_steps=2, skip_batches=4, drift_every=3)
SKIPPED = [BAD - 2, BAD + 2]
ON_RANK_1 = BAD * BATCH + BATCH - 2  # a sample that the last rank sees
Case = dict[str, Any]


def write_pictures(folder: Path) -> None:
    """100 pictures of three classes."""

    def encoded(number: int) -> bytes:
        file = io.BytesIO()
        gradient = Image.linear_gradient("L").resize((32, 32)).rotate(120 * (number % 3) + number)
        gradient.convert("RGB").save(file, format="PNG")
        return file.getvalue()

    found = [Picture(f"p{n:04d}", "png", (n % 3,), f"p{n:04d}", partial(encoded, n)) for n in range(100)]
    write_dataset(found, folder, ["a", "b", "c"], "single", {}, 7)


def case(folder: Path, name: str, watch: Guard, **more: Any) -> Case:
    """A case of `guard_worker`; `parallel`, `steps` and `lag` change the run, the rest is the `sabotage.Harm`."""
    lag = more.pop("lag", 0)
    run = Run(
        recipe="guarded",
        name=name,
        runs=str(folder / "runs"),
        steps=more.pop("steps", STEPS),
        model=Model(name="coatnet-nano", resolution=32),
        norm=Norm(replica_batch=8, momentum=0.1),
        data=Data(path=str(folder / "data"), global_batch=BATCH, workers=0, lanes=6),
        augment=Augment(flip=False),
        optim=Optim(lr=1e-3, steps=100, warmup_steps=2, ema=0.9),
        parallel=Parallel(**{"zero": 1, "recompute": "none", **more.pop("parallel", {})}),
        precision=Precision(dtype="fp32"),
        checkpoint=Checkpoint(every=4, keep=9),
        evaluate=Evaluate(),
        tracking=Tracking(mlflow=False, log_every=1),
        cluster=Cluster(device="cpu", timeout=120),
        guard=watch,
    )
    resolve.check(run)
    return {"run": json.loads(resolve.to_json(run)), "harm": more, "lag": lag}


def train(folder: Path, cases: dict[str, Case], world: int) -> tuple[int, list[dict[str, Any]]]:
    """Run the cases on so many ranks; the exit code, and what each rank saw."""
    (folder / "cases.json").write_text(json.dumps(cases))
    words = ["tests.parallel.guard_worker", str(folder / "cases.json"), str(folder / "out")]
    code = launch(words, world, folder / "logs", free_port(), True, more={"OMP_NUM_THREADS": "1"})
    return code, [json.loads((folder / f"out.{rank}").read_text()) for rank in range(world)]


def events(folder: Path, name: str, kind: str) -> list[dict[str, Any]]:
    """The events of a kind in a run's log."""
    lines = (folder / "runs" / name / "events" / "rank-00000.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == kind]


def losses(folder: Path, name: str) -> dict[int, tuple[float | None, float | None]]:
    """Step to loss and gradient norm; of a step that came again, the last."""
    rows = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: (row.get("train/loss"), row.get("train/grad_norm")) for row in rows if "train/lr" in row}


def weights(folder: Path, name: str, step: int = STEPS) -> dict[str, bytes]:
    """The tensors of a checkpoint, file by file."""
    path = folder / "runs" / name / "checkpoints" / f"step-{step:08d}"
    assert (path / "COMPLETE").exists()
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def guard_state(folder: Path, name: str, step: int = STEPS) -> dict[str, Any]:
    """What a checkpoint keeps of the guard."""
    state = json.loads((folder / "runs" / name / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
    found: dict[str, Any] = state["guard"]
    assert state["order"]["consumed"] % BATCH == 0
    return found


BACK, SKIP = replace(WATCH, nonfinite="rollback", spike="rollback"), replace(WATCH, spike="skip")
STAGES = {"pipeline": 2, "zero": 1, "micro_batch": 8}
SHARDED = {"zero": 3, "recompute": "full", "micro_batch": 4}
LONG = [BAD - 2, BAD + 6]
DIVERGED = replace(WATCH, divergence="rollback", divergence_steps=5, skip_batches=LONG[1] - LONG[0])
SCALED = [BAD * BATCH, (BAD + 1) * BATCH]  # the whole batch


Runs = tuple[Path, list[dict[str, Any]]]  # their folder, what each rank saw


def trained(folder: Path, wanted: dict[str, Case]) -> Runs:
    """Runs of two ranks, all of which come to their end."""
    write_pictures(folder / "data")
    cases = {name: case(folder, name, **{"watch": WATCH, **more}) for name, more in wanted.items()}
    code, seen = train(folder, cases, 2)
    assert code == 0
    assert all(answer["code"] == 0 for rank in seen for answer in rank.values())
    return folder, seen


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The runs of the tests that are quick."""
    cases: dict[str, Case] = {
        "without": {"skipped": SKIPPED},
        "nan-rollback": {"watch": BACK, "nan_at": [ON_RANK_1]},
        "left-out": {"left_out": [BAD + 1]},
        "nan-loss": {"nan_loss": [1, BAD + 1]},
        # in the step before a save, so that two steps are judged at once
        "gradient": {"nan_gradient": [1, 7], "block": "blocks.s2.0", "parallel": {"zero": 3}, "steps": 9},
    }
    return trained(tmp_path_factory.mktemp("few"), cases)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """More runs."""
    cases: dict[str, Case] = {
        "without": {"skipped": SKIPPED},
        "spike-rollback": {"watch": BACK, "scaled": SCALED},
        "left-out": {"left_out": [BAD + 1]},
        "nan-skip": {"nan_at": [ON_RANK_1]},
        "spike-skip": {"watch": SKIP, "scaled": SCALED},
        "explosion-rollback": {"watch": replace(BACK, explosion="rollback"), "exploding": [1, BAD + 1]},
        "long-without": {"skipped": LONG},
        "divergence-rollback": {"watch": DIVERGED, "scaled": [BAD * BATCH, (BAD + 5) * BATCH]},
        "gpu-rollback": {"watch": BACK, "nan_at": [ON_RANK_1], "lag": 1},  # as late as on a GPU
        "slow": {"slow": [1, 4, 8], "steps": 9},
        "late": {"late": [-1, 1, 60], "steps": 53},
        "stopped": {"watch": BACK, "nan_at": [ON_RANK_1], "steps": 10},
        "staged-without": {"skipped": SKIPPED, "parallel": STAGES},
        "staged-rollback": {"watch": BACK, "nan_at": [ON_RANK_1], "parallel": STAGES},
        "zero3-without": {"skipped": SKIPPED, "parallel": SHARDED},
        "zero3-rollback": {"watch": BACK, "nan_at": [ON_RANK_1], "parallel": SHARDED},
        "zero0-without": {"skipped": SKIPPED, "parallel": {"zero": 0}},
        "zero0-rollback": {"watch": BACK, "nan_at": [ON_RANK_1], "parallel": {"zero": 0}},
    }
    return trained(tmp_path_factory.mktemp("more"), cases)


def check_rollback(runs: Runs, name: str, reference: str, skipped: list[int] = SKIPPED, within: int = 1) -> None:
    """A run that went back `within` steps is, to the bit, one that skipped those batches from the start."""
    folder, seen = runs
    assert [row["since"] for row in events(folder, name, "guard") if row["action"] == "rollback"] == [BAD + 1]
    (back,) = events(folder, name, "rollback")
    assert (back["to_step"], back["skipped"]) == (4, skipped)
    assert back["from_step"] <= BAD + 1 + within
    assert losses(folder, name) == losses(folder, reference)
    assert weights(folder, name) == weights(folder, reference)
    assert guard_state(folder, name)["skipped"] == [skipped] == guard_state(folder, reference)["skipped"]
    assert [rank[name]["seen"] for rank in seen] == [rank[reference]["seen"] for rank in seen]


def check_left_out(folder: Path, name: str, kind: str) -> None:
    """A run that skipped an update is, to the bit, one in which that update was left out."""
    (event,) = events(folder, name, "guard")
    assert (event["of"], event["of_step"], event["action"]) == (kind, BAD + 1, "skip")
    expected, found = losses(folder, "left-out"), losses(folder, name)
    assert len(found) == STEPS
    assert {k: v for k, v in found.items() if k != BAD + 1} == {k: v for k, v in expected.items() if k != BAD + 1}
    assert weights(folder, name) == weights(folder, "left-out")
    assert weights(folder, name) != weights(folder, "without")


def test_rollback_is_a_run_that_skipped_those_batches_from_the_start(few: Runs) -> None:
    check_rollback(few, "nan-rollback", "without")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["spike-rollback", "explosion-rollback", "staged-rollback", "zero3-rollback", "zero0-rollback"]
)
def test_rollback_under_other_faults_and_layouts(name: str, more: Runs) -> None:
    same_layout = name in ("spike-rollback", "explosion-rollback")
    check_rollback(more, name, "without" if same_layout else name.replace("rollback", "without"))


def test_skipped_batches_are_the_only_ones_not_seen(few: Runs) -> None:
    _, seen = few
    if_none_were: list[int] = [n for n in range((STEPS + 4) * BATCH) if not SKIPPED[0] <= n // BATCH < SKIPPED[1]]
    assert sorted(n for rank in seen for step in rank["nan-rollback"]["seen"].values() for n in step) == if_none_were


def test_loss_that_is_not_finite_makes_no_update_though_its_gradient_is(few: Runs) -> None:
    folder, _ = few
    check_left_out(folder, "nan-loss", "nonfinite")
    (event,) = events(folder, "nan-loss", "guard")
    assert (event["rank"], event["value"]) == ([1], "nan")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("nan-skip", "nonfinite"), ("spike-skip", "spike")])
def test_skip_is_a_run_with_that_update_left_out(name: str, kind: str, more: Runs) -> None:
    check_left_out(more[0], name, kind)


def test_rank_and_sample_of_a_bad_picture_are_named(few: Runs) -> None:
    event = events(few[0], "nan-rollback", "guard")[0]
    assert (event["rank"], event["block"], event["replayed"]) == ([1], "images", True)
    assert (event["batch"], event["value"], event["samples_total"]) == (BAD, "nan", 1)
    assert event["samples"][0].startswith("p")
    assert event["step"] - event["of_step"] <= 1  # the delay on a CPU


@pytest.mark.slow
def test_stage_that_takes_the_bad_picture_is_named(more: Runs) -> None:
    event = events(more[0], "staged-rollback", "guard")[0]
    assert (event["rank"], event["block"], event["samples_total"]) == ([0], "images", 1)
    assert event["samples"] == events(more[0], "nan-skip", "guard")[0]["samples"]


def test_bad_gradient_that_does_not_come_again_is_found_where_it_began(few: Runs) -> None:
    folder, seen = few
    (event,) = events(folder, "gradient", "guard")
    assert (event["of"], event["of_step"], event["action"]) == ("nonfinite", 7, "skip")
    assert (event["rank"], event["block"], event["replayed"]) == ([1], "blocks.s2.0", False)
    assert event["samples_total"] == len(seen[1]["gradient"]["seen"]["7"])
    assert losses(folder, "gradient")[9][0] is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spike-rollback", "spike-skip"])
def test_spike_is_told_with_value_and_limit(name: str, more: Runs) -> None:
    event = events(more[0], name, "guard")[0]
    assert event["value"] > 2 * event["threshold"] > 0
    assert event["samples_total"] == BATCH


@pytest.mark.slow
def test_rollback_by_a_verdict_that_comes_as_late_as_on_a_gpu(more: Runs) -> None:
    check_rollback(more, "gpu-rollback", "without", within=2)
    event = events(more[0], "gpu-rollback", "guard")[0]
    assert (event["step"] - event["of_step"], event["rank"], event["samples_total"]) == (2, [1], 1)


@pytest.mark.slow
def test_explosion_is_told_with_value_and_limit(more: Runs) -> None:
    event = events(more[0], "explosion-rollback", "guard")[0]
    assert (event["of"], event["of_step"]) == ("explosion", BAD + 1)
    assert event["value"] > 10 * event["threshold"] > 0


@pytest.mark.slow
def test_divergence_is_undone_from_where_it_began(more: Runs) -> None:
    check_rollback(more, "divergence-rollback", "long-without", LONG, within=5)
    told = {row["of"] for row in events(more[0], "divergence-rollback", "guard")}
    assert told == {"spike", "divergence"}  # every loss of it is a spike too, which that run only notes


@pytest.mark.slow
def test_waiting_for_data_is_told_once(more: Runs) -> None:
    (event,) = [event for event in events(more[0], "late", "guard") if event["of"] == "input_bound"]
    assert (event["of_step"], event["action"]) == (50, "continue")
    assert event["value"] > event["threshold"] == 0.5


@pytest.mark.slow
def test_slow_rank_is_named_once(more: Runs) -> None:
    found = [event for event in events(more[0], "slow", "guard") if event["of"] == "slow_rank"]
    assert [(event["rank"], event["of_step"], event["action"]) for event in found] == [([1], 6, "continue")]
    assert found[0]["value"] > 0.2


@pytest.mark.slow
def test_resume_at_another_world_size_skips_the_same(more: Runs) -> None:
    folder, seen = more
    assert guard_state(folder, "stopped", 10)["skipped"] == [SKIPPED]
    code, alone = train(folder, {"stopped": case(folder, "stopped", BACK, nan_at=[ON_RANK_1])}, 1)
    assert code == 0
    both = [rank["without"]["seen"] for rank in seen]
    expected = {step: sorted(both[0][step] + both[1][step]) for step in both[0] if int(step) > 10}
    assert {step: sorted(found) for step, found in alone[0]["stopped"]["seen"].items()} == expected
    assert len(events(folder, "stopped", "rollback")) == 1
    for step in range(11, STEPS + 1):
        assert losses(folder, "stopped")[step][0] == pytest.approx(losses(folder, "without")[step][0], abs=1e-4)


@pytest.mark.slow
def test_drift_is_found_and_undone_to_the_bit(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data")
    cases = {
        "even": case(tmp_path, "even", WATCH, steps=12),
        "drift": case(tmp_path, "drift", WATCH, steps=12, flip=[2, 8]),
    }
    code, seen = train(tmp_path, cases, 3)
    assert code == 0
    assert events(tmp_path, "even", "guard") == []
    (event,) = events(tmp_path, "drift", "guard")
    assert (event["of"], event["of_step"], event["rank"], event["since"]) == ("drift", 9, [2], 7)
    assert all("running" in name for name in event["tensors"])
    (back,) = events(tmp_path, "drift", "rollback")
    assert (back["to_step"], back["skipped"]) == (4, [])  # no data is to blame
    assert [rank["drift"] for rank in seen] == [rank["even"] for rank in seen]
    assert losses(tmp_path, "drift") == losses(tmp_path, "even")
    assert weights(tmp_path, "drift", 12) == weights(tmp_path, "even", 12)
