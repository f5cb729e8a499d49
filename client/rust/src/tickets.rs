//! Fleet tickets: sessions that clients keep, encrypted with keys that all frontends of a namespace derive from the same secrets.
//!
//! For bindings to TLS stacks; they do the encryption and the decryption. At a ticket that is issued:
//!
//! 1. [`Tickets::secret_for_issue`], and without a secret [`Tickets::count_withheld`];
//! 2. [`Tickets::begin_state`], or [`Tickets::continue_state`] on a connection that a ticket has resumed;
//! 3. [`Tickets::count_issued`].
//!
//! At a ticket that a client offers:
//!
//! 1. [`Tickets::secret_for_name`], with the first 16 bytes;
//! 2. [`Tickets::check`], when it is decrypted, and [`Tickets::claim`] for single use;
//! 3. [`Tickets::count_resumed`], or [`Tickets::count_refused`] with the reason.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::agreement::Agreement;
use crate::clock::{self, Clock};
use crate::envelope::microseconds;
use crate::fingerprint::Fingerprint;
use crate::guarded_store::GuardedStore;
use crate::lookups::{Claim, Lookups};
use crate::options::Options;
use crate::removals::Removals;
use crate::sealing::{self, StoreKey, StoreKeys};
use crate::sender::{Item, Sender};
use crate::shim::{Expected, RemovalReason};
use crate::ticket_secret::{Epoch, NAME_BYTES, TicketSecret};
use crate::ticket_state::{Lineage, TicketState, hash_name};
use crate::v1::watch_event::Event;
use crate::v1::{NamespacePurged, SessionRemoved, WatchEvent, WatchResponse};
use crate::watching::Watcher;

/// How many bytes of a ticket a single use claims.
pub const HEAD_BYTES: usize = 32;
/// A session of more bytes is stored instead of sent as a ticket.
pub const MAX_SESSION_BYTES: usize = 8192;

pub(crate) const ISSUED: [&str; 2] = ["current", "held-over"];
pub(crate) const WITHHELD: [&str; 2] = ["no-secret", "unresumable"];
pub(crate) const RESUMED: [&str; 4] = ["current", "previous", "older", "next"];
pub(crate) const REFUSED: [&str; 20] = [
    "unknown-secret",
    "not-authentic",
    "malformed",
    "expired",
    "revoked",
    "purged",
    "removals-unknown",
    "replayed",
    "server-name-mismatch",
    "context-mismatch",
    "context-unknown",
    "context-unstable",
    "other-cipher",
    "timeout",
    "unavailable",
    "rejected",
    "limited",
    "breaker-open",
    "too-many-lookups",
    "internal-error",
];

/// The tickets of one namespace in one process: [`crate::Shim::tickets`].
///
/// No method waits for the store, except [`Tickets::claim`].
pub struct Tickets {
    rotation: u32,
    lifetime: u64,
    deadline: Duration,
    pub(crate) agreement: Agreement,
    pub(crate) removals: Removals,
    counts: Mutex<Counts>,
    lineage_keys: StoreKeys,
    use_keys: StoreKeys,
    clock: Arc<dyn Clock>,
    store: Arc<GuardedStore>,
    lookups: Arc<Lookups>,
    sender: Arc<Sender>,
}

#[derive(Clone, Default)]
struct Counts {
    issued: BTreeMap<&'static str, u64>,
    withheld: BTreeMap<&'static str, u64>,
    resumed: BTreeMap<&'static str, u64>,
    refused: BTreeMap<&'static str, u64>,
}

/// Statistics of the tickets of this process, counts by reason; the names are those of all clients.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct TicketStats {
    /// Tickets: `current`, with the secret of the present epoch; `held-over`, with that of an earlier one, since the store did not
    /// answer.
    pub issued: BTreeMap<&'static str, u64>,
    /// Handshakes that ended without a ticket: `no-secret`, `unresumable`.
    pub withheld: BTreeMap<&'static str, u64>,
    /// Resumed connections by the epoch of the ticket's secret, as seen from the present one: `current`, `previous`, `older`, `next`.
    pub resumed: BTreeMap<&'static str, u64>,
    /// Tickets of the fleet that did not resume, by reason.
    pub refused: BTreeMap<&'static str, u64>,
    /// Removals in memory.
    pub removals_held: usize,
    /// Secrets in memory.
    pub secrets_held: usize,
    /// Whether the stream of removals is live.
    pub live: bool,
}

