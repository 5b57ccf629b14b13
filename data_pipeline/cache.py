"""A node's own copies of files that lie elsewhere: whole, verified, one transfer for all processes, bounded in size.

    FOLDER/<sha256>.tar and .idx      a shard and its sidecar, by the checksum of the shard
    FOLDER/<sha256>.parquet           the index of a split
    FOLDER/<sha256>-<bytes>.part      one being fetched; bytes: what it will take, which counts from the start
    FOLDER/<sha256>.new               a sidecar being fetched
    FOLDER/room.lock                  held by the process that makes room

A name is the content's checksum, so a copy is never taken for another version of its shard, whoever left it. Locks are
flock's, which the kernel releases however a process ends: exclusive on a .part while it is fetched, shared on a .tar
while a reader has it open (`data_pipeline.shard.OpenShards`). Whatever is not locked may be evicted, what was unused
for longest first. A killed run leaves a .part, which the next fetch of that shard continues and any other may evict.
"""

import fcntl
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import InputError
from configs.schema import Data
from data_pipeline.errors import DataError, StoreError
from data_pipeline.shard import check_sidecar, sidecar_bytes
from data_pipeline.store import Patience, fetch, is_url

NAME = re.compile(r"([0-9a-f]{64})(?:-([0-9]{1,15})\.part|\.(?:tar|idx|parquet|new))")
POLL = 0.05  # seconds between two looks at a lock
STALLED = 600.0  # seconds after which another process's transfer that does not grow is given up


@dataclass
class _Kept:
    """The files in the cache of one checksum: their names, bytes on disk or reserved, and time of last use."""

    names: list[str] = field(default_factory=list)
    bytes: int = 0
    used: float = 0.0


