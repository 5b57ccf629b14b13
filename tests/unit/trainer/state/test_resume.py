"""Where a run goes on from, and what of it may differ: real checkpoints, real data sets."""

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from configs import resolve
from configs.errors import InputError
from configs.schema import Data, Model, Norm, Optim, Resume, Run
from data_pipeline import mixture
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.manifest import Dataset
from data_pipeline.stream import open_data
from trainer.cluster import Member
from trainer.engine.deepspeed_fragments import Fragment
from trainer.state import checkpoint, resume

STEP, BATCH = 2, 8


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 9, 9)).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data sets: the run's, another one of the same classes, one of others."""
    folder = tmp_path_factory.mktemp("data")
    for name, first, classes in (("own", 0, "ab"), ("other", 100, "ab"), ("foreign", 0, "abc")):
        found = [Picture(f"{name}{n}", "png", (n % 2,), f"{name}{n}", partial(encoded, first + n)) for n in range(40)]
        write_dataset(found, folder / name, list(classes), "single", {}, 7)
    return {name: str(folder / name) for name in ("own", "other", "foreign")}


def run_of(root: str, **settings: Any) -> Run:
    run = Run(
        recipe="test",
        model=Model(name="coatnet-nano", resolution=32),
        norm=Norm(replica_batch=8),
        data=Data(path=root, global_batch=BATCH, lanes=2),
        optim=Optim(steps=9, warmup_steps=1),
    )
    for field, value in settings.items():
        section, _, name = field.partition("__")
        run = (
            replace(run, **{section: replace(getattr(run, section), **{name: value})})
            if name
            else replace(run, **{section: value})
        )
    return run


def save(folder: Path, run: Run, dataset: Dataset, member: Member, step: int = STEP) -> Path:
    """A checkpoint as a run writes it, of one tensor."""
    split = dataset.split("train")
    state = {
        "step": step, "updates": step, "order": mixture.begin(run, split).state(step * BATCH, split.fingerprint),
        "guard": {"skipped": []}, "run": json.loads(resolve.to_json(run)), "vocabulary": list(dataset.vocabulary),
    }  # fmt: skip
    return checkpoint.save(folder, step, state, [Fragment("w", 0, torch.ones(3), {})], {}, member)


def found(folder: Path, run: Run, member: Member) -> tuple[resume.Found, list[str]]:
    """What `resume.find` finds, and what it says."""
    said: list[str] = []
    return resume.find(folder, run, open_data(run), member, said.append), said


def test_its_own_checkpoint_comes_first(roots: dict[str, str], tmp_path: Path, member: Member) -> None:
    run = run_of(roots["own"], init__path="elsewhere")
    assert found(tmp_path / "none", run, member)[0].facts(run)["source"] == "elsewhere"
    fresh = run_of(roots["own"])
    assert found(tmp_path / "none", fresh, member)[0].facts(fresh)["source"] == "fresh weights"
    path = save(tmp_path, fresh, open_data(fresh), member)
    assert found(tmp_path, fresh, member)[0].facts(fresh)["source"] == str(path)


def test_what_is_passed_over_is_told_with_the_reason(roots: dict[str, str], tmp_path: Path, member: Member) -> None:
    run = run_of(roots["own"])
    for step in (1, 2, 3):
        path = save(tmp_path, run, open_data(run), member, step)
    (path / "state.json").write_text("{}")
    (tmp_path / "step-00000002" / "COMPLETE").unlink()
    (tmp_path / "step-00000004.partial").mkdir()
    one, said = found(tmp_path, run, member)
    assert one.saved is not None
    assert one.saved.step == 1
    assert ["state.json has 2 bytes" in said[0], "COMPLETE is missing" in said[1], len(said)] == [True, True, 2]
    assert one.facts(run)["passed_over"] == said
    assert not (tmp_path / "step-00000004.partial").exists()


def test_damaged_checkpoints_alone_are_no_reason_to_begin_anew(
    roots: dict[str, str], tmp_path: Path, member: Member
) -> None:
    run = run_of(roots["own"])
    path = save(tmp_path, run, open_data(run), member)
    (path / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"step-00000002: complete, but damaged.*--resume.allow scratch"):
        found(tmp_path, run, member)
    one, said = found(tmp_path, run_of(roots["own"], resume=Resume(("scratch",))), member)
    assert one.saved is None
    assert "starts from fresh weights" in said[-1]
    (path / "COMPLETE").unlink()  # only an interrupted save: nothing was ever finished
    assert found(tmp_path, run, member)[0].saved is None


