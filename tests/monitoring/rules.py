"""The alert rules, by Prometheus' own tool, and the dashboards' files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus"
GRAFANA = ROOT / "deploy/grafana"


@pytest.mark.parametrize("arguments", [("check", "rules", "alerts.yaml"), ("test", "rules", "alerts.test.yaml")])
def test_promtool_finds_nothing_wrong(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=RULES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["store", "frontends"])
def test_the_dashboards_are_what_the_code_says(name: str) -> None:
    code = f"import sys, dashboards; sys.stdout.write(dashboards.dashboard({name!r}))"
    made = subprocess.run([sys.executable, "-c", code], cwd=GRAFANA, capture_output=True, text=True, check=True)
    assert made.stdout == (GRAFANA / f"{name}.json").read_text()
