"""`resumed doctor`: checks of a frontend's machine, of the store and of other frontends."""

from __future__ import annotations

import contextlib
import itertools
import platform
import ssl
import statistics
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from cryptography import x509
from cryptography.hazmat.backends.openssl.backend import backend
from rich.console import Console

import resumed
from resumed._transport.target import Target as TargetAddresses
from resumed_server.cli.diagnose.check import HANDSHAKE_PATIENCE, RoundTrip, verify
from resumed_server.cli.diagnose.checks import CheckWarning, exit_status, run_checks, show
from resumed_server.cli.diagnose.frontend_checks import FrontendChecks
from resumed_server.cli.diagnose.validity import validity
from resumed_server.cli.diagnosis import Failure
from resumed_server.cli.options import AsJson, Deadline, Keyring, Target
from resumed_server.cli.tls_options import TlsOptions, takes_tls
from resumed_server.errors import ExitStatus, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

_LOOKUPS = 20
_OLDEST_OPENSSL = (3, 0)


@takes_tls
def doctor(
    target: Target,
    *,
    namespace: Annotated[str, typer.Option(metavar="NAME", help="Namespace of the frontends, as given to install().")],
    keyring: Keyring = None,
    frontend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A running frontend to connect to; repeat it to offer the sessions of one frontend to the next.",
        ),
    ] = None,
    sni: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Server name to send to all frontends. Default: the host of the first --frontend."
        ),
    ] = None,
    deadline: Deadline = 2.0,
    as_json: AsJson = False,
    tls: TlsOptions,
) -> None:
    """Find out why a frontend does not resume: check its machine, the store and other frontends, and print remedies.

    Run it on the machine of the frontend, as the frontend's user. The exit status is that of the most serious failure.
    """
    verify(target, namespace, deadline)
    if frontend and keyring is None:
        raise UserError("--frontend: needs --keyring as well, to recognise the ids of the fleet")
    try:
        with contextlib.closing(RoundTrip(target, namespace, keyring, deadline, tls)) as round_trip:
            run = partial(run_checks, explain=round_trip.explain)
            examinations = {
                "this machine": run(_machine(round_trip, tls), to_the_end=True),
                f"the store at {target}": run(_store(target, round_trip)),
            }
            frontend_checks = FrontendChecks(namespace, round_trip, sni)
            for address in frontend or []:
                examinations[f"the frontend at {address}"] = run(frontend_checks.checks_of(address))
    except resumed.CredentialsError as error:
        raise UserError(f"--ca, --cert, --key: {error}") from None
    status = exit_status(itertools.chain(*examinations.values()))
    if as_json:
        report = {title: [vars(each) for each in checks] for title, checks in examinations.items()}
        Console(soft_wrap=True).print_json(data={"ok": not status, "examinations": report})
    else:
        for title, checks in examinations.items():
            show(title, checks)
    if status:
        raise typer.Exit(status)


def _machine(round_trip: RoundTrip, tls: TlsOptions) -> dict[str, Callable[[], str]]:
    return {
        "versions": _versions,
        "ssl.SSLContext": lambda: _installable(lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)),
        "OpenSSL.SSL.Context": _pyopenssl,
        "keyring": round_trip.load_keyring,
        "certificates": lambda: _certificates(tls),
    }


def _store(target: str, round_trip: RoundTrip) -> dict[str, Callable[[], str]]:
    return {
        "name": lambda: _resolve(target),
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
        raise CheckWarning(
            f"{text}: this OpenSSL receives no security fixes", "use a Python that links OpenSSL 3 or newer"
        )
    return text


def _installable(context: Callable[[], Any]) -> str:
    """Call install() on a context that is used for nothing else."""
    try:
        # It does not connect before the first session.
        installation = resumed.install(
            context(), target="127.0.0.1:1", namespace="doctor", keyring=resumed.Keyring.plaintext()
        )
    except resumed.UnsupportedContext as error:
        problem, _, advice = str(error).partition("; ")
        raise Failure(problem, advice or "use the other kind of context") from None
    installation.uninstall()
    return "accepts the callbacks"


def _pyopenssl() -> str:
    if find_spec("OpenSSL") is None:
        return "pyOpenSSL is not installed"
    from OpenSSL import SSL  # noqa: PLC0415 - an extra

    return _installable(lambda: SSL.Context(SSL.TLS_SERVER_METHOD))


def _certificates(tls: TlsOptions) -> str:
    found = []
    for name, path in (("--ca", tls.ca), ("--cert", tls.cert)):
        if path:
            pem = x509.load_pem_x509_certificates(Path(path).read_bytes())
            found.append(f"{name} {validity(min(pem, key=lambda each: each.not_valid_after_utc))}")
    return ", ".join(found) or "none: the connection to the store is plaintext"


def _resolve(target: str) -> str:
    try:
        addresses = TargetAddresses.parse(target).resolve()
    except (OSError, ValueError) as error:
        raise Failure(
            f"the name does not resolve ({getattr(error, 'strerror', None) or error})",
            "check the spelling, and the DNS configuration of this machine",
            ExitStatus.RETRY,
        ) from None
    return ", ".join(where if isinstance(where, str) else f"{where[0]}:{where[1]}" for _, where in addresses)


def _lookup_time(store: resumed.StoreClient) -> str:
    durations = []
    for _ in range(_LOOKUPS):
        started = time.perf_counter()
        store.get(b"doctor")
        durations.append(time.perf_counter() - started)
    median, slowest = statistics.median(durations), max(durations)
    text = f"{median * 1e3:.1f} ms, the slowest of {_LOOKUPS} {slowest * 1e3:.1f} ms"
    if slowest > HANDSHAKE_PATIENCE:
        raise CheckWarning(
            f"{text}: a handshake waits {HANDSHAKE_PATIENCE * 1e3:.0f} ms by default",
            "move the store nearer, give it more workers, use mirror=True, or raise install()'s deadline",
        )
    return text
