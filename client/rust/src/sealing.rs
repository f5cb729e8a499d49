//! The data that the store receives, the same in every language (`protos/README.md`, `protos/vectors`).
//!
//! - store key = SHA-256("resumed/v1" 00 format 00 namespace 00 session id)
//! - sealed value = 02 | key id (4) | `not_after` (8, Unix seconds, big endian) | nonce (12) | AES-256-GCM(envelope), under
//!   the key HKDF-SHA256(fleet key, salt = store key, info = "resumed/v1 seal"), with the first 13 bytes and the store key
//!   as associated data
//! - sealed id = nonce (12) | AES-SIV(issue time: Unix seconds, 4, big endian), RFC 5297, under the 64-byte key
//!   HKDF-SHA256(fleet key, salt = "", info = "resumed/v1 id"), with the one associated string namespace 00 nonce

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use aes_siv::siv::Aes256Siv;
use hkdf::Hkdf;
use hkdf::hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// Bytes of a sealed id, and of the ids that OpenSSL and rustls issue.
pub const ID_BYTES: usize = 32;
/// Bytes of a fleet key.
pub const KEY_BYTES: usize = 32;

/// The version of sealed values. Those of version 1 had no fingerprint.
const SEALED: u8 = 2;
const KEY_ID_BYTES: usize = 4;
const HEADER_BYTES: usize = 1 + KEY_ID_BYTES + 8;
const NONCE_BYTES: usize = 12;
const TAG_BYTES: usize = 16;
/// The bytes that sealing adds to an envelope.
pub(crate) const OVERHEAD_BYTES: usize = HEADER_BYTES + NONCE_BYTES + TAG_BYTES;

/// A hashed session id: where the store keeps the session.
pub(crate) type StoreKey = [u8; 32];
pub(crate) type KeyId = [u8; KEY_ID_BYTES];
type NonceBytes = [u8; NONCE_BYTES];

/// How a TLS stack serializes its sessions. Stacks of one format resume each other's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// `i2d_SSL_SESSION`.
    OpenSsl,
    /// rustls' encoding of the values in its `session_storage`.
    Rustls,
}

impl Format {
    const fn name(self) -> &'static str {
        match self {
            Self::OpenSsl => "openssl",
            Self::Rustls => "rustls",
        }
    }
}

/// Turns the session ids of one format and namespace into store keys.
#[derive(Clone)]
pub(crate) struct StoreKeys(Sha256);

impl StoreKeys {
    pub(crate) fn new(format: Format, namespace: &str) -> Self {
        Self::named(format.name(), namespace)
    }

    pub(crate) fn named(format: &str, namespace: &str) -> Self {
        let mut prefix = Sha256::new();
        for part in ["resumed/v1", format, namespace] {
            prefix.update(part);
            prefix.update([0]);
        }
        Self(prefix)
    }

    pub(crate) fn key(&self, session_id: &[u8]) -> StoreKey {
        self.0.clone().chain_update(session_id).finalize().into()
    }
}

/// One line of a keyring. Has no Debug: a key never shows.
pub(crate) struct FleetKey {
    secret: Zeroizing<[u8; KEY_BYTES]>,
    pub(crate) id: KeyId,
    id_key: Zeroizing<[u8; 64]>,
    name_key: Zeroizing<[u8; 32]>,
}

impl FleetKey {
    pub(crate) fn new(secret: Zeroizing<[u8; KEY_BYTES]>) -> Self {
        let mut id = KeyId::default();
        id.copy_from_slice(&Sha256::digest(secret.as_ref())[..KEY_ID_BYTES]);
        let id_key = derive(&secret, &[], b"resumed/v1 id");
        let name_key = derive(&secret, &[], b"resumed/v1 ticket name");
        Self { secret, id, id_key, name_key }
    }

    pub(crate) fn seal(&self, key: &StoreKey, plaintext: &[u8], not_after: u64, nonce: NonceBytes) -> Vec<u8> {
        let mut sealed = Vec::with_capacity(OVERHEAD_BYTES + plaintext.len());
        sealed.push(SEALED);
        sealed.extend(self.id);
        sealed.extend(not_after.to_be_bytes());
        let associated = [&sealed[..], key].concat();
        let payload = Payload { msg: plaintext, aad: &associated };
        let ciphertext = self.aead(key).encrypt(&Nonce::from(nonce), payload);
        sealed.extend(nonce);
        sealed.extend(ciphertext.expect("a session is far smaller than GCM's limit"));
        sealed
    }

