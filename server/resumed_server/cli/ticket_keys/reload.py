"""The command that has servers read changed keys."""

from __future__ import annotations

import shlex
import subprocess
import tempfile

from resumed_server.cli.ticket_keys.outputs import OutputError
from resumed_server.errors import UserError

PATIENCE = 20.0
"""Time limit of the command in seconds."""
_LONGEST_OUTPUT = 500


class ReloadCommand:
    """A command, without a shell.

    Raises:
        UserError: The text is empty, or its quotes do not match.
    """

    def __init__(self, text: str) -> None:
        try:
            self._arguments = shlex.split(text)
        except ValueError as error:
            raise UserError(f"--reload: {text!r}: {error}; quote it as for a shell, although none runs it") from None
        if not self._arguments:
            raise UserError("--reload: the command is empty; give one such as 'nginx -s reload'")

    def run(self) -> None:
        """Run the command and wait for its end.

        Raises:
            OutputError: It failed; the text has its last words.
        """
        program = self._arguments[0]
        # A file instead of a pipe: a daemon that the command starts may keep its end of a pipe open.
        with tempfile.TemporaryFile() as output:
            try:
                status = subprocess.run(  # noqa: S603 - the operator's command
                    self._arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=PATIENCE,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                raise OutputError(f"{program} did not end within {PATIENCE:g} s and was killed") from None
            except OSError as error:
                raise OutputError(f"{program} cannot be run: {error.strerror}") from None
            if status:
                output.seek(0)
                words = " ".join(output.read().decode(errors="replace").split())[-_LONGEST_OUTPUT:]
                raise OutputError(f"{program} ended with status {status}: {words}")
