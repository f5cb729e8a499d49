"""Renders the manifests with `helm` and `kubectl kustomize`, and validates the objects by Kubernetes' schemas."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from cloudcoil.models.cert_manager import v1 as cert_manager
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

TREE = Path(__file__).parents[2]
MANIFESTS = TREE / "deploy/kubernetes"
CHART = MANIFESTS / "chart"
HELM = TREE / ".build/kubernetes/helm"
KUBECTL = TREE / ".build/kubernetes/kubectl"
VERSIONS = [f"1.{minor}" for minor in range(28, 38)]

Object = dict[str, Any]

_CUSTOM = {
    ("cert-manager.io/v1", "Certificate"): cert_manager.Certificate,
    ("cert-manager.io/v1", "ClusterIssuer"): cert_manager.ClusterIssuer,
    ("cert-manager.io/v1", "Issuer"): cert_manager.Issuer,
    ("monitoring.coreos.com/v1", "PodMonitor"): prometheus_operator.PodMonitor,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): prometheus_operator.ServiceMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): prometheus_operator.PrometheusRule,
}
"""Models of the custom resources, by their own projects."""


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


def kustomized(directory: str) -> list[Object]:
    """Return the objects of a kustomization, by its path below the manifests."""
    text = subprocess.check_output([KUBECTL, "kustomize", MANIFESTS / directory], text=True)
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def problems(an_object: Object, version: str) -> list[str]:
    """Return the reasons for which a version of Kubernetes rejects an object, unknown fields and kinds included."""
    kind = an_object.get("apiVersion"), an_object.get("kind")
    validator = _validator(version, *kind)
    if validator is None:
        return [f"{kind[0]} {kind[1]} is no kind of Kubernetes {version}"]
    return [f"{kind[1]}: {error.json_path}: {error.message}" for error in validator.iter_errors(an_object)]


@functools.cache
def _validator(version: str, api_version: str, kind: str) -> Any:
    if custom := _CUSTOM.get((api_version, kind)):
        return jsonschema.Draft202012Validator(_strict(custom.model_json_schema(by_alias=True)))
    group, _, api = api_version.rpartition("/")
    name = "-".join(filter(None, (kind.lower(), group.partition(".")[0], api)))
    path = _schemas(version) / f"{name}.json"
    if not path.exists():
        return None
    return jsonschema.Draft7Validator(json.loads(path.read_text()), registry=_definitions(version))


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
