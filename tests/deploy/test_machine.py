"""The commands of docs/systemd.md on a machine that systemd boots, and what systemd does there with the units."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploy.machine import Machine, is_possible
from docs.markdown import commands
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path("docs/systemd.md")
INSTALLED = re.compile(r"apt-get |python3 -m venv |/opt/resumed/bin/pip ")
"""Commands that need a network; the machine has what they install."""
AGENT = re.compile(
    r"issue edge |cp \S*fleet\.keys ca|cp edge\.|cp deploy/systemd/ticket-keys\.env |systemctl .*resumed-ticket-keys@"
)
PROMETHEUS = """
useradd --system prometheus
install -d -o prometheus /etc/prometheus /var/lib/prometheus
install -d /etc/default && touch /etc/default/prometheus
"""
"""The work of the package prometheus, whose files in /usr the machine has."""
NGINX = """
[Service]
ExecStart=sleep infinity
ExecReload=touch /run/reloaded
"""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    if not is_possible():
        pytest.skip("needs root, systemd-nspawn and control groups")
    with contextlib.closing(Machine({"/etc/ssl": "/etc/ssl", "/etc/alternatives": "/etc/alternatives"})) as machine:
        for command in (
            "printf '127.0.0.1 localhost\\n127.0.0.1 store.example\\n' > /etc/hosts",
            PROMETHEUS,
            "mkdir /root/clone && cp -r /opt/tree/deploy /opt/tree/examples /root/clone",
        ):
            status, printed = machine.run(f"set -e\n{command}")
            assert status == 0, printed
        yield machine


def property_of(machine: Machine, unit: str, name: str) -> str:
    return machine.run(f"systemctl show --property={name} --value {unit}")[1].strip()


def journal(machine: Machine, unit: str) -> str:
    return machine.run(f"journalctl --unit {unit} --output cat --no-pager")[1]


def test_a_reader_of_the_page_gets_two_frontends_and_metrics(machine: Machine) -> None:
    printed: dict[str, str] = {}
    with contextlib.closing(machine.shell("/root/clone")) as shell:
        for command in commands(PAGE):
            if not command.typed or INSTALLED.match(command.text) or AGENT.match(command.text):
                continue
            if command.text.startswith("/opt/resumed/bin/resumed check"):  # a reader is slower than its start
                until(lambda: '"ready"' in journal(machine, "resumed"))
            if command.text.startswith("visit "):
                until(lambda text=command.text: _saved(shell.run(text), text, printed))  # type: ignore[misc]
                continue
            status, printed[command.text] = shell.run(command.text)
            assert status == 0, f"{command.where}: {command.text}\n{printed[command.text]}"
    first, second = (text for command, text in printed.items() if command.startswith("visit localhost"))
    assert first.endswith("full handshake\n")
    assert second.endswith("resumed\n")
    url = "http://127.0.0.1:9090/api/v1/query?query=sum(up)"
    until(lambda: _value(machine.run(f"/opt/resumed/bin/python -c {_quoted(url)}")) == "3")


def test_the_store_is_started_again_after_a_crash(machine: Machine) -> None:
    assert machine.run("kill -9 $(systemctl show --property=MainPID --value resumed)")[0] == 0
    until(lambda: property_of(machine, "resumed", "NRestarts") == "1")
    until(lambda: property_of(machine, "resumed", "ActiveState") == "active")


def test_the_store_drains_when_systemd_stops_it(machine: Machine) -> None:
    check = next(each.text for each in commands(PAGE) if "resumed check" in each.text)
    until(lambda: machine.run(f"cd /root/clone; {check}")[0] == 0)
    assert machine.run("systemctl restart resumed")[0] == 0
    assert property_of(machine, "resumed", "Result") == "success"
    assert "killing workers" not in journal(machine, "resumed")


def test_systemd_does_not_repeat_a_start_with_wrong_settings(machine: Machine) -> None:
    machine.run("echo RESUMED_CAPACITY=much >> /etc/resumed/resumed.env; systemctl restart resumed")
    until(lambda: property_of(machine, "resumed", "ActiveState") == "failed")
    assert property_of(machine, "resumed", "ExecMainStatus") == "2"
    assert "--capacity" in journal(machine, "resumed")
    machine.run("sed -i /much/d /etc/resumed/resumed.env; systemctl restart resumed")
    until(lambda: property_of(machine, "resumed", "ActiveState") == "active")


def test_nginx_is_reloaded_when_the_agent_has_written_keys(machine: Machine) -> None:
    machine.run(f"cat > /etc/systemd/system/nginx.service <<'END'\n{NGINX}\nEND\nsystemctl daemon-reload")
    assert machine.run("systemctl start nginx")[0] == 0
    with contextlib.closing(machine.shell("/root/clone")) as shell:
        for command in (
            *(each.text for each in commands(PAGE) if each.text.startswith("issue() {")),
            *(each.text for each in commands(PAGE) if each.typed and AGENT.match(each.text)),
            "systemd-tmpfiles --create resumed.conf; systemctl restart resumed-ticket-keys@edge",
        ):
            status, printed = shell.run(command)
            assert status == 0, f"{command}\n{printed}"
    until(lambda: machine.run("test -e /run/reloaded")[0] == 0)
    assert machine.run("systemctl stop resumed-ticket-keys@edge")[0] == 0
    assert machine.run("test -e /run/resumed-ticket-keys/edge/ticket-keys.conf")[0] == 0


def _saved(done: tuple[int, str], command: str, printed: dict[str, str]) -> bool:
    """Keep the output of a visit; return whether it is as expected: a lookup may be late on a loaded machine."""
    printed[command] = done[1]
    return done[1].endswith("resumed\n" if "sess_in" in command else "full handshake\n")


def _quoted(url: str) -> str:
    return f"\"import urllib.request; print(urllib.request.urlopen('{url}').read().decode())\""


def _value(done: tuple[int, str]) -> str | None:
    if done[0]:
        return None
    result = json.loads(done[1])["data"]["result"]
    return str(result[0]["value"][1]) if result else None
