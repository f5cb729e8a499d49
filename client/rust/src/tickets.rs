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
use crate::fingerprint::{Expected, Fingerprint};
use crate::guarded_store::GuardedStore;
use crate::lookups::{Claim, Lookups};
use crate::options::{Options, When};
use crate::removals::{OwnRemoval, OwnRemovals, Removals};
use crate::sealing::{self, StoreKey, StoreKeys};
use crate::sender::{Item, Sender};
use crate::stats::RemovalReason;
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
    own_removals: OwnRemovals,
    single_use: bool,
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
    /// When the secret that encrypts new tickets was created, in Unix seconds; None if there is none.
    pub secret_created: Option<u64>,
    /// Whether that secret is of an epoch that has ended, since the store did not answer.
    pub secret_held_over: bool,
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
            own_removals: OwnRemovals::default(),
            single_use: options.single_use,
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
    /// The reason, for [`Tickets::count_refused`]: `replayed`; `unknown-secret` if the store does not have the secret of the ticket, so that it
    /// has lost its storage since, and may have lost an earlier claim; or that of the call.
    pub fn claim(&self, head: &[u8; HEAD_BYTES], state: &TicketState, waited: Duration) -> Result<(), &'static str> {
        let secret = self.agreement.secret_for_name(&head[..NAME_BYTES]).ok_or("unknown-secret")?;
        let remaining = self.remaining(state).ok_or("expired")?;
        let end = Instant::now() + self.deadline.saturating_sub(waited);
        let claim = Claim {
            key: self.use_keys.key(head),
            secret: secret.address,
            remaining,
            // If a step of the store's clock ends the claim, it has ended the secret before.
            margin: self.margin().max(Duration::from_secs(secret.not_after().saturating_sub(state.end))),
            negotiated: state.negotiated,
            end,
            waited,
        };
        let stored = self.lookups.claim(claim)?;
        if self.agreement.is_stored_as(&secret, &stored) { Ok(()) } else { Err("unknown-secret") }
    }

    /// Removes a lineage, which ends at `end` (Unix seconds): at once in this process, and in the background in the whole fleet.
    pub fn remove(&self, lineage: &Lineage, end: u64, reason: RemovalReason) {
        let (key, end) = (self.lineage_keys.key(lineage), end.saturating_add(self.margin().as_secs()));
        let removal = OwnRemoval { key, reason, end };
        self.removals.add(&key, end);
        self.own_removals.add(removal);
        self.send(removal);
    }

    fn send(&self, OwnRemoval { key, reason, end }: OwnRemoval) {
        self.sender.submit(&self.store, Item::Remove { key, reason: reason.name(), end: Some(end) }, When::Soon);
    }

    /// Sends the removals of this process again: the store may have lost them with its storage. It may have lost the uses of tickets as well,
    /// so tickets of single use are void from here on.
    fn make_up_for_loss(&self) {
        self.agreement.recheck();
        let now = self.clock.now();
        self.own_removals.in_force(clock::seconds(now)).into_iter().for_each(|removal| self.send(removal));
        if self.single_use && self.removals.purge(microseconds(now)) {
            self.agreement.purge(microseconds(now), true);
        }
    }

    /// The time by which the clock of another frontend may be behind, for what must outlive a ticket there.
    fn margin(&self) -> Duration {
        Duration::from_secs(self.rotation.into())
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
        let secret = self.secret_for_issue();
        TicketStats {
            issued,
            withheld,
            resumed,
            refused,
            removals_held: self.removals.count(),
            secrets_held: self.agreement.count(),
            live: self.removals.live(),
            secret_created: secret.as_ref().map(|(secret, _)| secret.created / 1_000_000),
            secret_held_over: secret.is_some_and(|(_, held_over)| held_over),
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

    fn begin(&self, first: &WatchResponse, follows: bool) -> Result<(), String> {
        if !first.removals_only {
            return Err("the server knows no stream of removals, so no ticket resumes: update the servers of the store".into());
        }
        if follows && !first.continued {
            self.make_up_for_loss();
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use tokio::runtime::{Builder, Runtime};

    use super::*;
    use crate::agreement::tests::FakeStore;
    use crate::clock::fake::FakeClock;
    use crate::store::{self, Store, ttl};
    use crate::target::Target;
    use crate::{Keyring, v1};

    const START: u64 = 1_800_000_000; // a multiple of an hour
    const CONTEXT: Fingerprint = [1; 32];

    /// A frontend whose store for handshakes is down, and whose secrets are agreed on with a store in memory.
    struct Frontend {
        tickets: Tickets,
        clock: Arc<FakeClock>,
        runtime: Runtime,
    }

    impl Frontend {
        fn new(store: &FakeStore) -> Self {
            let frontend = Self::without_secrets(None);
            frontend.step(store);
            frontend
        }

        fn without_secrets(parent: Option<&Self>) -> Self {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            let mut options = Options::new("127.0.0.1:1", "shop", Keyring::from_keys(&[[7; 32]]).unwrap());
            options.deadline = Duration::from_secs(5);
            let target = Target::parse(&options.target).unwrap();
            let endpoint = store::endpoint(&target, None).unwrap();
            let entered = runtime.enter();
            let store = Arc::new(GuardedStore::new("shop".into(), options.deadline, Store::new(&options, &target, &endpoint)));
            drop(entered);
            let lookups = Arc::new(Lookups::new(Arc::clone(&store), None, runtime.handle().clone(), options.max_lookups));
            let clock = parent.map_or_else(|| Arc::new(FakeClock::at(START)), |parent| Arc::clone(&parent.clock));
            let parent = parent.map(|parent| &parent.tickets);
            let tickets = Tickets::new(&options, store, lookups, Arc::default(), Arc::clone(&clock) as _, parent);
            Self { tickets, clock, runtime }
        }

        fn step(&self, store: &FakeStore) {
            self.runtime.block_on(self.tickets.agreement.step(store));
        }

        /// Has the stream of removals deliver an event, and be live.
        fn receive(&self, event: Option<Event>) {
            self.tickets.take_in(WatchEvent { event });
            self.tickets.record_live(self.clock.instant());
        }

        fn advance(&self, seconds: u64) {
            self.clock.advance(Duration::from_secs(seconds));
            self.tickets.record_live(self.clock.instant());
        }

        fn secret(&self) -> Arc<TicketSecret> {
            self.tickets.secret_for_issue().unwrap().0
        }

        fn issue(&self) -> (Arc<TicketSecret>, TicketState) {
            let secret = self.secret();
            let state = self.tickets.begin_state(&secret, CONTEXT, b"shop.example", None).unwrap();
            (secret, state)
        }

        fn check(&self, (secret, state): &(Arc<TicketSecret>, TicketState)) -> Result<Duration, &'static str> {
            self.tickets.check(state, secret.name(), Expected::Fingerprint(CONTEXT), b"shop.example")
        }
    }

    fn live() -> (Frontend, FakeStore) {
        let store = FakeStore::default();
        let frontend = Frontend::new(&store);
        frontend.advance(0);
        (frontend, store)
    }

    fn purged(issued_before: Option<u64>, at: u64) -> Event {
        let time = |seconds: u64| prost_types::Timestamp { seconds: i64::try_from(seconds).unwrap(), nanos: 0 };
        Event::Purged(NamespacePurged { issued_before_time: issued_before.map(time), purge_time: Some(time(at)) })
    }

    #[test]
    fn a_ticket_lives_as_long_as_its_session_its_secret_and_the_certificate_of_its_client() {
        let (frontend, _) = live();
        let secret = frontend.secret();
        assert_eq!(secret.not_after(), START + 2 * 3600 + 7200);
        let end = |peer_end| frontend.tickets.begin_state(&secret, CONTEXT, b"", peer_end).map(|state| state.end);
        assert_eq!(end(None), Some(START + 7200));
        assert_eq!(end(Some(START + 10)), Some(START + 10));
        assert_eq!(end(Some(START)), None);
        frontend.advance(2 * 3600 + 100);
        assert_eq!(end(None), Some(secret.not_after()));
    }

    #[test]
    fn the_tickets_of_a_resumed_connection_have_its_lineage_and_end_no_later() {
        let (frontend, store) = live();
        let (_, state) = frontend.issue();
        frontend.advance(3600);
        frontend.step(&store);
        let later = frontend.secret();
        assert_eq!(frontend.tickets.continue_state(&later, &state), Some(state), "the secret ends later");
        let long = TicketState { end: u64::MAX, ..state };
        assert_eq!(frontend.tickets.continue_state(&later, &long), Some(TicketState { end: later.not_after(), ..state }));
        frontend.advance(3600);
        assert_eq!(frontend.tickets.continue_state(&later, &state), None);
        assert_ne!(frontend.tickets.begin_state(&later, CONTEXT, b"", None).unwrap().lineage, state.lineage);
    }

    #[test]
    fn a_ticket_is_accepted_where_all_that_it_proves_is_expected() {
        let (frontend, _) = live();
        let (secret, state) = frontend.issue();
        let check = |expected, name: &[u8]| frontend.tickets.check(&state, secret.name(), expected, name);
        assert_eq!(check(Expected::Fingerprint(CONTEXT), b"Shop.Example"), Ok(Duration::from_secs(7200)));
        assert_eq!(check(Expected::Fingerprint(CONTEXT), b""), Err("server-name-mismatch"));
        assert_eq!(check(Expected::Fingerprint([2; 32]), b"shop.example"), Err("context-mismatch"));
        assert_eq!(check(Expected::Unknown, b"shop.example"), Err("context-unknown"));
        assert_eq!(check(Expected::Unstable, b"shop.example"), Err("context-unstable"));
        frontend.advance(7199);
        assert_eq!(check(Expected::Fingerprint(CONTEXT), b"shop.example"), Ok(Duration::from_secs(1)));
        frontend.advance(1);
        assert_eq!(check(Expected::Fingerprint(CONTEXT), b"shop.example"), Err("expired"));
    }

    #[test]
    fn no_ticket_is_accepted_before_the_removals_are_known() {
        let frontend = Frontend::new(&FakeStore::default());
        let ticket = frontend.issue();
        assert_eq!((frontend.check(&ticket), frontend.tickets.stats().live), (Err("removals-unknown"), false));
        frontend.receive(Some(purged(Some(START - 10), START)));
        assert!(frontend.check(&ticket).is_ok() && frontend.tickets.stats().live);
    }

    #[test]
    fn a_server_without_a_stream_of_removals_is_refused() {
        let (frontend, _) = live();
        let first = |removals_only| WatchResponse { removals_only, ..Default::default() };
        assert!(frontend.tickets.begin(&first(true), false).is_ok());
        assert!(frontend.tickets.begin(&first(false), false).unwrap_err().contains("update the servers"));
    }

    #[test]
    fn a_removed_lineage_is_refused_at_once_and_at_the_frontends_that_the_store_notifies() {
        let store = FakeStore::default();
        let (one, other) = (Frontend::new(&store), Frontend::new(&store));
        for frontend in [&one, &other] {
            frontend.advance(0);
        }
        let (ticket, kept) = (one.issue(), one.issue());
        one.tickets.remove(&ticket.1.lineage, ticket.1.end, RemovalReason::Application);
        assert_eq!((one.check(&ticket), one.check(&kept).is_ok()), (Err("revoked"), true));
        assert_eq!(one.tickets.stats().removals_held, 1);
        assert!(other.check(&ticket).is_ok());
        let key = StoreKeys::named("ticket-lineage", "shop").key(&ticket.1.lineage).to_vec();
        other.receive(Some(Event::Removed(SessionRemoved { key: key.clone(), ttl: None })));
        assert!(other.check(&ticket).is_ok(), "not a lasting removal");
        let lasting = v1::SessionRemoved { key, ttl: Some(ttl(10)) };
        other.receive(Some(Event::Removed(lasting)));
        assert_eq!((other.check(&ticket), other.check(&kept).is_ok()), (Err("revoked"), true));
    }

    #[test]
    fn a_purge_ends_tickets_and_secrets_from_before_it() {
        for by_time in [false, true] {
            let (frontend, store) = live();
            let ticket = frontend.issue();
            frontend.advance(10);
            let (newer, purge) = (frontend.issue(), purged(by_time.then_some(START + 5), START + 5));
            store.purge((START + 5) * 1_000_000);
            frontend.receive(Some(purge.clone()));
            assert_eq!(frontend.check(&ticket), Err("unknown-secret"));
            assert_eq!(frontend.check(&newer), Err("unknown-secret"), "its secret was created before");
            assert!(frontend.tickets.secret_for_issue().is_none());
            frontend.step(&store);
            let next = frontend.issue();
            assert!(frontend.check(&next).is_ok());
            let old = (Arc::clone(&next.0), TicketState { negotiated: START * 1_000_000, ..next.1 });
            assert_eq!(frontend.check(&old), Err("purged"));
            frontend.receive(Some(purge));
            assert!(frontend.check(&next).is_ok(), "the same purge again, at the beginning of another stream");
        }
    }

    #[test]
    fn the_statistics_show_that_the_secret_is_held_over() {
        let (frontend, _) = live();
        let secret = || {
            let stats = frontend.tickets.stats();
            (stats.secret_created, stats.secret_held_over)
        };
        assert_eq!(secret(), (Some(START), false));
        frontend.advance(2 * 3600); // beyond the epoch that was the next one
        assert_eq!(secret(), (Some(START), true));
        frontend.advance(24 * 3600);
        assert_eq!(secret(), (None, false));
    }

    #[test]
    fn an_unknown_change_ends_all_tickets_up_to_now() {
        let (frontend, _) = live();
        let ticket = frontend.issue();
        frontend.advance(1);
        frontend.receive(None);
        assert_eq!(frontend.check(&ticket), Err("purged"));
        assert!(frontend.check(&frontend.issue()).is_ok());
    }

    #[test]
    fn a_removal_of_a_secrets_address_ends_its_tickets() {
        let (frontend, _) = live();
        let ticket = frontend.issue();
        let key = ticket.0.address.to_vec();
        frontend.receive(Some(Event::Removed(SessionRemoved { key, ttl: Some(ttl(10)) })));
        assert_eq!(frontend.check(&ticket), Err("unknown-secret"));
    }

    #[test]
    fn resumed_connections_are_counted_by_epoch() {
        let (frontend, store) = live();
        let name = |frontend: &Frontend| *frontend.secret().name();
        let mut names = Vec::new();
        for _ in 0..4 {
            names.push(name(&frontend));
            frontend.advance(3599);
            frontend.step(&store);
            frontend.advance(1);
            frontend.step(&store);
        }
        frontend.clock.set(START + 2 * 3600);
        for name in &names {
            frontend.tickets.count_resumed(name);
        }
        let expected = [("current", 1), ("previous", 1), ("older", 1), ("next", 1)];
        assert_eq!(frontend.tickets.stats().resumed, expected.into());
    }

    #[test]
    fn a_ticket_of_an_unknown_secret_is_counted_if_the_fleet_has_named_its_key() {
        let (frontend, _) = live();
        let mut name = *live().0.secret().name();
        assert!(frontend.tickets.secret_for_name(&name).is_none());
        name[0] ^= 1;
        assert!(frontend.tickets.secret_for_name(&name).is_none());
        assert_eq!(frontend.tickets.stats().refused, [("unknown-secret", 1)].into());
    }

    #[test]
    fn a_claim_at_a_store_that_is_down_is_refused_with_the_reason_of_the_call() {
        let (frontend, _) = live();
        let (secret, state) = frontend.issue();
        let mut head = [1; HEAD_BYTES];
        head[..NAME_BYTES].copy_from_slice(secret.name());
        let Frontend { tickets, runtime, .. } = &frontend;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let claims = std::thread::scope(|scope| {
            scope.spawn(move || runtime.block_on(stopped)); // as the thread of a process does
            let claims = [(); 4].map(|()| tickets.claim(&head, &state, Duration::ZERO));
            drop(stop);
            claims
        });
        assert_eq!(claims, [Err("unavailable"), Err("unavailable"), Err("unavailable"), Err("breaker-open")]);
    }

    #[test]
    fn a_forked_child_has_its_parents_secrets_and_removals() {
        let (parent, _) = live();
        let (ticket, removed) = (parent.issue(), parent.issue());
        parent.tickets.remove(&removed.1.lineage, removed.1.end, RemovalReason::FatalError);
        let child = Frontend::without_secrets(Some(&parent));
        assert_eq!((child.check(&ticket).is_ok(), child.check(&removed)), (true, Err("revoked")));
        // Its own stream has to be live within the grace.
        child.clock.advance(Duration::from_secs(299));
        assert!(child.check(&ticket).is_ok());
        child.clock.advance(Duration::from_secs(1));
        assert_eq!(child.check(&ticket), Err("removals-unknown"));
    }
}
