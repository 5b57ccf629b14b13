"""Files of a data set brought from where they lie: a folder, http(s), s3, gs, or what a user's command writes.

A transport is one attempt: it yields (offset, bytes) from a wished offset on, or from 0 where the store cannot begin
elsewhere, and raises `Dropped` when it ends early. `fetch` makes attempts until the whole file is there and proves to
be the right one. No attempt waits for ever: each has a time limit on silence and on a trickle of bytes.
"""

import functools
import http.client
import importlib
import os
import random
import selectors
import shlex
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from configs.errors import InputError
from data_pipeline.errors import DataError, StoreError

Piece = tuple[int, bytes]  # offset in the file, bytes from there on

CHUNK = 1 << 20  # bytes asked of a stream at once
RANGE = 1 << 24  # bytes asked of an object store in one request
TRICKLE = 1 << 16  # bytes that must come within each time limit
UNSIZED = 1 << 28  # bytes of a file whose size is not recorded: manifest.json and the indices
LONGEST_WAIT = 30.0  # seconds between two attempts
EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs")}  # scheme: (module that fsspec needs, our extra)
# Characters that a command gets in a URL; even a shell would read nothing more in them.
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+=,@%:~/")


class Dropped(Exception):
    """An attempt failed or ended early; the next may do better."""


class Refused(Dropped):
    """The store answered clearly: no such file, or no right to it."""


@dataclass(frozen=True)
class Patience:
    """How to fetch, and when to give up.

    Args:
        retries: attempts in a row that bring nothing new, after the first.
        pipe: a command with {url}, in place of the transports for URLs.
        timeout: seconds of silence that end an attempt.
        wait: seconds before the second attempt; doubled by each fruitless one.
    """

    retries: int = 5
    pipe: str = ""
    timeout: float = 30.0
    wait: float = 1.0


def is_url(path: str) -> bool:
    """Whether `path` names a store rather than a folder."""
    return "://" in path


def check_root(url: str, pipe: str) -> str:
    """The root of a data set at a URL, without trailing slashes.

    Raises:
        InputError: a scheme that cannot be read, no host, or a query, which file names cannot be appended to.
    """
    parts = urllib.parse.urlsplit(url)
    if not pipe and parts.scheme not in ("http", "https", *EXTRAS):
        raise InputError(
            f"data.path = {url!r}: http, https, s3 and gs can be read; for others give data.pipe, a command"
        )
    if not parts.netloc or parts.query or parts.fragment or "@" in parts.netloc or "\0" in url:
        raise InputError(f"data.path = {url!r}: must be SCHEME://HOST/FOLDER without user, query or fragment")
    return url.rstrip("/")


def join(root: str, relative: str) -> str:
    """The file at the relative path under a data set's root, be it a folder or a URL."""
    http_like = root.startswith(("http://", "https://"))
    return f"{root}/{urllib.parse.quote(relative) if http_like else relative}"


