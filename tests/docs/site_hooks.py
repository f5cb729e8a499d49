"""Hooks of mkdocs: the site has the Markdown of the whole tree, each page at its path, so that links work unchanged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

TREE = Path(__file__).parents[2]
_PARTS = (
    "*.md",
    "docs/**/*.md",
    "docs/**/*.svg",
    "examples/*.md",
    "benchmarks/**/*.md",
    "benchmarks/**/*.svg",
    "protos/*.md",
    "client/*/*.md",
)
_LINK = re.compile(r"(?<=\]\()(?P<path>[^()\s#:]+)(?P<anchor>#[^()\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of `docs_dir` by those of the tree, and keep those of the theme."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = [path.relative_to(TREE).as_posix() for part in _PARTS for path in sorted(TREE.glob(part))]
    return Files(theme + [File(path, str(TREE), config.site_dir, config.use_directory_urls) for path in paths])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside the site at the repository."""
    directory = (TREE / page.file.src_uri).parent

    def absolute(link: re.Match[str]) -> str:
        target = (directory / link["path"]).resolve()
        if not target.exists() or files.get_file_from_path(target.relative_to(TREE).as_posix()):
            return link[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"{config.repo_url.rstrip('/')}/{kind}/main/{target.relative_to(TREE)}{link['anchor'] or ''}"

    return _LINK.sub(absolute, markdown)
