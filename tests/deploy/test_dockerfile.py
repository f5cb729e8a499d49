"""The image's settings and its health check, with this tree in place of the image."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support.ports import free_port
from support.server import PATIENCE, running_server

DOCKER = Path(__file__).parents[2] / "deploy/docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
SETTINGS = dict(re.findall(r"(RESUMED_\w+)=(\S+)", DOCKERFILE.partition("FROM ${BASE_IMAGE}")[2]))


def test_the_server_insists_on_certificates_where_other_containers_reach_it() -> None:
    done = _run(sys.executable, "-m", "resumed_server", "serve", settings=SETTINGS)
    assert done.returncode == 2
    assert "--tls-cert" in done.stderr
    assert "--insecure" in done.stderr


def test_its_settings_are_enough_with_insecure() -> None:
    done = _run(sys.executable, "-m", "resumed_server", "serve", "--insecure", "--check", settings=SETTINGS)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.0.0.0:7400" in done.stdout


def test_the_health_check_notices_a_server_that_is_gone() -> None:
    assert "/opt/resumed/healthy.py" in DOCKERFILE
    settings = {"RESUMED_HEALTH_LISTEN": f"127.0.0.1:{free_port()}"}
    with running_server(env=settings):
        assert _checked(settings).returncode == 0
    gone = _checked(settings)
    assert gone.returncode == 1
    assert "UNAVAILABLE" in gone.stderr
    assert "Traceback" not in gone.stderr


def _checked(settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return _run(sys.executable, str(DOCKER / "healthy.py"), settings=settings)


def _run(*command: str, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command, which ends by itself."""
    environment = {**os.environ, **settings}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)
