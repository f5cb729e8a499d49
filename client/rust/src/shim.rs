//! The session policy: the decisions at each session hook of a TLS server, for bindings to TLS stacks.
//!
//! - A handshake never waits for the store beyond the deadline, and not at all while the store keeps failing.
//! - A call that fails means no resumption, and nothing else.
//! - Ids come from peers and values from the store: neither is trusted.
//! - A session resumes only where its context fingerprint is expected, and a single use is not spent before that is known.
//! - A session's lifetime counts from its negotiation: neither resuming nor storing it again prolongs it.
//! - A process that is forked begins anew: no thread, no connection, no count is its parent's.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tonic::transport::Endpoint;

use crate::clock::unix_time;
use crate::envelope::{self, Envelope};
use crate::error::Error;
use crate::fingerprint::Expected;
use crate::handshake_lookups::HandshakeLookups;
use crate::lookups::{Found, Query};
use crate::options::{Ids, Options, SessionMode, When};
use crate::process::Process;
use crate::sealing::{self, Format, ID_BYTES, StoreKeys};
use crate::sender::Item;
use crate::stats::{Kind, RemovalReason, Stats};
use crate::store::{self, How};
use crate::target::Target;
use crate::tickets::{TicketStats, Tickets};
use crate::turn::Turns;

/// How long after the issue of an id its look-up is retried if the store does not have the session: the Put may be on its way.
pub(crate) const FRESHNESS: Duration = Duration::from_secs(10);
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);
/// The store's limit.
pub(crate) const LARGEST_VALUE: usize = 65_536;

/// Decides for one TLS context, or several that share their sessions.
///
/// The bindings in this crate and in `libresumed` use it. Its threads and connections are those of a process: they are
/// made when first needed, and again in a forked child.
pub struct Shim {
    number: u64,
    options: Options,
    target: Target,
    endpoint: Endpoint,
    keys: StoreKeys,
    process: ArcSwapOption<Process>,
}

/// The parameters of one look-up.
#[derive(Clone, Copy, Debug)]
pub struct Lookup {
    /// The fingerprint that the session must have.
    pub expected: Expected,
    /// Whether to take the session from the whole fleet, also without `Options::single_use`.
    pub once: bool,
    /// Which ids are looked up, instead of `Options::ids`.
    pub ids: Option<Ids>,
}

impl Lookup {
    /// Returns a look-up of a session with such a fingerprint, by the options.
    #[must_use]
    pub fn expecting(expected: Expected) -> Self {
        Self { expected, once: false, ids: None }
    }
}

