"""Before a run starts: what is recorded of the code and the data."""

import subprocess
from pathlib import Path

from hvp_ray.training.preparation import git_commit


def _git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *author, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_is_that_of_the_repository_that_has_the_file_and_none_in_a_virtual_environment(tmp_path: Path) -> None:
    own = tmp_path / "package" / "module.py"
    installed = tmp_path / ".venv" / "lib" / "module.py"
    for path in (own, installed):
        path.parent.mkdir(parents=True)
        path.write_text("a = 1\n")
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", "package")
    _git(tmp_path, "commit", "--quiet", "--message", "one")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(own) == commit
    own.write_text("a = 2\n")
    assert git_commit(own) == f"{commit}-dirty"
    assert git_commit(installed) is None
    assert git_commit(tmp_path / "absent" / "module.py") is None
