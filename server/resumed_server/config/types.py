"""Parsers of setting values: durations, sizes, addresses, numbers, choices."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_LONGEST_UNIX_PATH = 107
"""Bytes that fit into sockaddr_un, less the final NUL."""


class Duration(float):
    """Seconds, written as "90s", "5m", "24h" or "7d"."""

    _UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1, "ms": 0.001}  # noqa: RUF012 - a constant

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Parse a number with a unit.

        Raises:
            ValueError: The text is anything else.
        """
        return cls(_quantity(text, cls._UNITS, "a duration such as 90s, 5m, 24h or 7d"))

    def __str__(self) -> str:
        return _format(self, self._UNITS)


class Size(int):
    """Bytes, written as "64KiB", "512MiB" or "1GiB"."""

    _UNITS = {"TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}  # noqa: RUF012 - a constant

    @classmethod
    def parse(cls, text: str) -> Size:
        """Parse a number with a unit.

        Raises:
            ValueError: The text is anything else.
        """
        return cls(_quantity(text, cls._UNITS, "a size such as 512MiB or 1GiB"))

    def __str__(self) -> str:
        return _format(self, self._UNITS)


def _quantity(text: str, units: dict[str, float] | dict[str, int], example: str) -> float:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]+)", text.strip(), re.ASCII)
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r} is not {example}")
    return float(match[1]) * units[match[2]]


def _format(value: float, units: dict[str, float] | dict[str, int]) -> str:
    """Return `value` in the largest unit that divides it, otherwise in the smallest."""
    unit, factor = next(((u, f) for u, f in units.items() if value and not value % f), list(units.items())[-1])
    return f"{value / factor:g}{unit}"


@dataclass(frozen=True)
class Address:
    """An address to listen on: a host and a port, or the path of a unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse "host:port", "[v6]:port" or "unix:/path".

        Raises:
            ValueError: The text is anything else.
        """
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if not path.startswith("/") or "\0" in path:
                raise ValueError(f"{text!r}: give the absolute path of the socket, as in unix:/run/resumed.sock")
            if len(path.encode()) > _LONGEST_UNIX_PATH:
                raise ValueError(
                    f"{text!r}: the path is longer than the {_LONGEST_UNIX_PATH} bytes that a socket may have"
                )
            return cls(path=path)
        match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:/\s]+)):(\d{1,5})", text, re.ASCII)
        if match is None or int(match[3]) > 65_535:  # noqa: PLR2004 - the largest port
            raise ValueError(f"{text!r} is not an address such as 127.0.0.1:7400, [::1]:7400 or unix:/run/resumed.sock")
        return cls(host=match[1] or match[2], port=int(match[3]))

    @property
    def local(self) -> bool:
        """Whether only processes of this machine can reach it."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class InRange:
    """A parser of values from `low` to `high`, both included; str() describes the range."""

    parse: Callable[[str], Any]
    low: Any
    high: Any

    def __call__(self, text: str) -> Any:
        """Parse a value.

        Raises:
            ValueError: The value is outside the range.
        """
        value = self.parse(text)
        if not self.low <= value <= self.high:
            raise ValueError(f"{text} is outside {self}")
        return value

    def __str__(self) -> str:
        return f"{self.low} to {self.high}"


MAX_INT = 999_999_999
"""The largest number that parse_int() accepts."""


def parse_int(text: str) -> int:
    """Parse a whole number of at most nine digits.

    Raises:
        ValueError: The text is anything else.
    """
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def choice_parser(*choices: str) -> Callable[[str], str]:
    """Return a parser that accepts `choices` only."""

    def parse_choice(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return parse_choice


def redact_password(url: str) -> str:
    """Return a URL of any engine without its password, for logs."""
    return re.sub(r"(?<=://)([^/?#:]*):([^/?#]*)@", r"\1:***@", url)
