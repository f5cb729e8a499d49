//! Ticket secrets: the frontends of a fleet derive their ticket keys from them, one secret for each epoch (`protos/README.md`).
//!
//! Time is cut into epochs of equal length. The secret of an epoch is agreed on through the store, where it is a sealed
//! value at an address that follows from the epoch.

use std::time::Duration;

use hkdf::hmac::Mac;
use zeroize::{Zeroize, Zeroizing};

use crate::sealing::{self, FleetKey, KeyId, OVERHEAD_BYTES, StoreKey, StoreKeys, derive_into};

/// Length of a key name, with which each ticket begins.
pub const NAME_BYTES: usize = 16;
/// The last generation of the secret of one epoch.
pub(crate) const MAX_GENERATION: u8 = u8::MAX;
/// The longest epoch.
pub(crate) const MAX_ROTATION: Duration = Duration::from_secs(7 * 24 * 3600);
/// The longest time for which the store keeps a removal or a claim.
pub(crate) const MAX_REMOVAL: Duration = Duration::from_secs(7 * 24 * 3600);

const VERSION: u8 = 1;
const EPOCH_BYTES: usize = 8;
const MAC_AT: usize = 12;
const SECRET_BYTES: usize = 32;
const ENCODED_BYTES: usize = 1 + 8 + SECRET_BYTES;

/// The name of the keys of a ticket: epoch (8) | tag (4) | MAC (4).
pub type TicketName = [u8; NAME_BYTES];

/// An epoch, and one attempt to agree on its secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch {
    /// Its beginning, in Unix seconds: a multiple of `rotation`.
    pub start: u32,
    /// Its length in seconds: 1 to 604,800.
    pub rotation: u32,
    /// Above 0 where the secret of an earlier generation cannot be opened, or was removed.
    pub generation: u8,
}

impl Epoch {
    /// Returns the epoch of a time, given in Unix seconds, in its first generation.
    pub(crate) fn at(now: u64, rotation: u32) -> Self {
        // Four bytes of seconds last until 2106.
        let now = u32::try_from(now).unwrap_or(u32::MAX);
        Self { start: now - now % rotation, rotation, generation: 0 }
    }

    pub(crate) fn next(self) -> Self {
        Self { start: self.start.saturating_add(self.rotation), generation: 0, ..self }
    }

    /// Returns when the secret is erased, in Unix seconds.
    ///
    /// Tickets of the epoch may live for `lifetime` seconds. The further epoch is for frontends whose clocks are behind, or that
    /// cannot reach the store: they still encrypt with the secret.
    pub(crate) fn not_after(self, lifetime: u64) -> u64 {
        u64::from(self.start) + 2 * u64::from(self.rotation) + lifetime
    }

    /// Returns the epoch in a key name, which anyone may have invented.
    pub(crate) fn of_name(name: &TicketName) -> Self {
        let [epoch @ .., _, _, _, _, _, _, _, _] = *name;
        Self::decode(epoch)
    }

    pub(crate) fn encode(self) -> [u8; EPOCH_BYTES] {
        let mut encoded = [0; EPOCH_BYTES];
        encoded[..4].copy_from_slice(&self.start.to_be_bytes());
        encoded[4..7].copy_from_slice(&self.rotation.to_be_bytes()[1..]);
        encoded[7] = self.generation;
        encoded
    }

    pub(crate) fn decode(encoded: [u8; EPOCH_BYTES]) -> Self {
        let [start @ .., _, _, _, _] = encoded;
        let [_, _, _, _, high, middle, low, generation] = encoded;
        Self { start: u32::from_be_bytes(start), rotation: u32::from_be_bytes([0, high, middle, low]), generation }
    }
}

/// The secret of an epoch, and the keys that are derived from it. Its memory is overwritten when it is dropped. It has no `Debug`, so it
/// never shows in a log.
pub struct TicketSecret {
    /// Its epoch.
    pub(crate) epoch: Epoch,
    /// The key of the fleet that seals it in the store.
    pub(crate) key_id: KeyId,
    /// The store key of its sealed value.
    pub(crate) address: StoreKey,
    /// When a frontend proposed it, in microseconds after the Unix epoch.
    pub(crate) created: u64,
    not_after: u64,
    name: TicketName,
    keys: Box<Keys>,
}

struct Keys {
    secret: [u8; SECRET_BYTES],
    /// HMAC-SHA256, AES-256.
    openssl: [[u8; 32]; 2],
    aead: [u8; 32],
}

impl Drop for Keys {
    fn drop(&mut self) {
        self.secret.zeroize();
        self.openssl.zeroize();
        self.aead.zeroize();
    }
}

impl TicketSecret {
    /// Makes the secret of an epoch of random bytes.
    pub(crate) fn propose(
        namespace: &str,
        key: &FleetKey,
        address: StoreKey,
        epoch: Epoch,
        created: u64,
        not_after: u64,
    ) -> Self {
        Self::new(namespace, key, address, epoch, created, not_after, |secret| sealing::fill_random(secret))
    }

