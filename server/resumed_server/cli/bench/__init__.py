"""`resumed bench`: load from returning TLS clients."""
