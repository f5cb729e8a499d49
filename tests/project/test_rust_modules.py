"""The imports of the Rust sources run in one direction: no module needs one that needs it."""

from __future__ import annotations

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TREE = Path(__file__).parents[2]
CRATES = ["client/rust/src", "client/c/src", "client/c/preload/src"]

Module: TypeAlias = tuple[str, ...]
"""The path of a module within its crate: ("ssl", "context"), and () for the crate's root."""

_NO_CODE = re.compile(r'//[^\n]*|"(?:\\.|[^"\\])*"', re.DOTALL)
_TESTS = re.compile(r"#\[cfg\(test\)\]\s*mod tests \{.*", re.DOTALL)
_USE = re.compile(r"\b(pub(?:\([a-z]+\))?\s+)?use\s+([^;]+);")
_PATH = re.compile(r"\b(?:crate|super|self)(?:::\w+)+")


def read_crate(sources: Path) -> dict[Module, str]:
    """Return the code of each module, without comments, strings and unit tests."""
    modules: dict[Module, str] = {}
    for path in sources.rglob("*.rs"):
        parts = path.relative_to(sources).with_suffix("").parts
        if parts[0] == "stubs":  # generated
            continue
        module = parts[:-1] if parts[-1] in {"lib", "mod"} else parts
        modules[module] = _TESTS.sub("", _NO_CODE.sub("", path.read_text(encoding="utf-8")))
    return modules


def expand(tree: str, prefix: Module = ()) -> Iterator[Module]:
    """Yield the paths of a use declaration: `a::{b, c::d}` is a::b and a::c::d."""
    depth, begin = 0, 0
    tree = re.sub(r"\s+as\s+\w+", "", tree)
    for end, character in enumerate(tree + ","):
        depth += (character == "{") - (character == "}")
        if character != "," or depth:
            continue
        head, brace, inner = tree[begin:end].strip().partition("{")
        begin = end + 1
        path = (*prefix, *(part for part in head.strip().split("::") if part))
        if brace:
            yield from expand(inner.rpartition("}")[0], path)
        elif head:
            yield path[:-1] if path[-1] in {"self", "*"} else path


class Crate:
    """The modules of a crate, and which others each of them names in its code."""

    def __init__(self, sources: Path) -> None:
        self._modules = read_crate(sources)
        self._exported: dict[Module, Module] = {}
        named = {module: set(self._named(module)) for module in self._modules}
        self.imports = {module: {self._owner(path) for path in paths} - {module} for module, paths in named.items()}

    def _named(self, module: Module) -> Iterator[Module]:
        """Yield the paths that a module names, and note those that it exports instead."""
        code = self._modules[module]
        for public, tree in _USE.findall(code):
            for path in self._absolute(module, expand(tree)):
                if public:
                    name = (*module, path[-1])
                    self._exported[name] = path
                else:
                    yield path
        code = _USE.sub("", code)
        children = "|".join(each[-1] for each in self._modules if each and each[:-1] == module)
        paths = [*_PATH.findall(code), *re.findall(rf"(?<!::)\b(?:{children or '$^'})::\w+", code)]
        yield from self._absolute(module, (tuple(path.split("::")) for path in paths))

    def _absolute(self, module: Module, paths: Iterable[Module]) -> Iterator[Module]:
        """Yield those of the paths that are in this crate, from its root."""
        for path in paths:
            bases = {"crate": (), "super": module[:-1], "self": module}
            if path[0] in bases:
                yield (*bases[path[0]], *path[1:])
            elif (*module, path[0]) in self._modules:
                yield (*module, *path)

    def _owner(self, path: Module) -> Module:
        """Return the module that defines an item."""
        for end in range(len(path), 0, -1):
            if path[:end] in self._modules:
                return path[:end]
            if path[:end] in self._exported:
                return self._owner((*self._exported[path[:end]], *path[end:]))
        return ()


@pytest.mark.parametrize("crate", CRATES)
def test_no_module_of_a_crate_imports_one_that_imports_it(crate: str) -> None:
    """As import-linter's layers do for Python."""
    try:
        TopologicalSorter(Crate(TREE / crate).imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join("::".join(("crate", *module)) for module in error.args[1]))


def test_a_cycle_through_a_reexport_and_a_path_in_the_code_is_found(tmp_path: Path) -> None:
    """The checker itself: `one` imports `other` by the root's name for a type, and `other` names `one` in its code."""
    (tmp_path / "lib.rs").write_text("mod one;\nmod other;\npub use other::{self, Thing};\n", encoding="utf-8")
    (tmp_path / "one.rs").write_text("use crate::{Thing, std};\n", encoding="utf-8")
    (tmp_path / "other.rs").write_text("struct Thing;\n// crate::one\nfn of() { super::one::of() }\n", encoding="utf-8")
    assert Crate(tmp_path).imports == {(): set(), ("one",): {("other",), ()}, ("other",): {("one",)}}
