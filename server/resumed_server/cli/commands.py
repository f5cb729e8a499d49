"""The commands beside `resumed serve`, for those who set a fleet up. They use the client as its users do.

Here are their options only: what they do is imported when one is run, so that `resumed --help` is quick.
"""

# ruff: noqa: PLC0415
from __future__ import annotations

import os
from enum import Enum
from typing import Annotated

import typer

_KeyringFile = Annotated[str, typer.Argument(metavar="FILE", help="The keyring file.")]
_KeyId = Annotated[
    str | None,
    typer.Argument(
        metavar="KEY", help="The key's id, as `show` has it. Needed where more than one key could be meant."
    ),
]
_Wait = Annotated[
    str, typer.Option(metavar="DURATION", help="How long a changed file takes to reach the last frontend, at most.")
]


_Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="Where the store is: 127.0.0.1:7400, dns:///store:7400 or unix:/run/resumed.sock."
    ),
]
_Deadline = Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How long each call may take.")]


class _Tls(str, Enum):
    """Versions of TLS."""

    TLS12 = "1.2"
    TLS13 = "1.3"


_Ca = Annotated[
    str | None, typer.Option(metavar="FILE", help="Speak TLS with the store, and trust these authorities (PEM).")
]
_Cert = Annotated[
    str | None, typer.Option(metavar="FILE", help="Speak TLS with the store, and show it this certificate (PEM).")
]
_Key = Annotated[
    str | None, typer.Option(metavar="FILE", help="The key of --cert (PEM), if it is not in the same file.")
]
_ServerName = Annotated[
    str | None, typer.Option(metavar="NAME", help="The name in the store's certificate, if TARGET's host is another.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (_keygen, _check, _doctor, _purge, _stats, _top, _demo, _bench):
        app.command(command.__name__.removeprefix("_"))(command)
    grants = typer.Typer(help="Which identities may do what in which namespaces.")
    grants.command("check")(_grants_check)
    app.add_typer(grants, name="grants")
    keyring = typer.Typer(help="What a keyring holds, and the steps of its rotation (docs/keyrings.md).")
    keyring.command("show")(_keyring_show)
    keyring.command("promote")(_keyring_promote)
    keyring.command("retire")(_keyring_retire)
    app.add_typer(keyring, name="keyring")


def _keygen(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="The file to make; it must not exist. Without it the key is printed."),
    ] = None,
    append: Annotated[
        bool,
        typer.Option("--append", help="Add the key to the end of FILE, where it opens, and seals once it is promoted."),
    ] = False,
) -> None:
    """Make a keyring: the key with which all frontends of a fleet seal their sessions."""
    from resumed_server.cli.keyring.keygen import keygen

    typer.echo(keygen(file, append=append))