impl Tickets {
    /// `parent` has the tickets of the process that this one was forked from, whose secrets and removals this one takes over.
    pub(crate) fn new(
        options: &Options,
        store: Arc<GuardedStore>,
        lookups: Arc<Lookups>,
        sender: Arc<Sender>,
        clock: Arc<dyn Clock>,
        parent: Option<&Self>,
    ) -> Self {
        let rotation = u32::try_from(options.rotation.as_secs()).unwrap_or(u32::MAX);
        let agreement = Agreement::new(options, Arc::clone(&clock));
        let removals = Removals::new(options.revocation_grace, Arc::clone(&clock));
        if let Some(parent) = parent {
            agreement.inherit(&parent.agreement);
            removals.inherit(&parent.removals);
        }
        Self {
            rotation,
            lifetime: options.lifetime.as_secs(),
            deadline: options.deadline,
            agreement,
            removals,
            counts: Mutex::default(),
            lineage_keys: StoreKeys::named("ticket-lineage", &options.namespace),
            use_keys: StoreKeys::named("ticket-use", &options.namespace),
            clock,
            store,
            lookups,
            sender,
        }
    }

    /// Returns the secret with which tickets are issued at present, and whether it is that of an earlier epoch, since the store did not
    /// answer. None: there is none, and the handshake ends without a ticket.
    #[must_use]
    pub fn secret_for_issue(&self) -> Option<(Arc<TicketSecret>, bool)> {
        self.agreement.secret_for_issue()
    }

    /// Returns the secret of the key with which a ticket begins: its first 16 bytes, or any others.
    ///
    /// None: this process does not have it. If the fleet has named the key, the refusal is counted (`unknown-secret`), and the secret is
    /// looked up in the background. Otherwise the ticket is no ticket of the fleet's.
    #[must_use]
    pub fn secret_for_name(&self, name: &[u8]) -> Option<Arc<TicketSecret>> {
        let found = self.agreement.secret_for_name(name);
        if found.is_none() && self.agreement.request(name) {
            self.count_refused("unknown-secret");
        }
        found
    }

    /// Returns the state of a ticket of a full handshake, which is to be encrypted with `secret`; None if it would have ended already.
    ///
    /// `server_name` is the name that the client asked for, empty if none. `peer_end` is the end of the client's certificate, in Unix
    /// seconds.
    #[must_use]
    pub fn begin_state(
        &self,
        secret: &TicketSecret,
        fingerprint: Fingerprint,
        server_name: &[u8],
        peer_end: Option<u64>,
    ) -> Option<TicketState> {
        let now = self.clock.now();
        let end = (clock::seconds(now) + self.lifetime).min(secret.not_after()).min(peer_end.unwrap_or(u64::MAX));
        let server_name = hash_name(server_name);
        self.unless_ended(TicketState {
            fingerprint,
            lineage: sealing::random(),
            negotiated: microseconds(now),
            end,
            server_name,
        })
    }

    /// Returns the state of a ticket of a connection that a ticket with the state `previous` has resumed, which is to be encrypted with
    /// `secret`; None if it would have ended already. Its lineage is the same, and its life is not longer.
    #[must_use]
    pub fn continue_state(&self, secret: &TicketSecret, previous: &TicketState) -> Option<TicketState> {
        self.unless_ended(TicketState { end: previous.end.min(secret.not_after()), ..*previous })
    }

