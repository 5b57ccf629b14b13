"""One picture from a URL of the user's own list: tried again where that can help, bounded in bytes and time."""

import http.client
import time
import urllib.error
import urllib.request

from data_pipeline.decode import MAX_PICTURE_BYTES
from data_pipeline.errors import DataError

TRIES = 4
FIRST_PAUSE = 0.5  # seconds; doubled for each further try
SILENCE = 20.0  # seconds without a byte
WHOLE = 300.0  # seconds for one picture
CHUNK = 1 << 16
AGAIN = (408, 425, 429)  # of the answers below 500, those that may pass


class Unreachable(DataError):
    """A picture cannot be fetched from its URL."""


def download(url: str, tries: int = TRIES) -> bytes:
    """The bytes at `url`, http or https.

    Raises:
        Unreachable: not there, too large, or not to be had in `tries` tries.
    """
    reason = ""
    for number in range(tries):
        if number:
            time.sleep(FIRST_PAUSE * 2 ** (number - 1))
        try:
            return _once(url)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code < 500 and error.code not in AGAIN:
                break
        except (OSError, http.client.HTTPException) as error:
            reason = f"{type(error).__name__}: {error}"
        except ValueError as error:  # a URL that is none
            raise Unreachable(f"{url}: cannot be fetched: {error}") from error
    raise Unreachable(f"{url}: cannot be fetched: {reason}")


def _once(url: str) -> bytes:
    """One try. A connection that ends before the length it announced is an IncompleteRead."""
    end = time.monotonic() + WHOLE
    request = urllib.request.Request(url, headers={"User-Agent": "coatnet-data-build", "Accept": "image/*"})
    parts, size = [], 0
    with urllib.request.urlopen(request, timeout=SILENCE) as answer:
        announced = answer.headers.get("Content-Length")
        while part := answer.read(CHUNK):
            parts.append(part)
            size += len(part)
            if size > MAX_PICTURE_BYTES:
                raise Unreachable(f"{url}: larger than {MAX_PICTURE_BYTES} bytes")
            if time.monotonic() > end:
                raise TimeoutError(f"not whole after {WHOLE:.0f} s")
    if announced is not None and announced.isdecimal() and int(announced) != size:
        raise http.client.IncompleteRead(b"", int(announced) - size)
    return b"".join(parts)
