"""One shard on disk: a plain WebDataset tar, and the sidecar that says where each sample lies in it.

Sidecar, little-endian: magic (8 bytes), version and number of samples n (uint32 each), n + 1 byte offsets (uint64), the
crc32 of each sample's byte range (uint32), the crc32 of everything before it (uint32). Sample i is the tar's bytes
[offset_i, offset_{i+1}): all its members, headers and padding included.
"""

import io
import json
import os
import struct
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError

MAGIC = b"CoAtIdx\n"
SIDECAR_VERSION = 1
HEADER = struct.Struct("<8sII")
CRC = struct.Struct("<I")
TAR_BLOCK = 512  # bytes; members start at multiples of it
PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_SAMPLE_BYTES = 1 << 28  # a larger sample is refused, not read
OPEN_SHARDS = 256  # file descriptors held at most, well below the usual limit of 1,024


@dataclass(frozen=True, eq=False)
class Sidecar:
    """Where a shard's n samples lie: `offsets` (n + 1,) in bytes, `crcs` (n,) of the byte ranges between them."""

    offsets: NDArray[np.uint64]
    crcs: NDArray[np.uint32]


@dataclass(frozen=True)
class Sample:
    """One sample as stored: `picture` is the undecoded file, `labels` indices into the vocabulary."""

    key: str
    extension: str
    picture: bytes
    labels: tuple[int, ...]


@dataclass(frozen=True)
class OpenShard:
    """A shard that can be read: its path (for messages), file descriptor and sidecar."""

    path: str
    descriptor: int
    sidecar: Sidecar

    def read(self, number: int, classes: int) -> Sample:
        """Sample `number`, its bytes checked against the sidecar and its labels against `classes`.

        Raises:
            DataError: naming the shard, the sample, its key and its offset.
        """
        begin, end = (int(edge) for edge in self.sidecar.offsets[number : number + 2])
        where = f"{self.path}: sample {number} at byte {begin}"
        if end - begin > MAX_SAMPLE_BYTES:
            raise DataError(f"{where}: {end - begin} bytes, the limit is {MAX_SAMPLE_BYTES}; rebuild without it")
        try:
            data = os.pread(self.descriptor, end - begin, begin)
        except OSError as error:
            raise DataError(f"{where}: cannot be read: {error.strerror}") from error
        if len(data) != end - begin:
            raise DataError(
                f"{where}: the file ends after {len(data)} of its {end - begin} bytes; fetch the shard again"
            )
        if zlib.crc32(data) != int(self.sidecar.crcs[number]):
            name = data[:100].partition(b"\0")[0].decode("ascii", "backslashreplace")
            raise DataError(
                f"{where}, key {name!r} if still readable: the bytes do not match their checksum; fetch the shard again"
            )
        try:
            return parse(data, classes)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


class OpenShards:
    """The shards of one split that were read last, at most `limit` of them open."""

    def __init__(self, paths: Sequence[str], counts: NDArray[np.int64], limit: int = OPEN_SHARDS) -> None:
        self._paths, self._counts, self._limit = paths, counts, limit
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def get(self, shard: int) -> OpenShard:
        """Shard number `shard`, opened if need be; the one unused for longest is closed when there are too many.

        Raises:
            DataError: the shard or its sidecar is missing or damaged.
        """
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1].descriptor)
        path = self._paths[shard]
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            opened = OpenShard(path, descriptor, read_sidecar(path, int(self._counts[shard])))
        except BaseException:
            os.close(descriptor)
            raise
        self._open[shard] = opened
        return opened

    def close(self) -> None:
        """Close all file descriptors."""
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    def __del__(self) -> None:
        self.close()


def sidecar_path(shard: str) -> str:
    """The sidecar beside the tar file `shard`."""
    return str(Path(shard).with_suffix(".idx"))


def sidecar_bytes(samples: int) -> int:
    """Size of the sidecar of a shard with `samples` samples."""
    return HEADER.size + 8 * (samples + 1) + 4 * samples + CRC.size


