"""Writes the JSON schemas of custom resources from the models of their projects, which take long to load.

python tests/deploy/custom_resources.py FILE      (make deploy-tools)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cloudcoil.models.cert_manager import v1 as cert_manager
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator

MODELS = {
    "cert-manager.io/v1": (cert_manager.Certificate, cert_manager.ClusterIssuer, cert_manager.Issuer),
    "monitoring.coreos.com/v1": (
        prometheus_operator.PodMonitor,
        prometheus_operator.PrometheusRule,
        prometheus_operator.ServiceMonitor,
    ),
}

if __name__ == "__main__":
    schemas = {
        f"{api_version}/{model.__name__}": model.model_json_schema(by_alias=True)
        for api_version, models in MODELS.items()
        for model in models
    }
    Path(sys.argv[1]).write_text(json.dumps(schemas))
