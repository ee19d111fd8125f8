"""A cluster whose certificates do not fit is refused with the reason. The head is a real gRPC server with TLS."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import pytest

from hvp_ray.errors import ConfigError
from hvp_ray.stream.tls import check_tls_files, explain_silence

MAKE = Path(__file__).parents[3] / "cluster" / "make_certificate.sh"
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def _make(folder: Path, *names: str) -> None:
    subprocess.run([str(MAKE), str(folder), *names], check=True, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return two clusters' certificates: `ours` and `theirs`, both for 127.0.0.1, and `ours/elsewhere`."""
    folder = tmp_path_factory.mktemp("tls")
    for cluster in ("ours", "theirs"):
        _make(folder / cluster, "node", "127.0.0.1")
    _make(folder / "ours", "elsewhere", "192.0.2.1", "localhost")
    return folder


def _serve(certificates: Path | None, name: str = "node") -> tuple[grpc.Server, int]:
    server = grpc.server(ThreadPoolExecutor(1))
    if certificates is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = [(certificates / f"{name}.key").read_bytes(), (certificates / f"{name}.crt").read_bytes()]
        authority = (certificates / "ca.crt").read_bytes()
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair], authority, True))
    server.start()
    return server, port


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("RAY_USE_TLS", None)


def _use(certificates: Path, name: str = "node") -> None:
    os.environ |= {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(certificates / "ca.crt"),
        "RAY_TLS_SERVER_CERT": str(certificates / f"{name}.crt"),
        "RAY_TLS_SERVER_KEY": str(certificates / f"{name}.key"),
    }


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("client", "server", "name", "message"),
    [
        ("ours", "ours", "node", None),
        ("theirs", "ours", "node", "TLS with these certificates fails: .*unable to get local issuer certificate"),
        ("ours", "ours", "elsewhere", "TLS with these certificates fails: .*IP address mismatch"),
        ("ours", None, "node", "TLS with these certificates fails: .*RAY_USE_TLS=0"),
        (None, "ours", "node", "it uses TLS and this program does not; .*with_tls.sh"),
        (None, None, "node", None),
    ],
)
def test_handshake_that_fails_is_explained(
    client: str | None, server: str | None, name: str, message: str | None, folder: Path
) -> None:
    process, port = _serve(folder / server if server else None, name)
    if client is not None:
        _use(folder / client)
        check_tls_files()
    found = explain_silence(f"127.0.0.1:{port}")
    process.stop(None)
    if message is None:
        assert found is None
    else:
        assert re.search(message, found or ""), found


@pytest.mark.usefixtures("environment")
def test_head_that_refuses_our_certificate_is_explained(folder: Path) -> None:
    process, port = _serve(folder / "ours")
    _use(folder / "theirs")
    os.environ["RAY_TLS_CA_CERT"] = str(folder / "ours" / "ca.crt")  # we trust the head, and it does not trust us
    found = explain_silence(f"127.0.0.1:{port}")
    process.stop(None)
    assert "TLS with these certificates fails: " in (found or "")


@pytest.mark.usefixtures("environment")
def test_silence_of_a_closed_port_is_not_explained_by_tls(folder: Path) -> None:
    process, port = _serve(None)
    process.stop(None).wait()
    _use(folder / "ours")
    assert explain_silence(f"127.0.0.1:{port}") is None


@pytest.mark.usefixtures("environment")
def test_missing_and_foreign_files_are_refused_by_name(folder: Path) -> None:
    check_tls_files()  # no TLS: nothing to check
    _use(folder / "ours", "absent")
    with pytest.raises(ConfigError, match="RAY_TLS_SERVER_CERT=.*absent.crt cannot be read; start this program by"):
        check_tls_files()
    _use(folder / "ours")
    os.environ["RAY_TLS_SERVER_KEY"] = str(folder / "theirs" / "node.key")
    with pytest.raises(ConfigError, match="do not match .*RAY_TLS_SERVER_KEY="):
        check_tls_files()
    os.environ.pop("RAY_TLS_SERVER_KEY")
    with pytest.raises(ConfigError, match=r"RAY_TLS_SERVER_KEY=\(unset\)"):
        check_tls_files()
