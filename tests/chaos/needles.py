"""Search for secrets in hundreds of megabytes of memory and files: raw, in hex, and in base64 at any offset.

Any copy of 16 bytes contains 8 aligned bytes of them. So the words of a haystack are intersected with the set of all
words of the needles, which takes seconds, and the full needle is searched only after a match.
"""

from __future__ import annotations

import base64
import contextlib
from array import array
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from io import RawIOBase
    from typing import IO

WORD = 8
LEAST = 24
"""Minimum bytes of a needle, so that its base64 has a word that does not depend on neighbouring bytes."""
CHUNK, OVERLAP = 16 << 20, 4096


class Form(NamedTuple):
    """An encoding of a needle."""

    name: str
    encoded: bytes


def forms(needle: bytes) -> Iterator[Form]:
    """Yield all forms of a needle; in base64, the characters that do not depend on neighbouring bytes."""
    yield Form("raw", needle)
    yield Form("hex", needle.hex().encode())
    yield Form("HEX", needle.hex().upper().encode())
    for before in range(3):
        # A character has 6 bits; characters that share bits with neighbouring bytes are omitted.
        encoded = base64.b64encode(bytes(before) + needle + bytes(2))
        own = encoded[-(-before * 8 // 6) : (before + len(needle)) * 8 // 6]
        yield Form("base64", own)
        yield Form("base64url", own.translate(bytes.maketrans(b"+/", b"-_")))


class Needles:
    """The forms of all needles, with their names for the report."""

    def __init__(self, named: Iterable[tuple[str, bytes]]) -> None:
        self._by_word: dict[int, list[tuple[str, Form]]] = defaultdict(list)
        self.count = 0
        for name, needle in named:
            if len(needle) < LEAST:
                raise ValueError(f"{name} is too short for a search")
            self.count += 1
            for form in forms(needle):
                for start in range(WORD):
                    word = int.from_bytes(form.encoded[start : start + WORD], "little")
                    self._by_word[word].append((name, form))
        self._words = frozenset(self._by_word)

    def found_in(self, haystack: Iterable[bytes]) -> set[tuple[str, str]]:
        """Return names and forms of the needles in a haystack, given as overlapping chunks."""
        found = set()
        for chunk in haystack:
            words = array("Q", chunk[: len(chunk) // WORD * WORD])
            for word in self._words.intersection(words):
                found |= {(name, form.name) for name, form in self._by_word[word] if form.encoded in chunk}
        return found


def chunks_of_file(path: Path) -> Iterator[bytes]:
    """Yield a file without its holes."""
    with path.open("rb") as file:
        yield from _chunks(file, 0, path.stat().st_size)


def chunks_of_memory(pid: int) -> Iterator[bytes]:
    """Yield the readable memory of a process: heap, stacks and mapped files."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            addresses, permissions = line.split()[:2]
            start, end = (int(part, 16) for part in addresses.split("-"))
            if permissions.startswith("r") and not line.endswith(("[vvar]", "[vvar_vclock]", "[vsyscall]")):
                yield from _chunks(memory, start, end)


def _chunks(file: IO[bytes] | RawIOBase, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        # A page after the end of a mapped file cannot be read.
        with contextlib.suppress(OSError):
            file.seek(start)
            yield file.read(min(CHUNK, end - start)) or b""
        start += CHUNK - OVERLAP if end - start > CHUNK else end - start
