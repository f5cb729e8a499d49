//! The state in a ticket: the part of it that the fleet's rules need, beside the TLS session (`protos/README.md`).
//!
//! OpenSSL keeps it as ticket application data: `SSL_SESSION_set1_ticket_appdata(3)`.

use std::time::SystemTime;

use sha2::{Digest, Sha256};

use crate::envelope::microseconds;
use crate::fingerprint::{FINGERPRINT_BYTES, Fingerprint};
use crate::sealing;

/// Length of an encoded state.
pub const STATE_BYTES: usize = MARK.len() + FINGERPRINT_BYTES + LINEAGE_BYTES + 8 + 8 + NAME_HASH_BYTES;

const MARK: &[u8; 8] = b"resumed\x03";
const LINEAGE_BYTES: usize = 16;
const NAME_HASH_BYTES: usize = 16;

/// The id of a lineage: random, the same in all tickets that stem from one full handshake.
pub type Lineage = [u8; LINEAGE_BYTES];
/// The hash of a server name: [`hash_name`].
pub type NameHash = [u8; NAME_HASH_BYTES];

/// The state in a ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TicketState {
    /// The fingerprint of the context that negotiated its lineage.
    pub fingerprint: Fingerprint,
    /// The id of its lineage.
    pub lineage: Lineage,
    /// When the full handshake of its lineage was, in microseconds after the Unix epoch.
    pub negotiated: u64,
    /// When the lineage ends, in Unix seconds.
    pub end: u64,
    /// The hash of the server name that the client asked for.
    pub server_name: NameHash,
}

impl TicketState {
    /// Returns the state of the lineage that begins with a stored session, on a connection that has resumed it. [`crate::Tickets::continue_state`]
    /// makes the states of its tickets.
    ///
    /// `issued` and `not_after` are those of the stored session, `server_name` is the name that the client asked for, empty if none.
    #[must_use]
    pub fn of_stored(fingerprint: Fingerprint, server_name: &[u8], issued: SystemTime, not_after: u64) -> Self {
        let (lineage, server_name) = (sealing::random(), hash_name(server_name));
        Self { fingerprint, lineage, negotiated: microseconds(issued), end: not_after, server_name }
    }

    /// Returns its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; STATE_BYTES] {
        let mut encoded = [0; STATE_BYTES];
        let mut rest = &mut encoded[..];
        let parts: [&[u8]; 6] = [
            MARK,
            &self.fingerprint,
            &self.lineage,
            &self.negotiated.to_be_bytes(),
            &self.end.to_be_bytes(),
            &self.server_name,
        ];
        for part in parts {
            let (head, tail) = rest.split_at_mut(part.len());
            head.copy_from_slice(part);
            rest = tail;
        }
        encoded
    }

    /// Returns the state in ticket application data, any bytes at all; None if they are not ours.
    #[must_use]
    pub fn decode(data: &[u8]) -> Option<Self> {
        let rest = data.strip_prefix(MARK)?;
        let (fingerprint, rest) = rest.split_first_chunk()?;
        let (lineage, rest) = rest.split_first_chunk()?;
        let (negotiated, rest) = rest.split_first_chunk()?;
        let (end, server_name) = rest.split_first_chunk()?;
        Some(Self {
            fingerprint: *fingerprint,
            lineage: *lineage,
            negotiated: u64::from_be_bytes(*negotiated),
            end: u64::from_be_bytes(*end),
            server_name: server_name.try_into().ok()?,
        })
    }
}

/// Returns the hash of a server name, in which the case of ASCII letters does not matter. An empty name is that of a client that sent none.
#[must_use]
pub fn hash_name(name: &[u8]) -> NameHash {
    let digest = Sha256::new_with_prefix(b"resumed/v1 server name\0").chain_update(name.to_ascii_lowercase());
    let mut hash = NameHash::default();
    hash.copy_from_slice(&digest.finalize()[..NAME_HASH_BYTES]);
    hash
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::sealing::StoreKeys;

    #[derive(Deserialize)]
    struct Vectors {
        states: Vec<Vector>,
    }

    #[derive(Deserialize)]
    struct Vector {
        fingerprint: String,
        lineage: String,
        negotiated_microseconds: u64,
        end: u64,
        server_name: String,
        state: String,
        removal_key: String,
        namespace: String,
    }

    #[test]
    fn states_and_removal_keys_are_those_of_the_other_languages() {
        let vectors: Vectors = serde_json::from_str(include_str!("../../../protos/vectors/tickets.json")).unwrap();
        assert!(!vectors.states.is_empty());
        for vector in vectors.states {
            let state = TicketState {
                fingerprint: hex::decode(vector.fingerprint).unwrap().try_into().unwrap(),
                lineage: hex::decode(vector.lineage).unwrap().try_into().unwrap(),
                negotiated: vector.negotiated_microseconds,
                end: vector.end,
                server_name: hash_name(vector.server_name.as_bytes()),
            };
            assert_eq!(hex::encode(state.encode()), vector.state);
            assert_eq!(TicketState::decode(&hex::decode(&vector.state).unwrap()), Some(state));
            let key = StoreKeys::named("ticket-lineage", &vector.namespace).key(&state.lineage);
            assert_eq!(hex::encode(key), vector.removal_key);
        }
    }

    #[test]
    fn the_data_of_others_are_no_state() {
        let state = TicketState::of_stored([1; 32], b"shop.example", SystemTime::UNIX_EPOCH, 1).encode();
        assert!(TicketState::decode(&state).is_some());
        let mut other = state;
        other[7] = 2;
        for data in [&[][..], &state[1..], &state[..STATE_BYTES - 1], &[&state[..], &[0]].concat(), &other] {
            assert_eq!(TicketState::decode(data), None);
        }
    }

    #[test]
    fn the_case_of_a_server_name_does_not_matter() {
        assert_eq!(hash_name(b"Shop.Example"), hash_name(b"shop.example"));
        assert_ne!(hash_name(b"shop.example"), hash_name(b""));
    }
}
