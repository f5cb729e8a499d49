"""Removes the lineage of a ticket as another frontend of the fleet would, with the fleet's keyring."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC

from resumed._client.store import Remove
from resumed._crypto.derivation import derive
from resumed._crypto.store_key import StoreKeys
from resumed._crypto.ticket_state import TicketState
from resumed._policy.ticket_secrets import TicketSecrets

if TYPE_CHECKING:
    import resumed
    from resumed._crypto.ticket_secret import TicketSecret

_MARK, _STATE_BYTES = b"resumed\x03", 88
_NAME_BYTES, _HEAD_BYTES, _MAC_BYTES = 16, 32, 32


def remove_lineage(store: resumed.StoreClient, keyring: resumed.Keyring, ticket: bytes, *, openssl: bool) -> None:
    """Remove the lineage of a ticket of OpenSSL's form, or of that of Go and rustls."""
    secrets = TicketSecrets(store, keyring)
    secrets.step()
    secret = secrets.named(ticket[:_NAME_BYTES], time.time())
    assert secret, "the ticket is none of the fleet's"
    state = _state_in(_decrypt_openssl(secret, ticket) if openssl else _decrypt_aead(secret, ticket))
    key = StoreKeys(store.namespace, "ticket-lineage").key(state.lineage)
    store.batch([Remove(key, state.end - time.time() + secrets.margin)])


def _decrypt_openssl(secret: TicketSecret, ticket: bytes) -> bytes:
    cipher = Cipher(AES(bytes(secret.openssl[-32:])), CBC(ticket[_NAME_BYTES:_HEAD_BYTES])).decryptor()
    return cipher.update(ticket[_HEAD_BYTES:-_MAC_BYTES]) + cipher.finalize()


def _decrypt_aead(secret: TicketSecret, ticket: bytes) -> bytes:
    head = ticket[:_HEAD_BYTES]
    key = derive(secret.aead, 32, head[_NAME_BYTES:], b"resumed/v1 ticket")
    return AESGCM(key).decrypt(bytes(12), ticket[_HEAD_BYTES:], head)


def _state_in(plaintext: bytes) -> TicketState:
    begin = plaintext.index(_MARK)
    state = TicketState.decode(plaintext[begin : begin + _STATE_BYTES])
    assert state
    return state