    fn open(&self, key: &StoreKey, sealed: &[u8]) -> Option<Vec<u8>> {
        let (header, rest) = sealed.split_at_checked(HEADER_BYTES)?;
        let (nonce, ciphertext) = rest.split_first_chunk::<NONCE_BYTES>()?;
        let associated = [header, key].concat();
        let payload = Payload { msg: ciphertext, aad: &associated };
        self.aead(key).decrypt(&Nonce::from(*nonce), payload).ok()
    }

    pub(crate) fn issue_id(&self, namespace: &str, issued: u32, nonce: NonceBytes) -> [u8; ID_BYTES] {
        let associated = associated(namespace, &nonce);
        let sealed = self.ids().encrypt([&associated], &issued.to_be_bytes());
        let mut id = [0; ID_BYTES];
        id[..NONCE_BYTES].copy_from_slice(&nonce);
        id[NONCE_BYTES..].copy_from_slice(&sealed.expect("a time is far smaller than SIV's limit"));
        id
    }

    /// Returns when the fleet issued an id, any bytes at all, for a namespace, or None if it did not.
    pub(crate) fn open_id(&self, namespace: &str, id: &[u8]) -> Option<u32> {
        let id: &[u8; ID_BYTES] = id.try_into().ok()?;
        let (nonce, sealed) = id.split_first_chunk::<NONCE_BYTES>()?;
        let issued = self.ids().decrypt([associated(namespace, nonce)], sealed).ok()?;
        Some(u32::from_be_bytes(issued.try_into().ok()?))
    }

    /// Returns the MAC over the parts of the name of a ticket's key.
    pub(crate) fn name_mac(&self, parts: [&[u8]; 3]) -> Hmac<Sha256> {
        let mac = Hmac::<Sha256>::new_from_slice(self.name_key.as_ref()).expect("HMAC takes keys of any length");
        parts.iter().fold(mac, Mac::chain_update)
    }

    fn ids(&self) -> Aes256Siv {
        Aes256Siv::new((&*self.id_key).into())
    }

    /// A cipher of the session's own: the nonce limit of GCM never binds.
    fn aead(&self, key: &StoreKey) -> Aes256Gcm {
        Aes256Gcm::new((&*derive::<32>(&self.secret, key, b"resumed/v1 seal")).into())
    }
}

/// Opens a value that the store returned for `key`, any bytes at all: the session and its `not_after`, or the reason of the miss.
pub(crate) fn open(keys: &[FleetKey], key: &StoreKey, sealed: &[u8], now: u64) -> Result<(Vec<u8>, u64), &'static str> {
    if sealed.len() < OVERHEAD_BYTES || sealed[0] != SEALED {
        return Err("malformed");
    }
    let (id, not_after) = sealed[1..HEADER_BYTES].split_first_chunk::<KEY_ID_BYTES>().ok_or("malformed")?;
    let fleet_key = keys.iter().find(|each| each.id == *id).ok_or("unknown-key")?;
    let not_after = u64::from_be_bytes(not_after.try_into().map_err(|_| "malformed")?);
    let plaintext = fleet_key.open(key, sealed).ok_or("not-authentic")?;
    if now >= not_after {
        return Err("expired");
    }
    Ok((plaintext, not_after))
}

/// Returns random bytes.
///
/// # Panics
///
/// The system has no random numbers: there is no TLS then either.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    fill_random(&mut bytes);
    bytes
}

/// Returns a random number below another one, which is not 0.
pub(crate) fn random_below(end: u64) -> u64 {
    u64::from_ne_bytes(random()) % end
}

/// Returns a random number from 0 to 1.
pub(crate) fn random_share() -> f64 {
    f64::from(u32::from_ne_bytes(random())) / f64::from(u32::MAX)
}

/// Fills a buffer with random bytes.
///
/// # Panics
///
/// As [`random`].
pub(crate) fn fill_random(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("the system has random numbers");
}

fn associated(namespace: &str, nonce: &NonceBytes) -> Vec<u8> {
    [namespace.as_bytes(), &[0], nonce].concat()
}