    fn new(
        namespace: &str,
        key: &FleetKey,
        address: StoreKey,
        epoch: Epoch,
        created: u64,
        not_after: u64,
        fill: impl FnOnce(&mut [u8; SECRET_BYTES]),
    ) -> Self {
        let mut keys = Box::new(Keys { secret: [0; SECRET_BYTES], openssl: [[0; 32]; 2], aead: [0; 32] });
        let Keys { secret, openssl, aead } = &mut *keys;
        fill(secret);
        let mut tag = [0; 4];
        derive_into(secret, &[], b"resumed/v1 ticket key\0tag", &mut tag);
        derive_into(secret, &[], b"resumed/v1 ticket key\0openssl", openssl.as_flattened_mut());
        derive_into(secret, &[], b"resumed/v1 ticket key\0aead32", aead);
        let mut name = [0; NAME_BYTES];
        name[..EPOCH_BYTES].copy_from_slice(&epoch.encode());
        name[EPOCH_BYTES..MAC_AT].copy_from_slice(&tag);
        let mac = key.name_mac([namespace.as_bytes(), &[0], &name[..MAC_AT]]).finalize().into_bytes();
        name[MAC_AT..].copy_from_slice(&mac[..NAME_BYTES - MAC_AT]);
        Self { epoch, key_id: key.id, address, created, not_after, name, keys }
    }

    /// Returns the plaintext of its sealed value.
    fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut encoded = Zeroizing::new(Vec::with_capacity(ENCODED_BYTES));
        encoded.push(VERSION);
        encoded.extend(self.created.to_be_bytes());
        encoded.extend(self.keys.secret);
        encoded
    }

    /// Returns its value for the store, sealed with `key`.
    pub(crate) fn seal(&self, key: &FleetKey) -> Vec<u8> {
        key.seal(&self.address, &self.encode(), self.not_after, sealing::random())
    }

    /// Opens the value of the secret of an epoch, any bytes at all, or returns the reason why it does not open.
    pub(crate) fn open(
        namespace: &str,
        key: &FleetKey,
        address: StoreKey,
        epoch: Epoch,
        sealed: &[u8],
        now: u64,
    ) -> Result<Self, &'static str> {
        if sealed.len() != OVERHEAD_BYTES + ENCODED_BYTES {
            return Err("malformed");
        }
        let (opened, not_after) = sealing::open(std::slice::from_ref(key), &address, sealed, now)?;
        let opened = Zeroizing::new(opened);
        let (version, rest) = opened.split_first().ok_or("malformed")?;
        let (created, secret) = rest.split_first_chunk().ok_or("malformed")?;
        if *version != VERSION || secret.len() != SECRET_BYTES {
            return Err("malformed");
        }
        let created = u64::from_be_bytes(*created);
        Ok(Self::new(namespace, key, address, epoch, created, not_after, |bytes| bytes.copy_from_slice(secret)))
    }

    /// The name of its keys, with which each of its tickets begins.
    #[must_use]
    pub fn name(&self) -> &TicketName {
        &self.name
    }

    /// The key of the HMAC-SHA256 of OpenSSL's tickets.
    #[must_use]
    pub fn hmac_key(&self) -> &[u8; 32] {
        &self.keys.openssl[0]
    }

    /// The key of the AES-256-CBC of OpenSSL's tickets.
    #[must_use]
    pub fn aes_key(&self) -> &[u8; 32] {
        &self.keys.openssl[1]
    }

    /// The key of which the AES-256-GCM keys of single tickets are derived.
    #[must_use]
    pub fn aead(&self) -> &[u8; 32] {
        &self.keys.aead
    }

    /// When it is erased, in Unix seconds.
    #[must_use]
    pub fn not_after(&self) -> u64 {
        self.not_after
    }
}

/// Returns the addresses of the secrets of a namespace.
pub(crate) fn addresses(namespace: &str) -> StoreKeys {
    StoreKeys::named("ticket-secret", namespace)
}

/// Returns the store key of the secret of an epoch, sealed with a key of the fleet. `addresses` is [`addresses`] of the namespace.
pub(crate) fn address_of(addresses: &StoreKeys, key: KeyId, epoch: Epoch) -> StoreKey {
    addresses.key(&[&key[..], &epoch.encode()].concat())
}

/// Returns the epoch in the name of a ticket's key, any bytes at all; None if it was not named with this key of the fleet.
pub(crate) fn epoch_of_name(namespace: &str, key: &FleetKey, name: &[u8]) -> Option<Epoch> {
    let name: &TicketName = name.try_into().ok()?;
    let (head, mac) = name.split_at(MAC_AT);
    key.name_mac([namespace.as_bytes(), &[0], head]).verify_truncated_left(mac).ok()?;
    Some(Epoch::of_name(name))
}

