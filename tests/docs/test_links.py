"""Links between the documents lead somewhere, tests that they name are there, and README.md leads to all of them."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from markdown_it.token import Token

TREE = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/**/*.md", "protos/*.md", "client/*/*.md")
    for page in TREE.glob(pattern)
)


@cache
def parsed(page: Path) -> list[Token]:
    """Return what Markdown is in a page."""
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files that a page links to, pictures included, and the anchors in them."""
    for token in parsed(page):
        for each in token.children or ():
            target = str(each.attrs.get("href") or each.attrs.get("src") or "")
            if target and not re.match(r"\w+:", target):
                path, _, anchor = target.partition("#")
                yield (page.parent / path).resolve() if path else page, anchor


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading, inline in pairwise(parsed(page)):
        if heading.type == "heading_open":
            text = "".join(each.content for each in inline.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            number = next(number for number in range(100) if (f"{slug}-{number}" if number else slug) not in found)
            found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TREE)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(target), f"{target} has no heading #{anchor}"


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached, at_hand = {TREE / "README.md"}, [TREE / "README.md"]
    while at_hand:
        new = {target for target, _ in links(at_hand.pop()) if target in PAGES} - reached
        reached |= new
        at_hand += new
    assert [str(page.relative_to(TREE)) for page in PAGES if page not in reached] == []


def test_every_test_that_a_document_names_is_there() -> None:
    """By its name alone; docs/threat-model.md, which names files too, has a test of its own."""
    there = {name for file in TREE.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    for page in PAGES:
        missing = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))) - there
        assert not missing, f"{page} names {missing}"
