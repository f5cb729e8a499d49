//! The data that a session has in memory as its ticket application data: OpenSSL copies it to the sessions of further tickets.
//!
//! data = "resumed" 02 | context fingerprint (32) | issue time (8, microseconds) | end (8, Unix seconds, 0 if no session was resumed) |
//! ids of the connection's sessions (32 each). It is not stored. TLS 1.3 issues several tickets, and reports only the
//! last one when the connection fails, so it remembers the others.

use std::time::SystemTime;

use store::{Fingerprint, ID_BYTES, from_microseconds, microseconds};

const MARK: &[u8; 8] = b"resumed\x02";
/// How many ids of the sessions of one connection are remembered.
const IDS: usize = 255;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lineage {
    /// The fingerprint of the context that negotiated the first session.
    pub(crate) fingerprint: Fingerprint,
    /// The time of the full handshake.
    pub(crate) issued: SystemTime,
    /// When the session that was resumed ends, in Unix seconds, or 0.
    pub(crate) end: u64,
    /// The ids of the sessions of the same connection, concatenated.
    ids: Vec<u8>,
}

/// A session has application data of another library.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Foreign;

impl Lineage {
    pub(crate) fn new(fingerprint: Fingerprint, issued: SystemTime) -> Self {
        Self { fingerprint, issued, end: 0, ids: Vec::new() }
    }

    /// Returns the lineage in a session's application data; None if there is none.
    pub(crate) fn decode(data: &[u8]) -> Result<Option<Self>, Foreign> {
        if data.is_empty() {
            return Ok(None);
        }
        let rest = data.strip_prefix(MARK).ok_or(Foreign)?;
        let (fingerprint, rest) = rest.split_first_chunk().ok_or(Foreign)?;
        let (issued, rest) = rest.split_first_chunk().ok_or(Foreign)?;
        let (end, ids) = rest.split_first_chunk().ok_or(Foreign)?;
        let issued = from_microseconds(u64::from_be_bytes(*issued)).ok_or(Foreign)?;
        Ok(Some(Self { fingerprint: *fingerprint, issued, end: u64::from_be_bytes(*end), ids: ids.to_vec() }))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let issued = microseconds(self.issued).to_be_bytes();
        [&MARK[..], &self.fingerprint, &issued, &self.end.to_be_bytes(), &self.ids].concat()
    }

    /// Returns the ids of the connection's sessions.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &[u8]> {
        self.ids.chunks(ID_BYTES)
    }

    /// Adds an id, and returns how many there are, before the oldest ones beyond a limit go.
    pub(crate) fn add(&mut self, id: &[u8]) -> usize {
        self.ids.extend(id);
        let number = self.ids.len() / ID_BYTES;
        self.ids.drain(..self.ids.len().saturating_sub(IDS * ID_BYTES));
        number
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn data_without_the_mark_is_foreign() {
        let mut lineage = Lineage::new([7; 32], SystemTime::UNIX_EPOCH + Duration::from_micros(5));
        lineage.end = 9;
        assert_eq!((lineage.add(&[1; 32]), lineage.add(&[2; 32])), (1, 2));
        let encoded = lineage.encode();
        assert_eq!(&encoded[..9], b"resumed\x02\x07");
        assert_eq!(encoded.len(), 8 + 32 + 8 + 8 + 64);
        assert_eq!(Lineage::decode(&encoded), Ok(Some(lineage)));
        assert_eq!(Lineage::decode(&[]), Ok(None));
        for foreign in [&encoded[..55], &encoded[1..], &[0; 32], b"resumed\x01................................................"]
        {
            assert_eq!(Lineage::decode(foreign), Err(Foreign));
        }
    }

    #[test]
    fn the_last_ids_are_remembered() {
        let mut lineage = Lineage::new([7; 32], SystemTime::UNIX_EPOCH);
        for number in 0..=255 {
            lineage.add(&[number; 32]);
        }
        assert_eq!(lineage.ids().map(|id| id[0]).collect::<Vec<_>>(), (1..=255).collect::<Vec<_>>());
    }
}