fn derive<const N: usize>(secret: &[u8; KEY_BYTES], salt: &[u8], info: &[u8]) -> Zeroizing<[u8; N]> {
    let mut key = Zeroizing::new([0; N]);
    derive_into(secret, salt, info, key.as_mut());
    key
}

/// Derives a key in its place, so that there is no copy of it elsewhere.
pub(crate) fn derive_into(secret: &[u8; KEY_BYTES], salt: &[u8], info: &[u8], key: &mut [u8]) {
    Hkdf::<Sha256>::new(Some(salt), secret).expand(info, key).expect("the size is far below HKDF's limit");
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Vectors<O, D> {
        keyring: Vec<String>,
        opens: Vec<O>,
        does_not_open: Vec<D>,
    }

    #[derive(Deserialize)]
    struct SealedVector {
        format: String,
        namespace: String,
        session_id: String,
        store_key: String,
        key: String,
        nonce: String,
        not_after: u64,
        plaintext: String,
        sealed: String,
    }

    #[derive(Deserialize)]
    struct Unsealable {
        case: String,
        store_key: String,
        now: u64,
        sealed: String,
        reason: String,
    }

    #[derive(Deserialize)]
    struct IssuedVector {
        namespace: String,
        issued: u32,
        key: String,
        nonce: String,
        id: String,
    }

    #[derive(Deserialize)]
    struct ForeignId {
        case: String,
        namespace: String,
        id: String,
    }

    fn vectors<T: serde::de::DeserializeOwned>(name: &str) -> T {
        let path = format!("{}/../../protos/vectors/{name}", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn bytes<const N: usize>(text: &str) -> [u8; N] {
        hex::decode(text).unwrap().try_into().unwrap()
    }

    fn fleet_key(text: &str) -> FleetKey {
        FleetKey::new(Zeroizing::new(bytes(text)))
    }

    /// Store keys and sealed values are those of the other languages, byte for byte, and what must not open does not.
    #[test]
    fn sealing_vectors() {
        let vectors: Vectors<SealedVector, Unsealable> = vectors("sealing.json");
        let keyring: Vec<_> = vectors.keyring.iter().map(|key| fleet_key(key)).collect();
        assert!(vectors.opens.iter().any(|vector| vector.format == Format::OpenSsl.name()));
        assert!(vectors.opens.iter().any(|vector| vector.format == Format::Rustls.name()));
        for vector in vectors.opens {
            let session_id = hex::decode(&vector.session_id).unwrap();
            let key = StoreKeys::named(&vector.format, &vector.namespace).key(&session_id);
            assert_eq!(key, bytes(&vector.store_key), "{}", vector.format);
            let plaintext = hex::decode(&vector.plaintext).unwrap();
            let sealed = fleet_key(&vector.key).seal(&key, &plaintext, vector.not_after, bytes(&vector.nonce));
            assert_eq!(hex::encode(&sealed), vector.sealed, "{}", vector.format);
            assert_eq!(open(&keyring, &key, &sealed, vector.not_after - 1), Ok((plaintext, vector.not_after)));
        }
        for vector in vectors.does_not_open {
            let sealed = hex::decode(&vector.sealed).unwrap();
            let opened = open(&keyring, &bytes(&vector.store_key), &sealed, vector.now);
            assert_eq!(opened.unwrap_err(), vector.reason, "{}", vector.case);
        }
    }

    /// Sealed ids are those of the other languages, byte for byte, and what must not open does not.
    #[test]
    fn id_vectors() {
        let vectors: Vectors<IssuedVector, ForeignId> = vectors("ids.json");
        let keyring: Vec<_> = vectors.keyring.iter().map(|key| fleet_key(key)).collect();
        let open = |namespace: &str, id: &[u8]| keyring.iter().find_map(|key| key.open_id(namespace, id));
        for vector in vectors.opens {
            let id = fleet_key(&vector.key).issue_id(&vector.namespace, vector.issued, bytes(&vector.nonce));
            assert_eq!(hex::encode(id), vector.id, "{}", vector.namespace);
            assert_eq!(open(&vector.namespace, &id), Some(vector.issued), "{}", vector.namespace);
        }
        for vector in vectors.does_not_open {
            assert_eq!(open(&vector.namespace, &hex::decode(&vector.id).unwrap()), None, "{}", vector.case);
        }
    }
}
