"""Values of the chart, by the feature that they enable."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.kubernetes import Object

REDIS: Object = {"engine": "redis", "redis": {"url": "redis://valkey:6379"}}
SCALED: Object = REDIS | {"autoscaling": {"enabled": True}}
CERTIFIED: Object = {"tls": {"certManager": {"enabled": True, "issuer": {"name": "ca"}}}}
OPERATED: Object = CERTIFIED | {"operator": {"enabled": True}}
MONITORED: Object = {
    "metrics": {name: {"enabled": True} for name in ("serviceMonitor", "podMonitor", "prometheusRule")},
    "grafanaDashboard": {"enabled": True},
}
EXTERNAL: Object = {"service": {"type": "LoadBalancer"}}
TRACED: Object = {"tracing": {"enabled": True}, "networkPolicy": {"egress": [{"ports": [{"port": 4317}]}]}}
GRANTED: Object = {"grants": "[[grant]]\n"}
EVERYTHING: Object = (
    SCALED | OPERATED | MONITORED | EXTERNAL | TRACED | GRANTED | {"imagePullSecrets": [{"name": "pull"}]}
)
PLAINTEXT: Object = {"tls": {"enabled": False}, "persistence": {"enabled": False}}
