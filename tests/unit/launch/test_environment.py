"""Environments in which libraries fail: no account, no home folder, a temporary folder with a long name."""

import getpass
import os
import pwd
import socket
from pathlib import Path

import pytest

from hvp_ray.errors import ConfigError
from hvp_ray.launch import environment
from hvp_ray.launch.environment import prepare_ray_environment


def _no_account(_user: int) -> None:
    raise KeyError("uid not found")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let each test change a copy of the environment, with temporary files in `tmp_path`."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "RAY_USE_TLS"):
        os.environ.pop(name, None)
    monkeypatch.setattr(environment.tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("home", [None, "/", "/absent"])
def test_user_without_account_or_home_gets_both(
    home: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pwd, "getpwuid", _no_account)
    monkeypatch.setattr(pwd, "getpwnam", _no_account)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        os.environ.pop(name, None)
    if home is not None:
        os.environ["HOME"] = home
    prepare_ray_environment()
    assert Path.home().parent == tmp_path
    assert Path.home().stat().st_mode & 0o077 == 0
    assert (Path.home() / ".ray" / "auth_token").stat().st_size > 0
    assert getpass.getuser() == f"uid-{os.getuid()}"


def test_usable_home_and_user_stay(tmp_path: Path) -> None:
    before = {"HOME": str(tmp_path), "USER": "somebody"}
    os.environ.update(before)
    prepare_ray_environment()
    assert {name: os.environ[name] for name in before} == before


def test_link_in_place_of_the_private_folder_is_refused(tmp_path: Path) -> None:
    os.environ["HOME"] = "/absent"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"hvp_ray-home-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="set HOME to a folder that you own"):
        prepare_ray_environment()


def test_ray_avoids_a_temporary_folder_that_is_too_long_for_its_sockets(tmp_path: Path) -> None:
    os.environ["HOME"] = str(tmp_path)
    os.environ["TMPDIR"] = "/short"
    prepare_ray_environment()
    assert "RAY_TMPDIR" not in os.environ
    os.environ["TMPDIR"] = "/scratch/" + 40 * "x"
    prepare_ray_environment()
    assert os.environ["RAY_TMPDIR"] == "/tmp"
    os.environ["RAY_TMPDIR"] = "/scratch/" + 40 * "x"
    with pytest.raises(ConfigError, match="RAY_TMPDIR=.* is too long"):
        prepare_ray_environment()


def test_local_address_names_no_cluster(tmp_path: Path) -> None:
    os.environ |= {"HOME": str(tmp_path), "RAY_ADDRESS": "local"}
    prepare_ray_environment()
    assert "RAY_ADDRESS" not in os.environ
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert (tmp_path / ".ray" / "auth_token").stat().st_size > 0


def test_joining_encrypts_if_this_machine_has_certificates_and_a_local_ray_does_not(tmp_path: Path) -> None:
    os.environ |= {"HOME": str(tmp_path), "RAY_ADDRESS": "192.0.2.1:6379"}
    prepare_ray_environment()
    assert "RAY_USE_TLS" not in os.environ
    (tmp_path / ".ray" / "tls").mkdir(parents=True)
    host = socket.gethostname()
    for name in ("ca.crt", f"{host}.crt", f"{host}.key"):
        (tmp_path / ".ray" / "tls" / name).touch()
    prepare_ray_environment()
    assert os.environ["RAY_USE_TLS"] == "1"
    assert os.environ["RAY_TLS_SERVER_KEY"] == str(tmp_path / ".ray" / "tls" / f"{host}.key")
    os.environ["RAY_USE_TLS"] = "0"
    prepare_ray_environment()
    assert os.environ["RAY_USE_TLS"] == "0"
    os.environ |= {"RAY_USE_TLS": "1", "RAY_ADDRESS": "local"}
    prepare_ray_environment()
    assert os.environ["RAY_USE_TLS"] == "0"


@pytest.mark.parametrize("taken", [".ray", ".ray/auth_token"])
def test_token_is_written_elsewhere_if_it_cannot_be_written_at_home(taken: str, tmp_path: Path) -> None:
    """A path that is taken refuses every account, root included, unlike a read-only folder."""
    os.environ["HOME"] = str(tmp_path / "home")
    (tmp_path / "home" / taken).parent.mkdir(parents=True)
    if taken == ".ray":
        (tmp_path / "home" / taken).touch()
    else:
        (tmp_path / "home" / taken).mkdir()
    prepare_ray_environment()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.parent == tmp_path / f"hvp_ray-home-{os.getuid()}"
    assert token.stat().st_size > 0


def test_file_in_place_of_the_private_folder_is_refused(tmp_path: Path) -> None:
    os.environ["HOME"] = "/absent"
    (tmp_path / f"hvp_ray-home-{os.getuid()}").touch()
    with pytest.raises(ConfigError, match="set HOME to a folder that you own"):
        prepare_ray_environment()
