"""The chart's values: each has its effect, other charts' names for them are answered, contradictions are refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deploy.kubernetes import CHART, VERSIONS, Refused, problems, rendered, rendered_together
from deploy.objects import container, env, kinds, of, part, pod, pods
from deploy.samples import CERTIFIED, EVERYTHING, EXTERNAL, GRANTED, MONITORED, OPERATED, REDIS, SCALED, TRACED
from project.versions import project_version
from resumed_server.config.settings import Settings
from support.mtls import Authority, Files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from deploy.kubernetes import Object

    Look = str | Callable[[list[Object]], Any]
    Effect = tuple[str, Any, Look, Any, Object]

ENGINE: Object = {"redis": REDIS["redis"]}  # the embedded engine would refuse it
PEER: Object = {"podSelector": {"matchLabels": {"a": "b"}}}
LABEL: Object = {"a": "b"}
RELABELING: Object = {"targetLabel": "a", "replacement": "b"}
CLAIM = "StatefulSet:spec volumeClaimTemplates 0"
SERVICE_MONITOR, POD_MONITOR = "ServiceMonitor:spec endpoints 0", "PodMonitor-frontends:spec podMetricsEndpoints 0"


def effect(path: str, value: Any, look: Look, seen: Any, given: Object | None = None) -> Effect:
    """Declare that only with `value` at `path`, beside the values `given`, the objects have `seen`."""
    return path, value, look, seen, given or {}


def names(objects: list[Object]) -> set[str]:
    return {each["metadata"]["name"] for each in objects}


def egress(port: int) -> Callable[[list[Object]], Any]:
    """Return a look at the rule for outgoing traffic to `port`."""
    return lambda objects: next(
        (
            each
            for each in of(objects, "NetworkPolicy")["spec"]["egress"]
            if any(one["port"] == port for one in each["ports"])
        ),
        None,
    )


EFFECTS = [
    effect(
        "global.compatibility.openshift.adaptSecurityContext",
        "force",
        lambda o: set(pod(o)["spec"]["securityContext"]),
        {"runAsNonRoot", "seccompProfile", "fsGroupChangePolicy"},
    ),
    effect(
        "nameOverride",
        "other",
        "Service:metadata labels app.kubernetes.io/name",
        "other",
        {"fullnameOverride": "resumed"},
    ),
    effect("fullnameOverride", "other", names, {"other"}),
    effect("namespaceOverride", "other", lambda o: {each["metadata"]["namespace"] for each in o}, {"other"}),
    effect("commonLabels", LABEL, lambda o: {each["metadata"]["labels"].get("a") for each in o}, {"b"}),
    effect(
        "commonAnnotations", LABEL, lambda o: {str(each["metadata"].get("annotations")) for each in o}, {str(LABEL)}
    ),
    effect("clusterDomain", "my.net", "Certificate:spec dnsNames 3", "resumed.resumed.svc.my.net", CERTIFIED),
    effect("image.repository", "reg/x", "container:image", f"reg/x:{project_version()}"),
    effect("image.tag", "9", "container:image", "resumed:9"),
    effect("image.digest", f"sha256:{'a' * 64}", "container:image", f"resumed@sha256:{'a' * 64}"),
    effect("image.pullPolicy", "Always", "container:imagePullPolicy", "Always"),
    effect("imagePullSecrets", [{"name": "x"}], "pod:spec imagePullSecrets", [{"name": "x"}]),
    effect("engine", "redis", lambda o: kinds(o) & {"StatefulSet", "Deployment"}, {"Deployment"}, ENGINE),
    effect("embedded.capacity", "100MiB", "env:RESUMED_CAPACITY", "100MiB"),
    effect(
        "persistence.enabled", False, "mount:/var/lib/resumed", {"name": "sessions", "emptyDir": {"sizeLimit": "2Gi"}}
    ),
    effect("persistence.size", "7Gi", f"{CLAIM} spec resources requests storage", "7Gi"),
    effect("persistence.storageClass", "fast", f"{CLAIM} spec storageClassName", "fast"),
    effect("persistence.accessModes", ["ReadWriteOnce"], f"{CLAIM} spec accessModes", ["ReadWriteOnce"]),
    effect(
        "persistence.existingClaim",
        "mine",
        "mount:/var/lib/resumed",
        {"name": "sessions", "persistentVolumeClaim": {"claimName": "mine"}},
    ),
    effect("persistence.labels", LABEL, f"{CLAIM} metadata labels", LABEL),
    effect("persistence.annotations", LABEL, f"{CLAIM} metadata annotations", LABEL),
    effect(
        "persistence.retentionPolicy.whenDeleted",
        "Delete",
        "StatefulSet:spec persistentVolumeClaimRetentionPolicy whenDeleted",
        "Delete",
    ),
    effect(
        "persistence.retentionPolicy.whenScaled",
        "Delete",
        "StatefulSet:spec persistentVolumeClaimRetentionPolicy whenScaled",
        "Delete",
    ),
    effect("redis.url", "rediss://a", "env:RESUMED_STORAGE", "rediss://a", REDIS),
    effect(
        "redis.secret",
        "pw",
        "mount:/etc/resumed/redis",
        {"name": "redis", "secret": {"secretName": "pw", "defaultMode": 0o440}},
        REDIS,
    ),
    effect("replicaCount", 7, "Deployment:spec replicas", 7, REDIS),
    effect("autoscaling.enabled", True, "has:HorizontalPodAutoscaler", True, REDIS),
    effect("autoscaling.minReplicas", 2, "HorizontalPodAutoscaler:spec minReplicas", 2, SCALED),
    effect("autoscaling.maxReplicas", 40, "HorizontalPodAutoscaler:spec maxReplicas", 40, SCALED),
    effect(
        "autoscaling.targetCPUUtilizationPercentage",
        55,
        "HorizontalPodAutoscaler:spec metrics 0 resource target averageUtilization",
        55,
        SCALED,
    ),
    effect(
        "autoscaling.metrics",
        [{"type": "Pods", "pods": {"metric": {"name": "a"}, "target": {"type": "AverageValue", "averageValue": "1"}}}],
        "HorizontalPodAutoscaler:spec metrics 1 type",
        "Pods",
        SCALED,
    ),
    effect(
        "autoscaling.behavior",
        {"scaleUp": {"stabilizationWindowSeconds": 1}},
        "HorizontalPodAutoscaler:spec behavior scaleUp",
        {"stabilizationWindowSeconds": 1},
        SCALED,
    ),
    effect("podDisruptionBudget.enabled", False, "has:PodDisruptionBudget", False, REDIS),
    effect("podDisruptionBudget.maxUnavailable", "30%", "PodDisruptionBudget:spec maxUnavailable", "30%", REDIS),
    effect("podDisruptionBudget.minAvailable", 2, "PodDisruptionBudget:spec minAvailable", 2, REDIS),
    effect("server.listen", "[::]", "env:RESUMED_HEALTH_LISTEN", "[::]:7401"),
    effect("server.maxTtl", "2h", "env:RESUMED_MAX_TTL", "2h"),
    effect("server.workers", 4, "env:RESUMED_WORKERS", "4"),
    effect("server.threads", 5, "env:RESUMED_THREADS", "5"),
    effect("server.maxConnectionAge", "5m", "env:RESUMED_MAX_CONNECTION_AGE", "5m"),
    effect("server.maxConnections", 1_000_000, "env:RESUMED_MAX_CONNECTIONS", "1000000"),
    effect("server.shutdownDelaySeconds", 45, "env:RESUMED_SHUTDOWN_DELAY", "45s"),
    effect("server.logLevel", "debug", "env:RESUMED_LOG_LEVEL", "debug"),
    effect("server.logFormat", "console", "env:RESUMED_LOG_FORMAT", "console"),
    effect("tls.enabled", False, "env:RESUMED_INSECURE", "true"),
    effect("tls.secret", "mine", lambda o: part(o, "mount:/etc/resumed/tls")["secret"]["secretName"], "mine"),
    effect("tls.clientCA.secret", "cas", "env:RESUMED_CLIENT_CA", "/etc/resumed/client-ca/ca.crt"),
    effect("tls.clientCA.configMap", "cas", "env:RESUMED_CLIENT_CA", "/etc/resumed/client-ca/ca.crt"),
    effect(
        "tls.clientCA.key",
        "bundle.pem",
        lambda o: part(o, "mount:/etc/resumed/client-ca")["configMap"]["items"],
        [{"key": "bundle.pem", "path": "ca.crt"}],
        {"tls": {"clientCA": {"configMap": "cas"}}},
    ),
    effect(
        "tls.certManager.enabled", True, "has:Certificate", True, {"tls": {"certManager": {"issuer": {"name": "ca"}}}}
    ),
    effect("tls.certManager.issuer.name", "other", "Certificate:spec issuerRef name", "other", CERTIFIED),
    effect("tls.certManager.issuer.kind", "AWSPCAIssuer", "Certificate:spec issuerRef kind", "AWSPCAIssuer", CERTIFIED),
    effect("tls.certManager.issuer.group", "a.example", "Certificate:spec issuerRef group", "a.example", CERTIFIED),
    effect("tls.certManager.duration", "1000h", "Certificate:spec duration", "1000h", CERTIFIED),
    effect("tls.certManager.renewBefore", "8h", "Certificate:spec renewBefore", "8h", CERTIFIED),
    effect("tls.certManager.dnsNames", ["a.example"], "Certificate:spec dnsNames 4", "a.example", CERTIFIED),
    effect("tls.certManager.ipAddresses", ["192.0.2.1"], "Certificate:spec ipAddresses", ["192.0.2.1"], CERTIFIED),
    effect("grants", "# none", "env:RESUMED_GRANTS", "/etc/resumed/grants/grants.toml"),
    effect("grantsCheck.enabled", False, "has:Job", False, GRANTED),
    effect("namespaceLimits.opsPerSecond", 2_000_000, "env:RESUMED_NAMESPACE_OPS_PER_SECOND", "2000000"),
    effect("namespaceLimits.sessions", 7, "env:RESUMED_NAMESPACE_SESSIONS", "7"),
    effect("namespaceLimits.bytes", "64MiB", "env:RESUMED_NAMESPACE_BYTES", "64MiB"),
    effect("namespaceLimits.watchers", 9, "env:RESUMED_NAMESPACE_WATCHERS", "9"),
    effect("metrics.enabled", False, "env:RESUMED_METRICS_LISTEN", None),
    effect("metrics.serviceMonitor.enabled", True, "has:ServiceMonitor", True),
    effect("metrics.serviceMonitor.namespace", "mon", "ServiceMonitor:metadata namespace", "mon", MONITORED),
    effect("metrics.serviceMonitor.interval", "5s", f"{SERVICE_MONITOR} interval", "5s", MONITORED),
    effect("metrics.serviceMonitor.scrapeTimeout", "5s", f"{SERVICE_MONITOR} scrapeTimeout", "5s", MONITORED),
    effect("metrics.serviceMonitor.labels", LABEL, "ServiceMonitor:metadata labels a", "b", MONITORED),
    effect("metrics.serviceMonitor.annotations", LABEL, "ServiceMonitor:metadata annotations", LABEL, MONITORED),
    effect("metrics.serviceMonitor.honorLabels", True, f"{SERVICE_MONITOR} honorLabels", True, MONITORED),
    effect(
        "metrics.serviceMonitor.relabelings", [RELABELING], f"{SERVICE_MONITOR} relabelings", [RELABELING], MONITORED
    ),
    effect(
        "metrics.serviceMonitor.metricRelabelings",
        [RELABELING],
        f"{SERVICE_MONITOR} metricRelabelings",
        [RELABELING],
        MONITORED,
    ),
    effect("metrics.podMonitor.enabled", True, "has:PodMonitor", True),
    effect("metrics.podMonitor.namespace", "mon", "PodMonitor-frontends:metadata namespace", "mon", MONITORED),
    effect(
        "metrics.podMonitor.namespaceSelector",
        {"any": False, "matchNames": ["shop"]},
        "PodMonitor-frontends:spec namespaceSelector matchNames",
        ["shop"],
        MONITORED,
    ),
    effect(
        "metrics.podMonitor.selector",
        {"matchLabels": LABEL},
        "PodMonitor-frontends:spec selector matchLabels a",
        "b",
        MONITORED,
    ),
    effect("metrics.podMonitor.port", "prom", f"{POD_MONITOR} port", "prom", MONITORED),
    effect("metrics.podMonitor.interval", "5s", f"{POD_MONITOR} interval", "5s", MONITORED),
    effect("metrics.podMonitor.scrapeTimeout", "5s", f"{POD_MONITOR} scrapeTimeout", "5s", MONITORED),
    effect("metrics.podMonitor.labels", LABEL, "PodMonitor-frontends:metadata labels a", "b", MONITORED),
    effect("metrics.podMonitor.annotations", LABEL, "PodMonitor-frontends:metadata annotations", LABEL, MONITORED),
    effect("metrics.podMonitor.honorLabels", True, f"{POD_MONITOR} honorLabels", True, MONITORED),
    effect("metrics.podMonitor.relabelings", [RELABELING], f"{POD_MONITOR} relabelings", [RELABELING], MONITORED),
    effect(
        "metrics.podMonitor.metricRelabelings",
        [RELABELING],
        f"{POD_MONITOR} metricRelabelings",
        [RELABELING],
        MONITORED,
    ),
    effect("metrics.prometheusRule.enabled", True, "has:PrometheusRule", True),
    effect("metrics.prometheusRule.namespace", "mon", "PrometheusRule:metadata namespace", "mon", MONITORED),
    effect("metrics.prometheusRule.labels", LABEL, "PrometheusRule:metadata labels a", "b", MONITORED),
    effect("metrics.prometheusRule.annotations", LABEL, "PrometheusRule:metadata annotations", LABEL, MONITORED),
    effect(
        "metrics.prometheusRule.additionalRuleLabels",
        {"team": "a"},
        lambda o: {rule["labels"].get("team") for rule in alerts(o)},
        {"a"},
        MONITORED,
    ),
    effect("grafanaDashboard.enabled", True, lambda o: "resumed-dashboards" in names(o), True),
    effect("grafanaDashboard.namespace", "mon", "ConfigMap-dashboards:metadata namespace", "mon", MONITORED),
    effect("grafanaDashboard.labels", LABEL, "ConfigMap-dashboards:metadata labels a", "b", MONITORED),
    effect("grafanaDashboard.annotations", LABEL, "ConfigMap-dashboards:metadata annotations", LABEL, MONITORED),
    effect("tracing.enabled", True, "env:RESUMED_OTEL", "true", {"networkPolicy": TRACED["networkPolicy"]}),
    effect("tracing.endpoint", "http://c:4317", "env:OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317", TRACED),
    effect("networkPolicy.enabled", False, "has:NetworkPolicy", False),
    effect("networkPolicy.frontends", [PEER], "NetworkPolicy:spec ingress 0 from", [PEER]),
    effect("networkPolicy.prometheus", [], "NetworkPolicy:spec ingress 1", None),
    effect("networkPolicy.dns.to", [PEER], lambda o: (egress(53)(o) or {}).get("to"), [PEER], REDIS),
    effect("networkPolicy.dns.ports", [5300], lambda o: len((egress(5300)(o) or {"ports": []})["ports"]), 2, REDIS),
    effect("networkPolicy.redis.to", [PEER], lambda o: (egress(6379)(o) or {}).get("to"), [PEER], REDIS),
    effect("networkPolicy.redis.ports", [7], egress(7), {"ports": [{"port": 6379}, {"port": 7}]}, REDIS),
    effect("networkPolicy.egress", [{"ports": [{"port": 9}]}], egress(9), {"ports": [{"port": 9}]}),
    effect(
        "service.type",
        "NodePort",
        lambda o: {each["spec"].get("type") for each in o if each["kind"] == "Service"},
        {None, "NodePort"},
    ),
    effect("service.annotations", LABEL, "Service:metadata annotations", LABEL),
    effect("service.labels", LABEL, "Service:metadata labels a", "b"),
    effect("service.ipFamilyPolicy", "SingleStack", "Service:spec ipFamilyPolicy", "SingleStack"),
    effect(
        "service.ipFamilies",
        ["IPv6"],
        "Service-external:spec ipFamilies",
        ["IPv6"],
        EXTERNAL | {"server": {"listen": "[::]"}},
    ),
    effect("service.external.annotations", LABEL, "Service-external:metadata annotations", LABEL, EXTERNAL),
    effect("service.external.port", 443, "Service-external:spec ports 0 port", 443, EXTERNAL),
    effect("service.external.nodePort", 30000, "Service-external:spec ports 0 nodePort", 30000, EXTERNAL),
    effect(
        "service.external.loadBalancerClass",
        "a.example/b",
        "Service-external:spec loadBalancerClass",
        "a.example/b",
        EXTERNAL,
    ),
    effect(
        "service.external.loadBalancerSourceRanges",
        ["192.0.2.0/24"],
        "Service-external:spec loadBalancerSourceRanges",
        ["192.0.2.0/24"],
        EXTERNAL,
    ),
    effect(
        "service.external.externalTrafficPolicy",
        "Cluster",
        "Service-external:spec externalTrafficPolicy",
        "Cluster",
        EXTERNAL,
    ),
    effect("serviceAccount.create", False, "pod:spec serviceAccountName", "default"),
    effect("serviceAccount.name", "mine", "pod:spec serviceAccountName", "mine"),
    effect("serviceAccount.annotations", LABEL, "ServiceAccount:metadata annotations", LABEL),
    effect("serviceAccount.labels", LABEL, "ServiceAccount:metadata labels a", "b"),
    effect("serviceAccount.automount", True, "pod:spec automountServiceAccountToken", True),
    effect("operator.enabled", True, "has:CronJob", True, CERTIFIED),
    effect(
        "operator.secret",
        "mine",
        "CronJob-stats:spec jobTemplate spec template spec volumes 0 secret secretName",
        "mine",
        OPERATED,
    ),
    effect("operator.identity", "spiffe://a/b", "Certificate-operator:spec uris", ["spiffe://a/b"], OPERATED),
    effect("operator.statsSchedule", "0 * * * *", "CronJob-stats:spec suspend", False, OPERATED),
    effect(
        "operator.resources",
        {"limits": {"cpu": 2}},
        "CronJob-purge:spec jobTemplate spec template spec containers 0 resources limits cpu",
        2,
        OPERATED,
    ),
    effect("resources", {"limits": {"cpu": 2}}, "container:resources limits cpu", 2),
    effect("podSecurityContext", {"fsGroup": 7}, "pod:spec securityContext fsGroup", 7),
    effect("securityContext", {"runAsUser": 7}, "container:securityContext runAsUser", 7),
    effect("readinessProbe", {"periodSeconds": 7}, "container:readinessProbe periodSeconds", 7),
    effect("livenessProbe", {"exec": {"command": ["a"]}}, "container:livenessProbe grpc", None),
    effect("startupProbe", {"failureThreshold": 7}, "container:startupProbe failureThreshold", 7),
    effect("strategy", {"type": "Recreate"}, "Deployment:spec strategy", {"type": "Recreate"}, REDIS),
    effect("minReadySeconds", 7, "Deployment:spec minReadySeconds", 7, REDIS),
    effect("revisionHistoryLimit", 7, "StatefulSet:spec revisionHistoryLimit", 7),
    effect("topologySpreadConstraints", [], "pod:spec topologySpreadConstraints", None, REDIS),
    effect("nodeSelector", LABEL, "pod:spec nodeSelector a", "b"),
    effect("tolerations", [{"key": "a"}], "pod:spec tolerations", [{"key": "a"}]),
    effect("affinity", {"podAffinity": {}}, "pod:spec affinity", {"podAffinity": {}}),
    effect("priorityClassName", "high", "pod:spec priorityClassName", "high"),
    effect("schedulerName", "mine", "pod:spec schedulerName", "mine"),
    effect("runtimeClassName", "gvisor", "pod:spec runtimeClassName", "gvisor"),
    effect("dnsPolicy", "Default", "pod:spec dnsPolicy", "Default"),
    effect("dnsConfig", {"searches": ["a"]}, "pod:spec dnsConfig", {"searches": ["a"]}),
    effect("hostAliases", [{"ip": "192.0.2.1", "hostnames": ["a"]}], "pod:spec hostAliases 0 ip", "192.0.2.1"),
    effect("podAnnotations", LABEL, "pod:metadata annotations", LABEL),
    effect("podLabels", LABEL, "pod:metadata labels a", "b"),
    effect("extraEnv", [{"name": "GRPC_VERBOSITY", "value": "NONE"}], "env:GRPC_VERBOSITY", "NONE"),
    effect("extraEnvFrom", [{"secretRef": {"name": "a"}}], "container:envFrom 0 secretRef name", "a"),
    effect("extraArgs", ["--otel"], "container:args", ["serve", "--otel"]),
    effect("extraVolumes", [{"name": "a", "emptyDir": {}}], lambda o: pod(o)["spec"]["volumes"][-1]["name"], "a"),
    effect(
        "extraVolumeMounts",
        [{"name": "a", "mountPath": "/a"}],
        "mount:/a",
        {"name": "a", "emptyDir": {}},
        {"extraVolumes": [{"name": "a", "emptyDir": {}}]},
    ),
    effect("extraContainers", [{"name": "a", "image": "b"}], "pod:spec containers 1 name", "a"),
    effect("extraInitContainers", [{"name": "a", "image": "b"}], "pod:spec initContainers 0 name", "a"),
    effect(
        "extraObjects",
        [{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "{{ .Release.Name }}-a"}}],
        lambda o: "resumed-a" in names(o),
        True,
    ),
]

USUAL = """
    affinity annotations args autoscaling.enabled autoscaling.maxReplicas autoscaling.metrics
    autoscaling.minReplicas autoscaling.behavior autoscaling.targetCPUUtilizationPercentage
    autoscaling.targetMemoryUtilizationPercentage command commonAnnotations commonLabels containerSecurityContext
    deploymentStrategy dnsConfig dnsPolicy env envFrom existingClaim extraArgs extraContainers extraDeploy extraEnv
    extraEnvFrom extraEnvVars extraEnvVarsCM extraEnvVarsSecret extraInitContainers extraManifests extraObjects
    extraVolumeMounts extraVolumes fullnameOverride grafanaDashboard.annotations grafanaDashboard.enabled
    grafanaDashboard.extraLabels grafanaDashboard.sidecarLabel hostAliases image.digest image.pullPolicy
    image.registry image.repository image.tag imagePullSecrets ingress initContainers labels lifecycle livenessProbe
    logFormat logLevel metrics.enabled metrics.serviceMonitor.additionalLabels metrics.serviceMonitor.enabled
    metrics.serviceMonitor.honorLabels metrics.serviceMonitor.interval metrics.serviceMonitor.labels
    metrics.serviceMonitor.metricRelabelings metrics.serviceMonitor.namespace metrics.serviceMonitor.relabelings
    metrics.serviceMonitor.scrapeTimeout minReadySeconds nameOverride namespaceOverride networkPolicy.allowExternal
    networkPolicy.egress networkPolicy.enabled networkPolicy.extraEgress networkPolicy.extraIngress nodeSelector
    otel persistence.accessMode persistence.accessModes persistence.annotations persistence.enabled
    persistence.existingClaim persistence.labels persistence.size persistence.storageClass
    persistence.storageClassName pdb podAnnotations podDisruptionBudget.enabled podDisruptionBudget.maxUnavailable
    podDisruptionBudget.minAvailable podLabels podMonitor podSecurityContext priorityClassName prometheusRule
    readinessProbe replicaCount replicas resources revisionHistoryLimit runtimeClassName schedulerName
    securityContext service.annotations service.clusterIP service.externalTrafficPolicy service.ipFamilies
    service.ipFamilyPolicy service.labels service.loadBalancerClass service.loadBalancerIP
    service.loadBalancerSourceRanges service.nodePort service.port service.type serviceAccount.annotations
    serviceAccount.automount serviceAccount.automountServiceAccountToken serviceAccount.create serviceAccount.labels
    serviceAccount.name serviceAccountName serviceMonitor sidecars startupProbe strategy telemetry
    terminationGracePeriodSeconds tls.certManager.dnsNames tls.certManager.ipAddresses tls.certManager.issuer.group
    tls.existingSecret tolerations topologySpreadConstraints updateStrategy volumeMounts volumes
