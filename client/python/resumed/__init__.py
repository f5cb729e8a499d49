"""resumed: share TLS sessions between all frontends of a fleet.

install() puts the store under a server's TLS context; that is all that most frontends need:

    import resumed

    resumed.install(context, target="dns:///store:7400", namespace="shop", keyring="fleet.keys")
"""

from resumed.admin import Admin, NamespaceStats
from resumed.credentials import Credentials
from resumed.dumps import forbid_core_dumps
from resumed.errors import (
    AlreadyExists,
    CredentialsError,
    InvalidCall,
    KeyringError,
    LimitExceeded,
    ResumedError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
    Unsealable,
    UnsupportedContext,
)
from resumed.installation import Installation, install
from resumed.sealing import Keyring, StoreKeys
from resumed.stats import Stats
from resumed.store import Get, Put, Remove, SessionStore, StoredSession, Take

__all__ = [
    "Admin",
    "AlreadyExists",
    "Credentials",
    "CredentialsError",
    "Get",
    "Installation",
    "InvalidCall",
    "Keyring",
    "KeyringError",
    "LimitExceeded",
    "NamespaceStats",
    "Put",
    "Remove",
    "ResumedError",
    "SessionStore",
    "Stats",
    "StoreError",
    "StoreKeys",
    "StoreTimeout",
    "StoreUnavailable",
    "StoredSession",
    "Take",
    "Unsealable",
    "UnsupportedContext",
    "forbid_core_dumps",
    "install",
]
