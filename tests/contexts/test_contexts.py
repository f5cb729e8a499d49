"""The rows of cases.toml whose servers are here: `ssl` and pyOpenSSL always, C and nginx where their programs are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from contexts.certificates import Files, new_keyring
from contexts.client import Visit
from contexts.places import ROOT, SERVERS, Library, environment_of
from contexts.run import Driver, Result, Trial, build_c_server, judge
from contexts.table import MUST, Row, rows
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterator

PRELOAD = ROOT / ".build" / "cargo" / "release" / "libresumed_preload.so"
PYTHON = ("ssl", "asyncio", "pyopenssl")
BUILT = ("c", "nginx")
RESUMES = "the same configuration twice"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Return the clients of this tree."""
    program = tmp_path_factory.mktemp("contexts") / "server"
    if PRELOAD.exists():
        build_c_server(PRELOAD, ROOT / "client" / "c" / "include", program)
    return Library(PRELOAD, program, [ROOT / "client" / "python", ROOT / "server"])


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory, library: Library) -> Iterator[Driver]:
    """Run a store, and write certificates and a keyring."""
    directory = tmp_path_factory.mktemp("files")
    for path in directory, directory.parent, directory.parent.parent:
        path.chmod(0o755)  # servers change their user
    with running_server(env=environment_of(library)) as store:
        yield Driver(store.target, Files(directory), new_keyring(directory))


def _reason(row: Row) -> str:
    """Return the reason to skip a row."""
    for server in {row.server, row.first_server} & set(BUILT):
        if not PRELOAD.exists():
            return "needs Rust: make contexts-ci"
        program = SERVERS[server].program or shutil.which("cc")
        if not program or not Path(program).exists():
            return f"needs {server}"
    return ""


def _parameters() -> list[object]:
    chosen = [row for row in rows() if {row.server, row.first_server} <= {*PYTHON, *BUILT}]
    return [
        pytest.param(
            row,
            id="on-" + re.sub(r"[^a-z0-9]+", "-", row.name.lower()),
            marks=[pytest.mark.skipif(bool(_reason(row)), reason=_reason(row))],
        )
        for row in chosen
    ]


@pytest.mark.parametrize("row", _parameters())
def test_nothing_is_let_in_that_the_server_alone_refuses(row: Row, driver: Driver, library: Library) -> None:
    """Each row has the most permissive settings, and is compared with the server alone."""
    alone = driver.run(row, library, alone=True)
    result = driver.run(row, library, alone=False, quick=True)
    complaints = judge(row, alone, result)
    if row.known and complaints:
        pytest.xfail(row.known)
    assert not complaints, "\n".join([row.name, *complaints, *result.lines])


def test_rows_are_distinct_and_say_what_must_happen() -> None:
    everything = rows()
    assert len({row.name for row in everything}) == len(everything)
    assert {row.must for row in everything} <= set(MUST)
    for server in SERVERS:
        assert {"resume", "not"} <= {row.must for row in everything if row.server == server}


def test_an_unexpected_outcome_is_a_complaint() -> None:
    honest = next(row for row in rows() if row.case == RESUMES)
    strict = next(row for row in rows() if row.must == "not")
    full, resumed = Visit(resumed=False, answer="served"), Visit(resumed=True, answer="served")

    def result(offered: Visit) -> Result:
        return Result(trials=[Trial("1.3", "", warm=True, first=full, offered=offered)])

    assert judge(honest, Result(error="broken"), result(resumed)) == ["error: broken"]
    assert judge(honest, result(full), result(full))
    assert not judge(honest, result(full), result(resumed))
    assert judge(strict, result(full), result(resumed))
    assert judge(strict, result(Visit(resumed=False, answer="refused")), result(full))
    assert not judge(strict, result(full), result(full))
