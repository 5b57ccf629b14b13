"""`coatnet data build|plan|run|merge|adopt`: data sets from pictures that are somewhere else."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from configs.errors import InputError
from slurm.decide import STOPPED
from trainer.commands import words

if TYPE_CHECKING:
    from data_pipeline.building.plan import Options
    from data_pipeline.manifest import Dataset

USAGE = """usage: coatnet data build SOURCE --out DIR [--workers N] [options]
       coatnet data build SOURCE --out DIR --cluster PROFILE [--tasks T] [--cpus C] [--wait] [--workers N] [options]
       coatnet data plan SOURCE --out DIR --tasks T [--workers N] [options]
       coatnet data run DIR --task I
       coatnet data merge DIR
       coatnet data adopt TAR ... --out DIR [--heldout TAR ...] [--vocabulary FILE] [--label-field NAME] [--workers N]

SOURCE is a folder, a file or a quoted pattern such as 'data/train-*.parquet'. What it is its files show, or you say:
--kind folder         a subfolder of pictures per class; with --labels path a picture's labels are its folder and all
                      folders above it
--kind list           CSV, TSV, JSONL or Parquet: a path (relative to the list) or an http(s) URL, and labels: a name or
                      index, several as a;b or as a list. --columns image=NAME,label=NAME if they have unusual names
--kind huggingface    Parquet with the encoded pictures in it; --columns as above
--kind tars           WebDataset tars; --label-field cls, txt or json.FIELD where the label is not in cls or json

adopt --label-field NAME   the field of the json members that holds the labels, such as label or class.id: a name, an
                      index, or a list of them; else cls, or the indices in the field labels

--cluster PROFILE     plan here, run the tasks as an array of SLURM jobs, and merge in a job after them. DIR must lie on
                      a disk that the nodes share; --tasks 64 is how many there are, --cpus 1 the cores of each, --wait
                      waits for the end. A task whose node is lost is queued again, and one that reaches its time limit
                      if it wrote a shard in that time; logs are in DIR.jobs

--vocabulary FILE     names of the classes, one a line, in the order of their indices; else they come from the labels
--hierarchy FILE      lines of child, tab, parent: a picture also gets all ancestors of its labels
--label-kind KIND     single or multi; else single where every picture has exactly one label
--heldout SHARE       of the pictures, by hash of their content, for the held-out split; 0.15 if not said
--heldout-source SRC  a second source of the same kind, whose pictures all are held out
--short-side N        store pictures with a larger short side at N pixels, as JPEG of --quality Q (90)
--shard-samples N     samples of a shard, 1000 if not said
--skip-unreadable     leave out and count pictures that cannot be read, fetched or decoded, in place of refusing

