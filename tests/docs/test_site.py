"""The site (mkdocs.yml, `make site`) has every page of the tree."""

from __future__ import annotations

import re

from docs.markdown import PAGES, TREE


def test_every_page_is_in_the_navigation() -> None:
    names = re.findall(r"- (?:.*: )?(\S+\.md)$", (TREE / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(names) == len(set(names))
    outside = {name for name in map(str, PAGES) if name.startswith((".github/", "deploy/"))}
    assert set(names) - {"CHANGELOG.md"} == set(map(str, PAGES)) - outside
