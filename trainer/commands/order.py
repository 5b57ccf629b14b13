"""`coatnet data order`: which samples a step sees, and when a sample is seen. Reads shards, but decodes nothing."""

import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError
from configs.schema import Run
from configs.tars import resampled
from trainer.state.skips import Skipped

if TYPE_CHECKING:
    from data_pipeline.manifest import Dataset, Source, Split
    from data_pipeline.mixture import Mixture
    from data_pipeline.order import Ints, Order
    from data_pipeline.shard import OpenShards

ORDER_USAGE = """usage: coatnet data order RECIPE --step N [--json] [--field value ...]
       coatnet data order RECIPE --find KEY [--epochs E] [--json] [--field value ...]

RECIPE is a recipe as for `coatnet train`, or the run.json of a run folder, with the same overrides: --data.path DIR.
Steps are those of the log: the first is 1. Of a run folder, the batches that its guard leaves out are no step's.

Epochs and positions count from 0, in a mixture those of the sample's own data set.

--step N    the samples of the global batch of step N, which is the same whatever the number of ranks and workers:
            epoch, position in it, place in the batch, shard:sample, key, labels
--find KEY  when a sample of the training split is seen in the first E epochs (3): epoch, position, step, place in the
            batch. KEY is the sample's key, which is looked for in one shard after the other, or shard:sample as
            --step prints it, which is answered at once"""


def order_command(arguments: list[str]) -> int:
    """`coatnet data order RECIPE --step N | --find KEY [--epochs E] [--json] [overrides]`; returns the exit code.

    Raises:
        InputError: words that do not fit, or no such sample.
        DataError: the data set cannot be opened, or a sample cannot be read.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(ORDER_USAGE + "\n")
        return 0
    from data_pipeline import mixture
    from data_pipeline.synthetic import open_data
    from trainer.commands.config import resolve_command

    as_json = "--json" in arguments
    options, rest = _taken([word for word in arguments if word != "--json"], ("--step", "--find", "--epochs"))
    if not rest or rest[0].startswith("-"):
        raise InputError("coatnet data order: the recipe is missing; `coatnet config list` has them")
    if ("--step" in options) == ("--find" in options):
        raise InputError("coatnet data order: needs either --step N or --find KEY")
    if "--epochs" in options and "--step" in options:
        raise InputError("--epochs belongs to --find, not to --step; leave it out")
    run = resolve_command(rest[0], rest[1:])
    if run.data.synthetic:
        raise InputError("coatnet data order: made-up samples have neither shards nor keys; leave --data.synthetic out")
    if resampled(run.data):
        raise InputError("coatnet data order: tars without an index have no order; `coatnet data adopt` indexes them")
    dataset = open_data(run)
    order, skipped = mixture.begin(run, dataset.split("train")), _left_out(Path(rest[0]))
    if "--step" in options:
        rows = _step(run, dataset, order, skipped, _number("--step", options["--step"]))
    else:
        epochs = _number("--epochs", options.get("--epochs", "3"))
        rows = _find(run, dataset, order, skipped, options["--find"], epochs)
    for row in rows:
        print(json.dumps(row) if as_json else _line(row))
    return 0


def _left_out(recipe: Path) -> Skipped:
    """The batches that a run leaves out, as its newest checkpoint tells, where `recipe` is its run.json."""
    marks = sorted(recipe.parent.glob("checkpoints/step-????????/COMPLETE")) if recipe.name == "run.json" else []
    state = json.loads((marks[-1].parent / "state.json").read_text()) if marks else {}
    return Skipped(state.get("guard", {}).get("skipped", []))


def _step(
    run: Run, dataset: "Dataset", order: "Order | Mixture", skipped: Skipped, step: int
) -> Iterator[dict[str, Any]]:
    """The samples of step number `step`, in their places of the global batch."""
    import numpy as np

    from data_pipeline.errors import DataError, StoreError
    from data_pipeline.prefetch import Fetched

    split, batch = dataset.split("train"), run.data.global_batch
    positions = np.arange(batch) + skipped.batch(step - 1) * batch
    shards = Fetched(split, run.data).open()
    _, shard_B, sample_B = order.lookup(positions)
    found = zip(*_own(order, positions), shard_B.tolist(), sample_B.tolist(), strict=True)
    for place, (epoch, position, shard, sample) in enumerate(found):
        source = _source(split, shard)
        row: dict[str, Any] = {"epoch": epoch, "position": position, "step": step, "place": place}
        row |= {**({"data": source.root} if source else {}), "shard": split.rows[shard].path, "sample": sample}
        try:
            stored = shards.read(shard, sample, source.classes if source else dataset.classes)
            numbers = [source.translate[label] for label in stored.labels] if source else stored.labels
            row |= {"key": stored.key, "labels": [dataset.vocabulary[number] for number in numbers]}
        except StoreError:
            raise
        except DataError as error:
            row |= {"damage": str(error)}
        yield row


def _find(
    run: Run, dataset: "Dataset", order: "Order | Mixture", skipped: Skipped, wanted: str, epochs: int
) -> Iterator[dict[str, Any]]:
    """When each sample that `wanted` names is seen; its step is None where its batch is left out."""
    import numpy as np

    split, batch = dataset.split("train"), run.data.global_batch
    for shard, sample in _named(split, wanted) or _searched(run, dataset, split, wanted):
        epoch = np.arange(epochs)
        positions = order.find(epoch, np.full_like(epoch, shard), np.full_like(epoch, sample))
        source = _source(split, shard)
        place = {**({"data": source.root} if source else {}), "shard": split.rows[shard].path, "sample": sample}
        for index, own, position in zip(positions.tolist(), *_own(order, positions), strict=True):
            update = skipped.update(index // batch)
            step = None if update is None else update + 1
            yield {"epoch": own, "position": position, "step": step, "place": index % batch} | place


def _own(order: "Order | Mixture", positions: "Ints") -> tuple[list[int], list[int]]:
    """Epoch of their own data set, and position in it, of the samples at global indices `positions`, each (n,)."""
    import numpy as np

    from data_pipeline.mixture import Mixture

    own, samples = positions, np.full_like(positions, order.samples)
    if isinstance(order, Mixture):
        source, own = order.origin(positions)
        samples = np.array([each.samples for each in order.orders])[source]
    return (own // samples).tolist(), (own % samples).tolist()


def _named(split: "Split", wanted: str) -> list[tuple[int, int]]:
    """Shard and sample of SHARD:NUMBER; none if `wanted` is not of that form. A mixture may have it several times.

    Raises:
        InputError: the shard has fewer samples.
    """
    path, _, number = wanted.rpartition(":")
    if not (path.endswith(".tar") and number.isascii() and number.isdecimal()):
        return []
    found = [shard for shard, row in enumerate(split.rows) if row.path == path]
    inside = [(shard, int(number)) for shard in found if int(number) < split.rows[shard].samples]
    if found and not inside:
        last = max(split.rows[shard].samples for shard in found) - 1
        raise InputError(f"--find {wanted!r}: the shard has samples 0 to {last}; nearest valid: {path}:{last}")
    return inside


def _searched(run: Run, dataset: "Dataset", split: "Split", key: str) -> list[tuple[int, int]]:
    """Shard and sample of `key`: of every data set of a mixture that has it, of each the first.

    Raises:
        InputError: no shard of the split holds it.
    """
    from data_pipeline.prefetch import Fetched

    shards, found, done = Fetched(split, run.data).open(), [], set()
    for shard in range(len(split.counts)):
        source = _source(split, shard)
        if source in done:
            continue
        sample = _sample_of(shards, shard, int(split.counts[shard]), key, source.classes if source else dataset.classes)
        if sample is not None:
            found.append((shard, sample))
            done.add(source)
        if not split.sources and found:
            break
    if not found:
        raise InputError(
            f"--find {key!r}: no shard of the training split of {dataset.root} holds this key; it may be held out, or "
            f"not be as `coatnet data order RECIPE --step 1` prints keys"
        )
    return found


def _sample_of(shards: "OpenShards", shard: int, samples: int, key: str, classes: int) -> int | None:
    """The number of the sample with `key` in a shard, by the header of each sample's first member; None: no such."""
    import os

    opened = shards.get(shard)
    for sample in range(samples):
        try:
            header = os.pread(opened.descriptor, tarfile.BLOCKSIZE, int(opened.sidecar.offsets[sample]))
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (OSError, tarfile.HeaderError):
            continue  # a damaged sample has no key that could be asked for
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            folder, slash, name = member.name.rpartition("/")
            same = key == folder + slash + name.partition(".")[0]
        else:  # a long name in a header of its own
            same = shards.read(shard, sample, classes).key == key
        if same:
            return sample
    return None


