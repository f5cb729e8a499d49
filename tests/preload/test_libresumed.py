"""libresumed as it is installed: by a program of one's own, through pkg-config."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

import resumed
from conformance.client import Client
from preload.servers import ROOT, context_files
from support.relay import Relay
from support.tls import CA, VERSIONS

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping
    from pathlib import Path

BUILD = ROOT / ".build" / "c"
EXAMPLE = ROOT / "client" / "c" / "examples" / "server.c"
PATIENCE = 60

pytestmark = pytest.mark.skipif("RESUMED_PRELOAD" not in os.environ, reason="needs Rust: make preload-test")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install libresumed as `cmake --install` does, and return the prefix."""
    prefix = tmp_path_factory.mktemp("prefix")
    subprocess.run(["cmake", "--install", BUILD, "--prefix", prefix], check=True, stdout=subprocess.DEVNULL)
    return prefix


@pytest.fixture(scope="module")
def program(installed: Path) -> Path:
    """Compile the example with what pkg-config says, and return the program."""
    pc = next(installed.rglob("resumed.pc"))
    environment = {**os.environ, "PKG_CONFIG_PATH": str(pc.parent)}
    flags = subprocess.check_output(["pkg-config", "--cflags", "--libs", "resumed"], env=environment, text=True)
    subprocess.run(["cc", EXAMPLE, "-o", installed / "server", *flags.split(), "-lpthread"], check=True)
    return installed / "server"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a certificate and a keyring."""
    directory = tmp_path_factory.mktemp("files")
    certificate = CA.issue_cert("localhost").private_key_and_cert_chain_pem.bytes()
    (directory / "certificate.pem").write_bytes(certificate)
    (directory / "fleet.keys").touch(0o600)
    (directory / "fleet.keys").write_text(resumed.Keyring.generate() + "\n", encoding="ascii")
    return directory


def command(program: Path, files: Path, target: str, options: Mapping[str, str]) -> list[str]:
    """Return the command that runs a program in a namespace of the fleet."""
    named = {"target": target, "namespace": "shop", "keyring": str(files / "fleet.keys"), **options}
    named["certificate"] = str(files / "certificate.pem")
    return [str(program), *(f"--{name}={value}" for name, value in named.items())]


@contextlib.contextmanager
def serving(program: Path, files: Path, target: str, *flags: str) -> Iterator[int]:
    """Run the example, and hand out its port."""
    libraries = {"LD_LIBRARY_PATH": str(next(program.parent.rglob("libresumed.so.0")).parent)}
    started = [*command(program, files, target, {"deadline": "10000"}), *flags]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True, env={**os.environ, **libraries}) as process:
        try:
            assert process.stdout
            yield int(process.stdout.readline())
        finally:
            process.terminate()


@pytest.mark.parametrize("version", VERSIONS)
def test_an_example_built_with_pkg_config_resumes_in_another_process(
    program: Path, files: Path, target: str, version: ssl.TLSVersion
) -> None:
    client = Client(version)
    with serving(program, files, target) as one, serving(program, files, target) as other:
        visit = client.visit(one)
        for port in other, one:
            visit = client.visit(port, visit.session)
            assert visit.resumed


@pytest.mark.parametrize("version", VERSIONS)
def test_a_session_of_single_use_resumes_once(program: Path, files: Path, target: str, version: ssl.TLSVersion) -> None:
    client = Client(version)
    with (
        serving(program, files, target, "--single-use") as one,
        serving(program, files, target, "--single-use") as other,
    ):
        session = client.visit(one).session
        assert [client.visit(port, session).resumed for port in (other, one, other)] == [True, False, False]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"keyring": "/nonexistent/fleet.keys"}, "/nonexistent/fleet.keys"),
        ({"keyring": "{files}/certificate.pem"}, "certificate.pem"),
        ({"keyring": "{files}/open.keys"}, "chmod 600"),
        ({"target": "store"}, "use host:port"),
        ({"target": "http://store:7400"}, "use host:port"),
        ({"namespace": "Not a namespace"}, "namespace must be 1 to 63 characters"),
        ({"namespace": ""}, "namespace must be 1 to 63 characters"),
    ],
)
def test_an_option_that_is_wrong_is_named(
    program: Path, files: Path, target: str, wrong: dict[str, str], complaint: str
) -> None:
    readable = files / "open.keys"
    readable.write_bytes((files / "fleet.keys").read_bytes())
    readable.chmod(0o644)
    libraries = {"LD_LIBRARY_PATH": str(next(program.parent.rglob("libresumed.so.0")).parent)}
    done = subprocess.run(
        command(program, files, target, {option: value.format(files=files) for option, value in wrong.items()}),
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **libraries},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("server: ")
    assert done.stderr.count("\n") == 1
    assert complaint in done.stderr


@pytest.mark.parametrize("flags", [(), ("--mirror=1000000",), ("--single-use",)], ids=["calls", "mirror", "single-use"])
def test_contexts_come_and_go_in_threads_and_forked_children(files: Path, target: str, flags: tuple[str, ...]) -> None:
    """handshakes.c: alerts sent and received, removals, contexts installed twice and freed, forks before and after."""
    options = command(BUILD / "resumed-handshakes", files, target, {"families": "24", "threads": "2", "children": "2"})
    done = subprocess.run([*options, *flags], check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def test_a_child_has_no_connection_of_its_parent_and_resumes_nothing_that_its_parent_removed(
    files: Path, target: str
) -> None:
    """forks.c: the store receives nothing of the parent's Remove, and answers the child."""
    relay = Relay(target)
    named = {
        "target": relay.target,
        "keyring": str(files / "fleet.keys"),
        "certificate": str(files / "certificate.pem"),
    }
    command = [str(BUILD / "resumed-forks"), *(f"--{name}={value}" for name, value in named.items())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout
        assert program.stdout.readline() == "stored\n"
        relay.deafen()
        _, errors = program.communicate("\n", PATIENCE)
    relay.close()
    assert program.returncode == 0, errors


@pytest.mark.parametrize("tickets", ["0", "1"], ids=["stored", "tickets"])
def test_a_session_resumes_only_where_its_context_fits(files: Path, target: str, tmp_path: Path, tickets: str) -> None:
    """contexts.c: hosts, client certificates, id contexts, data of the application, single use, sizes of options."""
    named = {
        "target": target,
        "keyring": str(files / "fleet.keys"),
        "tickets": tickets,
        **context_files(tmp_path, seconds=4),
    }
    options = [f"--{name}={value}" for name, value in named.items()]
    done = subprocess.run(
        [BUILD / "resumed-contexts", *options], check=False, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr


def test_tickets_end_with_their_lineage_and_are_good_for_one_use(files: Path, target: str, tmp_path: Path) -> None:
    """tickets.c: alerts, removals, single use, a fleet that moves to tickets, large certificates, early data."""
    paths = context_files(tmp_path, seconds=4)
    named = {"target": target, "keyring": files / "fleet.keys", **{name: paths[name] for name in ("certificate", "ca")}}
    options = [f"--{name}={value}" for name, value in named.items()]
    done = subprocess.run(
        [BUILD / "resumed-tickets", *options], check=False, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
