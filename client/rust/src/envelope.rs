//! The envelope: the bytes that are sealed for the store, a session with what decides whether it may resume.
//!
//! envelope = context fingerprint (32) | issue time (8, microseconds after the Unix epoch, big endian) | session. See
//! `protos/README.md`.

use std::time::{Duration, SystemTime};

use crate::fingerprint::{FINGERPRINT_BYTES, Fingerprint};

/// The bytes that an envelope adds to a session.
pub(crate) const HEADER_BYTES: usize = FINGERPRINT_BYTES + 8;

/// A session as it is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// The fingerprint of the context that negotiated the session.
    pub fingerprint: Fingerprint,
    /// The time of the full handshake. A ticket of a resumed connection has the time of the session that the connection resumed.
    pub issued: SystemTime,
    /// The serialized session.
    pub session: &'a [u8],
}

impl<'a> Envelope<'a> {
    pub(crate) fn encode(&self) -> Vec<u8> {
        [&self.fingerprint[..], &microseconds(self.issued).to_be_bytes(), self.session].concat()
    }

    /// Returns the envelope of bytes that were authentic, or the reason of the miss.
    pub(crate) fn decode(encoded: &'a [u8]) -> Result<Self, &'static str> {
        let (fingerprint, rest) = encoded.split_first_chunk().ok_or("malformed")?;
        let (issued, session) = rest.split_first_chunk().ok_or("malformed")?;
        let issued = from_microseconds(u64::from_be_bytes(*issued)).ok_or("malformed")?;
        Ok(Self { fingerprint: *fingerprint, issued, session })
    }
}

/// Returns a time in microseconds after the Unix epoch.
#[must_use]
pub fn microseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Returns the time that is so many microseconds after the Unix epoch, if the system can express it.
#[must_use]
pub fn from_microseconds(microseconds: u64) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_micros(microseconds))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Vectors {
        envelopes: Vec<Vector>,
        not_envelopes: Vec<String>,
    }

    #[derive(Deserialize)]
    struct Vector {
        fingerprint: String,
        issued_microseconds: u64,
        session: String,
        envelope: String,
    }

    /// Envelopes are those of the other languages, byte for byte, and shorter bytes are none.
    #[test]
    fn envelope_vectors() {
        let path = format!("{}/../../protos/vectors/sealing.json", env!("CARGO_MANIFEST_DIR"));
        let vectors: Vectors = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(!vectors.envelopes.is_empty() && !vectors.not_envelopes.is_empty());
        for vector in vectors.envelopes {
            let session = hex::decode(vector.session).unwrap();
            let envelope = Envelope {
                fingerprint: hex::decode(vector.fingerprint).unwrap().try_into().unwrap(),
                issued: from_microseconds(vector.issued_microseconds).unwrap(),
                session: &session,
            };
            assert_eq!(hex::encode(envelope.encode()), vector.envelope);
            assert_eq!(Envelope::decode(&hex::decode(vector.envelope).unwrap()), Ok(envelope));
        }
        for short in vectors.not_envelopes {
            assert_eq!(Envelope::decode(&hex::decode(short).unwrap()), Err("malformed"));
        }
    }
}