def _check(
    target: _Target,
    *,
    namespace: Annotated[
        str, typer.Option(metavar="NAME", help="The namespace to use; the check leaves nothing in it.")
    ] = "resumed-check",
    keyring: Annotated[
        str | None, typer.Option(metavar="FILE", help="The fleet's keyring; without it a throw-away key.")
    ] = None,
    deadline: Annotated[float, typer.Option(metavar="SECONDS", help="How long each call may take.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ca: _Ca = None,
    cert: _Cert = None,
    key: _Key = None,
    server_name: _ServerName = None,
) -> None:
    """Try every call of a running store, and say what to do if one fails (exit status 1)."""
    from resumed_server.cli.diagnose.check import check
    from resumed_server.cli.tls_options import Tls

    tls = Tls(ca, cert, key, server_name)
    well = check(target, namespace=namespace, keyring=keyring, deadline=deadline, as_json=as_json, tls=tls)
    raise typer.Exit(0 if well else 1)


def _doctor(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Where the store is, as install() is told.")],
    *,
    namespace: Annotated[str, typer.Option(metavar="NAME", help="The frontends' namespace, as install() is told.")],
    keyring: Annotated[
        str | None, typer.Option(metavar="FILE", help="The fleet's keyring; without it a throw-away key.")
    ] = None,
    frontend: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="A running frontend to visit; of two, each other's sessions."),
    ] = None,
    deadline: Annotated[float, typer.Option(metavar="SECONDS", help="How long each call may take.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    ca: _Ca = None,
    cert: _Cert = None,
    key: _Key = None,
    server_name: _ServerName = None,
) -> None:
    """Find out why a frontend does not resume: its machine, the store, other frontends; and what to do about it.

    Run it where the frontend runs, as its user. Exit status 1 if something is wrong.
    """
    from resumed_server.cli.diagnose.doctor import doctor
    from resumed_server.cli.tls_options import Tls

    well = doctor(
        target,
        namespace=namespace,
        keyring=keyring,
        tls=Tls(ca, cert, key, server_name),
        frontends=frontend or [],
        deadline=deadline,
        as_json=as_json,
    )
    raise typer.Exit(0 if well else 1)


def _purge(
    target: _Target,
    namespaces: Annotated[list[str], typer.Argument(metavar="NAMESPACE...", help="What to purge.")],
    *,
    before: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Spare what was issued since: a time such as 2026-11-25T10:00:00Z, or how long ago, as in 2h.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    ca: _Ca = None,
    cert: _Cert = None,
    key: _Key = None,
    server_name: _ServerName = None,
    deadline: _Deadline = 60.0,
) -> None:
    """End all sessions of a namespace, or those from before a time: none of them resumes again, at any frontend.

    Needs the grant "purge". For client certificates that were revoked, and keys or frontends that were stolen: see
    SECURITY.md.

    Exit status 1 if not all are purged; then try again.
    """
    from resumed_server.cli.admin import Store, purge
    from resumed_server.cli.tls_options import Tls

    store = Store(target, Tls(ca, cert, key, server_name), deadline)
    raise typer.Exit(0 if purge(store, namespaces, before=before, yes=yes) else 1)


def _stats(
    target: _Target,
    namespaces: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAMESPACE...]", help='What to count; without it all, which takes a grant for the namespaces "*".'
        ),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ca: _Ca = None,
    cert: _Cert = None,
    key: _Key = None,
    server_name: _ServerName = None,
    deadline: _Deadline = 60.0,
) -> None:
    """Count the sessions of each namespace in a running store. Takes seconds where there are millions.

    Needs the grant "stats".

    Exit status 1 if the store refuses or does not answer.
    """
    from resumed_server.cli.admin import Store, stats
    from resumed_server.cli.tls_options import Tls

    store = Store(target, Tls(ca, cert, key, server_name), deadline)
    raise typer.Exit(0 if stats(store, namespaces or (), as_json=as_json) else 1)


def _top(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ENDPOINT...",
            help="Metrics endpoints, of stores and frontends alike, as host:port or URLs; of a name every address. "
            "Without any 127.0.0.1:9464.",
        ),
    ] = None,
    interval: Annotated[str, typer.Option(metavar="DURATION", help="How long a period is, as in 2s or 1m.")] = "2s",
    count: Annotated[int | None, typer.Option(metavar="N", min=1, help="How many periods; no end without it.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for each period, instead of tables.")
    ] = False,
) -> None:
    """Watch what stores and frontends do: rates, hit rates, foreign hits and latencies, by namespace and worker."""
    from resumed_server.cli.top.command import top

    top(targets or ["127.0.0.1:9464"], interval=interval, count=count, as_json=as_json)


def _demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Watch a store and two frontends, ssl and pyOpenSSL, resume each other's TLS sessions."""
    from resumed_server.cli.demo.command import demo

    raise typer.Exit(0 if demo(as_json=as_json) else 1)


