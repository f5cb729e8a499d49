"""`resumed keygen` and `resumed keyring`."""
