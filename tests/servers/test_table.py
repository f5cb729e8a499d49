"""servers.toml and docs/servers.md agree, and differences from the table are failures."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from servers.debian import UNPACKED, Debian
from servers.run import CLIENTS, PAGE, RETURNS, TURNS, Result, certificate_rows
from servers.table import PROTOCOLS, VERSIONS, servers

if TYPE_CHECKING:
    from pathlib import Path


def test_every_server_is_complete() -> None:
    names = [server.name for server in servers()]
    assert len(set(names)) == len(names)
    for server in servers():
        assert server.ask in PROTOCOLS
        assert set(server.shared) <= set(server.offers) <= set(VERSIONS)
        assert server.how if server.shared else server.note
        used = set(re.findall(r"@(\w+)@", " ".join([server.command, server.prepare, *server.files.values()])))
        assert used <= {"d", "port", "port2", "backend", "site", "chain", "rsa", "ca", "env", "verify"}
        assert ("verify" in used) == bool(server.verify)


def test_the_page_has_every_server() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [server.name for server in servers() if f"| {server.name} |" not in page] == []
    assert "**failed**" not in page


def test_other_results_than_the_expected_ones_are_failures() -> None:
    server = next(server for server in servers() if server.verify and server.alert == "removes")
    good = Result(
        server, "1.3", own=True, turns=TURNS, reset_keeps=True, alert_removes=True, load=CLIENTS * RETURNS
    )  # fmt: skip
    assert good.complaints() == []
    for change in ({"turns": TURNS - 1}, {"load": 99}, {"reset_keeps": False}, {"alert_removes": False}):
        assert replace(good, **change).complaints()
    off = Result(replace(server, resumes=[]), "1.3", own_alone=True, own=True)
    assert off.complaints() == []
    for change in ({"turns": 1}, {"load": 1}, {"own": False}, {"own_alone": False}):
        assert replace(off, **change).complaints()
    assert [row.must for row in certificate_rows(server)] == ["not", "not", "same"]


def test_a_package_that_is_only_unpacked_has_a_version(tmp_path: Path) -> None:
    (tmp_path / UNPACKED).mkdir(parents=True)
    (tmp_path / UNPACKED / "vsftpd").write_text("3.0.3-13+b2\n")
    assert Debian(tmp_path).version("vsftpd") == "3.0.3-13+b2"