#[cfg(test)]
pub(crate) mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Vectors {
        secrets: Vec<Vector>,
    }

    #[derive(Deserialize)]
    struct Vector {
        namespace: String,
        key: String,
        start: u32,
        rotation: u32,
        generation: u8,
        secret: String,
        created_microseconds: u64,
        lifetime: u64,
        not_after: u64,
        address: String,
        plaintext: String,
        nonce: String,
        sealed: String,
        name: String,
        openssl: String,
        aead32: String,
    }

    fn bytes<const N: usize>(text: &str) -> [u8; N] {
        hex::decode(text).unwrap().try_into().unwrap()
    }

    /// Returns the secrets of the vectors, each with its namespace and the key that seals it.
    fn vectors() -> impl Iterator<Item = (Vector, FleetKey, TicketSecret)> {
        let vectors: Vectors = serde_json::from_str(include_str!("../../../protos/vectors/tickets.json")).unwrap();
        assert!(!vectors.secrets.is_empty());
        vectors.secrets.into_iter().map(|vector| {
            let key = FleetKey::new(Zeroizing::new(bytes(&vector.key)));
            let epoch = Epoch { start: vector.start, rotation: vector.rotation, generation: vector.generation };
            let address = address_of(&addresses(&vector.namespace), key.id, epoch);
            let (created, not_after) = (vector.created_microseconds, epoch.not_after(vector.lifetime));
            let secret = TicketSecret::new(&vector.namespace, &key, address, epoch, created, not_after, |secret| {
                *secret = bytes(&vector.secret);
            });
            (vector, key, secret)
        })
    }

    /// Returns the secrets of the vectors.
    pub(crate) fn secrets() -> impl Iterator<Item = TicketSecret> {
        vectors().map(|(_, _, secret)| secret)
    }

    #[test]
    fn secrets_and_their_keys_are_those_of_the_other_languages() {
        for (vector, key, secret) in vectors() {
            assert_eq!(hex::encode(secret.address), vector.address);
            assert_eq!(secret.not_after(), vector.not_after);
            assert_eq!(hex::encode(&*secret.encode()), vector.plaintext);
            let sealed = key.seal(&secret.address, &secret.encode(), secret.not_after(), bytes(&vector.nonce));
            assert_eq!(hex::encode(&sealed), vector.sealed);
            assert_eq!(hex::encode(secret.name()), vector.name);
            let openssl = [&secret.name()[..], secret.hmac_key(), secret.aes_key()].concat();
            assert_eq!(hex::encode(openssl), vector.openssl);
            assert_eq!(hex::encode(secret.aead()), vector.aead32);
        }
    }

    #[test]
    fn a_sealed_secret_opens_until_its_end_and_nothing_else_does() {
        for (vector, key, secret) in vectors() {
            let sealed = secret.seal(&key);
            let open =
                |address, sealed: &[u8], now| TicketSecret::open(&vector.namespace, &key, address, secret.epoch, sealed, now);
            let opened = open(secret.address, &sealed, vector.not_after - 1).ok().unwrap();
            assert_eq!((opened.name(), opened.created, opened.not_after()), (secret.name(), secret.created, vector.not_after));
            assert_eq!(open(secret.address, &sealed, vector.not_after).err(), Some("expired"));
            assert_eq!(open([0; 32], &sealed, 0).err(), Some("not-authentic"));
            assert_eq!(open(secret.address, &sealed[1..], 0).err(), Some("malformed"));
            let mut other = secret.encode().to_vec();
            other[0] = 2;
            let other = key.seal(&secret.address, &other, vector.not_after, [0; 12]);
            assert_eq!(open(secret.address, &other, 0).err(), Some("malformed"));
        }
    }

    #[test]
    fn a_name_shows_its_epoch_to_the_fleet_and_namespace_that_have_named_it() {
        for (vector, key, secret) in vectors() {
            let other = FleetKey::new(Zeroizing::new([9; 32]));
            assert_eq!(epoch_of_name(&vector.namespace, &key, secret.name()), Some(secret.epoch));
            assert_eq!(epoch_of_name("other", &key, secret.name()), None);
            assert_eq!(epoch_of_name(&vector.namespace, &other, secret.name()), None);
            assert_eq!(epoch_of_name(&vector.namespace, &key, &secret.name()[..15]), None);
            for at in 0..NAME_BYTES {
                let mut name = *secret.name();
                name[at] ^= 1;
                assert_eq!(epoch_of_name(&vector.namespace, &key, &name), None);
            }
        }
    }

    #[test]
    fn epochs_are_multiples_of_the_rotation() {
        let epoch = Epoch::at(1_790_000_005, 2);
        assert_eq!((epoch.start, epoch.next().start), (1_790_000_004, 1_790_000_006));
        assert_eq!(Epoch::decode(epoch.encode()), epoch);
    }
}