""".split()  # noqa: SIM905 - one a line would be a page of its own
"""Values of the charts of cert-manager, external-secrets, OpenFGA, Valkey and Bitnami, and of `helm create`."""

REFUSED = [
    ({"autoscaling": {"enabled": True}}, "autoscaling.enabled: the embedded engine is one pod"),
    ({"redis": {"url": "redis://a"}}, "redis.url: the embedded engine does not use it"),
    ({"redis": {"secret": "a"}}, "redis.secret: the embedded engine does not use it"),
    ({"engine": "redis"}, "redis.url: engine=redis needs it"),
    (REDIS | {"redis": {"url": "redis://u:secret@a"}}, "redis.url: it contains a password"),
    (REDIS | {"redis": {"url": "redis://:secret@a"}}, "redis.url: it contains a password"),
    (REDIS | {"redis": {"url": "redis+sentinel://a"}}, "redis.url: Sentinels need the name of the primary"),
    (REDIS | {"redis": {"url": "redis://a?password_file=/etc/resumed/redis/p"}}, "redis.secret: redis.url has files"),
    ({"embedded": {"capacity": "0.5MiB"}}, "embedded.capacity: the server allows 1MiB to 16TiB"),
    ({"namespaceLimits": {"bytes": "17TiB"}}, "namespaceLimits.bytes: the server allows up to 16TiB"),
    ({"embedded": {"capacity": "10GiB"}}, "persistence.size: less than half as much again"),
    ({"persistence": {"size": "1"}}, "persistence.size: less than half as much again"),
    (REDIS | {"persistence": {"existingClaim": "a"}}, "persistence.existingClaim: nothing would use it"),
    ({"server": {"maxTtl": "30d"}}, "server.maxTtl: the server allows 1s to 7d"),
    ({"server": {"maxConnectionAge": "0s"}}, "server.maxConnectionAge: the server allows 1s to 24h"),
    (SCALED | {"autoscaling": {"enabled": True, "minReplicas": 20}}, "autoscaling.minReplicas: more than"),
    (SCALED | {"resources": {"requests": {"cpu": None}}}, "autoscaling.targetCPUUtilizationPercentage: a share of"),
    (
        SCALED | {"autoscaling": {"enabled": True, "targetCPUUtilizationPercentage": 0}},
        "autoscaling.metrics: no metric to scale by",
    ),
    (
        REDIS | {"podDisruptionBudget": {"minAvailable": 3}},
        "podDisruptionBudget.minAvailable: as many as there are pods",
    ),
    (REDIS | {"strategy": {"rollingUpdate": {"maxSurge": 0}}}, "strategy.rollingUpdate: maxSurge and maxUnavailable"),
    ({"grants": "#", "tls": {"enabled": False}}, "grants: without TLS the server cannot identify clients"),
    ({"grants": "not toml"}, "grants: no [[grant]] and no [[limit]] in it"),
    (
        {"tls": {"enabled": False, "certManager": {"enabled": True}}},
        "tls.certManager.enabled: a certificate without TLS",
    ),
    ({"tls": {"certManager": {"enabled": True}}}, "tls.certManager.issuer.name: name the issuer"),
    (
        {"tls": {"certManager": {"duration": "30m", "renewBefore": "10m"}}},
        "tls.certManager.duration: cert-manager allows",
    ),
    ({"tls": {"certManager": {"duration": "1h"}}}, "tls.certManager.renewBefore: cert-manager allows"),
    ({"tls": {"clientCA": {"secret": "a", "configMap": "b"}}}, "tls.clientCA: either secret or configMap"),
    ({"operator": {"enabled": True}}, "operator.secret: name the Secret"),
    (
        {"metrics": {"enabled": False, "serviceMonitor": {"enabled": True}}},
        "metrics.serviceMonitor.enabled: there are no",
    ),
    (
        {"metrics": {"enabled": False, "prometheusRule": {"enabled": True}}},
        "metrics.prometheusRule.enabled: there are no",
    ),
    ({"metrics": {"serviceMonitor": {"scrapeTimeout": "1m"}}}, "metrics.serviceMonitor.scrapeTimeout: longer than"),
    ({"metrics": {"podMonitor": {"scrapeTimeout": "1m"}}}, "metrics.podMonitor.scrapeTimeout: longer than"),
    ({"tracing": {"enabled": True}}, "networkPolicy.egress: tracing.enabled needs a rule"),
    ({"networkPolicy": {"frontends": []}}, "networkPolicy.frontends: an empty list would admit every client"),
    ({"service": {"ipFamilyPolicy": "PreferDualStack"}}, "server.listen: the Service has IPv6 addresses"),
    ({"extraEnv": [{"name": "RESUMED_THREADS", "value": "1"}]}, "extraEnv: RESUMED_THREADS is set by another value"),
]

MISSPELT = [
    ({"engin": "redis"}, "at '': additional properties 'engin' not allowed"),
    ({"server": {"drain": 5}}, "at '/server': additional properties 'drain' not allowed"),
    ({"resources": {"limit": {"cpu": 1}}}, "at '/resources': additional properties 'limit' not allowed"),
    ({"tolerations": [{"kye": "a"}]}, "at '/tolerations/0': additional properties 'kye' not allowed"),
    ({"networkPolicy": {"frontends": [{"pods": {}}]}}, "at '/networkPolicy/frontends/0': additional properties 'pods'"),
    ({"readinessProbe": {"period": 1}}, "at '/readinessProbe': additional properties 'period' not allowed"),
    ({"extraEnv": [{"name": "A", "value": 1}]}, "at '/extraEnv/0/value': got number, want string"),
    ({"embedded": {"capacity": "1GB"}}, "at '/embedded/capacity'"),
    ({"server": {"maxTtl": "90"}}, "at '/server/maxTtl'"),
    ({"server": {"workers": 0}}, "at '/server/workers'"),
    ({"namespaceLimits": {"bytes": "64"}}, "at '/namespaceLimits/bytes'"),
    ({"persistence": {"accessModes": ["ReadWriteMany"]}}, "at '/persistence/accessModes/0'"),
]


def test_every_value_is_described_and_has_its_effect_tested() -> None:
    described = dict(leaves(json.loads((CHART / "values.schema.json").read_text())))
    assert described.pop("enabled")["description"].startswith("For the `condition` of an umbrella chart")
    assert [path for path, *_ in EFFECTS] == list(described) == list(present(default_values(), described))


@pytest.fixture(scope="module")
def renderings() -> dict[str, list[Object]]:
    """The objects by the values that render them: those of all effects, and those beside them."""
    values = {}
    for path, value, _, _, given in EFFECTS:
        values[str(given)] = {} if path == "engine" else given
        values[path] = copy.deepcopy(given)
        put(values[path], path, value)
    return dict(zip(values, rendered_together(list(values.values())), strict=True))


@pytest.mark.parametrize(
    ("path", "look", "seen", "given"), [(path, *rest) for path, _, *rest in EFFECTS], ids=[path for path, *_ in EFFECTS]
)
def test_value(path: str, look: Look, seen: Any, given: Object, renderings: dict[str, list[Object]]) -> None:
    before, after = (
        part(objects, look) if isinstance(look, str) else look(objects)
        for objects in (renderings[str(given)], renderings[path])
    )
    assert after == seen
    assert before != seen
    assert [problem for each in renderings[path] for problem in problems(each, VERSIONS[0])] == []


def test_a_value_of_another_type_is_refused() -> None:
    values: Object = {}
    for path, *_ in EFFECTS:
        put(values, path, [[]])
    with pytest.raises(Refused) as refusal:
        rendered(values)
    assert [path for path, *_ in EFFECTS if f"at '/{path.replace('.', '/')}" not in str(refusal.value)] == []


@pytest.mark.parametrize(("values", "message"), MISSPELT, ids=[message.split("'")[1] for _, message in MISSPELT])
def test_a_misspelt_or_impossible_value_is_refused(values: Object, message: str) -> None:
    with pytest.raises(Refused, match=re.escape(message)):
        rendered(values)


def test_the_usual_values_of_charts_are_accepted_or_answered_with_the_name_of_ours() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    others = set(others_names(schema))
    accepted = {path for path, _ in leaves(schema)}
    assert [name for name in USUAL if name not in accepted | others] == []
    values: Object = {}
    for name in sorted(others):
        put(values, name, 1)
    with pytest.raises(Refused) as refusal:
        rendered(values)
    answers = dict(re.findall(r"^([\w.]+): use ([\w.]+)", str(refusal.value), re.MULTILINE))
    assert set(answers) == others
    groups = {".".join(path.split(".")[:depth]) for path in accepted for depth in range(1, 5)}
    assert {name: ours for name, ours in answers.items() if ours not in groups} == {}


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message.partition(":")[0] for _, message in REFUSED])
def test_contradiction_is_refused(values: Object, message: str) -> None:
    with pytest.raises(Refused, match=f"\n{re.escape(message)}"):
        rendered(values)


def test_every_refusal_of_the_chart_is_tested() -> None:
    written = (CHART / "templates/refused.yaml").read_text()
    messages = re.findall(r'^    "((?:[^"\\]|\\.)+)"\)$', written, re.MULTILINE)
    assert len(messages) == written.count("\n  (list (")
    tested = [message for _, message in REFUSED]
    assert [message for message in messages if not any(message.startswith(each) for each in tested)] == []


def test_all_contradictions_are_reported_at_once() -> None:
    with pytest.raises(Refused, match=r"(?s)autoscaling.enabled: .*redis.url: .*redis.secret: "):
        rendered({"autoscaling": {"enabled": True}, "redis": {"url": "redis://a", "secret": "b"}})


LEFT_OUT = {
    "transport": "the native one has no TLS, and is not in the image",
    "core_dumps": "a dump contains secrets, and a pod has no place to keep it",
}
"""Settings of the server without a value of the chart, and the reasons."""


def test_every_setting_of_the_server_is_the_charts_or_left_out_for_a_reason() -> None:
    given = {
        name.removeprefix("RESUMED_").lower()
        for values in ({}, EVERYTHING, {"tls": {"enabled": False}})
        for name in env(rendered(values))
        if name.startswith("RESUMED_")
    }
    settings = {field.name for field in dataclasses.fields(Settings)}
    assert given == settings - set(LEFT_OUT)
    assert set(LEFT_OUT) <= settings


@pytest.mark.parametrize("values", [{}, REDIS | {"grants": "[[grant]]\n"}, {"tls": {"enabled": False}}])
def test_the_server_accepts_its_settings(values: Object, tmp_path: Path) -> None:
    authority = Authority()
    for directory in ("tls", "grants"):
        (tmp_path / directory).mkdir()
    Files(tmp_path / "tls").write(authority.server(), client_ca=authority.pem)
    (tmp_path / "grants/grants.toml").write_text("")
    settings = {name: text.replace("/etc/resumed", str(tmp_path)) for name, text in env(rendered(values)).items()}
    done = subprocess.run(
        [sys.executable, "-m", "resumed_server", "serve", "--check"],
        env={"COLUMNS": "200", "PYTHONPATH": os.environ.get("PYTHONPATH", "")} | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{settings['RESUMED_SHUTDOWN_DELAY']}" in done.stdout


def test_the_charts_grants_are_those_of_the_file_and_of_the_operator(tmp_path: Path) -> None:
    grants = '[[grant]]\nidentity = "dns:shop"\nnamespaces = ["shop"]\noperations = ["put", "get"]\n'
    objects = rendered(OPERATED | {"grants": grants})
    (identity,) = part(objects, "Certificate-operator:spec uris")
    file = tmp_path / "grants.toml"
    file.write_text(part(objects, "ConfigMap:data grants.toml"))
    assert part(objects, "ConfigMap-grants:data grants.toml") == file.read_text()
    for question, allowed in {
        ("dns:shop", "shop", "put"): True,
        ("dns:shop", "shop", "purge"): False,
        (identity, "shop", "purge"): True,
        (identity, "shop", "get"): False,
        (identity, "resumed-check", "take"): True,
    }.items():
        asked = [
            text for pair in zip(("--identity", "--namespace", "--operation"), question, strict=True) for text in pair
        ]
        command = [
            sys.executable,
            "-m",
            "resumed_server",
            *part(objects, "Job-grants:spec template spec containers 0 args"),
        ]
        command[-1] = str(file)
        assert subprocess.run([*command, *asked], capture_output=True, check=False).returncode == int(not allowed), (
            question
        )


@pytest.mark.parametrize("drain", [0, 20, 3600])
def test_a_pod_has_longer_than_its_drain(drain: int) -> None:
    """The drain, 10 s for the calls in flight, and a margin."""
    objects = rendered({"server": {"shutdownDelaySeconds": drain}})
    assert pod(objects)["spec"]["terminationGracePeriodSeconds"] >= drain + 12


def test_the_embedded_engine_is_one_pod() -> None:
    objects = rendered({"replicaCount": 3})
    assert of(objects, "StatefulSet")["spec"]["replicas"] == 1
    assert not {"PodDisruptionBudget", "HorizontalPodAutoscaler", "Deployment"} & kinds(objects)


def test_sessions_in_an_emptydir_count_as_ephemeral_storage() -> None:
    """Otherwise the kubelet evicts a pod whose store fills up."""
    assert container(rendered({}))["resources"]["limits"]["ephemeral-storage"] == "128Mi"
    resources = container(rendered({"persistence": {"enabled": False}}))["resources"]
    assert resources["requests"]["ephemeral-storage"] == resources["limits"]["ephemeral-storage"] == f"{2048 + 128}Mi"


def test_an_autoscaler_has_the_replicas_to_itself() -> None:
    """Otherwise each upgrade would reset their number."""
    assert "replicas" not in of(rendered(SCALED), "Deployment")["spec"]


def test_labels_cannot_take_a_pod_from_its_service() -> None:
    """The labels of the selector take precedence."""
    labels = {"app.kubernetes.io/name": "other", "app.kubernetes.io/component": "other"}
    objects = rendered({"podLabels": labels, "commonLabels": labels})
    assert of(objects, "Service")["spec"]["selector"].items() <= pod(objects)["metadata"]["labels"].items()


def test_the_pods_of_operators_belong_to_no_service_of_the_store() -> None:
    objects = rendered(OPERATED)
    labels = part(objects, "CronJob-purge:spec jobTemplate spec template metadata labels")
    assert not of(objects, "Service")["spec"]["selector"].items() <= labels.items()
    (peer,) = of(objects, "NetworkPolicy")["spec"]["ingress"][0]["from"][1:]
    assert peer["podSelector"]["matchLabels"].items() <= labels.items()


def test_on_openshift_no_pod_chooses_its_user() -> None:
    for objects in (
        rendered(EVERYTHING, "--api-versions", "security.openshift.io/v1"),
        rendered(EVERYTHING | {"global": {"compatibility": {"openshift": {"adaptSecurityContext": "force"}}}}),
    ):
        chosen = [context for spec in pods(objects).values() for context in (spec["securityContext"], *contexts(spec))]
        assert not any({"runAsUser", "runAsGroup", "fsGroup"} & set(context) for context in chosen)
    disabled = {"global": {"compatibility": {"openshift": {"adaptSecurityContext": "disabled"}}}}
    assert pod(rendered(disabled, "--api-versions", "security.openshift.io/v1"))["spec"]["securityContext"]["runAsUser"]


@pytest.mark.parametrize(
    ("url", "ports"),
    [
        ("redis://a", [6379]),
        ("rediss://user@a:6380/1", [6380]),
        ("redis+cluster://a:7000,b:7001,c", [7000, 7001, 6379]),
        ("redis+sentinel://[2001:db8::1],b:26380/main", [26379, 26380, 6379]),
    ],
)
def test_the_network_policy_admits_the_ports_of_the_url(url: str, ports: list[int]) -> None:
    objects = rendered(REDIS | {"redis": {"url": url}})
    assert egress(ports[0])(objects) == {"ports": [{"port": port} for port in ports]}


def alerts(objects: list[Object]) -> list[Object]:
    groups = of(objects, "PrometheusRule")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def contexts(spec: Any) -> list[Any]:
    return [each["securityContext"] for each in spec["containers"]]


def default_values() -> Object:
    """Return the chart's values."""
    values: Object = yaml.safe_load((CHART / "values.yaml").read_text())
    return values


def leaves(schema: Object, prefix: str = "") -> Iterator[tuple[str, Object]]:
    """Yield the path and the schema of each value."""
    for name, described in schema["properties"].items():
        if described is True:
            continue
        if "properties" in described:
            yield from leaves(described, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", described


def others_names(schema: Object, prefix: str = "") -> Iterator[str]:
    """Yield the paths that are names of other charts."""
    for name, described in schema["properties"].items():
        if described is True:
            yield f"{prefix}{name}"
        elif "properties" in described:
            yield from others_names(described, f"{prefix}{name}.")


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
