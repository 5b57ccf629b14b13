"""A run's copy of the code: what is on disk at the submission, and nothing that comes later."""

import subprocess
from pathlib import Path

import pytest

from slurm import snapshot


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one committed file, one changed, one new and one that git ignores."""
    root = tmp_path / "tree"
    (root / "models").mkdir(parents=True)
    (root / "models" / "a.py").write_text("committed = 1\n")
    (root / "models" / "b.py").write_text("old = 1\n")
    (root / ".gitignore").write_text("*.log\n")
    (root / "notes.txt").write_text("outside of the rooms\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"]):
        subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)
    (root / "models" / "b.py").write_text("changed = 2\n")
    (root / "models" / "new.py").write_text("new = 3\n")
    (root / "models" / "x.log").write_text("ignored\n")
    monkeypatch.setattr(snapshot, "ROOT", root)
    return root


def names(copy: Path) -> set[str]:
    return {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}


def test_uncommitted_changes_are_taken_and_later_edits_are_not(tree: Path, tmp_path: Path) -> None:
    copy = snapshot.take(tmp_path / "code")
    assert names(copy) == {"models/a.py", "models/b.py", "models/new.py", "SNAPSHOT"}
    assert copy.name == snapshot.digest()
    assert (copy / "SNAPSHOT").read_text().strip().endswith("+")
    assert snapshot.take(tmp_path / "code") == copy
    (tree / "models" / "b.py").write_text("later = 4\n")
    other = snapshot.take(tmp_path / "code")
    assert other != copy
    assert (copy / "models" / "b.py").read_text() == "changed = 2\n"
    assert (other / "models" / "b.py").read_text() == "later = 4\n"
    assert not (tmp_path / "code" / "partial").exists()


def test_without_git_every_file_of_the_rooms_is_taken(tree: Path, tmp_path: Path) -> None:
    subprocess.run(["rm", "-rf", str(tree / ".git")], check=True)
    (tree / "models" / "__pycache__").mkdir()
    (tree / "models" / "__pycache__" / "a.pyc").write_text("")
    copy = snapshot.take(tmp_path / "code")
    assert names(copy) == {"models/a.py", "models/b.py", "models/new.py", "models/x.log", "SNAPSHOT"}
    assert (copy / "SNAPSHOT").read_text() == "unknown\n"


def test_an_interrupted_copy_does_not_count(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "code" / "partial" / "models").mkdir(parents=True)
    (tmp_path / "code" / "partial" / "models" / "rest.py").write_text("")
    assert "models/rest.py" not in names(snapshot.take(tmp_path / "code"))
