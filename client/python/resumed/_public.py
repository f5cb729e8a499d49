"""The public names of `resumed`, which imports this module when the first of them is used."""

from resumed._client.admin import Admin, NamespaceStats
from resumed._client.store import Get, Put, Remove, StoreClient, StoredSession, Take
from resumed._crypto.keyring import Keyring
from resumed._crypto.store_key import StoreKeys
from resumed._exceptions import (
    AlreadyExists,
    CredentialsError,
    InvalidRequest,
    KeyringError,
    LimitExceeded,
    ResumedError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
    UnsealError,
    UnsupportedContext,
)
from resumed._install import Installation, install
from resumed._policy.stats import Stats
from resumed._process.hardening import forbid_core_dumps
from resumed._transport.tls import Credentials

__all__ = [
    "Admin",
    "AlreadyExists",
    "Credentials",
    "CredentialsError",
    "Get",
    "Installation",
    "InvalidRequest",
    "Keyring",
    "KeyringError",
    "LimitExceeded",
    "NamespaceStats",
    "Put",
    "Remove",
    "ResumedError",
    "Stats",
    "StoreClient",
    "StoreError",
    "StoreKeys",
    "StoreTimeout",
    "StoreUnavailable",
    "StoredSession",
    "Take",
    "UnsealError",
    "UnsupportedContext",
    "forbid_core_dumps",
    "install",
]
