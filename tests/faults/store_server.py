"""A store over HTTP that misbehaves as it is told: `Server(folder)`."""

import contextlib
import random
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

# What a request may meet. `ok` is the absence of a fault; `slow` a server that is whole but takes its time.
FAULTS = (
    "drop",  # the connection is reset somewhere in the body
    "delay",  # no answer for longer than the time limit
    "stall",  # half the body, then silence
    "truncate",  # Content-Length and body agree, and are too short
    "lie long",  # Content-Length is larger than the file
    "lie short",  # Content-Length is smaller than the body
    "no range",  # 200 and the whole file, whatever range was asked for; dropped half-way
    "other range",  # 206 with bytes from elsewhere
    "500",
    "503",
    "404",
    "416",
    "garbage",  # bytes of the right number
    "rotten drop",  # wrong bytes, and then a reset
    "flipped",  # one wrong bit
    "appended",  # the file, and more
    "no http",  # not a line of HTTP
    "redirect",  # to nowhere
    "empty",  # 200 and nothing
)
SILENCE = 0.8  # seconds; longer than the time limit of the tests' fetches


class Server:
    """Serves `folder` from a thread; request number i for a path meets the i-th fault planned for it.

    Attributes:
        asked: requests by path, unquoted.
        sent: bytes of bodies by path.
        ranges: paths of requests that asked for a range.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.plan: dict[str, list[str]] = {}
        self.always = ""  # what every request beyond the plan meets
        self.pace = 0.0  # seconds between two pieces of a body of 4 KiB
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def fault(self, path: str) -> tuple[str, float]:
        """What the next request for `path` meets, and a number from 0 to 1 for where."""
        with self.lock:
            self.asked[path] += 1
            planned = self.plan.get(path, [])
            return (planned.pop(0) if planned else self.always), self.draw.random()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    owner: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """One file, or what happens instead."""
        owner = cast("_Http", self.server).owner
        self.path = unquote(self.path)
        fault, place = owner.fault(self.path)
        try:
            content = (owner.folder / self.path.lstrip("/")).read_bytes()
        except OSError:
            self.send_error(404)
            return
        first = self.headers.get("Range", "")
        start = int(first.removeprefix("bytes=").rstrip("-")) if first else 0
        if first:
            owner.ranges.append(self.path)
        with contextlib.suppress(OSError):
            self._answer(fault, place, content, start)

    def _answer(self, fault: str, place: float, content: bytes, start: int) -> None:
        """Send `content` from `start` on, spoilt as `fault` says."""
        if fault.isdecimal():
            self.send_error(int(fault))
            return
        if fault == "delay":
            time.sleep(SILENCE)
        if fault == "no http":
            self.wfile.write(b"\0\1\2 what?\r\n\r\n")
            return
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()
            return
        start = 0 if fault in ("no range", "empty") else start
        if start >= len(content) > 0:
            self.send_error(416)
            return
        body, cut = bytearray(content[start:]), int(place * len(content[start:]))
        if fault in ("garbage", "rotten drop"):
            body = bytearray(random.Random(place).randbytes(len(body)))
        elif fault == "flipped":
            body[min(cut, len(body) - 1)] ^= 1
        elif fault == "truncate":
            del body[cut:]
        elif fault == "appended":
            body += b"more" * 100
        elif fault == "empty":
            body.clear()
        stated = {"lie long": len(body) + 1 + cut, "lie short": cut}.get(fault, len(body))
        self.send_response(206 if start or (fault == "other range" and self.headers.get("Range")) else 200)
        if start:
            shown = start + 1 if fault == "other range" else start
            self.send_header("Content-Range", f"bytes {shown}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(stated))
        self.end_headers()
        if fault in ("drop", "rotten drop", "no range", "other range"):
            self._send(body[:cut])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not an end
            self.connection.close()
        elif fault == "stall":
            self._send(body[: len(body) // 2])
            time.sleep(SILENCE)
        else:
            self._send(body)

    def _send(self, body: bytes | bytearray) -> None:
        """The body, in pieces if the server is slow."""
        owner = cast("_Http", self.server).owner
        step = 4096 if owner.pace else max(1, len(body))
        for begin in range(0, len(body), step):
            self.wfile.write(body[begin : begin + step])
            self.wfile.flush()
            with owner.lock:
                owner.sent[self.path] += len(body[begin : begin + step])
            time.sleep(owner.pace)
