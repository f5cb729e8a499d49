"""The manifests: valid in every version of Kubernetes, every value with its effect, every contradiction refused."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deploy.kubernetes import CHART, HELM, MANIFESTS, TREE, VERSIONS, Refused, kustomized, problems, rendered
from project.versions import project_version
from resumed_server.config.settings import Settings
from support.mtls import Authority, Files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from deploy.kubernetes import Object

    Effect = tuple[str, Any, Callable[[list[Object]], Any], Any, Object]

REDIS: Object = {"engine": "redis", "redis": {"url": "redis://valkey:6379"}}
SCALED: Object = REDIS | {"autoscaling": {"enabled": True}}
CERTIFIED: Object = {"tls": {"certManager": {"enabled": True, "issuer": {"name": "ca"}}}}
MONITORED: Object = {"metrics": {"serviceMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}}}
EVERYTHING: Object = SCALED | CERTIFIED | MONITORED | {"grants": "# nothing\n", "imagePullSecrets": [{"name": "pull"}]}
TREES = ["kustomize/overlays/embedded", "kustomize/overlays/valkey", "frontend", "ticket-keys"]
PEER: Object = {"podSelector": {"matchLabels": {"a": "b"}}}


def of(objects: list[Object], *kinds: str) -> Object:
    """Return the one object of these kinds."""
    (found,) = [each for each in objects if each["kind"] in kinds]
    return found


def pod(objects: list[Object]) -> Any:
    """Return the template of the pods."""
    return of(objects, "StatefulSet", "Deployment")["spec"]["template"]


def container(objects: list[Object]) -> Any:
    """Return the one container of the pods."""
    (found,) = pod(objects)["spec"]["containers"]
    return found


def env(objects: list[Object]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container(objects)["env"]}


def mounts(objects: list[Object]) -> dict[str, Any]:
    volumes = {each["name"]: each for each in pod(objects)["spec"].get("volumes", [])}
    return {each["mountPath"]: volumes.get(each["name"]) for each in container(objects).get("volumeMounts", [])}


def claim(objects: list[Object]) -> Any:
    return of(objects, "StatefulSet")["spec"]["volumeClaimTemplates"][0]["spec"]


def policy(objects: list[Object]) -> Any:
    """Return what gets in and out."""
    return of(objects, "NetworkPolicy")["spec"]


def spread(objects: list[Object]) -> dict[str, str]:
    """Return what happens when pods cannot be spread."""
    return {
        each["topologyKey"]: each["whenUnsatisfiable"] for each in pod(objects)["spec"]["topologySpreadConstraints"]
    }


def autoscaler(objects: list[Object]) -> Any:
    """Return how it scales."""
    return of(objects, "HorizontalPodAutoscaler")["spec"]


def effect(
    path: str, value: Any, look: Callable[[list[Object]], Any], seen: Any, given: Object | None = None
) -> Effect:
    """Say that `value` at `path`, beside the values `given`, shows as `seen`; and that it does not without."""
    return path, value, look, seen, given or {}


def kinds(objects: list[Object]) -> set[str]:
    """Return the kinds of all objects."""
    return {each["kind"] for each in objects}


EFFECTS = [
    effect("image.repository", "reg/x", lambda o: container(o)["image"], f"reg/x:{project_version()}"),
    effect("image.tag", "9", lambda o: container(o)["image"], "resumed:9"),
    effect("image.digest", f"sha256:{'a' * 64}", lambda o: container(o)["image"], f"resumed@sha256:{'a' * 64}"),
    effect("image.pullPolicy", "Always", lambda o: container(o)["imagePullPolicy"], "Always"),
    effect("imagePullSecrets", [{"name": "x"}], lambda o: pod(o)["spec"].get("imagePullSecrets"), [{"name": "x"}]),
    effect("fullnameOverride", "other", lambda o: {each["metadata"]["name"] for each in o}, {"other"}),
    effect("engine", "redis", lambda o: kinds(o) & {"StatefulSet", "Deployment"}, {"Deployment"}, {"replicas": 2}),
    effect("embedded.capacity", "3GiB", lambda o: env(o)["RESUMED_CAPACITY"], "3GiB"),
    effect("embedded.persistence.size", "7Gi", lambda o: claim(o)["resources"]["requests"]["storage"], "7Gi"),
    effect("embedded.persistence.storageClass", "fast", lambda o: claim(o).get("storageClassName"), "fast"),
    effect("redis.url", "rediss://a", lambda o: env(o)["RESUMED_STORAGE"], "rediss://a", REDIS),
    effect(
        "redis.secret",
        "pw",
        lambda o: mounts(o).get("/etc/resumed/redis"),
        {"name": "redis", "secret": {"secretName": "pw", "defaultMode": 0o440}},
        REDIS,
    ),
    effect("replicas", 7, lambda o: of(o, "Deployment")["spec"]["replicas"], 7, REDIS),
    effect("autoscaling.enabled", True, lambda o: "HorizontalPodAutoscaler" in kinds(o), True, REDIS),
    effect("autoscaling.minReplicas", 2, lambda o: autoscaler(o)["minReplicas"], 2, SCALED),
    effect("autoscaling.maxReplicas", 40, lambda o: autoscaler(o)["maxReplicas"], 40, SCALED),
    effect(
        "autoscaling.targetCPU",
        55,
        lambda o: autoscaler(o)["metrics"][0]["resource"]["target"]["averageUtilization"],
        55,
        SCALED,
    ),
    effect(
        "podDisruptionBudget.maxUnavailable",
        "30%",
        lambda o: of(o, "PodDisruptionBudget")["spec"]["maxUnavailable"],
        "30%",
        REDIS,
    ),
    effect("server.listen", "[::]", lambda o: env(o)["RESUMED_HEALTH_LISTEN"], "[::]:7401"),
    effect("server.maxTtl", "2h", lambda o: env(o)["RESUMED_MAX_TTL"], "2h"),
    effect("server.workers", 4, lambda o: env(o)["RESUMED_WORKERS"], "4"),
    effect("server.threads", 5, lambda o: env(o)["RESUMED_THREADS"], "5"),
    effect("server.maxConnectionAge", "5m", lambda o: env(o)["RESUMED_MAX_CONNECTION_AGE"], "5m"),
    effect("server.maxConnections", 1_000_000, lambda o: env(o)["RESUMED_MAX_CONNECTIONS"], "1000000"),
    effect("server.shutdownDelaySeconds", 45, lambda o: env(o)["RESUMED_SHUTDOWN_DELAY"], "45s"),
    effect("server.logLevel", "debug", lambda o: env(o)["RESUMED_LOG_LEVEL"], "debug"),
    effect("tls.enabled", False, lambda o: env(o).get("RESUMED_INSECURE"), "true"),
    effect("tls.secret", "mine", lambda o: mounts(o)["/etc/resumed/tls"]["secret"]["secretName"], "mine"),
    effect("tls.clientCASecret", "cas", lambda o: env(o)["RESUMED_CLIENT_CA"], "/etc/resumed/client-ca/ca.crt"),
    effect(
        "tls.certManager.enabled",
        True,
        lambda o: "Certificate" in kinds(o),
        True,
        {"tls": {"certManager": {"issuer": {"name": "ca"}}}},
    ),
    effect(
        "tls.certManager.issuer.name",
        "other",
        lambda o: of(o, "Certificate")["spec"]["issuerRef"]["name"],
        "other",
        CERTIFIED,
    ),
    effect(
        "tls.certManager.issuer.kind",
        "ClusterIssuer",
        lambda o: of(o, "Certificate")["spec"]["issuerRef"]["kind"],
        "ClusterIssuer",
        CERTIFIED,
    ),
    effect("tls.certManager.duration", "24h", lambda o: of(o, "Certificate")["spec"]["duration"], "24h", CERTIFIED),
    effect("tls.certManager.renewBefore", "8h", lambda o: of(o, "Certificate")["spec"]["renewBefore"], "8h", CERTIFIED),
    effect(
        "tls.clusterDomain",
        "my.net",
        lambda o: of(o, "Certificate")["spec"]["dnsNames"][-1],
        "resumed.resumed.svc.my.net",
        CERTIFIED,
    ),
    effect("grants", "# none", lambda o: "/etc/resumed/grants" in mounts(o), True),
    effect("namespaceLimits.opsPerSecond", 2_000_000, lambda o: env(o)["RESUMED_NAMESPACE_OPS_PER_SECOND"], "2000000"),
    effect("namespaceLimits.sessions", 7, lambda o: env(o)["RESUMED_NAMESPACE_SESSIONS"], "7"),
    effect("namespaceLimits.bytes", "64MiB", lambda o: env(o)["RESUMED_NAMESPACE_BYTES"], "64MiB"),
    effect("namespaceLimits.watchers", 9, lambda o: env(o)["RESUMED_NAMESPACE_WATCHERS"], "9"),
    effect("metrics.enabled", False, lambda o: len(of(o, "Service")["spec"]["ports"]), 1),
    effect("metrics.serviceMonitor.enabled", True, lambda o: "ServiceMonitor" in kinds(o), True),
    effect(
        "metrics.serviceMonitor.interval",
        "5s",
        lambda o: of(o, "ServiceMonitor")["spec"]["endpoints"][0]["interval"],
        "5s",
        MONITORED,
    ),
    effect(
        "metrics.serviceMonitor.labels",
        {"a": "b"},
        lambda o: of(o, "ServiceMonitor")["metadata"]["labels"].get("a"),
        "b",
        MONITORED,
    ),
    effect("metrics.prometheusRule.enabled", True, lambda o: "PrometheusRule" in kinds(o), True),
    effect(
        "metrics.prometheusRule.labels",
        {"a": "b"},
        lambda o: of(o, "PrometheusRule")["metadata"]["labels"].get("a"),
        "b",
        MONITORED,
    ),
    effect("networkPolicy.enabled", False, lambda o: "NetworkPolicy" in kinds(o), False),
    effect("networkPolicy.frontends", [PEER], lambda o: policy(o)["ingress"][0]["from"], [PEER]),
    effect("networkPolicy.prometheus", [], lambda o: len(policy(o)["ingress"]), 1),
    effect("networkPolicy.redis.to", [PEER], lambda o: policy(o)["egress"][1].get("to"), [PEER], REDIS),
    effect("networkPolicy.redis.ports", [7], lambda o: policy(o)["egress"][1]["ports"], [{"port": 7}], REDIS),
    effect("service.annotations", {"a": "b"}, lambda o: of(o, "Service")["metadata"].get("annotations"), {"a": "b"}),
    effect(
        "serviceAccount.annotations",
        {"a": "b"},
        lambda o: of(o, "ServiceAccount")["metadata"].get("annotations"),
        {"a": "b"},
    ),
    effect("resources", {"limits": {"cpu": 2}}, lambda o: container(o)["resources"]["limits"].get("cpu"), 2),
    effect(
        "topologySpread.nodes", "DoNotSchedule", lambda o: spread(o)["kubernetes.io/hostname"], "DoNotSchedule", REDIS
    ),
    effect(
        "topologySpread.zones",
        "DoNotSchedule",
        lambda o: spread(o)["topology.kubernetes.io/zone"],
        "DoNotSchedule",
        REDIS,
    ),
    effect("nodeSelector", {"a": "b"}, lambda o: pod(o)["spec"].get("nodeSelector"), {"a": "b"}),
    effect("tolerations", [{"key": "a"}], lambda o: pod(o)["spec"].get("tolerations"), [{"key": "a"}]),
    effect("affinity", {"podAffinity": {}}, lambda o: pod(o)["spec"].get("affinity"), {"podAffinity": {}}),
    effect("priorityClassName", "high", lambda o: pod(o)["spec"].get("priorityClassName"), "high"),
    effect("podAnnotations", {"a": "b"}, lambda o: pod(o)["metadata"].get("annotations"), {"a": "b"}),
    effect("podLabels", {"a": "b"}, lambda o: pod(o)["metadata"]["labels"].get("a"), "b"),
]

REFUSED = [
    ({"autoscaling": {"enabled": True}}, "autoscaling.enabled: the embedded engine is one pod"),
    ({"redis": {"url": "redis://a"}}, "redis.url: the embedded engine does not use it"),
    ({"redis": {"secret": "a"}}, "redis.secret: the embedded engine does not use it"),
    ({"engine": "redis"}, "redis.url: engine=redis needs it"),
    (REDIS | {"redis": {"url": "redis://u:secret@a"}}, "redis.url: it holds a password"),
    (REDIS | {"redis": {"url": "redis://:secret@a"}}, "redis.url: it holds a password"),
    (SCALED | {"autoscaling": {"enabled": True, "minReplicas": 20}}, "autoscaling.minReplicas: it is more than"),
    (SCALED | {"resources": {"requests": {"cpu": None}}}, "autoscaling.enabled: needs resources.requests.cpu"),
    ({"grants": "#", "tls": {"enabled": False}}, "grants: without TLS the server does not know who calls"),
    ({"tls": {"enabled": False, "certManager": {"enabled": True}}}, "tls.certManager.enabled: there is no TLS"),
    ({"tls": {"certManager": {"enabled": True}}}, "tls.certManager.issuer.name: name the Issuer"),
    (
        {"metrics": {"enabled": False, "serviceMonitor": {"enabled": True}}},
        "metrics.serviceMonitor.enabled: there are no metrics",
    ),
    (
        {"metrics": {"enabled": False, "prometheusRule": {"enabled": True}}},
        "metrics.prometheusRule.enabled: there are no metrics",
    ),
]


def test_every_value_is_described_and_has_its_effect_tested() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    described = dict(leaves(schema))
    del described["global"]
    assert [path for path, *_ in EFFECTS] == list(described) == list(present(default_values(), described))


@pytest.mark.parametrize(("path", "value", "look", "seen", "given"), EFFECTS, ids=[path for path, *_ in EFFECTS])
def test_value(path: str, value: Any, look: Callable[[list[Object]], Any], seen: Any, given: Object) -> None:
    values: Object = copy.deepcopy(REDIS | given if path == "engine" else given)
    before = copy.deepcopy(values) if path != "engine" else {}
    put(values, path, value)
    objects = rendered(values)
    assert look(objects) == seen
    assert look(rendered(before)) != seen
    assert [problem for each in objects for problem in problems(each, VERSIONS[0])] == []


@pytest.mark.parametrize("path", [path for path, *_ in EFFECTS])
def test_a_value_of_another_type_is_refused(path: str) -> None:
    values: Object = {}
    put(values, path, [[]])
    with pytest.raises(Refused, match=re.escape(f"at '/{path.replace('.', '/')}")):
        rendered(values)


@pytest.mark.parametrize(
    ("path", "value"),
    [("embedded.capacity", "1GB"), ("server.maxTtl", "90"), ("namespaceLimits.bytes", "64"), ("server.workers", 0)],
)
def test_what_the_server_would_refuse_the_chart_refuses(path: str, value: Any) -> None:
    """Otherwise the pods would not start."""
    values: Object = {}
    put(values, path, value)
    with pytest.raises(Refused, match=re.escape(f"at '/{path.replace('.', '/')}")):
        rendered(values)


LEFT_OUT = {
    "transport": "the native one has no TLS, and is not in the image",
    "core_dumps": "a dump holds secrets, and a pod has nowhere to keep it",
    "log_format": "what collects logs reads JSON, the default",
    "otel": "the image is without OpenTelemetry",
}
"""Settings of the server that the chart has no value for, and why."""


def test_every_setting_of_the_server_is_the_charts_or_left_out_for_a_reason() -> None:
    told = {
        name.removeprefix("RESUMED_").lower()
        for values in ({}, EVERYTHING, {"tls": {"enabled": False}})
        for name in env(rendered(values))
    }
    settings = {field.name for field in dataclasses.fields(Settings)}
    assert told == settings - set(LEFT_OUT)
    assert set(LEFT_OUT) <= settings


def test_a_misspelt_value_is_refused() -> None:
    with pytest.raises(Refused, match="additional properties 'engin' not allowed"):
        rendered({"engin": "redis"})
    with pytest.raises(Refused, match="additional properties 'drain' not allowed"):
        rendered({"server": {"drain": 5}})


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message.partition(":")[0] for _, message in REFUSED])
def test_contradiction_is_refused(values: Object, message: str) -> None:
    with pytest.raises(Refused, match=f"\n{re.escape(message)}"):
        rendered(values)


def test_every_refusal_of_the_chart_is_tested() -> None:
    written = (CHART / "templates/refused.yaml").read_text()
    told = re.findall(r'append \$problems \(?(?:printf )?"([^;"]*)', written)
    tested = [message for _, message in REFUSED]
    assert all(any(fits(text, message) for message in tested) for text in told)
    assert all(any(fits(text, message) for text in told) for message in tested)
    with pytest.raises(Refused, match=r"(?s)autoscaling.enabled: .*redis.url: .*redis.secret: "):
        rendered({"autoscaling": {"enabled": True}, "redis": {"url": "redis://a", "secret": "b"}})


@pytest.mark.parametrize("version", VERSIONS)
def test_all_objects_are_valid_in(version: str) -> None:
    objects = [each for values in ({}, REDIS, EVERYTHING) for each in rendered(values)]
    objects += [each for tree in TREES for each in kustomized(tree)]
    objects += [each for component in ("cert-manager", "monitoring") for each in resources(component)]
    assert [problem for each in objects for problem in problems(each, version)] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_what_kubernetes_does_not_know_is_refused_in(version: str) -> None:
    service = of(rendered({}), "Service")
    assert problems(service | {"kind": "Servise"}, version)
    assert problems(service | {"apiVersion": "v2"}, version)
    assert len(problems(service | {"spec": {"clusterIPs": "None", "port": []}}, version)) == 2
    certificate = of(rendered(CERTIFIED), "Certificate")
    assert problems(certificate | {"spec": certificate["spec"] | {"dnsName": ["a"]}}, version)
    monitor = of(rendered(MONITORED), "ServiceMonitor")
    assert problems(monitor | {"spec": {"endpoints": [{"prot": "metrics"}], "selector": {}}}, version)


@pytest.mark.parametrize("values", [{}, EVERYTHING, {"embedded": {"persistence": {"size": ""}}}])
def test_pods_meet_the_restricted_standard(values: Object) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, with a read-only root."""
    for objects in (rendered(values), kustomized("frontend")):
        template = pod(objects)["spec"]
        assert template["securityContext"]["runAsNonRoot"]
        assert template["securityContext"]["runAsUser"] > 0
        assert template["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(template)
        assert container(objects)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert all(not set(port) & {"hostPort", "hostIP"} for port in container(objects)["ports"])
        kept = {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
        assert all(len(set(each) & kept) == 1 for each in template.get("volumes", []))
        assert all("subPath" not in each for each in container(objects)["volumeMounts"])  # which is never updated
        assert template["automountServiceAccountToken"] is False


@pytest.mark.parametrize("drain", [0, 20, 3600])
def test_a_pod_has_longer_than_its_drain(drain: int) -> None:
    """The drain, 10 s for the calls in flight, and a margin."""
    objects = rendered({"server": {"shutdownDelaySeconds": drain}})
    assert pod(objects)["spec"]["terminationGracePeriodSeconds"] >= drain + 12


def test_the_embedded_engine_is_one_pod() -> None:
    objects = rendered({"replicas": 3})
    assert of(objects, "StatefulSet")["spec"]["replicas"] == 1
    assert not {"PodDisruptionBudget", "HorizontalPodAutoscaler", "Deployment"} & kinds(objects)


def test_a_store_without_persistence_is_gone_with_its_pod() -> None:
    objects = rendered({"embedded": {"persistence": {"size": ""}}})
    assert "emptyDir" in mounts(objects)["/var/lib/resumed"]
    assert "volumeClaimTemplates" not in of(objects, "StatefulSet")["spec"]


def test_an_autoscaler_has_the_replicas_to_itself() -> None:
    """Otherwise each upgrade would reset their number."""
    assert "replicas" not in of(rendered(SCALED), "Deployment")["spec"]


def test_pod_labels_cannot_take_a_pod_from_its_service() -> None:
    """The labels of the selector take precedence."""
    objects = rendered({"podLabels": {"app.kubernetes.io/name": "other"}})
    assert of(objects, "Service")["spec"]["selector"].items() <= pod(objects)["metadata"]["labels"].items()


@pytest.mark.parametrize("values", [{}, REDIS | {"grants": "[[grant]]\n"}, {"tls": {"enabled": False}}])
def test_the_server_takes_its_settings(values: Object, tmp_path: Path) -> None:
    authority = Authority()
    for directory in ("tls", "grants"):
        (tmp_path / directory).mkdir()
    Files(tmp_path / "tls").write(authority.server(), client_ca=authority.pem)
    (tmp_path / "grants/grants.toml").write_text("")
    settings = {name: text.replace("/etc/resumed", str(tmp_path)) for name, text in env(rendered(values)).items()}
    done = subprocess.run(
        [sys.executable, "-m", "resumed_server", "serve", "--check"],
        env={"COLUMNS": "200"} | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{settings['RESUMED_SHUTDOWN_DELAY']}" in done.stdout


def test_the_chart_is_of_this_version() -> None:
    version = re.search(r'^version = "(.*)"$', (TREE / "pyproject.toml").read_text(), re.MULTILINE)
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert version
    assert chart["version"] == chart["appVersion"] == version[1]
    assert container(kustomized("frontend"))["image"] == f"resumed:{version[1]}"


def test_the_kustomize_tree_is_what_the_chart_renders() -> None:
    """Run `make manifests` after a change of the chart."""
    spec = importlib.util.spec_from_file_location("render", MANIFESTS / "render.py")
    assert spec
    assert spec.loader
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    for path, content in render.tree(str(HELM)).items():
        assert path.read_text() == content, f"{path} is not current; run `make manifests`"


@pytest.mark.parametrize("engine", ["embedded", "valkey"])
def test_overlay_and_chart_are_the_same(engine: str) -> None:
    """Except for the labels of Helm."""
    values = {
        name: value
        for path in ("common", engine)
        for name, value in yaml.safe_load((CHART / f"ci/{path}-values.yaml").read_text()).items()
    }
    of_chart = {(each["kind"], each["metadata"]["name"]): each.get("spec") for each in rendered(values)}
    of_tree = {
        (each["kind"], each["metadata"]["name"]): each.get("spec")
        for each in kustomized(f"kustomize/overlays/{engine}")
    }
    assert of_tree == of_chart


def test_an_overlay_with_all_components(tmp_path: Path) -> None:
    shutil.copytree(MANIFESTS / "kustomize", tmp_path / "kustomize")
    (tmp_path / "kustomization.yaml").write_text(
        "resources: [kustomize/overlays/valkey]\n"
        "components: [kustomize/components/cert-manager, kustomize/components/monitoring]\n"
        "images: [{name: resumed, newName: reg/resumed, newTag: '2'}]\n"
    )
    objects = kustomized(str(tmp_path))
    assert {"Certificate", "ServiceMonitor", "PrometheusRule", "Deployment"} <= kinds(objects)
    assert container(objects)["image"] == "reg/resumed:2"


def test_the_frontend_gets_in() -> None:
    frontend, store = kustomized("frontend"), kustomized("kustomize/overlays/valkey")
    (peer,) = policy(store)["ingress"][0]["from"]
    assert peer["podSelector"]["matchLabels"].items() <= pod(frontend)["metadata"]["labels"].items()
    (identity,) = of(frontend, "Certificate")["spec"]["uris"]
    granted = next(each for each in store if each["kind"] == "ConfigMap")["data"]["grants.toml"]
    assert f'identity = "{identity}"' in granted
    service = of(store, "Service")["metadata"]
    assert env(frontend)["RESUMED_TARGET"] == f"dns:///{service['name']}.{service['namespace']}.svc.cluster.local:7400"
    certified = of(resources("cert-manager"), "Certificate")["spec"]["dnsNames"]
    assert f"{service['name']}.{service['namespace']}.svc.cluster.local" in certified


def test_the_alerts_are_those_of_prometheus() -> None:
    """The ones that `make monitoring` tests, without a Helm template in them."""
    alerts = yaml.safe_load((TREE / "deploy/prometheus/alerts.yaml").read_text())
    assert of(rendered(MONITORED), "PrometheusRule")["spec"] == alerts


def test_helm_lints_it() -> None:
    for values in ({}, EVERYTHING):
        subprocess.run(
            [HELM, "lint", "--strict", CHART, "--values", "-"], input=yaml.safe_dump(values), text=True, check=True
        )


def resources(component: str) -> list[Object]:
    """Return the objects of a component."""
    text = (MANIFESTS / "kustomize/components" / component / "resources.yaml").read_text()
    return [each for each in yaml.safe_load_all(text) if each]


def default_values() -> Object:
    """Return the chart's values."""
    values: Object = yaml.safe_load((CHART / "values.yaml").read_text())
    return values


def leaves(schema: Object, prefix: str = "") -> Iterator[tuple[str, Object]]:
    """Yield what can be set, by its path."""
    for name, described in schema["properties"].items():
        if "properties" in described:
            yield from leaves(described, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", described


def present(values: Object, described: Object, prefix: str = "") -> Iterator[str]:
    """Yield the paths that have values."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if path not in described and isinstance(value, dict):
            yield from present(value, described, f"{path}.")
        else:
            yield path


def put(values: Object, path: str, value: Any) -> None:
    """Set the value at a path."""
    *parents, last = path.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = value


def fits(written: str, message: str) -> bool:
    """Return whether the chart's output begins with a message."""
    return re.match(re.escape(written[: len(message)]).replace("%s", "[a-zA-Z]+"), message) is not None
