//! Which context serves a name, as this process has seen it in full handshakes.
//!
//! OpenSSL looks a session up before the servername callback chooses the context. So a look-up needs to know already which one it will
//! choose.

use store::{Expected, Fingerprint};

use crate::lru::Lru;
use crate::shared::Shared;

const NAMES: usize = 4096;

/// Where a connection begins: with these sessions, with this context (0 if unknown), for this server name in lower case.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) shim: u64,
    pub(crate) context: u64,
    pub(crate) name: Vec<u8>,
}

static LEARNED: Shared<Lru<Place, Expected>> = Shared::new(|| Lru::new(NAMES));

/// Returns the fingerprint that a full handshake ended with.
pub(crate) fn expected(place: &Place) -> Expected {
    LEARNED.with(|learned| learned.get(place).copied().unwrap_or(Expected::Unknown))
}

/// Records the fingerprint that a full handshake ended with.
pub(crate) fn learn(place: Place, fingerprint: Fingerprint) {
    LEARNED.with(|learned| {
        if learned.get(&place) != Some(&Expected::Unstable) {
            learned.put(place, Expected::Fingerprint(fingerprint));
        }
    });
}

/// Records that different contexts serve a name, and returns whether that is new.
pub(crate) fn unsettle(place: Place) -> bool {
    LEARNED.with(|learned| learned.put(place, Expected::Unstable) != Some(Expected::Unstable))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_full_handshake_counts_until_the_name_turns_out_to_be_unstable() {
        let place = |name: &[u8]| Place { shim: 1, context: 2, name: name.to_vec() };
        assert_eq!(expected(&place(b"a")), Expected::Unknown);
        for fingerprint in [[1; 32], [2; 32]] {
            learn(place(b"a"), fingerprint);
            assert_eq!(expected(&place(b"a")), Expected::Fingerprint(fingerprint));
        }
        assert_eq!(expected(&place(b"b")), Expected::Unknown);
        assert_eq!(expected(&Place { context: 3, ..place(b"a") }), Expected::Unknown);
        assert!(unsettle(place(b"a")));
        learn(place(b"a"), [1; 32]);
        assert_eq!(expected(&place(b"a")), Expected::Unstable);
        assert!(!unsettle(place(b"a")));
    }
}
