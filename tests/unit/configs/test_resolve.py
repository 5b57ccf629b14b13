"""From a name to a checked Run: recipes, files, cross-field rules, steps and warm-up."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from configs import resolve
from configs.errors import InputError
from configs.schema import Data, Optim, Parallel, Run

MINE = """
from dataclasses import replace
from configs import resolve
from configs.schema import Run

def small() -> Run:
    return Run(name="tiny", seed=7)

def named() -> Run:
    return replace(resolve.load("demo-digits"), seed=3)

def wrong():
    return {"seed": 7}

def greedy(size):
    return Run(seed=size)

def off():
    return Run(seed=-4)

def broken():
    return Run(seed={}["a seed"])

def misspelt():
    return Run(sed=4)
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def with_optim(**changes: float | int) -> Run:
    return Run(optim=replace(Optim(), **changes))  # type: ignore[arg-type]


def test_a_function_in_a_file_gives_a_run(mine: str) -> None:
    run = resolve.load(f"{mine}:small")
    assert (run.seed, run.recipe) == (7, "small")
    assert resolve.load(f"{mine}:named").recipe == "demo-digits"


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        (":smal", "did you mean 'small'"),
        (":wrong", "must return a configs.schema.Run, not dict"),
        (":greedy", "must take no arguments; it requires size"),
        (":off", "seed = -4"),
        (":broken", "mine.py:broken: raised KeyError: 'a seed' (line 22)"),
        (":misspelt", "mine.py:misspelt: raised TypeError: Run.__init__() got an unexpected keyword argument 'sed'"),
        (":replace", "unknown function"),
        ("", "name the function in the file too"),
    ],
)
def test_a_bad_function_is_refused(mine: str, ending: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        resolve.load(mine + ending)


def test_a_missing_file_names_its_neighbour(mine: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean .*mine\.py"):
        resolve.load(f"{tmp_path / 'mime.py'}:small")
    with pytest.raises(InputError, match="does not exist"):
        resolve.load(str(tmp_path / "nowhere" / "mine.py") + ":small")


def test_a_file_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def f(:\n")
    with pytest.raises(InputError, match=r"broken\.py.*SyntaxError"):
        resolve.load(f"{path}:f")
    path.write_text("x = 1\n")
    with pytest.raises(InputError, match="defines no function"):
        resolve.load(f"{path}:f")


def test_a_run_file_is_a_recipe_too(tmp_path: Path) -> None:
    run = resolve.load("coatnet4-in21k-224")
    path = tmp_path / "run.json"
    path.write_text(resolve.to_json(run))
    assert resolve.load(str(path)) == run
    with pytest.raises(InputError, match="cannot be read"):
        resolve.load(str(tmp_path / "other.json"))
    path.write_text("{}")
    with pytest.raises(InputError, match=r"run\.json': recipe: missing; every field must be given"):
        resolve.load(str(path))


@pytest.mark.parametrize(
    ("given", "meant"), [("demo-digit", "demo-digits"), ("coatnet5-jft300-224", "coatnet5-jft300m-224")]
)
def test_a_misspelt_recipe_is_met_with_its_neighbour(given: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{meant}'"):
        resolve.load(given)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (with_optim(steps=50), "optim.warmup_steps = 10000: must be at most optim.steps = 50; nearest valid: 50"),
        (with_optim(epochs=3.0, warmup_epochs=4.0), "optim.warmup_epochs = 4.0: must be at most optim.epochs = 3.0"),
        (Run(data=Data(global_batch=8), parallel=Parallel(micro_batch=9)), "parallel.micro_batch = 9"),
        (Run(name="..", recipe="x"), "name = '..'"),
        (Run(recipe="a\nb"), "name = 'a\\nb'"),
        (Run(parallel=Parallel(zero=4)), "parallel.zero = 4: must be one of 0, 1, 2, 3; nearest valid: 3"),  # type: ignore[arg-type]
        (Run(optim=Optim(loss="softmx")), "nearest valid: 'softmax'"),  # type: ignore[arg-type]
        (Run(seed=1.0), "seed = 1.0: must be of type int, not float"),  # type: ignore[arg-type]
        (Run(seed=True), "seed = True: must be of type int, not bool"),
        (Run(optim=Optim(epochs=float("inf"))), "optim.epochs = inf: must be a finite number"),
        (Run(optim=None), "optim = None: must be a configs.schema.Optim"),  # type: ignore[arg-type]
    ],
)
def test_rules_between_fields_and_types_are_held(run: Run, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        resolve.check(run)


def test_a_warmup_as_long_as_the_run_is_allowed() -> None:
    resolve.check(with_optim(steps=50, warmup_steps=50))
    resolve.check(with_optim(steps=50, warmup_epochs=1.0))  # in steps only once the data is known: see `warmup`


@pytest.mark.parametrize(
    ("recipe", "samples", "steps", "warmup"),
    [
        ("coatnet0-in1k-224", 1_281_167, 93_835, 10_000),
        ("coatnet4-in21k-224", 12_700_000, 279_052, 15_502),
        ("coatnet5-jft300m-224", 300_000_000, 1_025_390, 20_000),
    ],
)
def test_steps_and_warmup_of_the_papers_runs(recipe: str, samples: int, steps: int, warmup: int) -> None:
    run = resolve.load(recipe)
    assert (resolve.total_steps(run, samples), resolve.warmup(run, samples)) == (steps, warmup)


def test_steps_are_exact_and_at_least_one() -> None:
    run = Run(data=Data(global_batch=2), optim=Optim(epochs=0.29, warmup_steps=0))
    assert resolve.total_steps(run, 200) == 29  # 0.29 * 200 / 2 is 28.999999999999996 in floats
    assert resolve.total_steps(run, 1) == 1
    assert resolve.total_steps(with_optim(steps=17), 10) == 17


@pytest.mark.parametrize("changes", [{"epochs": 1.0}, {"steps": 3, "warmup_steps": 0, "warmup_epochs": 2.0}])
def test_a_warmup_longer_than_the_run_is_refused_when_the_data_is_known(changes: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"longer than the run, 3 steps over 12288 samples.*nearest valid: .* 3$"):
        resolve.warmup(with_optim(**changes), 3 * 4096)


@pytest.mark.parametrize("recipe", resolve.names())
def test_every_recipe_can_be_tried_on_made_up_pictures(recipe: str) -> None:
    run = resolve.load(recipe)
    tried = replace(run, data=replace(run.data, synthetic=True))
    samples = 1_280_000  # of the made-up training split: a JFT recipe warms up for longer than its 14 epochs of it
    assert resolve.total_steps(tried, samples) >= 50
    assert resolve.warmup(tried, samples) == (run.optim.warmup_steps or resolve.warmup(run, samples))
