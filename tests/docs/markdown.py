"""What Markdown pages tell their readers to run: blocks of shell and Python, and commands within sentences."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

TREE = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(TREE)
    for pattern in (
        *("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/**/*.md"),
        *("protos/**/*.md", "client/*/*.md", "deploy/**/*.md"),
    )
    for path in TREE.glob(pattern)
    if path.name != "CHANGELOG.md"  # describes the past
)
"""Every page of the tree."""

_OURS = "resumed|make|python3?|pytest|pip|buf|docker|helm|kubectl|cargo|go|npm"
_OTHERS = "openssl|git|apt-get|cmake|cc|curl|kill|redis-cli|promtool|systemctl|nginx|cp|mkdir|cd|issue"
_BEFORE = r"(?:(?:sudo|[A-Z_]+=\S+) )*(?:\.venv/bin/)?"
_COMMAND = re.compile(rf"(\$ )?({_BEFORE}({_OURS}|{_OTHERS})( |$)|[A-Z_]+=|\. \.venv/|\(sleep )")
_INLINE = re.compile(rf"{_BEFORE}(({_OURS}) \S|({_OTHERS}) .*-)")  # of the others, the name alone is none


class Block(NamedTuple):
    """A block of code; `language` is empty where the page names none."""

    page: Path
    line: int
    language: str
    lines: list[str]

    @property
    def where(self) -> str:
        """Page and line, as an editor takes them."""
        return f"{self.page}:{self.line}"

    @property
    def shell(self) -> bool:
        """Whether it is to be typed into a shell."""
        if self.language:
            return self.language in {"sh", "shell", "console"}
        return bool(_COMMAND.match(self.lines[0]))


class Command(NamedTuple):
    """A command as one line, without prompt and comment.

    Attributes:
        page: Where it stands.
        line: In which line.
        text: The command.
        typed: Whether it stands in a block, or else within a sentence.
        output: Its output according to the page.
    """

    page: Path
    line: int
    text: str
    typed: bool = True
    output: str = ""

    @property
    def where(self) -> str:
        """Page and line, as an editor takes them."""
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the fenced and indented blocks of a page."""
    return [part for part in _parts(page) if isinstance(part, Block)]


def commands(page: Path) -> list[Command]:
    """Return the commands of a page in its order: those of blocks, and those within sentences."""
    found: list[Command] = []
    for part in _parts(page):
        if isinstance(part, Block):
            found += _typed(part) if part.shell else []
            continue
        line, text = part
        for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
            said = " ".join(match[1].split())
            if _INLINE.match(said):
                found.append(Command(page, line + text.count("\n", 0, match.start()), said, typed=False))
    return found


def _parts(page: Path) -> Iterator[Block | tuple[int, str]]:
    """Yield the blocks of a page, and the text between them with the number of its first line."""
    text: list[str] = []
    block: Block | None = None
    fence = ""
    for number, line in enumerate((TREE / page).read_text(encoding="utf-8").splitlines(), 1):
        if block and (line.strip() == fence if fence else line.strip() and not line.startswith("    ")):
            yield Block(*block[:3], _trimmed(block.lines))
            block, was_fenced, fence = None, bool(fence), ""
            if was_fenced:
                continue
        if block:
            block.lines.append(line if fence else line[4:])
        elif (opened := re.match(r" *(```+)(\w*)", line)) or (
            line.startswith("    ") and not (text and text[-1].strip())
        ):
            if text:
                yield number - len(text), "\n".join(text)
                text = []
            fence, language = (opened[1], opened[2]) if opened else ("", "")
            block = Block(page, number + bool(opened), language, [] if opened else [line[4:]])
        else:
            text.append(line)
    if block:
        yield Block(*block[:3], _trimmed(block.lines))
    if text:
        yield number - len(text) + 1, "\n".join(text)


def _trimmed(lines: list[str]) -> list[str]:
    return "\n".join(lines).rstrip().splitlines()


def _typed(block: Block) -> Iterator[Command]:
    """Yield the commands of a block: lines, put together where one goes on; `$ ` begins those of a dialogue."""
    dialogue = block.lines[0].startswith("$ ")
    typed: list[tuple[int, str, list[str]]] = []
    whole, begun = "", block.line
    for number, line in enumerate(block.lines, block.line):
        if dialogue and not line.startswith("$ ") and not whole:
            typed[-1][2].append(line)
            continue
        begun = begun if whole else number
        whole += re.sub(r"(^|\s)#(\s.*|$)", "", line.removeprefix("$ ")).strip()
        if whole.endswith("\\"):
            whole = whole[:-1]
        elif whole.count("{") > whole.count("}"):  # a function goes on
            whole += " " if whole.endswith("{") else "; "
        elif whole:
            typed.append((begun, whole.strip(), []))
            whole = ""
    for number, text, output in typed:
        yield Command(block.page, number, text, output="\n".join(output))
