//! Tickets of TLS stacks that leave their encryption to the application: name (16) | salt (16) | AES-256-GCM(state, session).
//!
//! Each ticket has a key of its own, HKDF-SHA256(aead key of the secret, salt, info = "resumed/v1 ticket"), so its nonce is always zero. The
//! first 32 bytes are the associated data. See `protos/README.md`.

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use zeroize::Zeroizing;

use crate::sealing::{self, derive_into};
use crate::ticket_secret::{NAME_BYTES, TicketSecret};
use crate::ticket_state::{STATE_BYTES, TicketState};
use crate::tickets::HEAD_BYTES;

type Salt = [u8; HEAD_BYTES - NAME_BYTES];

/// Returns a ticket with a state and a session.
pub(crate) fn seal(secret: &TicketSecret, state: &TicketState, session: &[u8]) -> Vec<u8> {
    seal_with(secret, sealing::random(), &[&state.encode()[..], session].concat())
}

/// Returns the state and the session of a ticket, any bytes at all, or the reason to refuse it.
pub(crate) fn open(secret: &TicketSecret, ticket: &[u8]) -> Result<(TicketState, Vec<u8>), &'static str> {
    let (head, ciphertext) = ticket.split_first_chunk::<HEAD_BYTES>().ok_or("malformed")?;
    let (_, salt) = head.split_last_chunk().ok_or("malformed")?;
    let payload = Payload { msg: ciphertext, aad: head };
    let mut opened = cipher(secret, salt).decrypt(&Nonce::default(), payload).map_err(|_| "not-authentic")?;
    let state = opened.get(..STATE_BYTES).and_then(TicketState::decode).ok_or("malformed")?;
    opened.drain(..STATE_BYTES);
    Ok((state, opened))
}

fn seal_with(secret: &TicketSecret, salt: Salt, plaintext: &[u8]) -> Vec<u8> {
    let mut ticket = [&secret.name()[..], &salt].concat();
    let payload = Payload { msg: plaintext, aad: &ticket };
    let ciphertext = cipher(secret, &salt).encrypt(&Nonce::default(), payload);
    ticket.extend(ciphertext.expect("a session is far smaller than GCM's limit"));
    ticket
}

fn cipher(secret: &TicketSecret, salt: &Salt) -> Aes256Gcm {
    let mut key = Zeroizing::new([0; 32]);
    derive_into(secret.aead(), salt, b"resumed/v1 ticket", key.as_mut());
    Aes256Gcm::new((&*key).into())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::sealing::StoreKeys;
    use crate::ticket_secret::tests::secrets;

    #[derive(Deserialize)]
    struct Vectors {
        tickets: Vec<Vector>,
    }

    #[derive(Deserialize)]
    struct Vector {
        name: String,
        salt: String,
        plaintext: String,
        ticket: String,
        namespace: String,
        use_key: String,
    }

    #[test]
    fn tickets_are_those_of_the_other_languages_and_changed_ones_do_not_open() {
        let vectors: Vectors = serde_json::from_str(include_str!("../../../protos/vectors/tickets.json")).unwrap();
        assert!(!vectors.tickets.is_empty());
        for (vector, secret) in vectors.tickets.into_iter().zip(secrets()) {
            assert_eq!(hex::encode(secret.name()), vector.name);
            let plaintext = hex::decode(vector.plaintext).unwrap();
            let ticket = seal_with(&secret, hex::decode(vector.salt).unwrap().try_into().unwrap(), &plaintext);
            assert_eq!(hex::encode(&ticket), vector.ticket);
            let use_key = StoreKeys::named("ticket-use", &vector.namespace).key(&ticket[..HEAD_BYTES]);
            assert_eq!(hex::encode(use_key), vector.use_key);
            let (state, session) = open(&secret, &ticket).unwrap();
            assert_eq!([&state.encode()[..], &session].concat(), plaintext);
            for at in 0..ticket.len() {
                let mut changed = ticket.clone();
                changed[at] ^= 1;
                assert_eq!(open(&secret, &changed).err(), Some("not-authentic"));
            }
            assert_eq!(open(&secret, &ticket[..HEAD_BYTES - 1]).err(), Some("malformed"));
            assert_eq!(open(&secret, &ticket[..HEAD_BYTES]).err(), Some("not-authentic"));
            let foreign = seal_with(&secret, [0; 16], &plaintext[1..]);
            assert_eq!(open(&secret, &foreign).err(), Some("malformed"));
        }
    }

    #[test]
    fn two_tickets_of_one_session_differ() {
        let secret = secrets().next().unwrap();
        let state = TicketState::of_stored([1; 32], b"", std::time::SystemTime::UNIX_EPOCH, 1);
        assert_ne!(seal(&secret, &state, b"session"), seal(&secret, &state, b"session"));
        assert_eq!(open(&secret, &seal(&secret, &state, b"session")), Ok((state, b"session".to_vec())));
    }
}
