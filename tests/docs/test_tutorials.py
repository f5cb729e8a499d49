"""The tutorials: two nginx resume each other's sessions, and the chart accepts the values."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from docs.markdown import TREE, blocks, commands
from docs.quick_start import Shell, answers
from support.ports import free_port
from support.waiting import until

NGINX = Path("docs/tutorials/nginx-fleet.md")
KUBERNETES = Path("docs/tutorials/kubernetes-cert-manager.md")
LIBRARY = TREE / ".build/cargo/release/libresumed_preload.so"
BEFORE_THE_FIRST_STEP = re.compile(r"cmake|\. \.venv")


@pytest.mark.skipif(not (LIBRARY.exists() and shutil.which("nginx")), reason="needs nginx and `make c`")
def test_the_second_nginx_resumes_a_session_of_the_first(tmp_path: Path) -> None:
    ports = {port: str(free_port()) for port in ("7400", "8443", "8444")}

    def adapted(text: str) -> str:
        text = text.replace("/usr/local/lib/libresumed-preload.so", str(LIBRARY))
        text = re.sub(r"^resumed serve", "resumed serve --listen 127.0.0.1:7400", text)
        return re.sub("|".join(ports), lambda port: ports[port[0]], text)

    for name, language in (("nginx-a.conf", "nginx"), ("resumed.env", "ini")):
        block = next(block for block in blocks(NGINX) if block.language == language)
        (tmp_path / name).write_text(adapted("\n".join(block.lines) + "\n"))
    (tmp_path / "resumed.env").write_text((tmp_path / "resumed.env").read_text() + "RESUMED_DEADLINE=30\n")
    environment = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    printed = {}
    with contextlib.closing(Shell(["bash"], cwd=tmp_path, env=environment)) as shell, contextlib.ExitStack() as stack:
        for name in ("nginx-a.conf", "nginx-b.conf"):  # the last step stops both, unless an earlier one fails
            stack.callback(shell.run, f"nginx -p . -c {name} -s stop 2> /dev/null")
        for command in commands(NGINX):
            if command.typed and not BEFORE_THE_FIRST_STEP.match(command.text):
                status, printed[command.text] = shell.run(adapted(command.text))
                assert status == 0, f"{command.where}: {printed[command.text]}"
                if command.text.startswith("resumed serve"):  # a reader is slower than its start
                    until(partial(answers, ports["7400"]))
    assert printed["visit localhost:8444 -sess_in session.pem"].strip() == "session reused: r"


def test_the_grants_for_kubernetes_permit_the_frontend(tmp_path: Path) -> None:
    values = next(block for block in blocks(KUBERNETES) if block.lines[0] == "image:")
    grants = "\n".join(values.lines).partition("grants: |\n")[2].replace("\n  ", "\n").removeprefix("  ")
    (tmp_path / "grants.toml").write_text(grants)
    question = ("--identity", "spiffe://cluster.local/ns/shop/sa/shop", "--namespace", "shop", "--operation", "put")
    command = [sys.executable, "-m", "resumed_server", "grants", "check", str(tmp_path / "grants.toml"), *question]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert answer.returncode == 0, answer.stdout