    /// Returns the remaining life of a ticket that was decrypted, or the reason to refuse it.
    ///
    /// `name` has the first 16 bytes of the ticket. `expected` is the context fingerprint of the connection, `server_name` the name that its
    /// client asked for, empty if none.
    ///
    /// # Errors
    ///
    /// The reason, for [`Tickets::count_refused`].
    pub fn check(
        &self,
        state: &TicketState,
        name: &[u8],
        expected: Expected,
        server_name: &[u8],
    ) -> Result<Duration, &'static str> {
        // A purge may have ended it since the ticket was decrypted.
        self.agreement.secret_for_name(name).ok_or("unknown-secret")?;
        let remaining = self.remaining(state).ok_or("expired")?;
        if state.server_name != hash_name(server_name) {
            return Err("server-name-mismatch");
        }
        if state.fingerprint != expected.fingerprint()? {
            return Err("context-mismatch");
        }
        self.removals.check(&self.lineage_keys.key(&state.lineage), state.negotiated)?;
        Ok(remaining)
    }

    /// Claims the single use of a ticket, whose first 32 bytes are `head`. `waited` is how long the handshake has waited for the store
    /// before. Only for tickets that have passed [`Tickets::check`], and once for each handshake.
    ///
    /// # Errors
    ///
    /// The reason, for [`Tickets::count_refused`]: `replayed`, or that of the call.
    pub fn claim(&self, head: &[u8; HEAD_BYTES], state: &TicketState, waited: Duration) -> Result<(), &'static str> {
        let remaining = self.remaining(state).ok_or("expired")?;
        let end = Instant::now() + self.deadline.saturating_sub(waited);
        self.lookups.claim(Claim { key: self.use_keys.key(head), remaining, negotiated: state.negotiated, end, waited })
    }

    /// Removes a lineage, which ends at `end` (Unix seconds): at once in this process, and in the background in the whole fleet.
    pub fn remove(&self, lineage: &Lineage, end: u64, reason: RemovalReason) {
        let key = self.lineage_keys.key(lineage);
        self.removals.add(&key, end);
        self.sender.submit(&self.store, Item::Remove { key, reason: reason.name(), end: Some(end) }, false);
    }

    /// Returns how long a ticket of that state has still to live; None if it has ended.
    #[must_use]
    pub fn remaining(&self, state: &TicketState) -> Option<Duration> {
        let left = state.end.checked_sub(clock::seconds(self.clock.now())).filter(|left| *left > 0)?;
        Some(Duration::from_secs(left))
    }

    /// Counts a ticket that was issued.
    pub fn count_issued(&self, held_over: bool) {
        increment(&mut self.lock().issued, &ISSUED, if held_over { "held-over" } else { "current" });
    }

    /// Counts a handshake that ended without a ticket: `no-secret` or `unresumable`.
    pub fn count_withheld(&self, reason: &'static str) {
        increment(&mut self.lock().withheld, &WITHHELD, reason);
    }

    /// Counts a connection that a ticket has resumed, whose first 16 bytes are `name`.
    pub fn count_resumed(&self, name: &[u8; NAME_BYTES]) {
        let present = Epoch::at(clock::seconds(self.clock.now()), self.rotation);
        let start = Epoch::of_name(name).start;
        let epoch = match start {
            _ if start == present.start => "current",
            _ if start > present.start => "next",
            _ if start.saturating_add(self.rotation) == present.start => "previous",
            _ => "older",
        };
        increment(&mut self.lock().resumed, &RESUMED, epoch);
    }

    /// Counts a ticket of the fleet that did not resume.
    pub fn count_refused(&self, reason: &'static str) {
        increment(&mut self.lock().refused, &REFUSED, reason);
    }

    /// The statistics of this process.
    #[must_use]
    pub fn stats(&self) -> TicketStats {
        let Counts { issued, withheld, resumed, refused } = self.lock().clone();
        TicketStats {
            issued,
            withheld,
            resumed,
            refused,
            removals_held: self.removals.count(),
            secrets_held: self.agreement.count(),
            live: self.removals.live(),
        }
    }

    fn unless_ended(&self, state: TicketState) -> Option<TicketState> {
        self.remaining(&state).map(|_| state)
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watcher for Tickets {
    const REMOVALS_ONLY: bool = true;
    const LOST: &str = "the stream of removals has ended; tickets resume for the grace period";

    fn begin(&self, first: &WatchResponse) -> Result<(), String> {
        if first.removals_only {
            Ok(())
        } else {
            Err("the server knows no stream of removals, so no ticket resumes: update the servers of the store".into())
        }
    }

    fn take_in(&self, event: WatchEvent) {
        match event.event {
            Some(Event::Removed(SessionRemoved { key, ttl: Some(ttl) })) => {
                if let Ok(key) = StoreKey::try_from(key) {
                    self.agreement.drop_address(&key);
                    let seconds = u64::try_from(ttl.seconds).unwrap_or(0) + u64::from(ttl.nanos > 0);
                    self.removals.add(&key, clock::seconds(self.clock.now()).saturating_add(seconds));
                }
            }
            Some(Event::Purged(NamespacePurged { issued_before_time, purge_time })) => {
                let all = issued_before_time.is_none();
                let time = issued_before_time.or(purge_time).and_then(|time| SystemTime::try_from(time).ok());
                let before = microseconds(time.unwrap_or_else(|| self.clock.now()));
                if self.removals.purge(before) {
                    self.agreement.purge(before, all);
                }
            }
            // Changes that end no lineage.
            Some(Event::Stored(_) | Event::Removed(_)) => {}
            // An unknown change may have ended any.
            None => _ = self.removals.purge(microseconds(self.clock.now())),
        }
    }

    fn record_live(&self, then: Instant) {
        self.removals.record_live(then);
    }

    fn lose(&self) {}
}

fn increment(counts: &mut BTreeMap<&'static str, u64>, reasons: &[&str], reason: &'static str) {
    debug_assert!(reasons.contains(&reason), "{reason}");
    *counts.entry(reason).or_default() += 1;
}

impl fmt::Debug for Tickets {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Tickets").field("namespace", &self.store.namespace).finish_non_exhaustive()
    }
}
