"""A Debian of its own for the servers: nothing of this machine is changed, and no server of its packages starts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from contexts.certificates import Files, new_keyring
from servers.table import FILES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LIBRARY = Path("/usr/local/lib/libresumed-preload.so")
"""The library's path in the servers' file system."""


UNPACKED = "var/lib/unpacked"
"""The directory of the versions of packages that dpkg has not installed, in the servers' file system."""
UNPACK = """chroot "$1" sh -ec 'cd /tmp; mkdir -p /{directory}; apt-get --quiet=2 download {packages}
for file in *.deb; do dpkg --fsys-tarfile $file | tar --extract --keep-directory-symlink --directory /
dpkg-deb --field $file Version >/{directory}/${{file%%_*}}; rm $file; done'
"""


class Debian:
    """The servers' root directory, which mmdebstrap has made."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self, suite: str, packages: Iterable[str], unpacked: Iterable[str]) -> None:
        """Make it, unless it is there; as root, for some minutes.

        Args:
            suite: The release of Debian.
            packages: What to install.
            unpacked: Packages that conflict with one of these; only their files are put there.

        Raises:
            CalledProcessError: mmdebstrap failed.
        """
        if self.root.exists():
            return
        fresh = self.root.with_name(f"{self.root.name}.fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                "mmdebstrap", "--quiet", "--variant=apt", "--mode=root", "--dpkgopt=force-unsafe-io",
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                '--aptopt=Apt::Install-Recommends "false"', f"--include={','.join(sorted(packages))}",
                f"--customize-hook={UNPACK.format(directory=UNPACKED, packages=' '.join(sorted(unpacked)))}",
                suite, str(fresh),
            ],
            check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        fresh.rename(self.root)

    def version(self, package: str) -> str:
        """Return the version of a package, empty if it is neither installed nor unpacked."""
        unpacked = self.root / UNPACKED / package
        if unpacked.exists():
            return unpacked.read_text().strip()
        command = ["dpkg-query", f"--admindir={self.root}/var/lib/dpkg", "--show", "--showformat=${Version}", package]
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout

    def install(self, library: Path) -> None:
        """Put the preloaded library into it."""
        path = self.inside(LIBRARY)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".fresh")
        shutil.copy(library, fresh)
        fresh.chmod(0o755)
        fresh.replace(path)

    def write_files(self, users: Sequence[str]) -> Files:
        """Write certificates, and the fleet's keyring for each user of servers."""
        directory = self.inside(FILES)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        directory.chmod(0o755)
        files, keyring = Files(directory), new_keyring(directory)
        texts = [(directory / f"{name}.pem").read_bytes() for name in ("site", "ca-servers")]
        (directory / "site-chain.pem").write_bytes(b"".join(texts))
        for user in users:
            copy = self.inside(self.keyring(user))
            shutil.copy(keyring, copy)
            copy.chmod(0o600)
            os.chown(copy, self._user(user), -1)
        return files

    @staticmethod
    def keyring(user: str) -> Path:
        """Return the path of a user's keyring in the servers' file system."""
        return FILES / f"{user}.keys"

    def inside(self, path: Path) -> Path:
        """Return this machine's path of a file of the servers' file system."""
        return self.root / path.relative_to("/")

    def _user(self, name: str) -> int:
        users = (line.split(":") for line in self.inside(Path("/etc/passwd")).read_text(encoding="utf-8").splitlines())
        return next(int(number) for user, _, number, *_ in users if user == name)
