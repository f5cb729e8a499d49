"""Writes docs/configuration.md from the code, the chart and their comments, and the chart's README: `make reference`.

The commands come from typer's declarations, Python's classes and functions and the keys of the grants file from their
signatures and docstrings (read by griffe), the chart's values from their comments and from the schema that Helm checks.
The pages are changed there, and a test fails when one is out of date.
"""

from __future__ import annotations

import inspect
import json
import re
from enum import Enum
from functools import cache
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import griffe
import typer
import yaml

from resumed_server.cli.lazy_group import COMMANDS, load
from resumed_server.errors import EXIT_STATUSES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TREE = Path(__file__).parents[2]
PAGE = TREE / "docs/configuration.md"
PRELOAD = TREE / "client/c/README.md"
CHART_PAGE = TREE / "deploy/kubernetes/chart/README.md"
_CHART = TREE / "deploy/kubernetes/chart"

_HEAD = """# Configuration reference

All that can be set, generated from the code by `make reference`. What to set when is in the guides:
[frontends.md](frontends.md) for Python's frontends, [store.md](store.md) for the server, [kubernetes.md](kubernetes.md)
for the chart.

- [The command `resumed`](#the-command-resumed): `serve` and all others
- [Python](#python): `install()` and what goes with it
- [The preloaded library](#the-preloaded-library) under nginx, Apache, HAProxy, stunnel
- [The grants file](#the-grants-file)
- [The chart](#the-chart)

Elsewhere: Redis, whose options are part of the URL of `--storage` ([engines.md](engines.md#redis-and-valkey));
frontends in [Go](../client/go/README.md), [Node](../client/node/README.md), [Rust](../client/rust/README.md) and
[C](../client/c/README.md#in-a-server-of-your-own); the [keyring file](keyrings.md).
"""
_STATUSES = """
All commands have these exit statuses, and 130 if the user interrupts them. An error is one line on standard error;
`--json` prints the result of a command as JSON.
"""
_SERVE = """
All of it can be set in the environment, too; an option beats its variable. `resumed serve --check` shows
the result, and opens nothing.

| Notation | Meaning |
| --- | --- |
| DURATION | a number and `ms`, `s`, `m`, `h` or `d`: `90s`, `5m`, `24h` |
| SIZE | a number and `B`, `KiB`, `MiB`, `GiB` or `TiB`: `512MiB` |
| ADDRESS | `host:port`, `[v6]:port` or `unix:/path` |
"""
_PYTHON = """
All times are in seconds. All parameters except `context` and the first parameters of methods are keyword parameters.
"""
_GRANTS = """
The file of `resumed serve --grants`, in TOML: any number of tables `[[grant]]` and `[[limit]]`, read again when it
changes. [store.md](store.md#grants) and [limits.md](limits.md) describe it; `resumed grants check` explains its
decisions.
"""
_CHART_HEAD = """
The values of `deploy/kubernetes/chart`. Helm rejects misspelt values, wrong types and contradictions.
"""
_DOCS = "https://github.com/resumed/resumed/blob/main/docs"
_CHART_README = f"""# resumed

A central TLS session store: any frontend resumes a session that any other negotiated.
[Kubernetes]({_DOCS}/kubernetes.md) describes the installation, with certificates, grants, monitoring and an example of
a frontend.

    helm install resumed deploy/kubernetes/chart --namespace resumed --create-namespace --values values.yaml

## Values

Helm rejects misspelt values, wrong types and contradictions. This table is generated from values.yaml and
values.schema.json.
"""
_SHOWN = {
    "resumed": (
        "install",
        "Installation",
        "Credentials",
        "Keyring",
        "StoreClient",
        "Admin",
        "forbid_core_dumps",
    ),
    "resumed.prometheus": ("export",),
    "resumed.twisted": ("ConnectionCreator",),
}


def page() -> str:
    """Return docs/configuration.md as it has to be."""
    parts = [_HEAD, "\n## The command `resumed`\n", *_commands(), "\n## Python\n", _PYTHON, *_python()]
    parts += ["\n## The preloaded library\n", *_preload(), "\n## The grants file\n", _GRANTS, *_grants()]
    parts += ["\n## The chart\n", _CHART_HEAD, _chart()]
    return "".join(parts)


