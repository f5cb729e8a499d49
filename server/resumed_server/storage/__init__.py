"""Storage engines: where sessions are kept."""
