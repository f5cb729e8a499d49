"""Addresses taken before anything else starts, so that a busy one is found at once and every worker gets the same.

A socket that is bound, but never listens, keeps each port: the one that listens may still bind it, since both set
SO_REUSEADDR (and SO_REUSEPORT between workers, where a second server would otherwise join in unnoticed).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from resumed_server.config.types import Address


@contextlib.contextmanager
def reserved(addresses: Sequence[Address], flag: str = "--listen") -> Iterator[list[Address]]:
    """Hold `addresses` and yield them with concrete ports instead of 0; remove the unix sockets at the end.

    `flag` is the setting that they come from.

    Raises:
        UserError: All that cannot be had, one address a line.
    """
    with contextlib.ExitStack() as held:
        concrete, problems = [], []
        for address in addresses:
            try:
                concrete.append(_clear(address, held) if address.path else _bind(address, held))
            except OSError as error:
                problems.append(f"{flag}: cannot listen on {address}: {_advice(error)}")
        if problems:
            raise UserError("\n".join(problems))
        yield concrete


def _bind(address: Address, held: contextlib.ExitStack) -> Address:
    """Bind every address that the host stands for; the first finds the port where it is 0."""
    absent: OSError | None = None
    bound = False
    for family, kind, protocol, _, where in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
        try:
            keeper = held.enter_context(socket.socket(family, kind, protocol))
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            keeper.bind((where[0], address.port, *where[2:]))
        except OSError as error:
            if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                raise
            absent = error  # localhost often has an IPv6 address on machines without IPv6
            continue
        # Only now: where it is set before, a busy port is no error.
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        address = dataclasses.replace(address, port=keeper.getsockname()[1])
        bound = True
    if absent and not bound:
        raise absent
    return address


def _clear(address: Address, held: contextlib.ExitStack) -> Address:
    """Make way for a unix socket: remove one that a dead server left, refuse to touch anything else."""
    path = Path(address.path)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(
                0, "the path is taken by a file that is no socket; move it away or choose another path"
            )
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(address.path)
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise FileExistsError(0, "another process listens there; stop it or choose another path")
    if not path.parent.is_dir():
        raise FileNotFoundError(0, f"there is no directory {path.parent}; create it")
    held.callback(path.unlink, missing_ok=True)
    return address


_ADVICE = {
    errno.EACCES: "permission denied; ports below 1024 and other users' directories need privileges, choose another",
    errno.EADDRINUSE: "the port is in use; stop the process that listens there or choose another port",
    errno.EADDRNOTAVAIL: "this machine has no such address; use one of its own",
    errno.EAFNOSUPPORT: "this machine does not speak that protocol; use an IPv4 address",
}


def _advice(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "the name does not resolve; use an address"
    return _ADVICE.get(error.errno or 0, error.strerror or "unknown error")
