"""The manifests: valid in every version of Kubernetes, secure, installable twice, the same with Helm and kustomize."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deploy.kubernetes import CHART, HELM, KUBECTL, MANIFESTS, TREE, VERSIONS, kustomized, problems, rendered
from deploy.objects import container, env, kinds, of, part, pod, pods
from deploy.samples import CERTIFIED, EVERYTHING, GRANTED, MONITORED, OPERATED, PLAINTEXT, REDIS
from docs.markdown import blocks
from resumed_server.auth.grants import Grants

if TYPE_CHECKING:
    from pathlib import Path

    from deploy.kubernetes import Object

TREES = ["kustomize/overlays/embedded", "kustomize/overlays/valkey", "frontend", "issuer", "ticket-keys"]
PAGE = TREE / "docs/kubernetes.md"
SELECTING = {"Service", "NetworkPolicy", "PodDisruptionBudget", "StatefulSet", "Deployment", "ServiceMonitor"}
"""Kinds that select pods or Services of the release."""


@pytest.mark.parametrize("version", VERSIONS)
def test_all_objects_are_valid_in(version: str) -> None:
    objects = [each for values in ({}, REDIS, EVERYTHING, PLAINTEXT) for each in rendered(values)]
    objects += [each for tree in TREES for each in kustomized(tree)]
    objects += [each for component in ("cert-manager", "monitoring") for each in resources(component)]
    assert [problem for each in objects for problem in problems(each, version)] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_unknown_to_kubernetes_are_refused_in(version: str) -> None:
    service = of(rendered({}), "Service")
    assert problems(service | {"kind": "Servise"}, version)
    assert problems(service | {"apiVersion": "v2"}, version)
    assert len(problems(service | {"spec": {"clusterIPs": "None", "port": []}}, version)) == 2
    certificate = of(rendered(CERTIFIED), "Certificate")
    assert problems(certificate | {"spec": certificate["spec"] | {"dnsName": ["a"]}}, version)
    monitor = of(rendered(MONITORED), "ServiceMonitor")
    assert problems(monitor | {"spec": {"endpoints": [{"prot": "metrics"}], "selector": {}}}, version)


@pytest.mark.parametrize("values", [{}, EVERYTHING, PLAINTEXT], ids=["default", "everything", "plaintext"])
def test_pods_meet_the_restricted_standard(values: Object) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, with a read-only root."""
    for spec in (*pods(rendered(values)).values(), *pods(kustomized("frontend")).values()):
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(spec)
        assert spec["automountServiceAccountToken"] is False
        for each in spec["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert each["resources"]["requests"]
            assert each["resources"]["limits"]["memory"]
            assert all(not set(port) & {"hostPort", "hostIP"} for port in each.get("ports", []))
            assert all("subPath" not in one for one in each.get("volumeMounts", []))  # which is never updated
        kept = {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
        assert all(len(set(each) & kept) == 1 for each in spec.get("volumes", []))


def test_the_chart_needs_no_custom_resources_by_default() -> None:
    """It installs into a cluster without cert-manager and without the Prometheus operator."""
    for values in ({}, REDIS | GRANTED, PLAINTEXT):
        assert all(
            "." not in each["apiVersion"].partition("/")[0] or each["apiVersion"].endswith("k8s.io/v1")
            for each in rendered(values)
        )


def test_two_instances_in_an_umbrella_chart_share_nothing(tmp_path: Path) -> None:
    """Aliases of one dependency have the same release name. Their `condition` is a value of the chart."""
    shutil.copytree(CHART, tmp_path / "shop/charts/resumed")
    aliases = "".join(
        f"  - {{name: resumed, version: 0.1.0, alias: {alias}, condition: {alias}.enabled}}\n"
        for alias in ("one", "two")
    )
    (tmp_path / "shop/Chart.yaml").write_text(f"apiVersion: v2\nname: shop\nversion: 1.0.0\ndependencies:\n{aliases}")
    values = {alias: OPERATED | REDIS | MONITORED | GRANTED | {"enabled": True} for alias in ("one", "two")}
    objects = rendered(values, chart=tmp_path / "shop", name="shop", namespace="apps")
    identities = [(each["kind"], each["metadata"]["namespace"], each["metadata"]["name"]) for each in objects]
    assert len(set(identities)) == len(identities) > 20
    assert {name for _, _, name in identities if "-" not in name.removeprefix("shop-")} == {"shop-one", "shop-two"}
    selectors = [str(selector(each)) for each in objects if each["kind"] in SELECTING]
    assert len(set(selectors)) == 2
    for each in objects:
        if each["kind"] in SELECTING:
            mine = {
                f"{one['kind']}"
                for one in objects
                if one["kind"] == "Deployment" and selector(each).items() <= labels(one).items()
            }
            assert mine == {"Deployment"}
    secrets = [part_of(each) for each in objects if each["kind"] == "Certificate"]
    assert len(set(secrets)) == 4


@pytest.mark.parametrize(
    ("release", "name"),
    [("resumed", "resumed"), ("my-resumed", "my-resumed"), ("shop", "shop-resumed"), ("a" * 53, "a" * 46)],
)
def test_objects_are_named_after_the_release_and_the_chart(release: str, name: str) -> None:
    """A CronJob has a name of 52 characters at most."""
    objects = rendered(OPERATED, name=release)
    assert of(objects, "Service")["metadata"]["name"] == name
    assert max(len(each["metadata"]["name"]) for each in objects if each["kind"] == "CronJob") <= 52


def test_every_object_has_its_namespace() -> None:
    """`helm template | kubectl apply` would otherwise use the namespace of the context."""
    for each in rendered(EVERYTHING, namespace="sessions"):
        assert each["metadata"]["namespace"] == "sessions"


def test_only_the_pods_of_redis_have_a_headless_service() -> None:
    """The one pod of the embedded engine is reached again without waiting for DNS."""
    assert of(rendered(REDIS), "Service")["spec"]["clusterIP"] == "None"
    assert "clusterIP" not in of(rendered({}), "Service")["spec"]


def test_a_copied_chart_is_whole(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "chart", symlinks=True)
    assert not [path for path in (tmp_path / "chart").rglob("*") if path.is_symlink()]
    assert of(rendered(MONITORED, chart=tmp_path / "chart"), "PrometheusRule")["spec"]["groups"]


def test_operators_reach_the_store_by_a_name_of_its_certificate() -> None:
    """With their own certificate, for clients, which the server's grants name."""
    objects = rendered(OPERATED | GRANTED | {"namespaceOverride": "sessions", "clusterDomain": "my.net"}, name="shop")
    operator = next(each for each in objects if each["metadata"]["name"] == "shop-resumed-operator")["spec"]
    assert operator["usages"] == ["digital signature", "client auth"]
    server = next(
        each for each in objects if each["metadata"]["name"] == "shop-resumed" and each["kind"] == "Certificate"
    )["spec"]
    assert server["usages"] == ["digital signature", "server auth"]
    for kind in ("CronJob/shop-resumed-stats", "CronJob/shop-resumed-purge", "Pod/shop-resumed-test"):
        spec = pods(objects)[kind]
        target = spec["containers"][0]["args"][1]
        assert target.removeprefix("dns:///").removesuffix(":7400") in server["dnsNames"]
        assert spec["volumes"][0]["secret"]["secretName"] == operator["secretName"]
    assert operator["uris"][0] in next(each for each in objects if each["kind"] == "ConfigMap")["data"]["grants.toml"]


def test_a_job_of_operators_purges_the_namespace_that_they_set() -> None:
    """By the commands of docs/kubernetes.md, without the cluster that makes a Job of the CronJob."""
    cron = part(rendered(OPERATED), "CronJob-purge:")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "purge-shop"}} | cron["spec"]["jobTemplate"]
    command = [str(KUBECTL), "set", "env", "--local", "--filename=-", "NAMESPACE=shop", "--output=yaml"]
    changed = subprocess.run(command, input=yaml.safe_dump(job), stdout=subprocess.PIPE, text=True, check=True).stdout
    (one,) = yaml.safe_load(changed)["spec"]["template"]["spec"]["containers"]
    assert one["env"] == [{"name": "NAMESPACE", "value": "shop"}]
    assert one["args"][:1] + one["args"][2:4] == ["purge", "$(NAMESPACE)", "--yes"]
    assert cron["spec"]["suspend"] is True


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({"tls": {"enabled": False}}, ["tls.enabled=false", "image.repository"]),
        (
            {},
            [
                "grants is empty",
                "The pods wait for the Secret resumed-tls",
                "tls.clientCA is empty",
                "image.repository",
            ],
        ),
        (
            {"embedded": {"capacity": "1.2GiB"}, "tls": {"enabled": False}},
            ["tls.enabled", "image", "resources.limits.memory"],
        ),
        (
            {"service": {"type": "LoadBalancer"}, "image": {"repository": "reg/resumed"}}
            | GRANTED
            | {
                "tls": {
                    "clientCA": {"secret": "cas"},
                    "certManager": {"enabled": True, "issuer": {"name": "a", "kind": "ClusterIssuer"}},
                }
            },
            ["A ClusterIssuer issues any identity"],
        ),
    ],
    ids=["plaintext", "default", "large", "external"],
)
def test_the_notes_warn_of(values: Object, warned: list[str]) -> None:
    command = [str(HELM), "install", "resumed", str(CHART), "--dry-run=client", "--values", "-"]
    printed = subprocess.run(
        command, input=yaml.safe_dump(values), stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    warnings = re.findall("^WARNING: (.*)$", printed, re.MULTILINE)
    assert [text for text, begin in zip(warnings, warned, strict=True) if not text.startswith(begin)] == []
    assert ("contains no name for it" in printed) == ("service" in values)


def test_helm_test_checks_a_store_without_tls() -> None:
    (spec,) = [spec for name, spec in pods(rendered(PLAINTEXT)).items() if name.startswith("Pod/")]
    assert spec["containers"][0]["args"] == ["check", "dns:///resumed.resumed.svc.cluster.local:7400"]


def test_the_grants_are_checked_before_pods_change() -> None:
    """The Job has a copy of its own, since the ConfigMap still has the previous grants then."""
    objects = rendered(GRANTED)
    job, copy = of(objects, "Job"), part(objects, "ConfigMap-grants:metadata")
    for metadata in (job["metadata"], copy):
        assert metadata["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert int(copy["annotations"]["helm.sh/hook-weight"]) < 0
    spec = job["spec"]["template"]["spec"]
    assert spec["volumes"][0]["configMap"]["name"] == copy["name"]
    assert "serviceAccountName" not in spec  # which the installation creates only afterwards
    assert spec["restartPolicy"] == "Never"


def test_the_chart_is_of_this_version() -> None:
    version = re.search(r'^version = "(.*)"$', (TREE / "pyproject.toml").read_text(), re.MULTILINE)
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert version
    assert chart["version"] == chart["appVersion"] == version[1]
    assert container(kustomized("frontend"))["image"] == f"resumed:{version[1]}"


def test_the_files_from_the_chart_and_for_it_are_current() -> None:
    """Run `make manifests` after a change of the chart, the alerts or the dashboards."""
    spec = importlib.util.spec_from_file_location("render", MANIFESTS / "render.py")
    assert spec
    assert spec.loader
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    for path, content in render.tree(str(HELM)).items():
        assert path.read_text() == content, f"{path} is not current; run `make manifests`"
    for copy, original in render.COPIES.items():
        assert copy.read_bytes() == original.read_bytes(), f"{copy} is not current; run `make manifests`"


@pytest.mark.parametrize("engine", ["embedded", "valkey"])
def test_overlay_and_chart_are_the_same(engine: str) -> None:
    """Except for the labels of Helm, its hooks, and the Namespace."""
    values = {
        name: value
        for path in ("common", engine)
        for name, value in yaml.safe_load((CHART / f"ci/{path}-values.yaml").read_text()).items()
    }
    of_chart = {identity(each): each.get("spec") for each in rendered(values, "--no-hooks")}
    of_tree = {identity(each): each.get("spec") for each in kustomized(f"kustomize/overlays/{engine}")}
    assert of_tree.pop(("Namespace", None, "resumed")) is None
    assert of_tree == of_chart


@pytest.mark.parametrize("page", ["kubernetes.md", "tutorials/kubernetes-cert-manager.md"])
def test_the_values_of_the_docs_are_accepted(page: str) -> None:
    block = next(block for block in blocks(TREE / "docs" / page) if "grants: |" in block.lines)
    objects = rendered(yaml.safe_load("\n".join(block.lines)))
    assert {"Certificate", "Job", "CronJob", "Pod"} <= kinds(objects)
    assert [problem for each in objects for problem in problems(each, VERSIONS[-1])] == []


def test_the_kustomization_of_the_docs_starts(tmp_path: Path) -> None:
    """Each object is in the namespace that the kustomization creates, and a Certificate makes each mounted Secret."""
    objects = kustomized_page(tmp_path, "namespace: resumed")
    assert {each["metadata"].get("namespace") for each in objects if each["kind"] != "Namespace"} == {"resumed"}
    assert of(objects, "Namespace")["metadata"]["name"] == "resumed"
    assert container(objects)["image"].startswith("registry.example.com/team/resumed:")
    made = {each["spec"]["secretName"] for each in objects if each["kind"] == "Certificate"}
    assert {each["secret"]["secretName"] for each in pod(objects)["spec"]["volumes"] if "secret" in each} == made
    issuer = of(objects, "Certificate")["spec"]["issuerRef"]
    assert ("ClusterIssuer", None, issuer["name"]) in {identity(each) for each in kustomized("issuer")}
    assert {"ServiceMonitor", "PodMonitor", "PrometheusRule"} <= kinds(objects)


def test_the_kustomization_of_the_docs_moves_to_another_namespace(tmp_path: Path) -> None:
    objects = kustomized_page(tmp_path, "namespace: sessions")
    assert {each["metadata"].get("namespace") for each in objects if each["kind"] != "Namespace"} == {"sessions"}
    assert of(objects, "Namespace")["metadata"]["name"] == "sessions"
    assert of(objects, "Certificate")["spec"]["dnsNames"] == [
        "resumed",
        "resumed.sessions",
        "resumed.sessions.svc",
        "resumed.sessions.svc.cluster.local",
    ]


def test_the_frontend_gets_in() -> None:
    frontend, store = kustomized("frontend"), kustomized("kustomize/overlays/valkey")
    (peer,) = of(store, "NetworkPolicy")["spec"]["ingress"][0]["from"]
    labels = pod(frontend)["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= labels.items()
    (identity,) = next(each for each in frontend if each["metadata"]["name"] == "shop-identity")["spec"]["uris"]
    granted = of(store, "ConfigMap")["data"]["grants.toml"]
    assert f'identity = "{identity}"' in granted
    service = of(store, "Service")["metadata"]
    assert env(frontend)["RESUMED_TARGET"] == f"dns:///{service['name']}.{service['namespace']}.svc.cluster.local:7400"
    certified = of(resources("cert-manager"), "Certificate")["spec"]["dnsNames"]
    assert f"{service['name']}.{service['namespace']}.svc.cluster.local" in certified


@pytest.mark.parametrize("tree", ["frontend", "ticket-keys"])
def test_the_example_starts_and_prometheus_finds_it(tree: str) -> None:
    """A Certificate makes each mounted Secret but the keyring, and the PodMonitor of the store selects the pods."""
    objects, monitor = kustomized(tree), of(resources("monitoring"), "PodMonitor")["spec"]
    namespaces = {each["metadata"].get("namespace") for each in objects if each["kind"] != "Namespace"}
    assert namespaces == {of(objects, "Namespace")["metadata"]["name"]}
    made = {each["spec"]["secretName"] for each in objects if each["kind"] == "Certificate"}
    (endpoint,) = monitor["podMetricsEndpoints"]
    for each in objects:
        if each["kind"] == "Deployment":
            spec = each["spec"]["template"]["spec"]
            assert monitor["selector"]["matchLabels"].items() <= labels(each).items()
            containers = [*spec["containers"], *spec.get("initContainers", [])]
            assert endpoint["port"] in {port["name"] for container in containers for port in container["ports"]}
            secrets = {volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume}
            assert secrets == made | {"fleet-keys"}
            assert spec["serviceAccountName"] == of(objects, "ServiceAccount")["metadata"]["name"]


def test_the_grant_of_the_docs_admits_the_agents_of_ticket_keys() -> None:
    (block,) = (each for each in blocks(TREE / "docs/ticket-keys.md") if each.language == "toml")
    grants = Grants.parse("\n".join(block.lines))
    objects = kustomized("ticket-keys")
    identities = next(each for each in objects if each["metadata"]["name"] == "edge-identity")["spec"]["uris"]
    agents = [each["spec"]["template"]["spec"]["initContainers"][0] for each in objects if each["kind"] == "Deployment"]
    for agent in agents:
        (namespace,) = (each.partition("=")[2] for each in agent["args"] if each.startswith("--namespace="))
        assert all(grants.is_allowed(identities, namespace, each) for each in ("put", "get", "remove", "watch"))
    assert len(agents) == 2


@pytest.mark.parametrize("tree", ["frontend", "ticket-keys"])
def test_the_certificate_for_browsers_is_not_the_identity_for_the_store(tree: str) -> None:
    """A public authority issues no SPIFFE id, and a certificate for browsers has no place in the store's authority."""
    certificates = [each["spec"] for each in kustomized(tree) if each["kind"] == "Certificate"]
    assert sorted(("uris" in each, "dnsNames" in each) for each in certificates) == [(False, True), (True, False)]
    assert len({each["issuerRef"]["name"] for each in certificates}) == 2


def test_the_policy_of_the_issuer_admits_the_certificates_of_the_manifests() -> None:
    policies = {
        each["metadata"]["name"]: each["spec"]
        for each in yaml.safe_load_all((MANIFESTS / "issuer/policy.yaml").read_text())
        if each["kind"] == "CertificateRequestPolicy"
    }
    frontend = next(each for each in kustomized("frontend") if each["metadata"]["name"] == "shop-identity")["spec"]
    server = of(resources("cert-manager"), "Certificate")["spec"]
    operator = part(rendered(OPERATED), "Certificate-operator:spec")
    agent = next(each for each in kustomized("ticket-keys") if each["metadata"]["name"] == "edge-identity")["spec"]
    for certificate, policy in (
        (frontend, "resumed-clients"),
        (agent, "resumed-clients"),
        (operator, "resumed-clients"),
        (server, "resumed-server"),
    ):
        allowed = policies[policy]["allowed"]
        assert set(certificate["usages"]) <= set(allowed["usages"])
        assert set(certificate) & {"dnsNames", "uris", "ipAddresses", "commonName"} == set(allowed) - {"usages"}
    assert all(name == "resumed" or name.startswith("resumed.") for name in server["dnsNames"])


def test_the_alerts_and_dashboards_are_those_of_prometheus_and_grafana() -> None:
    """The tested ones, without a template of Helm in them."""
    alerts = yaml.safe_load((TREE / "deploy/prometheus/alerts.yaml").read_text())
    assert of(rendered(MONITORED), "PrometheusRule")["spec"] == alerts
    dashboards = part(rendered(MONITORED), "ConfigMap-dashboards:data")
    assert dashboards == {
        f"resumed-{name}.json": (TREE / f"deploy/grafana/{name}.json").read_text().strip() + "\n"
        for name in ("store", "frontends")
    }


def test_helm_lints_it() -> None:
    for values in ({}, EVERYTHING):
        subprocess.run(
            [HELM, "lint", "--strict", CHART, "--values", "-"], input=yaml.safe_dump(values), text=True, check=True
        )


def resources(component: str) -> list[Object]:
    """Return the objects of a component."""
    text = (MANIFESTS / "kustomize/components" / component / "resources.yaml").read_text()
    return [each for each in yaml.safe_load_all(text) if each]


def kustomized_page(directory: Path, namespace: str) -> list[Object]:
    """Return the objects of the kustomization in docs/kubernetes.md, in a namespace."""
    shutil.copytree(MANIFESTS, directory / "resumed/deploy/kubernetes")
    block = next(block for block in blocks(PAGE) if block.lines[0].startswith("resources: [resumed/"))
    text = "\n".join(block.lines).replace("$REGISTRY", "registry.example.com/team")
    assert "namespace: resumed" in text
    (directory / "kustomization.yaml").write_text(text.replace("namespace: resumed", namespace))
    return kustomized(str(directory))


def identity(an_object: Object) -> tuple[str, str | None, str]:
    metadata = an_object["metadata"]
    return an_object["kind"], metadata.get("namespace"), metadata["name"]


def selector(an_object: Object) -> Any:
    spec = an_object["spec"]
    found = spec.get("podSelector") or spec["selector"]
    return found.get("matchLabels", found)


def labels(an_object: Object) -> Any:
    return an_object["spec"]["template"]["metadata"]["labels"]


def part_of(certificate: Object) -> str:
    return str(certificate["spec"]["secretName"])
