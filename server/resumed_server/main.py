"""Start-up of `resumed serve`: logs, signals, listen addresses, then one worker or a supervisor with several."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import tempfile
from typing import TYPE_CHECKING

import structlog

from resumed_server.lifecycle import supervisor
from resumed_server.lifecycle.listeners import reserve_addresses
from resumed_server.lifecycle.shutdown import GRACE_SECONDS
from resumed_server.lifecycle.worker import ListenAddresses, Worker, open_storage
from resumed_server.limits.enforcer import SharedCounters
from resumed_server.observability import logging, native_log
from resumed_server.storage.registry import shared_url

if TYPE_CHECKING:
    from resumed_server.config.settings import Settings
    from resumed_server.observability.metrics.shared_segment import MetricsSegment

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status: 1 if the server should be started again.

    Raises:
        UserError: An address or the storage cannot be used.
    """
    native_log.detach_stderr()
    logging.configure(settings.log_format, settings.log_level)
    os.umask(0o077)  # only this user may access the database and unix sockets
    signal.pthread_sigmask(signal.SIG_BLOCK, supervisor.STOP_SIGNALS)  # for sigtimedwait(); threads inherit the mask
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # files are reloaded without a signal
    log.info("starting", **settings.as_text())
    counters = SharedCounters.create()  # before the fork: all workers share them
    with contextlib.ExitStack() as stack:
        addresses = ListenAddresses(
            stack.enter_context(reserve_addresses(settings.listen)),
            stack.enter_context(reserve_addresses(settings.health_listen, "--health-listen")),
            stack.enter_context(reserve_addresses(settings.metrics_listen, "--metrics-listen")),
        )
        segment = _metrics_segment(settings.workers) if addresses.metrics else None
        if settings.workers == 1:
            return Worker(settings, addresses, counters, segment).run()
        storage = shared_url(
            settings.storage, lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="resumed-"))
        )
        settings = dataclasses.replace(settings, storage=storage)
        # An error of the storage is reported once, not by every worker.
        open_storage(settings).close()
        parent = os.getpid()
        return supervisor.run(
            settings.workers,
            lambda number: Worker(settings, addresses, counters, segment, number=number, supervisor=parent).run(),
            timeout=settings.shutdown_delay + 2 * GRACE_SECONDS,
        )


def _metrics_segment(workers: int) -> MetricsSegment:
    from resumed_server.observability.metrics.shared_segment import MetricsSegment  # noqa: PLC0415 - only with metrics

    return MetricsSegment(workers)