def _bench(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...", help="The TLS servers, of any kind, as host:port; clients visit them in turns."
        ),
    ],
    *,
    tls: Annotated[
        _Tls | None, typer.Option(help="The only version to speak; without it the newest that the servers speak.")
    ] = None,
    resume: Annotated[
        float, typer.Option(metavar="PERCENT", min=0, max=100, help="How many visits offer the last visit's session.")
    ] = 90,
    duration: Annotated[str, typer.Option(metavar="DURATION", help="For how long, as in 10s or 5m.")] = "10s",
    count: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many visits to make, however long it takes.")
    ] = None,
    connections: Annotated[
        int, typer.Option(metavar="N", min=1, max=10_000, help="Visits under way at a time, of all processes together.")
    ] = 8,
    clients: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=1_000_000, help="Clients: so many visits until one comes back."),
    ] = 256,
    processes: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=256, help="Processes to make the visits with; without it one for every other core."
        ),
    ] = None,
    sni: Annotated[
        str | None, typer.Option(metavar="NAME", help="The name to ask for; without it the first TARGET's host.")
    ] = None,
    ca: Annotated[
        str | None, typer.Option(metavar="FILE", help="Certificates to trust, in place of the system's.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Trust any certificate.")] = False,
    send: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Send this behind the handshake and wait for the answer's first byte, which the times then include; "
            r"as in 'GET / HTTP/1.0\r\n\r\n'.",
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure TLS servers of any kind: full and resumed handshakes a second, and the duration of each.

    Each client visits one server after the other, and offers there the session that the one before gave it.

    Exit status 1 if a visit failed.
    """
    from resumed_server.cli.bench.command import bench

    well = bench(
        targets,
        tls=tls.value if tls else None,
        resume=resume,
        duration=duration,
        count=count,
        connections=connections,
        clients=clients,
        processes=min(processes or max(1, (os.cpu_count() or 1) // 2), connections),
        sni=sni,
        ca=ca,
        insecure=insecure,
        send=send,
        as_json=as_json,
    )
    raise typer.Exit(0 if well else 1)


def _grants_check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The file that `resumed serve --grants` is given.")],
    identity: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who calls: spiffe://example.org/shop or dns:frontend.shop.svc.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(metavar="NAME", help="In which namespace.")] = None,
    operation: Annotated[
        str | None, typer.Option(metavar="NAME", help="What: put, get, take, remove, watch, purge or stats.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a sentence and a table.")] = False,
) -> None:
    """Check a file of grants, and explain why a call is allowed or denied (exit status 1).

    An omitted option stands for any value.
    """
    from resumed_server.cli.grants import Question, check

    allowed = check(file, Question(identity, namespace, operation), as_json=as_json)
    raise typer.Exit(0 if allowed else 1)


def _keyring_show(
    file: _KeyringFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the ids and ages of a keyring's keys, never the keys."""
    from resumed_server.cli.keyring.commands import show

    show(file, as_json=as_json)


def _keyring_promote(
    file: _KeyringFile,
    key: _KeyId = None,
    wait: _Wait = "5m",
    force: Annotated[bool, typer.Option("--force", help="Do not wait: every frontend has the key.")] = False,
) -> None:
    """Let a key seal from now on; the one before goes on opening."""
    from resumed_server.cli.keyring.commands import promote

    typer.echo(promote(file, key, wait=wait, force=force))


def _keyring_retire(
    file: _KeyringFile,
    key: _KeyId = None,
    lifetime: Annotated[
        str,
        typer.Option(
            metavar="DURATION",
            help="How long sessions live, at most: the largest `lifetime` of the frontends, or the store's --max-ttl.",
        ),
    ] = "24h",
    wait: _Wait = "5m",
    force: Annotated[
        bool, typer.Option("--force", help="Do not wait: the sessions that it sealed are lost, as where it was stolen.")
    ] = False,
) -> None:
    """Drop a key that seals no more, once all it sealed has ended."""
    from resumed_server.cli.keyring.commands import retire

    typer.echo(retire(file, key, lifetime=lifetime, wait=wait, force=force))