def chart_page() -> str:
    """Return the chart's README as it has to be, with links that work in a packaged chart."""
    return _CHART_README + re.sub(r"\]\(([\w.-]+\.md)\)", rf"]({_DOCS}/\1)", _chart())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of Markdown, without the columns that are empty in all rows."""
    cells = [[_cell(cell) for cell in row] for row in rows]
    kept = [any(column) for column in zip(*cells, strict=True)]
    lines = [list(compress(line, kept)) for line in (head, ["---"] * len(kept), *cells)]
    return "\n" + "".join(re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(line)} |\n") for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"\bdocs/([\w.-]+\.md)", r"[\1](\1)", " ".join(text.split())).replace("|", "\\|")


def _code(text: object) -> str:
    return f"`{text}`" if str(text) else ""


# The commands


def _commands() -> Iterator[str]:
    yield _STATUSES
    yield _table(("Exit status", "Meaning"), ((f"{status:d}", meaning) for status, meaning in EXIT_STATUSES.items()))
    for path, command in _leaves():
        yield f"\n### `{path}`\n\n{_paragraphs(command.__doc__)}\n"
        about: dict[str, list[tuple[str, str, str, str]]] = {}
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            kind, declared = get_args(parameter.annotation)
            topic = declared.rich_help_panel or ""
            about.setdefault(topic, []).append(_option(parameter.name, kind, declared, parameter.default))
        if path == "resumed serve":
            yield _SERVE
        for topic, rows in about.items():
            if len(about) > 1:
                yield f"\n**{topic or 'This run'}**\n"
            yield _table(("Option", "Environment", "Default", "Meaning"), rows)


def _leaves() -> Iterator[tuple[str, Any]]:
    """Yield the full name and the function of each command."""
    for name in COMMANDS:
        command = load(name)
        children = getattr(command, "commands", {})
        yield from ((f"resumed {name} {child}", each.callback) for child, each in children.items())
        if not children:
            yield f"resumed {name}", command.callback


def _option(name: str, kind: Any, declared: Any, default: Any) -> tuple[str, str, str, str]:
    """Return the row of an option or argument: of which type, as declared to typer, and its default."""
    choices = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, Enum)]
    metavar = declared.metavar or "|".join(member.value for each in choices for member in each)
    if isinstance(declared, typer.models.ArgumentInfo):
        shown = metavar
    else:
        # In an annotation, typer takes the first flag for the default until it builds the command.
        given = [each for each in (declared.default, *(declared.param_decls or ())) if isinstance(each, str)]
        flags = ", ".join(given or [f"--{name.replace('_', '-')}"])
        shown = flags if kind is bool else f"{flags} {metavar}"
    default = " ".join(default) if isinstance(default, list) else default
    default = "" if default in {None, False, inspect.Parameter.empty} else default
    low, high = declared.min, declared.max
    span = "" if low is None else f" {low} or more." if high is None else f" {low} to {high}."
    return _code(shown), _code(declared.envvar or ""), _code(default), declared.help + span


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(each.split()) for each in text.split("\n\n"))


# Python


def _python() -> Iterator[str]:
    for module, names in _SHOWN.items():
        for name in names:
            thing = _declared(f"{module}.{name}")
            yield from _described(f"{module}.{name}", thing)
            if thing.is_class and module == "resumed":
                yield _members(f"{module}.{name}", thing)


def _declared(path: str) -> Any:
    """Return what griffe knows of a function or class, by where it can be imported from."""
    thing = _loader().modules_collection[path]
    return thing.final_target if thing.is_alias else thing


@cache
def _loader() -> griffe.GriffeLoader:
    options: griffe.GoogleOptions = {"returns_multiple_items": False, "returns_named_value": False}
    loader = griffe.GriffeLoader(
        search_paths=[TREE / "client/python", TREE / "server"],
        docstring_parser="google",
        docstring_options=options,
    )
    for package in ("resumed", "resumed_server"):
        loader.load(package)
    return loader


def _described(title: str, thing: Any) -> Iterator[str]:
    shown = title if thing.is_class else f"{title}()"
    yield f"\n### `{shown}`\n"
    # A constructor's parameters are in the class's docstring.
    parameters = {each.name: each for each in thing.parameters if each.name != "self"}
    for section in thing.docstring.parsed:
        if section.kind is griffe.DocstringSectionKind.text:
            yield f"\n{_paragraphs(section.value)}\n"
        elif section.kind is griffe.DocstringSectionKind.parameters:
            yield _table(
                ("Parameter", "Type", "Default", "Meaning"),
                (
                    (_code(each.name), _type(parameters[each.name]), _default(parameters[each.name]), each.description)
                    for each in section.value
                ),
            )
        elif section.kind is griffe.DocstringSectionKind.raises:
            yield "\nRaises:\n\n"
            yield from (f"- `{each.annotation}`: {' '.join(each.description.split())}\n" for each in section.value)


def _type(parameter: Any) -> str:
    return _code(str(parameter.annotation).replace("os.PathLike[str]", "PathLike")) if parameter.annotation else ""


def _default(parameter: Any) -> str:
    return "" if parameter.default is None else _code(parameter.default)


def _members(title: str, thing: Any) -> str:
    rows = []
    for name, member in thing.members.items():
        if name.startswith("_") or not member.docstring:
            continue
        call = f"{name}({_signature(member)})" if member.is_function else name
        rows.append((_code(call), _sentences(member)))
    return _table((f"Of `{title.rpartition('.')[2]}`", "Meaning"), rows)


def _signature(function: Any) -> str:
    parts, keyword_only = [], False
    for each in function.parameters:
        if each.name in {"self", "cls"}:
            continue
        if each.kind is griffe.ParameterKind.keyword_only and not keyword_only:
            keyword_only = True
            parts.append("*")
        parts.append(each.name if each.default is None else f"{each.name}={each.default}")
    return ", ".join(parts)


def _sentences(member: Any) -> str:
    """Return the text of a docstring, its sections as sentences."""
    said = []
    for section in member.docstring.parsed:
        if section.kind is griffe.DocstringSectionKind.text:
            said.append(section.value)
        elif section.kind is griffe.DocstringSectionKind.parameters:
            said += [f"`{each.name}`: {each.description}" for each in section.value]
        elif section.kind is griffe.DocstringSectionKind.returns:
            said += [f"Returns: {each.description}" for each in section.value]
        elif section.kind is griffe.DocstringSectionKind.raises:
            said += [f"Raises `{each.annotation}`: {each.description}" for each in section.value]
    return " ".join(said)


# The preloaded library, the grants file, the chart


def _preload() -> Iterator[str]:
    yield "\nEnvironment variables of `libresumed-preload.so` ([client/c](../client/c/README.md)).\n\n"
    yield from (f"{line}\n" for line in preload_table())


def preload_table() -> list[str]:
    """Return the lines of the table of variables, which is the one in the library's own page."""
    lines = PRELOAD.read_text(encoding="utf-8").splitlines()
    first = lines.index("| Variable | Default | Meaning |")
    return lines[first : lines.index("", first)]