def pack_sidecar(offsets: Sequence[int], crcs: Sequence[int]) -> bytes:
    """The sidecar's bytes for n + 1 `offsets` and n `crcs`."""
    body = HEADER.pack(MAGIC, SIDECAR_VERSION, len(crcs))
    body += np.asarray(offsets, dtype="<u8").tobytes() + np.asarray(crcs, dtype="<u4").tobytes()
    return body + CRC.pack(zlib.crc32(body))


def read_sidecar(shard: str, samples: int) -> Sidecar:
    """The sidecar of the tar file `shard`, which the manifest says holds `samples` samples.

    Raises:
        DataError: missing, damaged, of another version, or at odds with the shard.
    """
    path = sidecar_path(shard)
    try:
        data = Path(path).read_bytes()
        tar_bytes = os.stat(shard).st_size
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; rebuild the data set or fetch the file again"
        ) from error
    if len(data) != sidecar_bytes(samples):
        raise DataError(
            f"{path}: {len(data)} bytes, expected {sidecar_bytes(samples)} for {samples} samples; fetch it again"
        )
    if CRC.unpack(data[-CRC.size :])[0] != zlib.crc32(data[: -CRC.size]):
        raise DataError(f"{path}: the bytes do not match their checksum; fetch it again")
    magic, version, count = HEADER.unpack_from(data)
    if (magic, version, count) != (MAGIC, SIDECAR_VERSION, samples):
        raise DataError(
            f"{path}: not a version {SIDECAR_VERSION} sidecar of {samples} samples (version {version}, {count} samples)"
        )
    offsets = np.frombuffer(data, dtype="<u8", count=samples + 1, offset=HEADER.size)
    crcs = np.frombuffer(data, dtype="<u4", count=samples, offset=HEADER.size + 8 * (samples + 1))
    if (offsets[1:] <= offsets[:-1]).any() or int(offsets[-1]) > tar_bytes or (offsets % TAR_BLOCK).any():
        raise DataError(
            f"{path}: its offsets do not fit {shard} of {tar_bytes} bytes; the two files are not of one build"
        )
    return Sidecar(offsets.astype(np.uint64), crcs.astype(np.uint32))


def parse(data: bytes, classes: int) -> Sample:
    """The sample whose tar members are `data`. Members are only read, never executed or unpickled.

    Raises:
        DataError: not tar members of one sample with one picture and one label member, or labels out of range.
    """
    key, members = None, {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if key not in (None, folder + slash + stem):
                    raise DataError(f"key {key!r}: also holds a member of {folder + slash + stem!r}")
                key = folder + slash + stem
                content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                if content is None or extension.lower() in members:
                    raise DataError(f"key {key!r}: member {member.name!r} is no plain file or comes twice")
                members[extension.lower()] = content.read()
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"key {key!r}: not readable as tar members: {error}") from error
    pictures = [extension for extension in PICTURE_EXTENSIONS if extension in members]
    if key is None or len(pictures) != 1:
        raise DataError(f"key {key!r}: needs one member of {PICTURE_EXTENSIONS}, has {sorted(members)}")
    return Sample(key, pictures[0], members[pictures[0]], _labels(key, members, classes))


def _labels(key: str, members: dict[str, bytes], classes: int) -> tuple[int, ...]:
    """The labels in the one member `cls` (a number) or `json` ({"labels": [numbers]})."""
    if ("cls" in members) == ("json" in members):
        raise DataError(f"key {key!r}: needs either a cls or a json member, has {sorted(members)}")
    try:
        if "cls" in members:
            text = members["cls"].strip()
            labels: object = [int(text)] if text.isdigit() else text
        else:
            content = json.loads(members["json"])
            labels = content.get("labels") if isinstance(content, dict) else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"key {key!r}: its label cannot be read: {error}") from error
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise DataError(f"key {key!r}: labels {labels!r}: must be whole numbers from 0 to {classes - 1}")
    return tuple(labels)
