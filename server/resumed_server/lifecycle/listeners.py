"""Reserve the listen addresses before anything else starts, so that a busy one is reported at once.

A bound socket that never listens reserves each port. The worker's socket can still bind it, since both set
SO_REUSEADDR, which also allows a port with connections in TIME_WAIT. Workers share a port by SO_REUSEPORT; the
reservation prevents a second server from joining them.
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
def reserve_addresses(addresses: Sequence[Address], flag: str = "--listen") -> Iterator[list[Address]]:
    """Reserve `addresses` and yield them with a free port instead of 0; delete the unix sockets at the end.

    `flag` is the option of the addresses.

    Raises:
        UserError: Addresses cannot be used; each line names one.
    """
    with contextlib.ExitStack() as stack:
        concrete, problems = [], []
        for address in addresses:
            try:
                concrete.append(_remove_stale_socket(address, stack) if address.path else _bind(address, stack))
            except OSError as error:
                problems.append(f"{flag}: cannot listen on {address}: {_advice(error)}")
        if problems:
            raise UserError("\n".join(problems))
        yield concrete


def _bind(address: Address, stack: contextlib.ExitStack) -> Address:
    """Bind every address of the host; the first one determines the port if that is 0."""
    absent: OSError | None = None
    bound = False
    for family, kind, protocol, _, where in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
        try:
            placeholder = stack.enter_context(socket.socket(family, kind, protocol))
            placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            placeholder.bind((where[0], address.port, *where[2:]))
        except OSError as error:
            if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                raise
            absent = error  # localhost often has an IPv6 address on machines without IPv6
            continue
        # After bind(): with this option set before, bind() would succeed on a busy port.
        placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        address = dataclasses.replace(address, port=placeholder.getsockname()[1])
        bound = True
    if absent and not bound:
        raise absent
    return address


def _remove_stale_socket(address: Address, stack: contextlib.ExitStack) -> Address:
    """Delete the unix socket of a server that has ended; any other file is an error."""
    path = Path(address.path)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(0, "the path is a file and not a socket; move it or choose another path")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(address.path)
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise FileExistsError(0, "another process listens there; stop it or choose another path")
    if not path.parent.is_dir():
        raise FileNotFoundError(0, f"there is no directory {path.parent}; create it")
    stack.callback(path.unlink, missing_ok=True)
    return address


_ADVICE = {
    errno.EACCES: "permission denied; ports below 1024 and other users' directories need privileges, choose another",
    errno.EADDRINUSE: "the port is in use; stop the process that listens there or choose another port",
    errno.EADDRNOTAVAIL: "this machine does not have this address; use one of its own",
    errno.EAFNOSUPPORT: "this machine does not support this protocol; use an IPv4 address",
}


def _advice(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "the name does not resolve; use an address"
    return _ADVICE.get(error.errno or 0, error.strerror or "unknown error")
