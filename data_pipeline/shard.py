"""One shard on disk: a plain WebDataset tar, and the sidecar that says where each sample lies in it.

Sidecar, little-endian: magic (8 bytes), version and number of samples n (uint32 each), n + 1 byte offsets (uint64), the
crc32 of each sample's byte range (uint32), the crc32 of everything before it (uint32). Sample i is the tar's bytes
[offset_i, offset_{i+1}): all its members, headers and padding included.
"""

import fcntl
import os
import struct
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import Damage, DataError, StoreError
from data_pipeline.members import PICTURE_EXTENSIONS, PLAIN, TAR_BLOCK, Labelling, Sample, parse

__all__ = ["PICTURE_EXTENSIONS", "OpenShards", "Sample", "parse", "read_sidecar"]

MAGIC = b"CoAtIdx\n"
SIDECAR_VERSION = 1
HEADER = struct.Struct("<8sII")
CRC = struct.Struct("<I")
MAX_SAMPLE_BYTES = 1 << 28  # a larger sample is refused, not read
ANY_SIZE = 1 << 63  # bytes; no tar is so long
OPEN_TRIES = 1000  # to have a cached shard before it is evicted again
OPEN_SHARDS = 256  # file descriptors held at most, well below the usual limit of 1,024


@dataclass(frozen=True, eq=False)
class Sidecar:
    """Where a shard's n samples lie: `offsets` (n + 1,) in bytes, `crcs` (n,) of the byte ranges between them."""

    offsets: NDArray[np.uint64]
    crcs: NDArray[np.uint32]


@dataclass(frozen=True)
class OpenShard:
    """A shard that can be read: its path (for messages), file descriptor and sidecar."""

    path: str
    descriptor: int
    sidecar: Sidecar

    def read(self, number: int, classes: int, labelling: Labelling = PLAIN) -> Sample:
        """Sample `number`, its bytes checked against the sidecar and its labels against `classes`.

        Raises:
            Damage: naming the shard, the sample, its key and its offset.
            StoreError: the file system fails.
        """
        begin, end = (int(edge) for edge in self.sidecar.offsets[number : number + 2])
        where = f"{self.path}: sample {number} at byte {begin}"
        if end - begin > MAX_SAMPLE_BYTES:
            raise Damage(f"{where}: {end - begin} bytes, the limit is {MAX_SAMPLE_BYTES}; rebuild without it")
        try:
            data = os.pread(self.descriptor, end - begin, begin)
            while len(data) < end - begin and (
                more := os.pread(self.descriptor, end - begin - len(data), begin + len(data))
            ):
                data += more
        except OSError as error:
            raise StoreError(f"{where}: cannot be read: {error.strerror}") from error
        if len(data) != end - begin:
            raise Damage(f"{where}: the file ends after {len(data)} of its {end - begin} bytes; fetch the shard again")
        if zlib.crc32(data) != int(self.sidecar.crcs[number]):
            name = data[:100].partition(b"\0")[0].decode("ascii", "backslashreplace")
            raise Damage(
                f"{where}, key {name!r} if still readable: the bytes do not match their checksum; fetch the shard again"
            )
        try:
            return parse(data, classes, labelling)
        except Damage as error:
            raise Damage(f"{where}: {error}", error.key) from error