DIFFERENT: dict[str, tuple[dict[str, Any], str, str]] = {
    "recipe": ({"recipe": "another"}, "recipe was 'test', is 'another'", "recipe"),
    "optimizer": ({"optim__lr": 0.5}, "optim.lr was", "optim.lr"),
    "section": ({"augment__randaugment_layers": 2}, "augment.randaugment_layers was 0, is 2", "augment."),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_is_told_and_may_be_allowed(
    what: str, roots: dict[str, str], tmp_path: Path, member: Member
) -> None:
    settings, told, name = DIFFERENT[what]
    save(tmp_path, run_of(roots["own"]), open_data(run_of(roots["own"])), member)
    with pytest.raises(InputError, match=f"is of another run: {told}.*--resume.allow"):
        found(tmp_path, run_of(roots["own"], **settings), member)
    one, said = found(tmp_path, run_of(roots["own"], **settings, resume=Resume((name,))), member)
    assert one.saved is not None
    assert told in said[-1]
    assert len(one.allowed) == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model__head_size": 16}, "model.head_size can never differ: it shapes the state"),
        ({"model__name": "coatnet0"}, "model.name can never differ"),
        ({"seed": 3}, "seed can never differ: the data cursor counts in it"),
    ],
)
def test_what_shapes_the_state_can_never_differ(
    settings: dict[str, Any], told: str, roots: dict[str, str], tmp_path: Path, member: Member
) -> None:
    save(tmp_path, run_of(roots["own"]), open_data(run_of(roots["own"])), member)
    with pytest.raises(InputError, match=told):
        found(tmp_path, run_of(roots["own"], **settings, resume=Resume(("optim.",))), member)


def test_what_does_not_touch_the_mathematics_is_free(roots: dict[str, str], tmp_path: Path, member: Member) -> None:
    save(tmp_path, run_of(roots["own"]), open_data(run_of(roots["own"])), member)
    other = run_of(roots["own"], parallel__zero=1, checkpoint__keep=9, tracking__log_every=3, guard__window=20)
    one, said = found(tmp_path, other, member)
    assert one.saved is not None
    assert [one.allowed, said] == [[], []]


def test_other_data_are_told_and_may_be_allowed(roots: dict[str, str], tmp_path: Path, member: Member) -> None:
    own = run_of(roots["own"])
    save(tmp_path, own, open_data(own), member)
    other = run_of(roots["other"])
    split = open_data(other).split("train")
    with pytest.raises(InputError, match=r"--resume\.allow dataset goes on over the data here"):
        resume.open_order(other, split, found(tmp_path, other, member)[0].saved)
    allowed = replace(other, resume=Resume(("dataset",)))
    one, said = found(tmp_path, allowed, member)
    assert "dataset was" in said[-1]
    assert resume.open_order(allowed, split, one.saved).state(0, split.fingerprint)["fingerprint"] == split.fingerprint


def test_other_classes_are_never_allowed(roots: dict[str, str], tmp_path: Path, member: Member) -> None:
    own = run_of(roots["own"])
    save(tmp_path, own, open_data(own), member)
    with pytest.raises(InputError, match=r"other classes.*--init.head reset"):
        found(tmp_path, run_of(roots["foreign"], resume=Resume(("dataset",))), member)


def test_an_average_cannot_be_made_from_none(roots: dict[str, str], tmp_path: Path, member: Member) -> None:
    save(tmp_path, run_of(roots["own"]), open_data(run_of(roots["own"])), member)
    with pytest.raises(InputError, match=r"holds no averaged weights; nearest valid: 0\.0"):
        found(tmp_path, run_of(roots["own"], optim__ema=0.9, resume=Resume(("optim.",))), member)


@pytest.mark.parametrize(
    ("name", "told"), [("seed", "can never differ"), ("optim.lrr", "did you mean 'optim.lr'"), ("data", "did you mean")]
)
def test_names_that_mean_nothing_are_refused(name: str, told: str, roots: dict[str, str]) -> None:
    with pytest.raises(InputError, match=told):
        resolve.check(run_of(roots["own"], resume=Resume((name,))))
    resolve.check(run_of(roots["own"], resume=Resume(("optim.lr", "augment.", "dataset", "scratch"))))
