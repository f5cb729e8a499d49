"""Fuzz targets: checks that accept any bytes, and raise only for a defect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable

Check: TypeAlias = "Callable[[bytes], None]"

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """A reader of foreign bytes.

    Attributes:
        name: Names its corpus too.
        prepare: Returns the check, which catches the reader's documented exceptions.
        seeds: Returns inputs from which mutation gets far.
        covers: The source files, relative to the source roots, whose coverage counts.
        longest: Bytes that an input may have.
    """

    name: str
    prepare: Callable[[], Check]
    seeds: Callable[[], Iterable[bytes]]
    covers: tuple[str, ...]
    longest: int = 4_096

    @property
    def corpus(self) -> Path:
        """Where its inputs are kept."""
        return CORPUS / self.name


def mutated(data: bytes, choose: random.Random) -> bytes:
    """Return `data` with a few bytes changed, cut, repeated or put in."""
    changed = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 4, 16))):
        at = choose.randrange(len(changed) + 1)
        match choose.randrange(6):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << choose.randrange(8)
            case 1 if changed:
                changed[at % len(changed)] = choose.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                changed[at:at] = choose.randbytes(choose.choice((1, 2, 9)))
            case 3:
                del changed[at : at + choose.choice((1, 2, 9))]
            case 4:
                changed[at:at] = changed[at : at + choose.choice((2, 9, 64))]
            case _:
                del changed[at:]
    return bytes(changed)


class Pieces:
    """Takes an input apart, so that every input makes sense."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        """Return whether bytes remain."""
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        piece = self._data[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def number(self, size: int = 1) -> int:
        """Return the next number of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def rest(self) -> bytes:
        """Return the remaining bytes."""
        return self.take(len(self._data))