impl Shim {
    /// Makes a shim. Opens no connection and starts no thread.
    ///
    /// # Errors
    ///
    /// An option is outside its range, or a file cannot be used; the message says which, and what to do.
    pub fn new(options: Options, format: Format) -> Result<Self, Error> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        options.check()?;
        let target = Target::parse(&options.target)?;
        let endpoint = store::endpoint(&target, options.credentials.as_ref())?;
        let keys = StoreKeys::new(format, &options.namespace);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Ok(Self { number, options, target, endpoint, keys, process: ArcSwapOption::empty() })
    }

    /// Returns a number that no other shim of this process ever has.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The options that it was made with.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Begins the agreement on ticket secrets and the stream of removals of this process, if its sessions are tickets; they also begin at the
    /// first ticket.
    pub fn begin_tickets(&self) {
        let _ = self.tickets();
    }

    /// Returns the tickets of this process; None if its sessions are stored ([`Options::sessions`]), or if the system has no thread. Not to be
    /// kept: a forked child has others.
    #[must_use]
    pub fn tickets(&self) -> Option<Arc<Tickets>> {
        if self.options.sessions == SessionMode::Stored {
            return None;
        }
        self.process()?.tickets.clone()
    }

    /// The statistics of the tickets of this process.
    #[must_use]
    pub fn ticket_stats(&self) -> TicketStats {
        self.running().and_then(|process| process.tickets.as_ref().map(|tickets| tickets.stats())).unwrap_or_default()
    }

    /// Returns the id for a session about to be negotiated.
    #[must_use]
    pub fn issue_id(&self) -> [u8; ID_BYTES] {
        self.options.keyring.issue_id(&self.options.namespace, unix_time())
    }

    /// Returns an id for a session that is not stored, since a limit is used up ([`Shim::sheds`]): its look-up is no call at any frontend.
    #[must_use]
    pub fn issue_expired_id(&self) -> [u8; ID_BYTES] {
        self.options.keyring.issue_id(&self.options.namespace, 0)
    }

    /// Whether a limit of the store is used up, so that sessions of full handshakes are not to be stored: their Puts, and their look-ups,
    /// would use up the operations that resume stored sessions.
    #[must_use]
    pub fn sheds(&self) -> bool {
        self.running().is_some_and(|process| process.store.breaker.scarce(Instant::now()))
    }

    /// Counts a session that is not stored for that reason.
    pub fn shed(&self) {
        self.count((Kind::Puts, "dropped"));
    }

    /// Returns when a session ends, in Unix seconds, that is negotiated now.
    #[must_use]
    pub fn not_after(&self) -> u64 {
        unix_time() + self.options.lifetime.as_secs()
    }

    /// Stores a session that a handshake has just negotiated, and returns whether that is under way.
    ///
    /// `not_after` is the end of its life, in Unix seconds. With [`When::Now`] the handshake waits until it is stored, at most for the
    /// deadline.
    pub fn negotiated(&self, id: &[u8], envelope: &Envelope, not_after: u64, when: When) -> bool {
        let Some(process) = self.process() else { return false };
        let size = sealing::OVERHEAD_BYTES + envelope::HEADER_BYTES + envelope.session.len();
        if unix_time() >= not_after || size > LARGEST_VALUE {
            process.store.count((Kind::Puts, "unresumable"));
            return false;
        }
        let not_after = not_after.min(self.not_after());
        let key = self.keys.key(id);
        let value = self.options.keyring.seal(&key, &envelope.encode(), not_after);
        let number = process.sender.submit(&process.store, Item::Put { key, value, issued: envelope.issued, not_after }, when);
        // After a call that failed, which may have been this handshake's look-up, a handshake does not wait once more.
        if let Some(number) = number.filter(|_| {
            when == When::Now && process.store.breaker.last_call_succeeded() && process.sender.last_batch_succeeded()
        }) {
            process.sender.wait(number, self.options.deadline);
        }
        number.is_some()
    }

    /// Counts a session that cannot be resumed from the store, and so is not stored.
    pub fn unresumable(&self) {
        self.count((Kind::Puts, "unresumable"));
    }

    /// Returns the session of an id that a client offered, any bytes at all, or None to make a full handshake; counts a hit or a miss.
    ///
    /// For callers that make one look-up in a handshake, and do not learn whether it resumed the session; others use [`Shim::find`].
    pub fn look_up<T>(
        &self,
        id: &[u8],
        lookup: Lookup,
        decode: impl FnOnce(&Envelope, u64) -> Result<T, &'static str>,
    ) -> Option<T> {
        let (session, reason) = self.find(id, lookup, &mut HandshakeLookups::default(), decode)?;
        self.hit(reason);
        Some(session)
    }

    /// Returns the session of an id that a client offered, any bytes at all, and the reason of the hit, which the caller counts when the
    /// handshake is done ([`Shim::hit`] or [`Shim::not_resumed`]). None to make a full handshake; counts the miss then, unless an earlier one
    /// of the handshake's look-ups has missed the same id.
    ///
    /// `decode` makes a session of an envelope and its `not_after`, or returns the reason of the miss. It has no side effects: a single
    /// use is taken only after it, and may turn out to be spent.
    pub fn find<T>(
        &self,
        id: &[u8],
        lookup: Lookup,
        handshake: &mut HandshakeLookups,
        decode: impl FnOnce(&Envelope, u64) -> Result<T, &'static str>,
    ) -> Option<(T, &'static str)> {
        let process = self.process()?;
        let found = handshake.look_up(id, |handshake| self.find_in(&process, id, lookup, handshake, decode))?;
        found.inspect_err(|reason| process.store.count((Kind::Misses, reason))).ok()
    }

    /// Counts a hit: a handshake has resumed a session that [`Shim::find`] returned.
    pub fn hit(&self, reason: &'static str) {
        self.count((Kind::Hits, reason));
    }

    /// Counts a miss: no handshake has resumed a session that [`Shim::find`] returned.
    pub fn not_resumed(&self) {
        self.count((Kind::Misses, "not-resumed"));
    }

    /// Removes a session from the whole fleet, in the background.
    pub fn remove(&self, id: &[u8], reason: RemovalReason) {
        let Some(process) = self.process() else { return };
        let key = self.keys.key(id);
        if let Some(mirror) = &process.mirror {
            mirror.remove(&key);
        }
        process.sender.submit(&process.store, Item::Remove { key, reason: reason.name(), end: None }, When::Soon);
    }

    /// Counts a connection that was cut, which is no reason to remove its session (RFC 5246 section 7.2.1).
    pub fn kept(&self) {
        self.count((Kind::Removals, "kept"));
    }

    /// Counts a resumed connection that was ended, since its context turned out to be another one than its session's.
    pub fn terminated(&self) {
        self.count((Kind::Terminations, "context-mismatch"));
    }

    /// Counts a defect that a binding caught.
    pub fn internal_error(&self) {
        self.count((Kind::Misses, "internal-error"));
        log::error!("a session callback failed; the handshake goes on without resumption");
    }

    /// Waits until all Puts and removals so far are sent, and returns false if that took too long, or if a removal was refused or dropped
    /// and not requested again.
    pub fn flush(&self, patience: Duration) -> bool {
        self.running().is_none_or(|process| process.sender.flush(patience))
    }

    /// Whether the store kept failing, so that handshakes do not call it at present.
    #[must_use]
    pub fn breaker_open(&self) -> bool {
        self.running().is_some_and(|process| !process.store.breaker.closed())
    }

    /// The statistics of this process.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.running().map(|process| process.store.stats()).unwrap_or_default()
    }

    /// Sends the rest of the queue, for `patience` at most, and stops; nothing more is stored.
    pub fn close(&self, patience: Duration) {
        if let Some(process) = self.running() {
            process.sender.close(patience);
        }
    }

    fn count(&self, counted: (Kind, &'static str)) {
        if let Some(process) = self.process() {
            process.store.count(counted);
        }
    }

    fn find_in<T>(
        &self,
        process: &Process,
        id: &[u8],
        lookup: Lookup,
        handshake: &mut HandshakeLookups,
        decode: impl FnOnce(&Envelope, u64) -> Result<T, &'static str>,
    ) -> Result<(T, &'static str), &'static str> {
        let (key, now, waited) = (self.keys.key(id), unix_time(), handshake.waited());
        let end = Instant::now() + self.options.deadline.saturating_sub(waited);
        let query = Query { key, end, waited, answered: false };
        let (value, reason) = self.get(process, id, query, lookup, handshake, now)?;
        if process.sender.is_removed(&key) {
            return Err("unknown"); // the store may not have received the Remove yet
        }
        let (opened, not_after) = self.options.keyring.open(&key, &value, now)?;
        let envelope = Envelope::decode(&opened)?;
        if envelope.fingerprint != lookup.expected.fingerprint()? {
            return Err("context-mismatch");
        }
        let session = decode(&envelope, not_after)?;
        if !lookup.once && !self.options.single_use {
            return Ok((session, reason));
        }
        // A single use is the store's to grant, not a copy's. It is spent only now that the session is known to be of use.
        let query = Query { answered: reason != "mirror", ..query };
        if !query.answered {
            handshake.begin_call()?;
        }
        let (_, taken) = process.lookups.find(query, How::Take, false)?;
        Ok((session, if reason == "retried" { reason } else { taken }))
    }

    /// Returns the value of an id and the reason of the hit, from the mirror or the store.
    fn get(
        &self,
        process: &Process,
        id: &[u8],
        query: Query,
        lookup: Lookup,
        handshake: &mut HandshakeLookups,
        now: u64,
    ) -> Found {
        let expected = lookup.expected.fingerprint();
        // An id in the mirror is the fleet's: to open it first would only take time.
        if let Some(value) = process.mirror.as_ref().filter(|_| expected.is_ok()).and_then(|mirror| mirror.get(&query.key)) {
            return Ok((value, "mirror"));
        }
        let issued = self.options.keyring.open_id(&self.options.namespace, id);
        if !(1..=ID_BYTES).contains(&id.len()) || (issued.is_none() && lookup.ids.unwrap_or(self.options.ids) == Ids::Sealed) {
            return Err("foreign-id");
        }
        if issued.is_some_and(|issued| now > issued.saturating_add(self.options.lifetime.as_secs())) {
            return Err("expired-id");
        }
        expected?;
        handshake.begin_call()?;
        process.lookups.find(query, How::Get, issued.is_some_and(|issued| is_fresh(issued, now)))
    }

    /// The state of this process; None if the system has no thread for it.
    fn process(&self) -> Option<Arc<Process>> {
        self.running().or_else(|| self.begin())
    }

    fn running(&self) -> Option<Arc<Process>> {
        self.process.load_full().filter(|process| process.pid == std::process::id())
    }

    fn begin(&self) -> Option<Arc<Process>> {
        static BEGINNING: Turns = Turns::new();
        let _turn = BEGINNING.take();
        if let Some(process) = self.running() {
            return Some(process);
        }
        let parent = self.process.load_full();
        let process = Process::start(&self.options, &self.target, &self.endpoint, parent.as_deref())
            .inspect_err(|error| log::error!("no resumption: {error}"))
            .ok()?;
        // The parent's runtime belongs to the parent: here its threads do not exist, and no thread may wait for them.
        std::mem::forget(self.process.swap(Some(Arc::clone(&process))));
        Some(process)
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        self.close(CLOSE_PATIENCE);
        if self.running().is_none() {
            std::mem::forget(self.process.swap(None));
        }
    }
}

impl fmt::Debug for Shim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Shim").field("options", &self.options).finish_non_exhaustive()
    }
}

/// Whether the Put of a session may still be under way. One that was issued far ahead of this machine's clock is not: the clock is wrong.
fn is_fresh(issued: u64, now: u64) -> bool {
    now.abs_diff(issued) <= FRESHNESS.as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_fresh_for_ten_seconds_whichever_clock_is_ahead() {
        assert!(is_fresh(1000, 1000) && is_fresh(1000, 1010) && is_fresh(1010, 1000));
        assert!(!is_fresh(1000, 1011) && !is_fresh(1011, 1000));
    }
}