def _grants() -> Iterator[str]:
    for name, path in (("grant", "resumed_server.auth.grants.Grant"), ("limit", "resumed_server.limits.config.Limit")):
        yield f"\n### `[[{name}]]`\n"
        text, attributes = _declared(path).docstring.parsed[:2]
        yield f"\n{_paragraphs(text.value)}\n"
        yield _table(("Key", "Meaning"), ((_code(each.name), each.description) for each in attributes.value))


def _chart() -> str:
    text = (_CHART / "values.yaml").read_text(encoding="utf-8")
    schema = json.loads((_CHART / "values.schema.json").read_text(encoding="utf-8"))
    rows = _values("", yaml.compose(text), schema, text.splitlines(), schema["definitions"])
    return _table(("Value", "Default", "May be", "Meaning"), rows)


def _values(
    path: str, node: Any, schema: Any, lines: list[str], definitions: Any
) -> Iterator[tuple[str, str, str, str]]:
    """Yield a row for each value of a mapping, and for each group of values that has a comment of its own."""
    for key, value in node.value:
        name, allowed = f"{path}{key.value}", schema["properties"][key.value]
        meaning = _comment(lines, key.start_mark.line).removeprefix("-- ")
        if "properties" in allowed:
            if meaning:
                yield _code(name), "", "", meaning
            yield from _values(f"{name}.", value, allowed, lines, definitions)
            continue
        default = yaml.safe_load(yaml.serialize(value))
        yield _code(name), _code(json.dumps(default) if default != "" else ""), _allowed(allowed, definitions), meaning


def _comment(lines: list[str], line: int) -> str:
    """Return the comment right above a line."""
    comment: list[str] = []
    while line and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        comment.insert(0, lines[line].strip().removeprefix("#").strip())
    return " ".join(comment)


def _allowed(schema: Any, definitions: Any) -> str:
    if "$ref" in schema:
        return _allowed(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return " or ".join(_allowed(each, definitions) for each in schema["anyOf"])
    if "title" in schema:
        return str(schema["title"])
    if "enum" in schema:
        return ", ".join(_code(each) for each in schema["enum"] if each)
    if "minimum" in schema:
        return f"{schema['minimum']} to {schema['maximum']}"
    return {"boolean": "`true`, `false`", "array": "list", "object": "map", "string": "text"}[schema["type"]]


if __name__ == "__main__":
    for written, text in ((PAGE, page()), (CHART_PAGE, chart_page())):
        written.write_text(text, encoding="utf-8")
        typer.echo(f"{written.relative_to(TREE)} is written")
