"""Metrics of the server for Prometheus: calls, operations, storage, watchers and workers. All names begin `resumed_`.

Each process counts for itself (recorder.py, instrumented_engine.py) and publishes its figures in memory that all
workers share (worker.py, shared_segment.py). Any worker serves the figures of all of them (http_endpoint.py,
collector.py).
"""
