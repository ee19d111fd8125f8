"""Explain why a cluster's head does not answer, if the reason is TLS: gRPC itself waits and says nothing."""

import os
import socket
import ssl

from hvp_ray.errors import ConfigError

_FILES = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY")
_PROBE_SECONDS = 5.0
_HTTP2 = ["h2"]  # what gRPC speaks; its servers refuse others


def uses_tls() -> bool:
    """Return whether Ray's connections are encrypted, as Ray reads the environment."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def check_tls_files() -> None:
    """Check the certificate files of this process, if it uses TLS.

    Raises:
        ConfigError: a variable is unset, or its file is missing or no certificate or key.
    """
    if not uses_tls():
        return
    for name in _FILES:
        path = os.environ.get(name, "")
        if not os.access(path, os.R_OK):
            raise ConfigError(
                f"RAY_USE_TLS=1 needs the cluster's certificates, and {name}={path or '(unset)'} cannot be read; start this "
                f"program by cluster/with_tls.sh, or set {', '.join(_FILES)} to the files of this machine"
            )
    try:
        _context()
    except (ssl.SSLError, ValueError) as error:
        files = ", ".join(f"{name}={os.environ[name]}" for name in _FILES)
        raise ConfigError(
            f"the certificates of RAY_USE_TLS=1 are damaged or do not match ({error}): {files}"
        ) from error


def explain_silence(head: str) -> str | None:
    """Return why a handshake with the head fails, with a remedy. None: TLS is not the reason.

    Args:
        head: address, as `host:port`.
    """
    host, _, port = head.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS) as raw:
            reason = _find_fault(raw, host.strip("[]"))
    except OSError:  # a dead or hanging head
        return None
    if not uses_tls():
        return None if reason else "it uses TLS and this program does not; start this program by cluster/with_tls.sh"
    return reason and (
        f"TLS with these certificates fails: {reason}; use the certificates of this cluster (RAY_TLS_...), or RAY_USE_TLS=0 "
        f"if it runs without TLS"
    )


def _find_fault(raw: socket.socket, host: str) -> str | None:
    """Return what is wrong with a handshake. None: nothing.

    Raises:
        OSError: the head does not answer at all.
    """
    try:
        with _context().wrap_socket(raw, server_hostname=host) as connection:
            # Since TLS 1.3 the other side judges our certificate after the handshake. If it takes it, it sends its settings.
            return None if connection.recv(1) or not uses_tls() else "the head refuses the certificate of this program"
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    except ssl.SSLError as error:
        return error.reason or "no TLS"
    except ConnectionResetError as error:
        return str(error)


def _context() -> ssl.SSLContext:
    """Return how this process would connect: with its certificates, or without TLS by a client that trusts anyone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(_HTTP2)
    if uses_tls():
        authority, certificate, key = (os.environ[name] for name in _FILES)
        context.load_verify_locations(authority)
        context.load_cert_chain(certificate, key)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
