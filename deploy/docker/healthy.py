"""The HEALTHCHECK of the image: exit status 0 if the server of this container answers calls."""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

address = os.environ["RESUMED_HEALTH_LISTEN"].split()[0]
with grpc.insecure_channel(address) as channel:
    try:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=4)
    except grpc.RpcError as error:
        sys.exit(f"{address}: {error.code().name}: {error.details()}")
sys.exit(health.status != health_pb2.HealthCheckResponse.SERVING)