@dataclass(frozen=True)
class Cache:
    """Copies in `folder`, of at most `limit` bytes, or what is in use if that is more.

    Any number of processes of one machine may share the folder, which must lie on a file system of its own.
    """

    folder: str
    limit: int
    patience: Patience = field(default_factory=Patience)

    def shard(self, url: str, sidecar: str, samples: int, size: int, sha256: str) -> str:
        """The path of the whole, verified tar whose URL or path is `url`, its sidecar beside it; fetched if need be.

        Raises:
            StoreError: it, or its `sidecar`, cannot be fetched, or is not what the manifest says.
        """
        tar = self._path(sha256, ".tar")
        with self._errors(url):
            while not self._take(tar, size, samples):
                with self._claim(self._path(sha256, f"-{size}.part"), url) as part:
                    if part is None:
                        continue
                    if _size(_beside(tar)) != sidecar_bytes(samples):
                        self._fetch_sidecar(sidecar, _beside(tar), samples, size)
                    if _size(tar) != size:
                        self._make_room()
                        self._fetch_claimed(url, part, size, sha256, ".tar")
                    else:  # by another process, between our look and our claim
                        os.unlink(self._path(sha256, f"-{size}.part"))
        return tar

    def index(self, url: str, sha256: str) -> bytes:
        """The bytes of the small file `url`, by its checksum.

        Raises:
            StoreError: it cannot be fetched, or is not what the manifest says.
        """
        path = self._path(sha256, ".parquet")
        with self._errors(url):
            while True:
                try:
                    data = Path(path).read_bytes()
                except FileNotFoundError:
                    data = b""
                if hashlib.sha256(data).hexdigest() == sha256:
                    return data
                with self._claim(self._path(sha256, "-0.part"), url) as part:
                    if part is not None:
                        os.ftruncate(part, 0)  # of unknown size: what is there may be all of it
                        self._fetch_claimed(url, part, None, sha256, ".parquet")

    def renew(self, url: str, sidecar: str, samples: int, size: int, sha256: str) -> None:
        """Look again at a copy whose samples do not match their checksums; a damaged one is fetched anew.

        Raises:
            StoreError: see `shard`.
        """
        tar, name = self._path(sha256, ".tar"), self._path(sha256, f"-{size}.part")
        with self._errors(url), self._claim(name, url) as part:
            if part is not None and _size(tar) is not None:
                self._fetch_sidecar(sidecar, _beside(tar), samples, size)
                with open(tar, "rb") as file:
                    damaged = _differs(file.fileno(), sha256)
                if damaged:
                    os.unlink(tar)
                os.unlink(name)
        self.shard(url, sidecar, samples, size, sha256)

    def _path(self, sha256: str, ending: str) -> str:
        """Where the copy with this checksum lies.

        Raises:
            DataError: no checksum, so that it might lead out of the folder.
        """
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise DataError(f"sha256 {sha256!r}: must be 64 hex digits; build the data set again")
        return os.path.join(self.folder, sha256 + ending)

    @contextmanager
    def _errors(self, url: str) -> Iterator[None]:
        """Make the folder; what goes wrong in it is an error that says where.

        Raises:
            StoreError: instead of an OSError.
        """
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            yield
        except OSError as error:
            raise StoreError(
                f"{url}: cannot be kept in the cache {self.folder}: {error}; choose another data.cache or a smaller "
                f"data.cache_bytes = {self.limit}"
            ) from error

    def _take(self, tar: str, size: int, samples: int) -> bool:
        """Whether the shard is here, whole; it then counts as just used."""
        if _size(tar) != size or _size(_beside(tar)) != sidecar_bytes(samples):
            return False
        try:
            os.utime(tar)
        except FileNotFoundError:  # evicted between the two looks
            return False
        return True

    @contextmanager
    def _claim(self, path: str, url: str) -> Iterator[int | None]:
        """The descriptor of `path`, locked for this process alone; None once another process has finished it.

        Raises:
            StoreError: another process holds it without getting on.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            seen, since = 0, time.monotonic()
            # Once it is a whole shard, with its new name, readers may hold it for long: no need to wait for those.
            while _is(descriptor, path) and not _locked(descriptor):
                stamp = os.fstat(descriptor).st_mtime_ns  # renewed by every write and every attempt
                if stamp != seen:
                    seen, since = stamp, time.monotonic()
                elif time.monotonic() - since > STALLED:
                    raise StoreError(f"{url}: a process that fetches it into {path} has not got on for {STALLED:g} s")
                time.sleep(POLL)
            yield descriptor if _is(descriptor, path) else None
        finally:
            os.close(descriptor)

    def _fetch_claimed(self, url: str, part: int, size: int | None, sha256: str, ending: str) -> None:
        """Complete the claimed .part and give it its name."""
        fetch(url, part, size, lambda: _differs(part, sha256), self.patience)
        os.fsync(part)
        os.rename(self._path(sha256, f"-{size or 0}.part"), self._path(sha256, ending))

    def _fetch_sidecar(self, url: str, path: str, samples: int, tar_bytes: int) -> None:
        """Bring the sidecar to `path`. Only the holder of the shard's .part does."""
        new = path.removesuffix(".idx") + ".new"
        with open(new, "w+b") as file:

            def check() -> str:
                try:
                    check_sidecar(os.pread(file.fileno(), sidecar_bytes(samples), 0), samples, tar_bytes, url)
                except DataError as error:
                    return str(error)
                return ""

            fetch(url, file.fileno(), sidecar_bytes(samples), check, self.patience)
            os.fsync(file.fileno())
        os.rename(new, path)

    def _make_room(self) -> None:
        """Evict what is unused, the longest unused first, until what is here and what is reserved fits.

        Called with the .part of the file to come claimed, which is thereby reserved, and spared.
        """
        with open(os.path.join(self.folder, "room.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held for moments only
            kept = self._kept()
            total = sum(each.bytes for each in kept.values())
            for each in sorted(kept.values(), key=lambda one: one.used):
                if total <= self.limit:
                    return
                if _evict([os.path.join(self.folder, name) for name in each.names]):
                    total -= each.bytes

    def _kept(self) -> dict[str, _Kept]:
        """What lies in the cache, by checksum. Other files in the folder are nobody's business here."""
        kept: dict[str, _Kept] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                match = NAME.fullmatch(entry.name)
                try:
                    found = entry.stat(follow_symlinks=False) if match else None
                except FileNotFoundError:  # renamed or evicted since it was listed
                    found = None
                if match and found:
                    each = kept.setdefault(match[1], _Kept())
                    each.names.append(entry.name)
                    each.bytes += max(found.st_size, int(match[2] or 0))
                    each.used = max(each.used, found.st_mtime)
        return kept


def cache_of(data: Data, root: str) -> Cache | None:
    """The cache for a data set at `root`; None: it is read where it lies.

    Raises:
        StoreError: the temporary folder belongs to somebody else.
    """
    patience = Patience(data.fetch_retries, data.pipe)
    if data.cache:
        return Cache(os.path.abspath(os.path.expanduser(data.cache)), data.cache_bytes, patience)
    if not is_url(root):
        return None
    folder = os.path.join(tempfile.gettempdir(), f"coatnet-cache-{os.getuid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.lstat(folder)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be made: {error.strerror}; give data.cache") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StoreError(f"{folder}: is not a folder of yours; give data.cache")
    return Cache(folder, data.cache_bytes, patience)


def _beside(tar: str) -> str:
    """The cached sidecar of a cached tar."""
    return tar.removesuffix(".tar") + ".idx"


def _size(path: str) -> int | None:
    """Bytes of the file at `path`; None: there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def _locked(descriptor: int) -> bool:
    """Lock a file for its one writer, unless somebody holds it.

    Raises:
        InputError: the file system has no such locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise InputError(
            f"data.cache: its file system has no flock ({error.strerror}); choose a local folder"
        ) from error
    return True


def _is(descriptor: int, path: str) -> bool:
    """Whether the open file is still the one at `path`: it may have been renamed or evicted meanwhile."""
    try:
        there, here = os.stat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)


def _differs(descriptor: int, sha256: str) -> str:
    """What is wrong with a complete file, or nothing."""
    digest, offset = hashlib.sha256(), 0
    while data := os.pread(descriptor, 1 << 20, offset):
        digest.update(data)
        offset += len(data)
    return "" if digest.hexdigest() == sha256 else f"its {offset} bytes do not match the manifest's sha256"


def _evict(paths: list[str]) -> bool:
    """Remove the files of one checksum, unless a process reads or fetches one of them; says whether they are gone."""
    held: list[int] = []
    try:
        for path in paths:
            held.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            if not _locked(held[-1]):
                return False
        # The tar first: without it the sidecar is no use, and is fetched again with it.
        for path in sorted(paths, key=lambda one: not one.endswith(".tar")):
            os.unlink(path)
    except OSError:  # gone meanwhile, or another user's
        return False
    finally:
        for descriptor in held:
            os.close(descriptor)
    return True
