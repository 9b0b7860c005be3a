"""What a run records of the checkout it was made with."""

from __future__ import annotations

import os
import subprocess

import pytest

from fastkd import environment
from fastkd.environment import NAMED, checkout

NOTHING = dict.fromkeys(("commit", "branch", "dirty", "changed_files", "changed_count"))


@pytest.fixture
def git(tmp_path, monkeypatch):
    """Runs git in a fresh repository with one commit: package/code.py and old.txt. Nobody's settings take part."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name, value in {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    root = tmp_path / "checkout"
    root.mkdir()

    def run(*arguments: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
        done = subprocess.run(["git", "-C", str(root), *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    run.root = root
    run.code = root / "package" / "code.py"
    run.code.parent.mkdir()
    run.code.write_text("first = 1\n")
    (root / "old.txt").write_text("some text that is long enough to be found again\n" * 5)
    (root / ".gitignore").write_text("ignored\n")
    run("init", "--quiet", "--initial-branch=work")
    run("add", "--all")
    run("commit", "--quiet", "--message=one")
    run("remote", "add", "origin", "https://user:secret@example.com/x.git")
    return run


def test_a_clean_checkout(git):
    (git.root / "ignored").write_text("x")
    assert checkout(git.code) == {
        "commit": git("rev-parse", "HEAD"), "branch": "work", "dirty": False, "changed_files": [], "changed_count": 0,
    }  # fmt: skip


def test_what_differs_is_named_and_nothing_of_it_is_shown(git):
    git.code.write_text("password = 'hunter2'\n")
    git("mv", "old.txt", "new name.txt")
    (git.root / "package" / "added.py").write_text("")
    found = checkout(git.code)
    assert found["dirty"] and found["changed_count"] == 3
    assert sorted(found["changed_files"]) == ["new name.txt", "package/added.py", "package/code.py"]
    assert "hunter2" not in str(found) and "secret" not in str(found)


def test_many_changed_files_are_counted(git):
    for number in range(NAMED + 7):
        (git.root / f"new_{number}").write_text("")
    found = checkout(git.code)
    assert len(found["changed_files"]) == NAMED and found["changed_count"] == NAMED + 7


def test_a_detached_head(git):
    git("checkout", "--quiet", "--detach")
    found = checkout(git.code)
    assert found["branch"] is None and found["commit"] == git("rev-parse", "HEAD") and found["dirty"] is False


def test_an_installed_package_inside_somebody_elses_checkout(git):
    (git.root / "ignored").mkdir()
    installed = git.root / "ignored" / "code.py"
    installed.write_text("")
    assert checkout(installed) == NOTHING


def test_without_a_repository_and_without_git(git, tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text("")
    assert checkout(tmp_path / "code.py") == NOTHING
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout(git.code) == NOTHING
    found = environment.environment()
    assert found["packages"]["torch"] and found["commit"] is None and found["cpus"] > 0
