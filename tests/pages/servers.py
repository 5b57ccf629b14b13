"""MLflow's server and the databases behind it, started for real on this machine, and the ways to break them."""

import os
import pwd
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.launch import free_port

LIMIT = 180.0  # seconds that a server may take to answer


def wait(there: Callable[[], object], what: str, limit: float = LIMIT) -> None:
    """Wait for something."""
    deadline = time.monotonic() + limit
    while not there():
        assert time.monotonic() < deadline, f"{what}: not within {limit:.0f} s"
        time.sleep(0.2)


class MlflowServer:
    """`mlflow server` at one address, which can be killed and started again.

    Attributes:
        uri: of the server.
    """

    def __init__(self, folder: Path, store: str) -> None:
        """Start it.

        Args:
            folder: of its log and its artifacts.
            store: of its figures, as `--backend-store-uri` takes it.
        """
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        self._log = folder / "mlflow-server.log"
        self._words = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--port", str(port)]
        self._words += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._words, stdout=log, stderr=log, start_new_session=True)
        wait(self.answers, f"mlflow server, see {self._log}")

    def answers(self) -> bool:
        """Whether it does."""
        assert self._process.poll() is None, self._log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """Kill -9 it with all its processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def fill_disk(self, full: bool) -> None:
        """Let no file of the server grow from now on, as on a full disk; or let them again."""
        listed = subprocess.run(["ps", "-o", "pid=", "-g", str(self._process.pid)], capture_output=True, text=True,
                                check=True)  # fmt: skip
        limit = 0 if full else resource.RLIM_INFINITY
        for pid in listed.stdout.split():
            resource.prlimit(int(pid), resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


@contextmanager
def mlflow_server(folder: Path, store: str) -> Iterator[MlflowServer]:
    """A server, ended with all its processes."""
    server = MlflowServer(folder, store)
    try:
        yield server
    finally:
        server.kill()


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's programs, the newest; None where there are none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else None


def postgres_obstacle() -> str:
    """Why no database can be started on this machine; empty where one can."""
    if postgres_programs() is None:
        return "not installed: postgresql (Debian's package)"
    return "it needs root, to become the user postgres" if os.geteuid() else ""


class Postgres:
    """A database cluster of its own, run by the user postgres.

    Attributes:
        uri: as MLflow takes it, with the driver psycopg2.
    """

    def __init__(self, folder: Path) -> None:
        """Make it and start it.

        Args:
            folder: of its data.
        """
        programs = postgres_programs()
        assert programs is not None
        self._programs, self._data, port = programs, folder / "data", free_port()
        folder.mkdir(parents=True)
        for above in (folder, *folder.parents):
            if above.stat().st_uid == 0 and not above.stat().st_mode & 0o001:
                above.chmod(above.stat().st_mode | 0o011)  # pytest's folders are root's alone
        shutil.chown(folder, "postgres")
        self._own("initdb", "-D", str(self._data), "-U", "postgres", "--auth=trust", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        self._own("pg_ctl", "-D", str(self._data), "-w", "-l", str(folder / "log"), "-o", options, "start")
        self.uri = f"postgresql+psycopg2://postgres@127.0.0.1:{port}/postgres"
        self._ask = ["psql", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-qAtc"]

    def _own(self, program: str, *words: str) -> None:
        """Run one of its programs as its user."""
        user = pwd.getpwnam("postgres")
        done = subprocess.run([str(self._programs / program), *words], user=user.pw_uid, group=user.pw_gid, cwd="/",
                              env={"PATH": os.environ["PATH"], "LC_ALL": "C"}, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr

    def ask(self, command: str) -> str:
        """What a statement of SQL returns."""
        return subprocess.run([*self._ask, command], capture_output=True, text=True, check=True).stdout.strip()

    def refuse(self, refused: bool) -> None:
        """Let the database refuse every change from now on, as one that is full does; or take them again."""
        self.ask(f"ALTER SYSTEM SET default_transaction_read_only = {'on' if refused else 'off'}")
        self.ask("SELECT pg_reload_conf()")

    def stop(self) -> None:
        """End it at once."""
        self._own("pg_ctl", "-D", str(self._data), "-m", "immediate", "stop")


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """A database, ended again."""
    database = Postgres(folder)
    try:
        yield database
    finally:
        database.stop()
