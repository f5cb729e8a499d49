"""`resumed check` and `resumed doctor`."""
