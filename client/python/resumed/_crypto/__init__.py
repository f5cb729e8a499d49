"""Encryption of session values and ids; keyring files."""
