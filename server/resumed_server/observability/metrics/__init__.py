"""Metrics of the server, for Prometheus: what it did, how it is, and what its store holds. All names begin `resumed_`.

Each process counts for itself (recorder.py, engine.py) and keeps what it counted pinned to a board that all workers
share (process.py, board.py). Whichever worker is asked reads the whole board (endpoint.py, collector.py).
"""