class OpenShards:
    """The shards of one split that were read last, at most `limit` of them open.

    Args:
        paths: of the tars, for messages, and for reading where there is no `locate`.
        counts: samples of each shard, (shards,).
        limit: shards open at a time.
        locate: the local path of a shard number, whole; its sidecar lies beside it.
        renew: has a copy looked at again whose samples are damaged. Given with the `locate` of a cache, whose files
            are locked while they are open so that no process evicts them.
        labelling: of a shard number; None: all are plain.
    """

    def __init__(
        self,
        paths: Sequence[str],
        counts: NDArray[np.int64],
        limit: int = OPEN_SHARDS,
        locate: Callable[[int], str] | None = None,
        renew: Callable[[int], None] | None = None,
        labelling: Callable[[int], Labelling] | None = None,
    ) -> None:
        self._paths, self._counts, self._limit = paths, counts, limit
        self._locate, self._renew = locate, renew
        self._labelling = labelling or (lambda shard: PLAIN)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def get(self, shard: int) -> OpenShard:
        """Shard number `shard`, opened if need be; the one unused for longest is closed when there are too many.

        Raises:
            StoreError: the shard or its sidecar is missing or cannot be read.
            DataError: its sidecar is damaged.
        """
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1].descriptor)
        local, descriptor = self._descriptor(shard)
        try:
            opened = OpenShard(
                self._paths[shard], descriptor, read_sidecar(local, int(self._counts[shard]), whole=False)
            )
        except BaseException:
            os.close(descriptor)
            raise
        self._open[shard] = opened
        return opened

    def read(self, shard: int, number: int, classes: int) -> Sample:
        """Sample `number` of shard number `shard`; a copy that went bad in the cache is fetched again first.

        Raises:
            StoreError: see `get`.
            DataError: the sample is damaged where the shard comes from: see `OpenShard.read`.
        """
        try:
            return self.get(shard).read(number, classes, self._labelling(shard))
        except DataError as error:
            if self._renew is None or isinstance(error, StoreError):
                raise
            self._close(shard)
            self._renew(shard)
        return self.get(shard).read(number, classes, self._labelling(shard))

    def where(self, shard: int, number: int) -> str:
        """The place of a sample, for messages."""
        opened = self.get(shard)
        return f"{opened.path}: sample {number} at byte {int(opened.sidecar.offsets[number])}"

    def _descriptor(self, shard: int) -> tuple[str, int]:
        """Local path and descriptor of a shard, locked against eviction if it is a cache's.

        Raises:
            StoreError: it cannot be had.
        """
        for _ in range(OPEN_TRIES):
            local = self._locate(shard) if self._locate else self._paths[shard]
            try:
                descriptor = os.open(local, os.O_RDONLY | os.O_CLOEXEC)
            except (OSError, ValueError) as error:
                if self._renew is not None and isinstance(error, FileNotFoundError):
                    continue  # evicted since it was located
                raise StoreError(
                    f"{self._paths[shard]}: missing, cannot be opened: {error}; restore the file, then give the same "
                    f"command again"
                ) from error
            if self._renew is None:
                return local, descriptor
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(local)):
                    return local, descriptor
            except (BlockingIOError, FileNotFoundError):
                time.sleep(0.01)  # it is just being evicted, or has just been fetched
            except OSError:  # of a mixture, a shard that is read in place, where there are no locks
                return local, descriptor
            os.close(descriptor)
        raise StoreError(f"{self._paths[shard]}: evicted as often as it was fetched; give a larger data.cache_bytes")

    def _close(self, shard: int) -> None:
        """Close one shard if it is open."""
        if shard in self._open:
            os.close(self._open.pop(shard).descriptor)

    def close(self) -> None:
        """Close all file descriptors."""
        for shard in list(self._open):
            self._close(shard)

    def __del__(self) -> None:
        self.close()


def sidecar_path(shard: str) -> str:
    """The sidecar beside the tar file `shard`."""
    return os.path.splitext(shard)[0] + ".idx"


def sidecar_bytes(samples: int) -> int:
    """Size of the sidecar of a shard with `samples` samples."""
    return HEADER.size + 8 * (samples + 1) + 4 * samples + CRC.size


def pack_sidecar(offsets: Sequence[int], crcs: Sequence[int]) -> bytes:
    """The sidecar's bytes for n + 1 `offsets` and n `crcs`."""
    body = HEADER.pack(MAGIC, SIDECAR_VERSION, len(crcs))
    body += np.asarray(offsets, dtype="<u8").tobytes() + np.asarray(crcs, dtype="<u4").tobytes()
    return body + CRC.pack(zlib.crc32(body))


def read_sidecar(shard: str, samples: int, whole: bool = True) -> Sidecar:
    """The sidecar of the tar file `shard`, which the manifest says holds `samples` samples.

    With `whole`, a tar that ends before its last sample is refused; else the samples it lacks are damaged ones.

    Raises:
        DataError: missing, damaged, of another version, or at odds with the shard.
    """
    path = sidecar_path(shard)
    try:
        data = Path(path).read_bytes()
        tar_bytes = os.stat(shard).st_size if whole else ANY_SIZE
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be read: {error.strerror}; rebuild the data set or fetch the file again"
        ) from error
    return check_sidecar(data, samples, tar_bytes, path)


def check_sidecar(data: bytes, samples: int, tar_bytes: int, path: str) -> Sidecar:
    """The sidecar whose file's bytes are `data`; `path` is for messages.

    Raises:
        DataError: damaged, of another version, or at odds with a shard of `samples` samples and `tar_bytes` bytes.
    """
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
            f"{path}: its offsets do not fit a shard of {tar_bytes} bytes; the two files are not of one build"
        )
    return Sidecar(offsets.astype(np.uint64), crcs.astype(np.uint32))
