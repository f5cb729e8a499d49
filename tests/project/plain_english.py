"""Count six habits that make English hard to read, and fail above a budget for each part of the tree.

Counted are Markdown without code and tables, docstrings and comments of Python, and comments of the other languages.
`python tests/project/plain_english.py tests docs` lists all occurrences in these parts of the tree.
"""

# ruff: noqa: T201 - a tool prints
from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from markdown_it.token import Token

TREE = Path(__file__).parents[2]
PATTERNS = {
    "a clause instead of a noun": r"what (?:is|was|were|are|has|had|it|a|an|the|they|he|each|all|comes|came|this|those"
    r"|no|nobody|one|others?|of)",
    "a person without a role": r"(?:whoever|who (?:is|was|has|does|may|came|comes|reads|calls|asks|holds|steals|needs"
    r"|wants|can|did|sends|takes|makes|gets|must))",
    "nobody in particular": r"(?:nobody|anybody|everybody|somebody)",
    "an idiom": r"(?:likewise|such a one|the like|of late|meanwhile|for ever|whatever)",
    "an actor left out": r"(?:is|are|was|were|be|been) (?:told|handed|asked|let|left|given|meant)",
    "software that talks": r"(?:tells?|telling) (?:of|the|a|it|what|who|whether|them)",
}
GOAL = 0.3
"""Occurrences per 1,000 words that every part of the tree shall reach."""


class Part(NamedTuple):
    """A part of the tree, and how many occurrences per 1,000 words it may have: this number only falls."""

    name: str
    files: tuple[str, ...]
    budget: float


PARTS = (
    Part("pages", ("*.md", ".github/**/*.md"), 0.3),
    Part("docs", ("docs/**/*.md",), 0.3),
    Part("examples", ("examples/**/*.md", "examples/**/*.py"), 0.3),
    Part("protos", ("protos/**/*.md", "protos/**/*.proto", "protos/**/*.py"), 0.3),
    Part("server", ("server/**/*.py",), 0.3),
    Part("client/python", ("client/python/**/*.md", "client/python/**/*.py"), 0.3),
    Part("client/go", ("client/go/**/*.md", "client/go/**/*.go"), 0.3),
    Part("client/node", ("client/node/*.md", "client/node/src/**/*.ts", "client/node/test/**/*.ts"), 0.3),
    Part("client/rust", ("client/rust/*.md", "client/rust/**/*.rs"), 0.3),
    Part("client/c", ("client/c/*.md", "client/c/**/*.rs", "client/c/**/*.h", "client/c/**/*.c"), 0.3),
    Part("deploy", ("deploy/**/*.md", "deploy/**/*.py"), 0.3),
    Part("tests", ("tests/**/*.py",), 0.3),
    Part("fuzz", ("fuzz/**/*.md", "fuzz/**/*.py"), 0.3),
    Part("benchmarks", ("benchmarks/**/*.md", "benchmarks/**/*.py"), 0.3),
)
_GENERATED = re.compile(r"^client/.*/(?:v1|resumedv1|stubs|target|node_modules)/")
_PATTERN = re.compile(
    "|".join(rf"(\b{pattern}\b)".replace(" ", r"\s+") for pattern in PATTERNS.values()), re.IGNORECASE
)
_MARKDOWN = MarkdownIt("commonmark").enable("table")
_LINE_COMMENT = re.compile(r"^\s*//[/!]?(.*)$|^\s*(?:/\*+|\*)(.*?)(?:\*/)?$|\s//(.*)$")


class Prose(NamedTuple):
    """A piece of text, and the line of its file where it begins."""

    line: int
    text: str


def markdown_prose(source: str) -> Iterator[Prose]:
    """Yield the headings and paragraphs of a page, without code and tables."""
    table = False
    for token in _MARKDOWN.parse(source):
        table = token.type == "table_open" or (table and token.type != "table_close")
        if token.type == "inline" and not table and token.map:
            yield Prose(token.map[0] + 1, "".join(map(_inline_text, token.children or ())))


def _inline_text(token: Token) -> str:
    return "\n" if token.type in {"softbreak", "hardbreak"} else token.content if token.type == "text" else ""


def python_prose(source: str) -> Iterator[Prose]:
    """Yield docstrings, those of attributes included, and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield Prose(node.lineno, node.value.value)
    comments = (
        Prose(token.start[0], token.string.lstrip("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    )
    yield from _joined(comments)


def comment_prose(source: str) -> Iterator[Prose]:
    """Yield the comments of a language that begins them with two slashes or a slash and an asterisk."""
    matches = ((number, _LINE_COMMENT.search(line)) for number, line in enumerate(source.splitlines(), 1))
    yield from _joined(Prose(number, next(filter(None, match.groups()), "")) for number, match in matches if match)


def _joined(lines: Iterable[Prose]) -> Iterator[Prose]:
    """Join consecutive lines, as a sentence may continue on the next one."""
    block: list[Prose] = []
    for line in lines:
        if block and line.line != block[-1].line + 1:
            yield Prose(block[0].line, "\n".join(each.text for each in block))
            block = []
        block.append(line)
    if block:
        yield Prose(block[0].line, "\n".join(each.text for each in block))


_READERS = {".md": markdown_prose, ".py": python_prose}


def occurrences(prose: Prose) -> Iterator[tuple[int, str]]:
    """Yield the line of each occurrence of a pattern, and a description."""
    for match in _PATTERN.finditer(prose.text):
        line = prose.line + prose.text.count("\n", 0, match.start())
        yield line, f"{' '.join(match.group().split())!r} is {list(PATTERNS)[(match.lastindex or 1) - 1]}"


class Count(NamedTuple):
    """The words of a part of the tree, and its occurrences as `file:line: description`."""

    words: int
    found: list[str]

    @property
    def rate(self) -> float:
        """Occurrences per 1,000 words."""
        return 1000 * len(self.found) / max(self.words, 1)


def count(part: Part, tree: Path) -> Count:
    """Read the files of a part of a tree."""
    words, found = 0, []
    for path in sorted({path for pattern in part.files for path in tree.glob(pattern)}):
        name = path.relative_to(tree).as_posix()
        if _GENERATED.search(name):
            continue
        for prose in _READERS.get(path.suffix, comment_prose)(path.read_text()):
            words += len(prose.text.split())
            found += [f"{name}:{line}: {description}" for line, description in occurrences(prose)]
    return Count(words, found)


def main(tree: Path = TREE) -> int:
    """Print a table, and the occurrences in parts above their budget; return 1 if there is such a part."""
    counts = {part: count(part, tree) for part in PARTS}
    over = [part for part, counted in counts.items() if counted.rate > part.budget]
    for part in PARTS:
        if part in over or part.name in sys.argv[1:]:
            print(*counts[part].found, sep="\n")
    print(f"{'':14}{'words':>8}{'found':>7}{'per 1,000':>11}{'budget':>8}   (goal {GOAL})")
    for part, (words, found) in counts.items():
        print(f"{part.name:14}{words:8,}{len(found):7}{counts[part].rate:11.2f}{part.budget:8.1f}")
    for part in over:
        print(f"{part.name}: over its budget; write the sentences above with the actor and the thing by name")
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
