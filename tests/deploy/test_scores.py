"""The chart's objects keep the rules of kube-score and checkov: `make deploy-scores`.

deploy/kubernetes/scores.yaml has the exceptions. A rule there that no object breaks fails as well.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deploy.kubernetes import MANIFESTS, rendered
from deploy.samples import EVERYTHING, GRANTED, REDIS

if TYPE_CHECKING:
    from pathlib import Path

SAMPLES: dict[str, Any] = {"embedded": GRANTED, "redis": REDIS | GRANTED, "everything": EVERYTHING}
DIGEST = {"image": {"repository": "registry.example.com/resumed", "digest": f"sha256:{'a' * 64}"}}
EXCEPTIONS: dict[str, dict[str, str]] = yaml.safe_load((MANIFESTS / "scores.yaml").read_text())
"""By tool: rules that the objects break on purpose, and the reasons."""
PASSED = 7
"""The least grade of kube-score without a remark."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with the objects of the samples."""
    directory = tmp_path_factory.mktemp("objects")
    for name, values in SAMPLES.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump_all(rendered(values | DIGEST)))
    return directory


def test_the_objects_keep_the_rules_of_kube_score(directory: Path) -> None:
    broken = {
        check["check"]["id"]: f"{an_object['object_name']}: {check['comments']}"
        for path in directory.iterdir()
        for an_object in report(os.environ["KUBE_SCORE"], "score", "--output-format=json", str(path))
        for check in an_object["checks"] or []
        if not check["skipped"] and check["grade"] < PASSED
    }
    assert broken.keys() == EXCEPTIONS["kube-score"].keys(), broken


def test_the_objects_keep_the_rules_of_checkov(directory: Path) -> None:
    options = ("--framework=kubernetes", "--output=json", "--quiet", "--compact", "--skip-download")
    found = report(os.environ["CHECKOV"], *options, f"--directory={directory}")["results"]["failed_checks"]
    broken = {each["check_id"]: f"{each['resource']}: {each['check_name']}" for each in found}
    assert broken.keys() == EXCEPTIONS["checkov"].keys(), broken


def report(*command: str) -> Any:
    """Return the report of a command that asks no network."""
    environment = os.environ | {"BC_SKIP_MAPPING": "TRUE"}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False, env=environment).stdout)