def _source(split: "Split", shard: int) -> "Source | None":
    """The data set of a mixture that a shard belongs to; None: there is one data set alone."""
    return next((source for source in reversed(split.sources) if source.first_shard <= shard), None)


def _taken(arguments: list[str], names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The options among `names` with their values, as `--name value` or `--name=value`, and the other words.

    Raises:
        InputError: one comes without a value, or twice.
    """
    options: dict[str, str] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in names:
            rest.append(word)
            continue
        given = value if equals else next(words, "")
        if not given or name in options:
            raise InputError(f"{name}: needs one value; see `coatnet data order --help`")
        options[name] = given
    return options, rest


def _number(option: str, given: str) -> int:
    """A whole number of at least 1, small enough for a position.

    Raises:
        InputError: it is none.
    """
    if not (given.isascii() and given.isdecimal() and 0 < int(given[:19]) < 10**12 and len(given) < 19):
        raise InputError(f"{option} {given!r}: must be a whole number from 1 to 10**12; nearest valid: 1")
    return int(given)


def _line(row: dict[str, Any]) -> str:
    """A row for people: its fields, those of few words with their names."""
    words = [f"{name} {row[name]}" for name in ("epoch", "position", "step", "place") if row[name] is not None]
    words += ["left out by the guard"] if row["step"] is None else []
    words += [row["data"]] if "data" in row else []
    words += [f"{row['shard']}:{row['sample']}"]
    words += [row["key"], f"labels {', '.join(row['labels']) or '-'}"] if "key" in row else []
    words += [f"damaged: {row['damage']}"] if "damage" in row else []
    return "  ".join(words)
