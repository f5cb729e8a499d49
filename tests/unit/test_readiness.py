"""Health follows the engine, and the log tells each change once."""

from __future__ import annotations

from typing import cast

from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from structlog.testing import capture_logs

from resumed_server.engines.base import Engine, EngineBroken, EngineUnavailable
from resumed_server.readiness import LIVENESS, Readiness
from resumed_server.service import SERVICE_NAME


class Moody:
    """An engine that answers probes as it is told."""

    error: Exception | None = None

    def probe(self) -> None:
        """Raise what it was told to."""
        if self.error:
            raise self.error


def test_health_follows_the_engine_and_each_change_is_one_log_line() -> None:
    """Not serving before the first answer; any failure of the engine counts, also one that it did not foresee."""
    health, moody = HealthServicer(), Moody()
    engine = cast("Engine", moody)
    readiness = Readiness(health)

    def statuses() -> set[int]:
        return {health.Check(HealthCheckRequest(service=name), None).status for name in ("", SERVICE_NAME)}

    assert statuses() == {HealthCheckResponse.NOT_SERVING}
    with capture_logs() as logged:
        for error in (None, None, EngineUnavailable("gone"), EngineUnavailable("gone"), KeyError("secret"), None):
            moody.error = error
            assert readiness.follow(engine)
            assert statuses() == {HealthCheckResponse.NOT_SERVING if error else HealthCheckResponse.SERVING}
    assert [line["event"] for line in logged] == ["ready", "not ready", "ready"]
    assert logged[1]["cause"] == "gone"


def test_of_a_broken_engine_nothing_is_hoped_for() -> None:
    """So that the process can end, and another one begin anew."""
    moody = Moody()
    moody.error = EngineBroken("damaged")
    assert not Readiness(HealthServicer()).follow(cast("Engine", moody))


def test_a_server_lives_whatever_its_engine_does() -> None:
    """So that nobody restarts it for a storage that is down."""
    health, moody = HealthServicer(), Moody()
    readiness = Readiness(health)
    for error in (EngineUnavailable("gone"), None):
        moody.error = error
        assert health.Check(HealthCheckRequest(service=LIVENESS), None).status == HealthCheckResponse.SERVING
        assert readiness.follow(cast("Engine", moody))
