"""The command `resumed` inside this process, where nothing depends on a process of its own: most of one is imports."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from resumed_server.cli import main

if TYPE_CHECKING:
    from collections.abc import Mapping


def run_command(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Call the command in this process, and return its output; it never shows a traceback.

    Args:
        arguments: Those behind `resumed`.
        env: Environment variables beside our own.
    """
    output, complaints = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, env or {}),
        mock.patch.object(sys, "argv", ["resumed", *arguments]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(complaints),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert "Traceback" not in output.getvalue() + complaints.getvalue()
    return subprocess.CompletedProcess(
        ["resumed", *arguments], int(ended.value.code or 0), output.getvalue(), complaints.getvalue()
    )
