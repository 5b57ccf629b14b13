"""`coatnet submit` without a scheduler: mistakes are refused before anything is asked of one, or written."""

from dataclasses import replace
from pathlib import Path

import pytest

from configs import resolve
from configs.errors import InputError
from slurm.clusters import Profile
from trainer.commands.submit import _advise, _node_counts, _places, _sweep, submit_command

WORDS = ("demo-digits", "--gpus-per-node", "1", "--data.global-batch", "32", "--norm.replica-batch", "16")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nodes", "5..6"), "data.global_batch = 32: 6 ranks do not divide it"),
        (("--nodes", "two"), "must be a number or N..M"),
        (("--nodes", "4..2"), "a range must ascend"),
        (("--data.path", "/absent"), "/absent"),
        (("--data.path", "/absent:1", "--data.mixture", "/absent:1"), "/absent"),
        (("--dry-run", "--check"), "one of them at a time"),
        (("--chain", "2", "--array", "seed=1,2"), "nearest valid: 1"),
        (("--chain", "0"), "nearest valid: 1"),
        (("--array", "seed"), "--array optim.lr=1e-3,8e-4"),
        (("--array", "seed=1,,2"), "--array optim.lr=1e-3,8e-4"),
        (("--array", "sede=1,2"), "did you mean 'seed'"),
        (("--optim.lerning-rate", "1"), "optim.lerning_rate"),
        (("--model.name", "coatnet9"), "coatnet9"),
        (("--cluster", "./absent.toml"), "coatnet cluster init"),
    ],
)
def test_mistakes_are_refused_at_once(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        submit_command([*WORDS, "--runs", str(tmp_path / "runs"), *words])
    assert said in str(error.value)
    assert not (tmp_path / "runs").exists()


PROFILE = Profile(gpu="h100")


def test_a_pinned_layout_is_told_what_a_better_one_would_save(capsys: pytest.CaptureFixture[str]) -> None:
    run = resolve.load("coatnet5-jft300m-224")
    slow = replace(run, parallel=replace(run.parallel, recompute="full", zero=3, micro_batch=8))
    _advise(slow, PROFILE, (8,), 8)
    told = capsys.readouterr().err
    assert "layout: --parallel.layout auto would take" in told
    assert "days less" in told
    assert "8 nodes of 8 x h100" in told
    _advise(slow, Profile(), (8,), 8)
    assert "does not say which GPU" in capsys.readouterr().err


def test_a_layout_that_is_left_open_is_chosen_before_anything_waits(capsys: pytest.CaptureFixture[str]) -> None:
    run = resolve.load("coatnet7-jft3b-224")
    left_open = replace(run, parallel=replace(run.parallel, layout="auto", micro_batch=3))
    assert _node_counts("16", 8, [left_open]) == (16,)
    _advise(left_open, PROFILE, (16,), 8)
    assert "layout: auto: " in capsys.readouterr().err
    with pytest.raises(InputError, match="rtx4090"):
        _advise(left_open, Profile(gpu="rtx4090"), (1,), 1)


def test_a_sweep_is_every_combination_in_a_folder_of_its_own() -> None:
    found = list(_sweep(["optim.lr=1e-3,2e-3", "--seed=1,2"]))
    assert [name for _, name in found] == ["lr1e-3-seed1", "lr1e-3-seed2", "lr2e-3-seed1", "lr2e-3-seed2"]
    assert found[3][0] == ["--optim.lr", "2e-3", "--seed", "2"]
    assert list(_sweep([])) == [([], "")]


def test_of_a_range_the_numbers_of_nodes_that_divide() -> None:
    run = resolve.load("coatnet7-jft3b-224")
    assert _node_counts("4..8", 8, [run]) == (4, 8)
    assert _node_counts("16", 8, [run]) == (16,)


def test_a_sweep_s_own_folder_has_the_same_name_each_time() -> None:
    run = resolve.load("demo-digits")
    assert _places([run])[0] == Path("runs/demo-digits/submitit")
    assert _places([run, run]) == _places([run, run])
    assert _places([run, run])[0].parent.name.startswith("demo-digits-sweep-")
