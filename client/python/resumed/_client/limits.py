"""Limits of the contract `resumed.v1` that this client keeps to (protos/vectors/limits.json)."""

NAMESPACE_PATTERN = r"[a-z0-9.-]{1,63}"
BATCH_OPERATIONS = 256
"""Operations that one Batch call carries; longer sequences are sent as several calls."""
BATCH_VALUE_BYTES = 16 << 20
"""Bytes of values that one Batch call carries: with keys and framing it stays below the limit of a request."""
