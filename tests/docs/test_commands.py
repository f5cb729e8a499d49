"""Every command that a page of the tree gives its readers is run, or `tables.py` says what checks it instead.

`resumed` is run, with stores and frontends of this test in place of the placeholders; where a sentence only names one
of its commands, that exists with these options. Targets of `make`, most of which take minutes, exist, know the
variables, and the scripts that they run the options. So do Python scripts; of pytest it is tested that something is
selected.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
from importlib.metadata import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
import typer.main

from docs.markdown import PAGES, TREE, Command, blocks, commands
from docs.tables import BEFORE, ELSEWHERE, INSTEAD, NO_COMMANDS
from resumed_server.cli import app

if TYPE_CHECKING:
    from docs.stage import Stage

MAKEFILE = (TREE / "Makefile").read_text(encoding="utf-8")
ALL = {page: commands(page) for page in PAGES}
_IncompleteError: Any = typer.BadParameter.__mro__[1]
_PYTHON = r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?python3?"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if ALL[page]], ids=str)
def test_every_command_works(page: Path, stage: Stage, tmp_path: Path) -> None:
    directory = tmp_path / "page"
    shutil.copytree(stage.directory, directory)
    problems, functions = [], {}
    for command in ALL[page]:
        if function := re.match(r"(\w+)\(\) \{", command.text):
            functions[function[1]] = command.text
            continue
        try:
            if not _checked_without_running(command):
                _run(command, functions.get(command.text.split()[0], ""), stage, directory)
        except (AssertionError, subprocess.SubprocessError) as problem:
            problems.append(f"{command.where}: {problem}")
    assert not problems, "\n\n".join(problems)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_block_says_what_it_is(page: Path) -> None:
    """Otherwise a command in an unlabelled block would go untested."""
    unknown = [
        f"{block.where}: {block.lines[0]}"
        for block in blocks(page)
        if not block.language and not block.shell and not block.lines[0].startswith((*NO_COMMANDS, " ", "┌"))
    ]
    assert not unknown, "name its language in a fence, or what it is in tables.py"


def test_the_tables_have_nothing_that_no_page_has() -> None:
    texts = [command.text for page in ALL.values() for command in page]
    heads = [block.lines[0] for page in PAGES for block in blocks(page)]
    assert not [key for key in ELSEWHERE if not any(map(re.compile(re.escape(key)).match, map(_bare, texts)))]
    assert not [key for key in (*INSTEAD, *BEFORE) if key not in texts]
    assert not [key for key in NO_COMMANDS if not any(head.startswith(key) for head in heads)]


def _run(command: Command, function: str, stage: Stage, directory: Path) -> None:
    if preparation := BEFORE.get(command.text):
        stage.run(preparation, directory)
    text = "\n".join(filter(None, [function, INSTEAD.get(command.text, command.text)]))
    printed = stage.run(text, directory, may_fail=bool(command.output))
    assert _masked(command.output) in _masked(printed), f"{text} prints\n{printed}"


def _bare(text: str) -> str:
    return text.removeprefix(".venv/bin/")


def _checked_without_running(command: Command) -> bool:
    """Check a command that is not to be run, and return False for one that is."""
    text = _bare(command.text)
    if text.startswith(tuple(ELSEWHERE)):
        _check_names(text)
    elif text.startswith("make "):
        _check_target(text)
    elif script := re.fullmatch(rf"{_PYTHON} (?P<path>\S+\.py)(?P<arguments>.*)", text):
        _check_arguments(command.page.parent, script["path"], script["arguments"])
    elif selection := re.fullmatch(rf"(?:{_PYTHON} -m )?pytest (?P<arguments>.*)", text):
        _check_selection(selection["arguments"])
    elif text.startswith("resumed "):
        return not (_is_whole(shlex.split(text)) or command.typed)
    else:
        assert re.match(r"\(?(openssl|sleep|issue) ", text), "is neither run here nor in tables.py"
        return False
    return True


def _check_names(text: str) -> None:
    """Check that the files, extras and values that a command names are there."""
    for path in re.findall(r"(?<![\w./])(?:client|deploy|docs|protos|server|tests)/[\w./-]+", text):
        assert (TREE / path).exists(), f"{path} is not there"
    for extras in re.findall(r"\[([a-z,]+)\]", text):
        assert set(extras.split(",")) <= set(metadata("resumed").get_all("Provides-Extra") or ()), (
            f"no such extra: {extras}"
        )
    for value in re.findall(r"--set ([\w.]+)=", text):
        schema = json.loads((TREE / "deploy/kubernetes/chart/values.schema.json").read_text())
        for name in value.split("."):
            assert name in schema.get("properties", {}), f"the chart has no value {value}"
            schema = schema["properties"][name]


def _check_target(text: str) -> None:
    """Check that make has the target, that it knows the variables, and its scripts the options that they hold."""
    target, *variables = shlex.split(text)[1:]
    # Not by `make --dry-run`: that runs each line which has $(MAKE) in it.
    rule = re.search(rf"^{re.escape(target)}:.*\n(\t.*\n)*", MAKEFILE, re.MULTILINE)
    assert rule, f"make has no target {target}"
    for variable in variables:
        name, _, value = variable.partition("=")
        assert f"$({name})" in rule[0], f"make {target} knows no {name}"
        for path in re.findall(r"\S+\.py", rule[0]) if value.startswith("-") else ():
            _check_arguments(Path(), path, value)


def _check_arguments(beside: Path, path: str, arguments: str) -> None:
    """Check that a script is there, and knows these options."""
    script = next((path for path in (TREE / path, TREE / beside / path) if path.exists()), None)
    assert script, f"{path} is not there"
    known = {node.value for node in ast.walk(ast.parse(script.read_bytes())) if isinstance(node, ast.Constant)}
    for option in re.findall(r"(?<!\S)--[\w-]+", arguments):
        assert option in known, f"{path} has no option {option}"


def _check_selection(arguments: str) -> None:
    """Check that pytest's files are there, and have tests with such names."""
    paths, _, expression = re.sub(r" (-x|--\w+ \d+)", "", arguments).partition(" -k ")
    names: set[str] = set()
    for path in paths.split():
        assert (TREE / path).exists(), f"{path} is not there"
        for file in [TREE / path] if path.endswith(".py") else (TREE / path).rglob("test_*.py") if expression else ():
            nodes = list(ast.walk(ast.parse(file.read_bytes())))
            names |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            names |= {node.id for node in nodes if isinstance(node, ast.Name)}
    for word in set(re.findall(r"\w+", expression)) - {"and", "or", "not"}:
        assert any(word in name for name in names), f"{paths} has no test {word}"


def _is_whole(words: list[str]) -> bool:
    """Return whether `resumed ...` could be run as it stands, or only names a command; either has these options."""
    command: Any = typer.main.get_command(app)
    arguments: list[str] = []
    for word in words[1:]:
        if word in getattr(command, "commands", {}):
            _, command, _ = command.resolve_command(typer.Context(command), [word])
        elif word.startswith("-"):
            options = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
            assert word.partition("=")[0] in options | {"--help"}, f"{command.name} has no option {word}"
            arguments.append(word)
        else:
            assert not hasattr(command, "commands"), f"there is no command {word}"
            arguments.append(word)
    try:
        command.make_context(command.name, arguments, resilient_parsing=False)
    except _IncompleteError:
        return False
    except typer.Exit:  # --help
        return True
    return bool(arguments)


def _masked(text: str) -> str:
    """Return an output without its variable parts and without prompts."""
    return re.sub(r"\d[\d,.:TZ-]*", "#", re.sub(r".*\[y/N\].*\n", "", text))
