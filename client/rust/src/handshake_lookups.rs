//! The look-ups of one handshake.

use std::time::{Duration, Instant};

use crate::ticket_state::TicketState;
use crate::tickets::{HEAD_BYTES, Tickets};

/// How many of the sessions that a client offers in one handshake are looked up at the store. Clients offer one or two; a thousand fit in a
/// `ClientHello`.
pub(crate) const MAX_CALLS: usize = 4;

/// The look-ups of one handshake so far. They share its deadline, at most four of them are calls, and a session that one of them did not
/// find is not looked up again: a client may send its `ClientHello` twice (`HelloRetryRequest`, RFC 8446 section 4.1.4).
#[derive(Debug, Default)]
pub struct HandshakeLookups {
    waited: Duration,
    calls: usize,
    missed: Vec<Vec<u8>>,
    /// The tickets whose single use it has claimed, or tried to.
    claims: Vec<([u8; HEAD_BYTES], Result<(), &'static str>)>,
}

impl HandshakeLookups {
    /// Claims the single use of a ticket, as [`Tickets::claim`] does; of one ticket once.
    ///
    /// # Errors
    ///
    /// The reason, for [`Tickets::count_refused`].
    pub fn claim(&mut self, tickets: &Tickets, head: &[u8; HEAD_BYTES], state: &TicketState) -> Result<(), &'static str> {
        if let Some((_, claimed)) = self.claims.iter().find(|(ticket, _)| ticket == head) {
            return *claimed;
        }
        self.begin_call()?;
        let began = Instant::now();
        let claimed = tickets.claim(head, state, self.waited);
        self.waited += began.elapsed();
        self.claims.push((*head, claimed));
        claimed
    }

    /// Makes a look-up; None if an earlier one of the same id has missed.
    pub(crate) fn look_up<T>(
        &mut self,
        id: &[u8],
        look_up: impl FnOnce(&mut Self) -> Result<T, &'static str>,
    ) -> Option<Result<T, &'static str>> {
        if self.missed.iter().any(|missed| missed == id) {
            return None;
        }
        let (began, calls) = (Instant::now(), self.calls);
        let found = look_up(self);
        self.waited += began.elapsed();
        // All calls are remembered, and the first few of the others, of which there may be a thousand.
        if found.is_err() && (self.calls > calls || self.missed.len() < MAX_CALLS) {
            self.missed.push(id.to_vec());
        }
        Some(found)
    }

    /// Returns how long the handshake has waited for the store.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
    }

    /// Counts a call that is about to be made, or returns the reason to make none.
    pub(crate) fn begin_call(&mut self) -> Result<(), &'static str> {
        if self.calls >= MAX_CALLS {
            return Err("too-many-lookups");
        }
        self.calls += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Expected, Format, Keyring, Lookup, Options, Shim};

    /// Returns a shim without a store: none of its look-ups finds a session.
    fn shim() -> Shim {
        let options = Options::new("127.0.0.1:1", "shop", Keyring::from_keys(&[[7; 32]]).unwrap());
        Shim::new(options, Format::OpenSsl).unwrap()
    }

    fn look_up(shim: &Shim, id: &[u8], lookups: &mut HandshakeLookups) {
        assert!(shim.find(id, Lookup::expecting(Expected::Fingerprint([1; 32])), lookups, |_, _| Ok(())).is_none());
    }

    #[test]
    fn a_handshake_makes_at_most_four_calls() {
        let (shim, mut lookups) = (shim(), HandshakeLookups::default());
        look_up(&shim, b"not of the fleet", &mut lookups);
        for _ in 0..MAX_CALLS + 40 {
            look_up(&shim, &shim.issue_id(), &mut lookups);
        }
        let misses = shim.stats().misses;
        assert_eq!((misses["foreign-id"], misses["too-many-lookups"]), (1, 40), "{misses:?}");
    }

    #[test]
    fn a_miss_is_kept_and_counted_once() {
        let (shim, mut lookups) = (shim(), HandshakeLookups::default());
        let ids: Vec<_> = (0..MAX_CALLS).map(|_| vec![1; 32]).chain((0..MAX_CALLS).map(|_| shim.issue_id().to_vec())).collect();
        for id in ids.iter().chain(&ids) {
            look_up(&shim, id, &mut lookups);
        }
        let misses = shim.stats().misses;
        assert_eq!((misses["foreign-id"], misses.values().sum::<u64>()), (1, 1 + MAX_CALLS as u64), "{misses:?}");
    }

    #[test]
    fn a_handshake_that_has_waited_for_its_deadline_waits_no_more() {
        let (shim, waited) = (shim(), Duration::from_secs(60));
        look_up(&shim, &shim.issue_id(), &mut HandshakeLookups { waited, ..Default::default() });
        assert_eq!(shim.stats().misses, [("timeout", 1)].into());
    }
}
