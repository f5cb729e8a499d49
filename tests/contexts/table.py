"""The rows of cases.toml: a case for each server."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contexts.places import PRELOADED, Host, Profile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Sequence

MUST = ("resume", "not", "same", "ended")
SETTINGS = frozenset({"verified", "ignore", "single", "mirror", "take"})


@dataclass(frozen=True)
class Row:
    """A case with one server."""

    case: str
    server: str
    first_server: str
    first: Sequence[Host]
    second: Sequence[Host]
    must: str
    settings: Sequence[str]
    ask: str = "localhost"
    ask_second: str = "localhost"
    client: str = ""
    client_second: str = ""
    path: str = "/"
    path_second: str = "/"
    alpn_second: str = ""
    cold: bool = False
    known: str = ""
    known_version: str = ""
    resumes: int = 0
    here: bool = False

    @property
    def name(self) -> str:
        """Return how --only finds it."""
        return f"{self.server}: {self.case}"

    @property
    def switched(self) -> bool:
        """Whether the second place chooses by a file, which appears after the warm-up."""
        return any(host.by == "switch" for host in self.second)

    @property
    def serving(self) -> Host:
        """Return the host of the second place that serves a client of the name."""
        named = [host for host in self.second if host.by == self.ask_second.lower()]
        return (named or list(self.second))[0]


def _hosts(texts: list[str], profiles: dict[str, Profile]) -> list[Host]:
    split = [text.rpartition("=") for text in texts]
    return [Host(by, name, profiles[name]) for by, _, name in split]


def _settings(must: str, server: str) -> list[str]:
    if must == "resume":
        # Redis' context always asks for certificates; its connections take that back.
        return ["verified"] if server == "redis" else [""]
    if server in PRELOADED:
        return ["", "verified", "verified ignore take", "verified ignore mirror"]
    return ["", "ignore take", "ignore mirror"]


def rows() -> list[Row]:
    """Return all rows, in the order of the file."""
    parsed = tomllib.loads(Path(__file__).with_name("cases.toml").read_text(encoding="utf-8"))
    profiles = {name: Profile(**values) for name, values in parsed["host"].items()}
    known = parsed["known"]
    return [_row(dict(case), server, profiles, known) for case in parsed["case"] for server in _servers(case)]


def _servers(case: dict[str, Any]) -> list[str]:
    """Return the servers of a case: `ssl` under asyncio, too, which has no authentication after the handshake."""
    servers: list[str] = case["servers"]
    located = any(host.startswith("located") for host in case["first"] + case["second"])
    return [*servers, "asyncio"] if "ssl" in servers and not located else servers


def _row(case: dict[str, Any], server: str, profiles: dict[str, Profile], known: dict[str, Any]) -> Row:
    del case["servers"]
    first, second = (_hosts(case.pop(place), profiles) for place in ("first", "second"))
    case.setdefault("first_server", server)
    case.setdefault("ask_second", case.get("ask", "localhost"))
    case["known"] = case.pop("known", {}).get(server, "")
    if server in known and known[server]["must"] == case["must"]:
        case["known"], case["known_version"] = known[server]["why"], known[server]["version"]
    settings = case.pop("with", None) or _settings(case["must"], server)
    if server == "mosquitto" and case["must"] == "resume":
        # Its id context has the port, which is the same one on two machines, but not at two places of one.
        settings = [words if "ignore" in words else f"{words} ignore".strip() for words in settings]
    return Row(case=case.pop("name"), server=server, first=first, second=second, settings=settings, **case)