Pictures of the same bytes become one, before the split. The order over all shards is shuffled, and is the same on any
machine with any number of workers. A build that was killed goes on when the same command is given again."""

OPTIONS = {
    "--kind": 1,
    "--labels": 1,
    "--columns": 1,
    "--label-field": 1,
    "--vocabulary": 1,
    "--hierarchy": 1,
    "--label-kind": 1,
    "--heldout": 1,
    "--heldout-source": 1,
    "--short-side": 1,
    "--quality": 1,
    "--shard-samples": 1,
    "--skip-unreadable": 0,
}


def build_command(name: str, arguments: list[str]) -> int:
    """Dispatch `coatnet data NAME ...`; returns the exit code."""
    if "-h" in arguments or "--help" in arguments:
        sys.stdout.write(USAGE + "\n")
        return 0
    return {"build": _build, "plan": _plan, "run": _run, "merge": _merge, "adopt": _adopt}[name](arguments)


def _build(arguments: list[str]) -> int:
    """`coatnet data build SOURCE --out DIR`: plan, run and merge in local processes."""
    cluster = {"--cluster": 1, "--tasks": 1, "--cpus": 1, "--wait": 0}
    options = words.options("coatnet data build", arguments, OPTIONS | cluster | {"--out": 1, "--workers": 1}, places=1)
    source, out = _place(options, "build", "SOURCE"), _out(options, "build")
    if "--cluster" in options:
        return _build_on_cluster(source, out, options)
    if any(name in options for name in cluster):
        raise InputError("--tasks, --cpus and --wait belong to --cluster PROFILE; `coatnet data plan` cuts without one")
    from data_pipeline.building import tasks

    dataset = tasks.build(source, out, _made_of(options), words.whole(options, "--workers", 1), _tell)
    print(_described(out, dataset))
    return 0


def _build_on_cluster(source: str, out: str, options: dict[str, list[str]]) -> int:
    """`coatnet data build ... --cluster PROFILE`: plan here, the rest as jobs."""
    from trainer.commands import build_cluster

    count = build_cluster.tasks_for(words.whole(options, "--tasks", 0))
    from data_pipeline.building import plan  # torch comes with it
    from data_pipeline.building.build import BUILD
    from data_pipeline.manifest import Dataset, open_dataset

    if Path(out, BUILD, plan.PLAN).exists():
        count = 0  # the tasks of a build that goes on are those that it was cut into
    made = plan.plan(source, out, _made_of(options), count, words.whole(options, "--workers", 1), _tell)
    if isinstance(made, Dataset):
        print(_described(out, made))
        return 0
    cpus = words.whole(options, "--cpus", 1)
    array, merge = build_cluster.send(out, len(made.tasks), options["--cluster"][0], cpus)
    if "--wait" in options:
        build_cluster.wait(out, array, merge)
        print(_described(out, open_dataset(out)))
    return 0


def _plan(arguments: list[str]) -> int:
    """`coatnet data plan SOURCE --out DIR --tasks T`."""
    options = words.options(
        "coatnet data plan", arguments, OPTIONS | {"--out": 1, "--workers": 1, "--tasks": 1}, places=1
    )
    source, out = _place(options, "plan", "SOURCE"), _out(options, "plan")
    from data_pipeline.building import plan
    from data_pipeline.manifest import Dataset

    tasks = words.whole(options, "--tasks", 0)
    made = plan.plan(source, out, _made_of(options), tasks, words.whole(options, "--workers", 1), _tell)
    if isinstance(made, Dataset):
        print(f"{out}: built already")
        return 0
    shards = sum(task.shards for task in made.tasks)
    left_out = ", ".join(f"{count} {name}" for name, count in made.counts.items())
    print(f"{out}: {len(made.tasks)} tasks, 0 to {len(made.tasks) - 1}, {shards} shards; {left_out}")
    print(f"run each: coatnet data run {out} --task I; then: coatnet data merge {out}")
    return 0


def _run(arguments: list[str]) -> int:
    """`coatnet data run DIR --task I`."""
    options = words.options("coatnet data run", arguments, {"--task": 1}, places=1)
    out = _place(options, "run", "DIR")
    if "--task" not in options:
        raise InputError("coatnet data run: --task I is missing: the number of the task to do")
    from data_pipeline.building import tasks

    written: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        """SIGTERM: what is written stays, and where that is more than before, another try makes sense."""
        hint = "the same command goes on there" if written else "more time, or a smaller --shard-samples, is needed"
        _tell(f"{out}: stopped, {len(written)} shards were written; {hint}")
        raise SystemExit(STOPPED if written else 128 + number)

    signal.signal(signal.SIGTERM, stop)
    print(f"{out}: task {tasks.run(out, words.whole(options, '--task', 0), written.append)} done")
    return 0


def _merge(arguments: list[str]) -> int:
    """`coatnet data merge DIR`."""
    out = _place(words.options("coatnet data merge", arguments, {}, places=1), "merge", "DIR")
    from data_pipeline.building import tasks

    print(_described(out, tasks.merge(out)))
    return 0


def _adopt(arguments: list[str]) -> int:
    """`coatnet data adopt TAR ... --out DIR`."""
    known = {"--out": 1, "--heldout": words.MANY, "--vocabulary": 1, "--label-field": 1, "--workers": 1}
    options = words.options("coatnet data adopt", arguments, known, places=words.MANY)
    out = _out(options, "adopt")
    from data_pipeline.building import adopt

    vocabulary, field = (options.get(name, [""])[0] for name in ("--vocabulary", "--label-field"))
    tars, heldout, workers = options[""], options.get("--heldout", []), words.whole(options, "--workers", 1)
    dataset = adopt.adopt(tars, out, heldout, vocabulary, workers, _tell, field)
    print(_described(out, dataset))
    return 0


def _made_of(options: dict[str, list[str]]) -> "Options":
    """The build's options from the words.

    Raises:
        InputError: a number or a column of another form.
    """
    from data_pipeline.building.plan import SHARD, Options
    from data_pipeline.building.sources import Reading

    def word(name: str, default: str = "") -> str:
        return options.get(name, [default])[0]

    given = word("--columns")
    columns = dict(text.partition("=")[::2] for text in given.split(",") if given)
    if not columns.keys() <= {"image", "label"} or not all(columns.values()):
        raise InputError(f"--columns {given!r}: must be image=NAME, label=NAME or image=NAME,label=NAME")
    try:
        heldout = float(word("--heldout", "-1"))
    except ValueError as error:
        raise InputError(f"--heldout {word('--heldout')!r}: must be a share, such as 0.05") from error
    return Options(
        reading=Reading(word("--kind", "auto"), word("--labels", "folder"), columns, word("--label-field")),
        shard_samples=words.whole(options, "--shard-samples", SHARD),
        heldout=heldout,
        heldout_source=word("--heldout-source"),
        label_kind=word("--label-kind", "auto"),
        vocabulary=word("--vocabulary"),
        hierarchy=word("--hierarchy"),
        short_side=words.whole(options, "--short-side", 0),
        quality=words.whole(options, "--quality", 0),
        skip_unreadable="--skip-unreadable" in options,
    )


def _place(options: dict[str, list[str]], command: str, what: str) -> str:
    """The one word that stands alone."""
    if not options[""]:
        raise InputError(f"coatnet data {command}: {what} is missing; see `coatnet data {command} --help`")
    return options[""][0]


def _out(options: dict[str, list[str]], command: str) -> str:
    """The folder to write to."""
    if "--out" not in options:
        raise InputError(f"coatnet data {command}: --out DIR is missing: the folder to write the data set to")
    return options["--out"][0]


def _described(out: str, dataset: "Dataset") -> str:
    """What a data set holds, a line for each split, and what its build left out."""
    lines = [f"{out}: {dataset.classes} classes, {dataset.label_kind} labels"]
    for name, split in dataset.splits.items():
        lines.append(f"  {name}: {split.samples} samples in {len(split.rows)} shards, {split.fingerprint[:12]}")
    facts = dataset.card.get("statistics")
    if isinstance(facts, dict):
        named = ("unreadable", "duplicates_removed", "duplicates_of_other_label", "duplicates_left", "resized")
        lines.append("  " + ", ".join(f"{facts[name]} {name.replace('_', ' ')}" for name in named))
    return "\n".join(lines)


def _tell(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
