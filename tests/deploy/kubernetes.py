"""Renders the manifests with `helm` and `kubectl kustomize`, and validates the objects by Kubernetes' schemas."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

TREE = Path(__file__).parents[2]
MANIFESTS = TREE / "deploy/kubernetes"
CHART = MANIFESTS / "chart"
HELM = TREE / ".build/kubernetes/helm"
KUBECTL = TREE / ".build/kubernetes/kubectl"
CUSTOM_RESOURCES = TREE / ".build/kubernetes/custom-resources.json"
VERSIONS = [f"1.{minor}" for minor in range(28, 38)]

Object = dict[str, Any]


class Refused(Exception):
    """Helm rejects the values, with this message."""


def rendered(
    values: Object, *options: str, chart: Path = CHART, name: str = "resumed", namespace: str = "resumed"
) -> list[Object]:
    """Return the objects that a chart renders with `values`, hooks included.

    Raises:
        Refused: Helm rejects the values.
    """
    return _rendered(yaml.safe_dump(values), options, chart, name, namespace)


@functools.cache
def _rendered(values: str, options: tuple[str, ...], chart: Path, name: str, namespace: str) -> list[Object]:
    command = [str(HELM), "template", name, str(chart), "--namespace", namespace, *options, "--values", "-"]
    done = subprocess.run(command, input=values, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(done.stderr)
    return [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]


def rendered_together(instances: list[Object]) -> list[list[Object]]:
    """Return the objects of the chart for each of these values, by aliases in one umbrella chart: Helm starts slowly.

    Raises:
        Refused: Helm rejects some of the values.
    """
    aliases = [f"instance-{number}" for number in range(len(instances))]
    names = {"fullnameOverride": "resumed", "nameOverride": "resumed"}
    found: dict[str, list[Object]] = {alias: [] for alias in aliases}
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(CHART, Path(directory, "charts/resumed"))
        version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
        dependencies = [{"name": "resumed", "version": version, "alias": alias} for alias in aliases]
        umbrella = {"apiVersion": "v2", "name": "all", "version": "1.0.0", "dependencies": dependencies}
        Path(directory, "Chart.yaml").write_text(yaml.safe_dump(umbrella))
        done = subprocess.run(
            [HELM, "template", "resumed", directory, "--namespace", "resumed", "--values", "-"],
            input=yaml.safe_dump({alias: names | one for alias, one in zip(aliases, instances, strict=True)}),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise Refused(done.stderr)
    for document in re.split("^---$", done.stdout, flags=re.MULTILINE):
        an_object = yaml.load(document, yaml.CSafeLoader)
        if an_object:
            found[document.partition("charts/")[2].partition("/")[0]].append(an_object)
    return list(found.values())


def kustomized(directory: str) -> list[Object]:
    """Return the objects of a kustomization, by its path below the manifests."""
    text = subprocess.check_output([KUBECTL, "kustomize", MANIFESTS / directory], text=True)
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def problems(an_object: Object, version: str) -> list[str]:
    """Return the reasons for which a version of Kubernetes rejects an object, unknown fields and kinds included."""
    return _problems(json.dumps(an_object), version)


@functools.cache
def _problems(text: str, version: str) -> list[str]:
    an_object = json.loads(text)
    kind = an_object.get("apiVersion"), an_object.get("kind")
    validator = _validator(version, *kind)
    if validator is None:
        return [f"{kind[0]} {kind[1]} is no kind of Kubernetes {version}"]
    return [f"{kind[1]}: {error.json_path}: {error.message}" for error in validator.iter_errors(an_object)]


@functools.cache
def _validator(version: str, api_version: str, kind: str) -> Any:
    if custom := _custom_resources().get(f"{api_version}/{kind}"):
        return jsonschema.Draft202012Validator(_strict(custom))
    group, _, api = api_version.rpartition("/")
    name = "-".join(filter(None, (kind.lower(), group.partition(".")[0], api)))
    path = _schemas(version) / f"{name}.json"
    if not path.exists():
        return None
    return jsonschema.Draft7Validator(json.loads(path.read_text()), registry=_definitions(version))


@functools.cache
def _custom_resources() -> dict[str, Any]:
    """Return the schemas of the kinds of our objects that are not Kubernetes' own."""
    schemas: dict[str, Any] = json.loads(CUSTOM_RESOURCES.read_text())
    return schemas


def _schemas(version: str) -> Path:
    return Path(kubernetes_validate.__file__).parent / f"kubernetes-json-schema/v{version}.0-local-strict"


@functools.cache
def _definitions(version: str) -> Any:
    definitions = json.loads((_schemas(version) / "_definitions.json").read_text())
    return Registry().with_resource("_definitions.json", Resource(definitions, DRAFT7))


def _strict(schema: Any) -> Any:
    """Return a schema that rejects unknown fields, as the API server does in strict mode."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    stricter = {key: _strict(value) for key, value in schema.items()}
    return stricter | {"additionalProperties": False} if isinstance(stricter.get("properties"), dict) else stricter
