"""Finds secrets in memory and files, among hundreds of megabytes: as they are, in hex, and in base64 at any offset.

Any copy of 16 bytes contains 8 aligned ones. So the words of a haystack are compared with a set of all
words that the needles have, which takes seconds, and only where one is found the whole needle is looked for.
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
"""Bytes that a needle must have, or its base64 may hold no word that does not depend on its neighbours."""
CHUNK, OVERLAP = 16 << 20, 4096


class Form(NamedTuple):
    """How a needle is written."""

    name: str
    encoded: bytes


def forms(needle: bytes) -> Iterator[Form]:
    """Yield all that is looked for: in base64 what does not depend on the bytes before and behind."""
    yield Form("raw", needle)
    yield Form("hex", needle.hex().encode())
    yield Form("HEX", needle.hex().upper().encode())
    for before in range(3):
        # A character encodes 6 bits; those that share bits with neighbouring bytes are omitted.
        encoded = base64.b64encode(bytes(before) + needle + bytes(2))
        own = encoded[-(-before * 8 // 6) : (before + len(needle)) * 8 // 6]
        yield Form("base64", own)
        yield Form("base64url", own.translate(bytes.maketrans(b"+/", b"-_")))


class Needles:
    """Search terms, by the name in reports."""

    def __init__(self, named: Iterable[tuple[str, bytes]]) -> None:
        self._by_word: dict[int, list[tuple[str, Form]]] = defaultdict(list)
        self.count = 0
        for name, needle in named:
            if len(needle) < LEAST:
                raise ValueError(f"{name} is too short to be looked for")
            self.count += 1
            for form in forms(needle):
                for start in range(WORD):
                    word = int.from_bytes(form.encoded[start : start + WORD], "little")
                    self._by_word[word].append((name, form))
        self._words = frozenset(self._by_word)

    def found_in(self, haystack: Iterable[bytes]) -> set[tuple[str, str]]:
        """Return names and forms of the needles in a haystack, which comes in chunks that overlap."""
        found = set()
        for chunk in haystack:
            words = array("Q", chunk[: len(chunk) // WORD * WORD])
            for word in self._words.intersection(words):
                found |= {(name, form.name) for name, form in self._by_word[word] if form.encoded in chunk}
        return found


def chunks_of_file(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, which may have holes."""
    with path.open("rb") as file:
        yield from _chunks(file, 0, path.stat().st_size)


def chunks_of_memory(pid: int) -> Iterator[bytes]:
    """Yield all readable memory of a process: heap, stacks, and mapped files."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            addresses, permissions = line.split()[:2]
            start, end = (int(part, 16) for part in addresses.split("-"))
            if permissions.startswith("r") and not line.endswith(("[vvar]", "[vvar_vclock]", "[vsyscall]")):
                yield from _chunks(memory, start, end)


def _chunks(file: IO[bytes] | RawIOBase, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        # A page behind the end of a mapped file cannot be read.
        with contextlib.suppress(OSError):
            file.seek(start)
            yield file.read(min(CHUNK, end - start)) or b""
        start += CHUNK - OVERLAP if end - start > CHUNK else end - start
