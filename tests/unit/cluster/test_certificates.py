"""Certificates of a cluster: made once, renewed in time, readable by their account only; wrong ones stop a node at once."""

import re
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[3] / "cluster"
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def _make(folder: Path, *names: str, **environment: str) -> None:
    command = [str(CLUSTER / "make_certificate.sh"), str(folder), *names]
    subprocess.run(command, check=True, capture_output=True, env={"PATH": "/usr/bin:/bin"} | environment)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _key_fits(folder: Path, name: str) -> bool:
    public = ["openssl", "pkey", "-in", str(folder / f"{name}.key"), "-pubout"]
    certified = ["openssl", "x509", "-in", str(folder / f"{name}.crt"), "-noout", "-pubkey"]
    return subprocess.check_output(public) == subprocess.check_output(certified)


def test_repeated_call_changes_nothing_and_keys_are_private(tmp_path: Path) -> None:
    _make(tmp_path, "node", "10.0.0.1", "fd00::1", "head", "localhost")
    made = _contents(tmp_path)
    _make(tmp_path, "node", "10.0.0.1", "head")
    assert _contents(tmp_path) == made
    assert set(made) == {"ca.crt", "ca.key", "node.crt", "node.key", ".lock"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


@pytest.mark.parametrize("change", ["another address", "it expires within 90 days", "a new authority"])
def test_certificate_is_made_again(change: str, tmp_path: Path) -> None:
    _make(tmp_path, "node", "10.0.0.1", HVP_TLS_DAYS="80" if change == "it expires within 90 days" else "397")
    before = _contents(tmp_path)
    if change == "a new authority":
        (tmp_path / "ca.crt").unlink()
        (tmp_path / "ca.key").unlink()
    _make(tmp_path, "node", "10.0.0.2" if change == "another address" else "10.0.0.1")
    after = _contents(tmp_path)
    assert after["node.crt"] != before["node.crt"]
    assert (after["ca.key"] == before["ca.key"]) == (change != "a new authority")
    subprocess.run(["openssl", "verify", "-CAfile", tmp_path / "ca.crt", tmp_path / "node.crt"], check=True)
    assert _key_fits(tmp_path, "node")


@pytest.mark.parametrize("missing", ["ca.crt", "ca.key"])
def test_half_an_authority_is_never_replaced(missing: str, tmp_path: Path) -> None:
    _make(tmp_path, "node", "10.0.0.1")
    (tmp_path / missing).unlink()
    before = _contents(tmp_path)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        _make(tmp_path, "node", "10.0.0.2")
    assert b"only one is there" in refused.value.stderr
    assert _contents(tmp_path) == before


def test_unequal_pair_and_long_host_names_get_a_certificate(tmp_path: Path) -> None:
    name = "node." + "x" * 60
    _make(tmp_path, name, "10.0.0.1")
    _make(tmp_path, "other", "10.0.0.1")
    shutil.copy(tmp_path / "other.key", tmp_path / f"{name}.key")
    _make(tmp_path, name, "10.0.0.1")
    assert _key_fits(tmp_path, name)


def test_processes_that_start_together_agree_on_a_pair(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: _make(tmp_path, "node", "10.0.0.1"), range(4)))
    assert _key_fits(tmp_path, "node")
    subprocess.run(["openssl", "verify", "-CAfile", tmp_path / "ca.crt", tmp_path / "node.crt"], check=True)


def test_authority_of_another_folder_signs_and_its_key_stays_there(tmp_path: Path) -> None:
    authority, pod = tmp_path / "authority", tmp_path / "pod"
    _make(authority)
    files = {"HVP_CA_CERT": str(authority / "ca.crt"), "HVP_CA_KEY": str(authority / "ca.key")}
    _make(pod, "node", "10.0.0.1", **files)
    assert set(_contents(pod)) == {"ca.crt", "node.crt", "node.key", ".lock"}
    subprocess.run(["openssl", "verify", "-CAfile", authority / "ca.crt", pod / "node.crt"], check=True)


def _with_tls(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(CLUSTER / "with_tls.sh"), "env"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(home), "RAY_NODE_IP": "10.0.0.1"} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_command_gets_the_variables_of_a_certificate_that_the_machine_made(tmp_path: Path) -> None:
    folder = tmp_path / ".ray" / "tls"
    _make(folder)
    done = _with_tls(tmp_path)
    assert done.returncode == 0, done.stderr
    variables = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert variables["RAY_USE_TLS"] == "1"
    assert Path(variables["RAY_TLS_SERVER_CERT"]) == folder / f"{socket.gethostname()}.crt"
    assert _key_fits(folder, socket.gethostname())
    off = _with_tls(tmp_path / "nothing", RAY_USE_TLS="0")
    assert off.returncode == 0
    assert "RAY_TLS_" not in off.stdout


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no authority", "the authority's certificate .* cannot be read"),
        ("no certificate", r"\.crt cannot be read"),
        ("foreign", "is not valid .*error 20"),
        ("expired", "is not valid .*expired"),
        ("foreign key", "is not the key of"),
        ("other address", r"names none of this machine's addresses \(10.0.0.1\)"),
    ],
)
def test_wrong_files_are_refused_with_the_remedy(fault: str, message: str, tmp_path: Path) -> None:
    folder, name = tmp_path / ".ray" / "tls", socket.gethostname()
    if fault != "no authority":
        days = "-1" if fault == "expired" else "397"
        _make(folder, name, "10.0.0.9" if fault == "other address" else "10.0.0.1", HVP_TLS_DAYS=days)
        (folder / "ca.key").unlink()
    if fault == "no certificate":
        (folder / f"{name}.crt").unlink()
    if fault in ("foreign", "foreign key"):
        _make(tmp_path / "other", name, "10.0.0.1")
        shutil.copy(tmp_path / "other" / f"{name}.key", folder)
    if fault == "foreign":
        shutil.copy(tmp_path / "other" / f"{name}.crt", folder)
    done = _with_tls(tmp_path)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert "copy ~/.ray/tls" in done.stderr
    assert "RAY_USE_TLS=0" in done.stderr