def fetch(url: str, descriptor: int, size: int | None, check: Callable[[], str], patience: Patience) -> None:
    """Write to `descriptor` the file at `url`, from where what is already there ends.

    Args:
        url: a URL, or a path.
        descriptor: of an empty file, or of one that an earlier fetch began.
        size: of the whole file in bytes; None where it is not known.
        check: looks at the file when it is complete; says what is wrong, or nothing.
        patience: see there.

    Raises:
        StoreError: the attempts are used up; says why the last failed, and what to do.
        OSError: the file cannot be written.
    """
    have = most = os.fstat(descriptor).st_size
    left_over, wrong, fruitless, tries, begun = have > 0, 0, 0, 0, time.monotonic()
    enough = min(CHUNK, -(-size // 16)) if size else CHUNK
    while True:
        tries += 1
        os.utime(descriptor)  # shows processes that wait for this one that it is alive
        have, reason, final = _attempt(url, descriptor, have, size, patience)
        grown, most = have - most, max(have, most)
        if not reason:
            reason = check()
            if not reason:
                return
            os.ftruncate(descriptor, 0)
            # What an earlier process left may be at fault, and does not count.
            wrong, left_over, have, most = wrong + (not left_over), False, 0, 0
        elif grown >= enough:
            fruitless = 0
        else:
            fruitless += 1
        if final or fruitless > patience.retries or wrong > patience.retries:
            break
        pause = min(LONGEST_WAIT, patience.wait * 2.0 ** min(10, fruitless))
        time.sleep(pause * random.SystemRandom().uniform(0.5, 1.0))  # not the global generator, which the run seeds
    raise StoreError(
        f"{url}: cannot be fetched: {reason} ({tries} attempts in {time.monotonic() - begun:.0f} s, {have} of "
        f"{'?' if size is None else size} bytes here); make the file readable, then give the same command again"
    )


def read_small(url: str, patience: Patience) -> bytes:
    """The bytes of a small file at `url`, as they come: there is nothing to verify them with.

    Raises:
        StoreError: it cannot be fetched.
    """
    with tempfile.TemporaryFile() as file:
        fetch(url, file.fileno(), None, lambda: "", patience)
        return file.read()


def _attempt(url: str, descriptor: int, have: int, size: int | None, patience: Patience) -> tuple[int, str, bool]:
    """One attempt to complete the file: (bytes now there, what went wrong or nothing, whether trying again is vain)."""
    if size is not None and have >= size:
        os.ftruncate(descriptor, size)
        return size, "", False
    try:
        with closing(pieces(url, have, size, patience)) as found:
            for offset, data in found:
                if offset < have:
                    os.ftruncate(descriptor, offset)
                data = data if size is None else data[: size - offset]
                _write(descriptor, data, offset)
                have = offset + len(data)
                if size is None and have > UNSIZED:
                    return have, f"longer than the {UNSIZED} bytes that a file of its kind may have", True
                if size is not None and have >= size:
                    return have, "", False
    except Dropped as error:
        return have, str(error), isinstance(error, Refused) and size is None
    if size is not None:
        return have, f"ended after {have} bytes", False
    return have, "", False


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """All of `data` at `offset`: the system may write less at a time."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def pieces(url: str, start: int, size: int | None, patience: Patience) -> Generator[Piece, None, None]:
    """The file's bytes from `start` on, or from 0.

    Raises:
        Dropped: the store is out of reach, or fell silent, or ended early as far as it says so itself.
        InputError: the scheme's package is not installed.
        DataError: a name that must not get into a command.
    """
    if not is_url(url):
        return _local(url, start)
    if patience.pipe:
        return _piped(url, start, patience)
    scheme = url.partition(":")[0]
    if scheme in EXTRAS:
        return _objects(url, start, size, patience.timeout)
    return _http(url, start, patience.timeout)


def _local(path: str, start: int) -> Generator[Piece, None, None]:
    """A file, of a network file system as a rule."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while data := file.read(CHUNK):
                yield start, data
                start += len(data)
    except FileNotFoundError as error:
        raise Refused("no such file") from error
    except OSError as error:
        raise Dropped(error.strerror or str(error)) from error


def _http(url: str, start: int, timeout: float) -> Generator[Piece, None, None]:
    """A file behind http or https. Proxies come from the environment, as usual."""
    headers = {"User-Agent": "coatnet", "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
            stated = response.headers.get("Content-Length", "")
            left = int(stated) if stated.isdecimal() else None
            if start and response.status == 206:
                if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    yield 0, b""
                    raise Dropped("answered with another range of bytes than was asked for")
            else:
                start = 0
            for data in _paced(functools.partial(response.read1, CHUNK), timeout):
                yield start, data
                start += len(data)
                left = None if left is None else left - len(data)
            if left:
                raise Dropped(f"closed the connection {left} bytes early")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # what is here is longer than the file there
            yield 0, b""
        gone = 400 <= error.code < 500 and error.code not in (408, 416, 425, 429)
        raise (Refused if gone else Dropped)(f"HTTP status {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Dropped(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from error


def _paced(read: Callable[[], bytes], timeout: float) -> Iterator[bytes]:
    """What `read` returns until it returns nothing, which must be some TRICKLE of bytes in every `timeout` seconds."""
    since, got = time.monotonic(), 0
    while data := read():
        yield data
        got += len(data)
        if time.monotonic() - since > timeout:
            if got < TRICKLE:
                raise Dropped(f"only {got} bytes came in {timeout:g} s")
            since, got = time.monotonic(), 0


def _objects(url: str, start: int, size: int | None, timeout: float) -> Generator[Piece, None, None]:
    """An object of S3 or Google Cloud Storage through fsspec, in ranges. Credentials are the packages' own affair."""
    try:
        store = _file_system(url.partition(":")[0], timeout)
        end = int(store.info(url)["size"]) if size is None else size
        while start < end:
            data = store.cat_file(url, start=start, end=min(end, start + RANGE))
            if not data:
                raise Dropped(f"holds {start} bytes only")
            yield start, data
            start += len(data)
    except (Dropped, InputError):
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    except Exception as error:  # each of these packages has a tree of errors of its own
        raise Dropped(f"{type(error).__name__}: {error}") from error


def _file_system(scheme: str, timeout: float) -> Any:
    """fsspec's file system of a scheme.

    Raises:
        InputError: its package is not installed.
    """
    module, extra = EXTRAS[scheme]
    try:
        importlib.import_module(module)
        fsspec = importlib.import_module("fsspec")
    except ImportError as error:
        raise InputError(
            f"{scheme}:// needs the package {module} ({error}); pip install -e '.[{extra}]', or give data.pipe"
        ) from error
    if scheme == "s3":
        return fsspec.filesystem(scheme, config_kwargs={"connect_timeout": timeout, "read_timeout": timeout})
    # Of silence, not of a whole request; left to itself gcsfs has none.
    silence = importlib.import_module("aiohttp").ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    return fsspec.filesystem(scheme, requests_timeout=silence)


def _piped(url: str, start: int, patience: Patience) -> Generator[Piece, None, None]:
    """What the user's command writes. No shell runs it; its process group is killed when it stalls."""
    if not PLAIN.issuperset(url):
        raise DataError(f"{url!r}: a command gets only names of letters, digits and ._-+=,@%:~/; rename the file")
    start = start if "{offset}" in patience.pipe else 0
    words = [word.replace("{url}", url).replace("{offset}", str(start)) for word in shlex.split(patience.pipe)]
    with tempfile.TemporaryFile() as said:
        try:
            child = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, start_new_session=True
            )
        except OSError as error:
            raise InputError(f"data.pipe = {patience.pipe!r}: {words[0]!r} cannot be run: {error.strerror}") from error
        assert child.stdout is not None
        try:
            with child.stdout as output:
                for data in _paced(functools.partial(_read, output.fileno(), patience.timeout), patience.timeout):
                    yield start, data
                    start += len(data)
            code = child.wait(patience.timeout)
        except subprocess.TimeoutExpired as error:
            raise Dropped("data.pipe wrote everything but did not end") from error
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if code:
            said.seek(max(0, said.seek(0, os.SEEK_END) - 300))
            words_said = said.read().decode("utf-8", "backslashreplace").strip()
            raise Dropped(f"data.pipe ended with status {code}: {words_said or 'it said nothing'}")


def _read(descriptor: int, timeout: float) -> bytes:
    """The next bytes of a pipe.

    Raises:
        Dropped: none within `timeout` seconds.
    """
    with selectors.DefaultSelector() as waiting:
        waiting.register(descriptor, selectors.EVENT_READ)
        if not waiting.select(timeout):
            raise Dropped(f"data.pipe wrote nothing for {timeout:g} s")
    return os.read(descriptor, CHUNK)
