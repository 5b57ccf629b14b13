"""Existing WebDataset tars: their samples by byte range, and labels in whatever member they are."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import InputError
from data_pipeline.building.labels import words_of
from data_pipeline.shard import MAX_SAMPLE_BYTES, PICTURE_EXTENSIONS

LABEL_MEMBERS = ("cls", "json", "txt")  # where a label is looked for when the user does not say


@dataclass
class TarSample:
    """One sample of a tar: its key, the bytes [begin, end) with all headers, (offset, size) of each member's content.

    `problem` says why it cannot be a sample, if it cannot.
    """

    key: str
    begin: int
    end: int = 0
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    problem: str = ""

    @property
    def picture(self) -> str:
        """The extension of its one picture; empty if it has none or several."""
        found = [extension for extension in PICTURE_EXTENSIONS if extension in self.members]
        return found[0] if len(found) == 1 else ""


def tar_samples(path: str | Path) -> Iterator[TarSample]:
    """The samples of an uncompressed tar: neighbouring members of one name up to the first dot of its last part.

    Folders are passed over. Nothing but headers is read.

    Raises:
        InputError: not a tar, or it ends in the middle.
    """
    current: TarSample | None = None
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.isdir():
                    continue
                key = folder + slash + stem
                if current is None or key != current.key:
                    if current is not None:
                        current.end = member.offset
                        yield current
                    current = TarSample(key, member.offset)
                extension = extension.lower()
                if not member.isreg() or member.issparse():
                    current.problem = f"member {member.name!r} is no plain file"
                elif extension in current.members:
                    current.problem = f"has {extension!r} twice"
                current.members[extension] = (member.offset_data, member.size)
            if current is not None:
                current.end = archive.offset
                yield current
        size = Path(path).stat().st_size
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: not readable as an uncompressed tar: {error}; fetch it again") from error
    if current is not None and current.end > size:
        raise InputError(f"{path}: ends after {size} bytes, inside {current.key!r}; fetch it again")


def tar_labels(sample: TarSample, data: dict[str, bytes], wanted: str, where: str) -> tuple[str, ...]:
    """The labels of a sample as words.

    Args:
        sample: for its members.
        data: the contents of the members that `label_members` names.
        wanted: `json.FIELD` (nested: `json.a.b`), or another member whose text is the label; empty: `cls`, else the
            field `labels` or `label` of `json`, else `txt`.
        where: for messages.

    Raises:
        InputError: no such member or field, or its content is no label.
    """
    chosen = wanted or next((member for member in LABEL_MEMBERS if member in sample.members), "")
    member, _, fields = chosen.partition(".")
    if member not in data:
        raise InputError(f"{where}: no member {member or '/'.join(LABEL_MEMBERS)!r} with a label; see --label-field")
    try:
        text = data[member].decode("utf-8")
        if member != "json":
            return words_of(text.strip(), where)
        value: object = json.loads(text)
        if not fields and isinstance(value, dict) and "weights" in value:
            raise InputError(f"{where}: has soft labels, which only `coatnet data adopt` takes, as they are")
        names = (
            fields.split(".") if fields else ["labels" if isinstance(value, dict) and "labels" in value else "label"]
        )
        for name in names:
            if not isinstance(value, dict) or name not in value:
                raise InputError(f"{where}: json has no field {'.'.join(names)!r}; see --label-field")
            value = value[name]
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: its label cannot be read: {error}") from error
    return words_of(value, where)


def label_members(sample: TarSample, wanted: str) -> list[str]:
    """The members of a sample that `tar_labels` needs, where it has them and they are not too large."""
    names = [wanted.partition(".")[0]] if wanted else list(LABEL_MEMBERS)
    return [name for name in names if name in sample.members and sample.members[name][1] <= MAX_SAMPLE_BYTES // 2]
