"""`resumed doctor`: what keeps a frontend from resuming, in plain words: its machine, the store, other frontends."""

from __future__ import annotations

import contextlib
import platform
import ssl
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.backends.openssl.backend import backend
from rich.console import Console

import resumed
from resumed._transport.target import Target
from resumed_server.cli.diagnose.check import HANDSHAKE_PATIENCE, RoundTrip, verify
from resumed_server.cli.diagnose.checks import Concern, Failure, show, taken, well
from resumed_server.cli.diagnose.frontend_checks import FrontendSteps
from resumed_server.cli.diagnose.validity import validity
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resumed_server.cli.tls_options import Tls

_LOOKUPS = 20
_OLDEST_OPENSSL = (3, 0)


def doctor(
    target: str,
    *,
    namespace: str,
    keyring: str | None,
    tls: Tls,
    frontends: Sequence[str],
    deadline: float,
    as_json: bool,
) -> bool:
    """Examine all that resumption takes, print what was found, and return whether nothing is wrong.

    Args:
        target: Where the store is, as install() is told.
        namespace: The frontends' namespace.
        keyring: Their keyring file; None for a throw-away key.
        tls: The files of their credentials.
        frontends: Running ones to visit, as host:port.
        deadline: Seconds that each call may take.
        as_json: Print JSON instead of tables.

    Raises:
        UserError: An argument is outside its range.
    """
    verify(target, namespace, deadline)
    if frontends and keyring is None:
        raise UserError("--frontend: needs --keyring as well, to tell whose ids it issues")
    try:
        with contextlib.closing(RoundTrip(target, namespace, keyring, deadline, tls)) as round_trip:
            examinations = {
                "this machine": taken(_machine(round_trip, tls), to_the_end=True),
                f"the store at {target}": taken(_store(target, round_trip)),
            }
            visits = FrontendSteps(namespace, round_trip)
            for frontend in frontends:
                examinations[f"the frontend at {frontend}"] = taken(visits.of(frontend))
    except resumed.CredentialsError as error:
        raise UserError(f"--ca, --cert, --key: {error}") from None
    healthy = all(map(well, examinations.values()))
    if as_json:
        report = {title: [vars(step) for step in steps] for title, steps in examinations.items()}
        Console(soft_wrap=True).print_json(data={"ok": healthy, "examinations": report})
    else:
        for title, steps in examinations.items():
            show(title, steps)
    return healthy


def _machine(round_trip: RoundTrip, tls: Tls) -> dict[str, Callable[[], str]]:
    return {
        "versions": _versions,
        "ssl.SSLContext": lambda: _installable(lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)),
        "OpenSSL.SSL.Context": _pyopenssl,
        "keyring": round_trip.load_keyring,
        "certificates": lambda: _certificates(tls),
    }


def _store(target: str, round_trip: RoundTrip) -> dict[str, Callable[[], str]]:
    return {
        "name": lambda: _resolved(target),
        **round_trip.calls(),
        "look-up time": lambda: _lookup_time(round_trip.store),
    }


def _versions() -> str:
    found = [f"resumed {version('resumed')}", f"Python {platform.python_version()}", ssl.OPENSSL_VERSION]
    for package in ("cryptography", "pyOpenSSL"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    found.append(f"with {backend.openssl_version_text()}")
    text = ", ".join(found)
    if ssl.OPENSSL_VERSION_INFO[:2] < _OLDEST_OPENSSL:
        raise Concern(f"{text}: this OpenSSL gets no security fixes", "use a Python that links OpenSSL 3 or newer")
    return text


def _installable(context: Callable[[], Any]) -> str:
    """Put the shim under a context of no consequence."""
    try:
        # Connects to nobody before the first session.
        installation = resumed.install(
            context(), target="127.0.0.1:1", namespace="doctor", keyring=resumed.Keyring.plaintext()
        )
    except resumed.UnsupportedContext as error:
        problem, _, advice = str(error).partition("; ")
        raise Failure(problem, advice or "use the other kind of context") from None
    installation.uninstall()
    return "takes the callbacks"


def _pyopenssl() -> str:
    if find_spec("OpenSSL") is None:
        return "pyOpenSSL is not installed"
    from OpenSSL import SSL  # noqa: PLC0415 - an extra

    return _installable(lambda: SSL.Context(SSL.TLS_SERVER_METHOD))


def _certificates(tls: Tls) -> str:
    found = []
    for name, path in (("--ca", tls.ca), ("--cert", tls.cert)):
        if path:
            pem = x509.load_pem_x509_certificates(Path(path).read_bytes())
            found.append(f"{name} {validity(min(pem, key=lambda each: each.not_valid_after_utc))}")
    return ", ".join(found) or "none: the connection to the store is plaintext"


def _resolved(target: str) -> str:
    try:
        addresses = Target.parse(target).resolve()
    except (OSError, ValueError) as error:
        raise Failure(
            f"the name does not resolve ({getattr(error, 'strerror', None) or error})",
            "check its spelling, and that the DNS of this machine knows it",
        ) from None
    return ", ".join(where if isinstance(where, str) else f"{where[0]}:{where[1]}" for _, where in addresses)


def _lookup_time(store: resumed.SessionStore) -> str:
    taken_each = []
    for _ in range(_LOOKUPS):
        started = time.perf_counter()
        store.get(b"doctor")
        taken_each.append(time.perf_counter() - started)
    median, slowest = statistics.median(taken_each), max(taken_each)
    text = f"{median * 1e3:.1f} ms, the slowest of {_LOOKUPS} {slowest * 1e3:.1f} ms"
    if slowest > HANDSHAKE_PATIENCE:
        raise Concern(
            f"{text}: a handshake waits {HANDSHAKE_PATIENCE * 1e3:.0f} ms at most unless told otherwise",
            "move the store nearer, give it more workers, use mirror=True, or raise install()'s deadline",
        )
    return text
