"""A sample out of the bytes of its tar members: strictly read, nothing executed, unpickled or guessed.

The headers that webdataset, GNU tar, bsdtar and Python write are understood: ustar with its prefix, GNU long names,
pax records of one member. Compressed, sparse, linked or oversized members and archives that change their rules half-way
are refused. Python's own `tarfile` takes ten times as long, and skips what it does not understand.
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from data_pipeline.errors import Damage

LABEL_EXTENSIONS = ("cls", "json")
PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TAR_BLOCK = 512  # bytes; members start at multiples of it
MAX_MEMBERS = 1000  # of a sample, folders between them included
MAX_NAME_BYTES = 1 << 14  # of a long name or of a member's pax records
# name, size, checksum, type, magic and version, prefix
_HEADER = Struct("100s24x12s12x8sc100x8s80x155s12x")
_EMPTY = bytes(TAR_BLOCK)
_INDEX = re.compile("0|[1-9][0-9]{0,8}")
_POSIX, _GNU, _OLD = b"ustar\x0000", b"ustar  \x00", bytes(8)
_CHECKSUM = slice(148, 156)


@dataclass(frozen=True)
class Sample:
    """One sample as stored: `picture` is the undecoded file, `labels` indices into the vocabulary.

    `weights` are the labels' shares in soft labels, 0 to 1, as many; empty: each label counts whole.
    """

    key: str
    extension: str
    picture: bytes
    labels: tuple[int, ...]
    weights: tuple[float, ...] = ()


class Labelling(NamedTuple):
    """Where the labels of a data set's samples are, if its tars were adopted with labels in an unusual place.

    `field` of the `json` member (`a.b`: of a table in it) has a name or an index, or a list of them; `names` are the
    indices of the names. An empty `field`: `cls`, or the indices in the field `labels`.
    """

    field: str
    names: Mapping[str, int]


PLAIN = Labelling("", {})


class Member(NamedTuple):
    """A file in a tar: its name, and its content's bytes [begin, end)."""

    name: str
    begin: int
    end: int


def parse(data: bytes, classes: int, labelling: Labelling = PLAIN) -> Sample:
    """The sample whose tar members are `data`: one picture, and its labels in `cls` or `json`; others are ignored.

    Raises:
        Damage: not tar members of one sample with one picture and one label member, or labels out of range.
    """
    key: str | None = None
    found: dict[str, Member] = {}
    try:
        for member in members(data):
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            extension = extension.lower()
            if key not in (None, folder + slash + stem):
                raise Damage(f"also holds a member of {folder + slash + stem!r}")
            key = folder + slash + stem
            if extension in found:
                raise Damage(f"member {member.name!r} comes twice")
            found[extension] = member
        pictures = [extension for extension in PICTURE_EXTENSIONS if extension in found]
        if len(pictures) != 1:
            raise Damage(f"needs one member of {PICTURE_EXTENSIONS}, has {sorted(found)}")
        picture = found[pictures[0]]
        labels, weights = labels_of(
            {name: data[m.begin : m.end] for name, m in found.items() if name in LABEL_EXTENSIONS}, classes, labelling
        )
    except Damage as error:
        raise Damage(f"key {key!r}: {error}", key or "") from error
    assert key is not None
    return Sample(key, pictures[0], data[picture.begin : picture.end], labels, weights)


def members(data: bytes) -> Iterator[Member]:
    """The plain files in `data`, whole blocks of a tar; folders are passed over.

    Raises:
        Damage: see the module's docstring.
    """
    begin = 0
    records: dict[str, str] = {}  # what an extended header says of the member behind it
    for _ in range(2 * MAX_MEMBERS):
        if begin >= len(data):
            break
        block = data[begin : begin + TAR_BLOCK]
        if block == _EMPTY:  # the tar's end
            if data.count(0, begin) != len(data) - begin:
                raise Damage(f"not readable as tar members: bytes after the end of the tar at {begin}")
            break
        stored, size, kind = _header(block, begin)
        size = int(records.get("size", size))
        content, begin = begin + TAR_BLOCK, begin + TAR_BLOCK - (-size // TAR_BLOCK) * TAR_BLOCK
        if begin > len(data):
            raise Damage(f"not readable as tar members: {stored!r} of {size} bytes ends outside of its sample")
        if kind in (b"L", b"x"):
            if size > MAX_NAME_BYTES or records:
                raise Damage(f"not readable as tar members: the name of {stored!r} has {size} bytes, or comes twice")
            if kind == b"L":  # GNU's way to say the same
                records = {"path": _text(data[content : content + size])}
            else:
                records = _records(data[content : content + size])
            if records.get("path") == "":
                raise Damage("not readable as tar members: an empty long name")
            continue
        # Beside a long name, the header's is cut off, be it in the middle of a character.
        name, records = records.get("path") or _text(stored), {}
        if kind == b"5" and not size:
            continue
        if kind not in (b"0", b"\0") or not name or name.endswith("/"):
            raise Damage(f"member {name!r} is no plain file")
        yield Member(name, content, content + size)
    else:
        raise Damage(f"more than {MAX_MEMBERS} members")
    if records:
        raise Damage("not readable as tar members: a long name without its member")


def _header(block: bytes, begin: int) -> tuple[bytes, int, bytes]:
    """Name, size in bytes and type of a member, out of its header `block`, which lies at `begin`.

    Raises:
        Damage: cut off, its checksum or a number is wrong, or of a form that is not read.
    """
    where = f"not readable as tar members: the header at byte {begin}"
    if len(block) != TAR_BLOCK:
        raise Damage(f"{where} is cut off")
    name, size, checksum, kind, magic, prefix = _HEADER.unpack(block)
    # The low half of adler32 is 1 + the sum of the bytes, modulo 65521; the checksum counts itself as eight blanks.
    total = (zlib.adler32(block) & 0xFFFF) - 1 - sum(block[_CHECKSUM]) + 8 * 32
    if (total - _octal(checksum, where)) % 65521:
        raise Damage(f"{where} does not match its checksum")
    if magic not in (_POSIX, _GNU, _OLD):
        raise Damage(f"{where} is of another form: {magic!r}")
    name = name.partition(b"\0")[0]
    folder = prefix.partition(b"\0")[0] if magic == _POSIX else b""
    return folder + b"/" + name if folder else name, _octal(size, where), kind


def _octal(field: bytes, where: str) -> int:
    """A number of a header: octal digits that end with NUL or a blank.

    Raises:
        Damage: anything else; numbers above 8 GB have another form.
    """
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits.isdigit() or digits.strip(b"01234567"):
        raise Damage(f"{where} has the number {field!r}")
    return int(digits, 8)


def _text(name: bytes) -> str:
    """A member's name.

    Raises:
        Damage: not UTF-8.
    """
    try:
        return name.partition(b"\0")[0].decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damage(f"not readable as tar members: the name {name[:100]!r} is not UTF-8") from error


def _records(content: bytes) -> dict[str, str]:
    """The pax records (lines of "LENGTH KEY=VALUE") of one member, of which `path` and `size` matter.

    Raises:
        Damage: not of that form, or they make the member a sparse file.
    """
    found: dict[str, str] = {}
    while content:
        digits = content.partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 6 else 0
        line = content[len(digits) + 1 : length]
        key, equals, value = line.partition(b"=")
        whole = length <= len(content) and equals and line.endswith(b"\n") and b"\0" not in line
        fits = key != b"size" or (value[:-1].isdigit() and len(value) < 20)
        if not whole or not fits or key.startswith(b"GNU.sparse"):
            raise Damage("not readable as tar members: wrong pax records, or a sparse file")
        content = content[length:]
        if key in (b"path", b"size"):
            found[key.decode()] = _text(value[:-1])
    return found


def labels_of(
    contents: dict[str, bytes], classes: int, labelling: Labelling = PLAIN
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Labels and, of soft labels, their weights: in `cls`, a number, or `json`, {"labels": [...], "weights": [...]}.

    Beside a `cls`, a `json` without "labels" is somebody's notes. With a `labelling` of its own, what it says.

    Raises:
        Damage: none or both, or labels or weights out of range.
    """
    weights: object = []
    try:
        notes = json.loads(contents["json"]) if "json" in contents else {}
        if labelling.field:
            return _labels_in(notes, classes, labelling), ()
        stated = notes if isinstance(notes, dict) and "labels" in notes else {}
        if not contents or ("cls" in contents and stated):
            raise Damage(f"needs labels in either a cls or a json member, has them in {sorted(contents)}")
        if "cls" in contents:
            text = contents["cls"].strip()
            labels: object = [int(text)] if text.isdigit() else text
        else:
            labels, weights = stated.get("labels"), stated.get("weights", [])
    except (ValueError, RecursionError) as error:
        if isinstance(error, Damage):
            raise
        raise Damage(f"its label cannot be read: {error}") from error
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise Damage(f"labels {str(labels)[:100]}: must be whole numbers from 0 to {classes - 1}")
    if not isinstance(weights, list) or not all(type(w) in (int, float) and 0 <= w <= 1 for w in weights):
        raise Damage(f"weights {str(weights)[:100]}: must be numbers from 0 to 1")
    if weights and (len(weights) != len(labels) or len(set(labels)) != len(labels)):
        raise Damage(f"weights {str(weights)[:100]}: must be as many as the labels, which must be distinct")
    return tuple(labels), tuple(float(weight) for weight in weights)


def _labels_in(notes: object, classes: int, labelling: Labelling) -> tuple[int, ...]:
    """Labels in a field of a `json` member, each once.

    Raises:
        Damage: there is no such field, or it has another form, or names what is no class.
    """
    value = notes
    for name in labelling.field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise Damage(f"json has no field {labelling.field!r}, which is to hold its labels")
        value = value[name]
    labels = []
    for entry in value if isinstance(value, list) else [value]:
        word = str(entry)
        if type(entry) not in (str, int):
            raise Damage(f"label {word[:100]!r}: must be a name or a whole number")
        try:
            labels.append(labelling.names[word])
        except KeyError:
            if not _INDEX.fullmatch(word) or int(word) >= classes:
                raise Damage(f"label {word[:100]!r}: is no class of the data set") from None
            labels.append(int(word))
    return tuple(dict.fromkeys(labels))
