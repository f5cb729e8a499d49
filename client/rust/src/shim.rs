//! What to do at each session hook of a TLS server: the policy, for bindings to TLS stacks.
//!
//! - A handshake never waits for the store beyond the deadline, and not at all while the store keeps failing.
//! - A call that fails means no resumption, and nothing else.
//! - What comes from a peer (ids) and from the store (values) is foreign: neither is trusted.
//! - A session resumes only where its context fingerprint is expected, and a single use is not spent before that is known.
//! - A session's life counts from its negotiation. Whoever resumes or stores it again never prolongs it.
//! - A process that is forked begins anew: no thread, no connection, no count is its parent's.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwapOption;
use nix::sys::signal::{SigSet, SigmaskHow};
use tokio::runtime::{Builder, Handle};
use tonic::transport::Endpoint;

use crate::breaker::Breaker;
use crate::envelope::{self, Envelope};
use crate::fingerprint::Fingerprint;
use crate::mirror::Mirror;
use crate::options::{Ids, Options};
use crate::prober::Prober;
use crate::sealing::{self, Format, ID_BYTES, StoreKey, StoreKeys};
use crate::sender::{Item, Sender};
use crate::stats::{Kind, Recorder, Stats};
use crate::store::{Failure, How, Store};
use crate::target::Target;
use crate::turn::Turns;
use crate::{Error, store};

/// How long after its issue an id that the store does not know is asked for again: its Put may be on its way.
const FRESHNESS: u64 = 10;
/// The times to wait before each further ask, or what the deadline leaves.
const FRESH_PAUSES: [Duration; 4] =
    [Duration::from_millis(1), Duration::from_millis(4), Duration::from_millis(16), Duration::from_millis(64)];
/// What a further ask must have left of the deadline, so that it is not a failure of the store if it is late.
const LEAST_ASK: Duration = Duration::from_millis(10);
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);
/// The store's limit.
const LARGEST_VALUE: usize = 65_536;

/// A value and the reason of the hit, or the reason of the miss.
type Found = Result<(Vec<u8>, &'static str), &'static str>;

/// A key to ask the store for.
#[derive(Clone, Copy)]
struct Ask {
    key: StoreKey,
    /// When the handshake has waited long enough.
    end: Instant,
    /// How long it had waited in earlier look-ups.
    waited: Duration,
    /// Whether the store has answered this look-up before: if it is late now, it had little time.
    answered: bool,
}

/// Decides for one TLS context, or several that share their sessions.
///
/// This is what the bindings in this crate and in `libresumed` are made of. Its threads and connections are those of a process: they are
/// made when first needed, and again in a forked child.
pub struct Shim {
    number: u64,
    options: Options,
    target: Target,
    endpoint: Endpoint,
    keys: StoreKeys,
    process: ArcSwapOption<Process>,
}

/// Why a session is removed, as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// A connection failed with a fatal alert (RFC 5246 section 7.2.2).
    FatalError,
    /// The application asked for it.
    Application,
}

/// The context fingerprint that a session must have, so that it may resume on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// This one.
    Fingerprint(Fingerprint),
    /// The process has not seen yet which context serves such connections.
    Unknown,
    /// Different contexts serve such connections.
    Unstable,
}

impl Expected {
    fn fingerprint(self) -> Result<Fingerprint, &'static str> {
        match self {
            Self::Fingerprint(fingerprint) => Ok(fingerprint),
            Self::Unknown => Err("context-unknown"),
            Self::Unstable => Err("context-unstable"),
        }
    }
}

/// What is special about one look-up.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// The fingerprint that the session must have.
    pub expected: Expected,
    /// Whether to take the session from the whole fleet, whatever the options say.
    pub once: bool,
    /// Which ids are looked up, instead of what the options say.
    pub ids: Option<Ids>,
    /// How long this handshake has waited in look-ups before this one.
    pub waited: Duration,
}

impl Look {
    /// Returns a look-up of a session with such a fingerprint, as the options say.
    #[must_use]
    pub fn expecting(expected: Expected) -> Self {
        Self { expected, once: false, ids: None, waited: Duration::ZERO }
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

    /// Returns the id for a session about to be negotiated.
    #[must_use]
    pub fn issue_id(&self) -> [u8; ID_BYTES] {
        self.options.keyring.issue_id(&self.options.namespace, unix_time())
    }

    /// Whether a limit of the store is used up, so that sessions of full handshakes are not to be stored: their Puts, and the look-ups of
    /// what could not be stored, would use up what resumes those that are.
    #[must_use]
    pub fn sheds(&self) -> bool {
        let scarce = |process: Arc<Process>| process.breaker.scarce(Instant::now());
        self.options.ids == Ids::Sealed && self.running().is_some_and(scarce)
    }

    /// Notes a session that is not stored for that.
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
    /// `not_after` is the end of its life, in Unix seconds. `wait` is whether the handshake waits until it is stored, at most for the
    /// deadline.
    pub fn negotiated(&self, id: &[u8], envelope: &Envelope, not_after: u64, wait: bool) -> bool {
        let Some(process) = self.process() else { return false };
        let size = sealing::OVERHEAD_BYTES + envelope::HEADER_BYTES + envelope.session.len();
        if unix_time() >= not_after || size > LARGEST_VALUE {
            process.count((Kind::Puts, "unresumable"));
            return false;
        }
        let not_after = not_after.min(self.not_after());
        let key = self.keys.key(id);
        let value = self.options.keyring.seal(&key, &envelope.encode(), not_after);
        let number = process.sender.submit(&process, Item::Put { key, value, issued: envelope.issued, not_after }, wait);
        // After a call that failed, which may have been this handshake's look-up, a handshake does not wait once more.
        if let Some(number) = number.filter(|_| wait && process.breaker.answered() && process.sender.answered()) {
            process.sender.wait(number, self.options.deadline);
        }
        number.is_some()
    }

    /// Notes a session that cannot be resumed from the store, and so is not stored.
    pub fn unresumable(&self) {
        self.count((Kind::Puts, "unresumable"));
    }

    /// Returns the session of an id that a client offered, any bytes at all, or None to make a full handshake.
    ///
    /// `decode` makes a session of an envelope and its `not_after`, or returns the reason why it cannot. It has no side effects: a single
    /// use is taken only after it, and may turn out to be spent.
    pub fn look_up<T>(
        &self,
        id: &[u8],
        look: Look,
        decode: impl FnOnce(&Envelope, u64) -> Result<T, &'static str>,
    ) -> Option<T> {
        let process = self.process()?;
        let found = self.find(&process, id, look, decode);
        match found {
            Ok((session, reason)) => {
                process.count((Kind::Hits, reason));
                Some(session)
            }
            Err(reason) => {
                process.count((Kind::Misses, reason));
                None
            }
        }
    }

    /// Removes a session from the whole fleet, in the background.
    pub fn remove(&self, id: &[u8], removal: Removal) {
        let Some(process) = self.process() else { return };
        let key = self.keys.key(id);
        if let Some(mirror) = &process.mirror {
            mirror.remove(&key);
        }
        let reason = match removal {
            Removal::FatalError => "fatal-error",
            Removal::Application => "application",
        };
        process.sender.submit(&process, Item::Remove { key, reason }, false);
    }

    /// Notes a connection that was cut, which says nothing against its session (RFC 5246 section 7.2.1).
    pub fn kept(&self) {
        self.count((Kind::Removals, "kept"));
    }

    /// Notes a resumed connection that was ended, since its context turned out to be another one than its session's.
    pub fn terminated(&self) {
        self.count((Kind::Terminations, "context-mismatch"));
    }

    /// Notes a defect that a binding caught.
    pub fn internal_error(&self) {
        self.count((Kind::Misses, "internal-error"));
        log::error!("a session callback failed; the handshake goes on without resumption");
    }

    /// Waits until all Puts and removals so far are sent, and returns false if that took too long.
    pub fn flush(&self, patience: Duration) -> bool {
        self.running().is_none_or(|process| process.sender.flush(patience))
    }

    /// Whether the store kept failing, so that handshakes do not ask it at present.
    #[must_use]
    pub fn resting(&self) -> bool {
        self.running().is_some_and(|process| !process.breaker.closed())
    }

    /// What happened in this process so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.running().map(|process| process.recorder.snapshot()).unwrap_or_default()
    }

    /// Sends what is not sent yet, for `patience` at most, and stops; nothing more is stored.
    pub fn close(&self, patience: Duration) {
        if let Some(process) = self.running() {
            process.sender.close(patience);
        }
    }

    fn count(&self, counted: (Kind, &'static str)) {
        if let Some(process) = self.process() {
            process.count(counted);
        }
    }

    fn find<T>(
        &self,
        process: &Arc<Process>,
        id: &[u8],
        look: Look,
        decode: impl FnOnce(&Envelope, u64) -> Result<T, &'static str>,
    ) -> Result<(T, &'static str), &'static str> {
        let (key, now) = (self.keys.key(id), unix_time());
        let end = Instant::now() + self.options.deadline.saturating_sub(look.waited);
        let ask = Ask { key, end, waited: look.waited, answered: false };
        let (value, reason) = self.get(process, id, ask, look, now)?;
        if process.sender.is_removed(&key) {
            return Err("unknown"); // the store may not have heard of it yet
        }
        let (opened, not_after) = self.options.keyring.open(&key, &value, now)?;
        let envelope = Envelope::decode(&opened)?;
        if envelope.fingerprint != look.expected.fingerprint()? {
            return Err("context-mismatch");
        }
        let session = decode(&envelope, not_after)?;
        if !look.once && !self.options.single_use {
            return Ok((session, reason));
        }
        // A single use is the store's to grant, not a copy's. It is spent only now that the session is known to be of use.
        let ask = Ask { answered: reason != "mirror", ..ask };
        let (_, taken) = process.call(ask, How::Take, false)?;
        Ok((session, if reason == "retried" { reason } else { taken }))
    }

    /// Returns the value of an id and the reason of the hit, from the mirror or the store.
    fn get(&self, process: &Arc<Process>, id: &[u8], ask: Ask, look: Look, now: u64) -> Found {
        let expected = look.expected.fingerprint();
        // An id in the mirror is the fleet's: to open it first would only take time.
        if let Some(value) = process.mirror.as_ref().filter(|_| expected.is_ok()).and_then(|mirror| mirror.get(&ask.key)) {
            return Ok((value, "mirror"));
        }
        let issued = self.options.keyring.open_id(&self.options.namespace, id);
        if !(1..=ID_BYTES).contains(&id.len()) || (issued.is_none() && look.ids.unwrap_or(self.options.ids) == Ids::Sealed) {
            return Err("foreign-id");
        }
        if issued.is_some_and(|issued| now > issued.saturating_add(self.options.lifetime.as_secs())) {
            return Err("expired-id");
        }
        expected?;
        process.call(ask, How::Get, issued.is_some_and(|issued| is_fresh(issued, now)))
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
        let process = Process::start(&self.options, &self.target, &self.endpoint)
            .inspect_err(|error| log::error!("no resumption: {error}"))
            .ok()?;
        // The parent's runtime belongs to the parent: here its threads do not exist, and nobody may wait for them.
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

/// What a shim has in one process: a thread, in which all calls are made.
pub(crate) struct Process {
    pid: u32,
    pub(crate) namespace: String,
    pub(crate) deadline: Duration,
    pub(crate) store: Store,
    pub(crate) sender: Sender,
    pub(crate) breaker: Breaker,
    prober: Prober,
    recorder: Recorder,
    mirror: Option<Mirror>,
    handle: Handle,
    flights: Mutex<HashMap<StoreKey, Arc<Flight>>>,
    lookups: AtomicUsize,
    max_lookups: usize,
}

impl Process {
    fn start(options: &Options, target: &Target, endpoint: &Endpoint) -> Result<Arc<Self>, Error> {
        let failed = |error: std::io::Error| Error::new(format!("no thread for the store: {error}"));
        let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let entered = runtime.enter();
        let process = Arc::new(Self {
            pid: std::process::id(),
            namespace: options.namespace.clone(),
            deadline: options.deadline,
            store: Store::new(options, target, endpoint),
            sender: Sender::default(),
            breaker: Breaker::default(),
            prober: Prober::default(),
            recorder: Recorder::default(),
            mirror: (options.mirror > 0).then(|| Mirror::new(options.mirror)),
            handle: runtime.handle().clone(),
            flights: Mutex::default(),
            lookups: AtomicUsize::new(0),
            max_lookups: options.max_lookups,
        });
        drop(entered);
        let running = Arc::clone(&process);
        // Signals are for the program's own threads: many servers count on being interrupted by theirs.
        let blocked = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
        let thread = thread::Builder::new().name("resumed".into()).spawn(move || {
            runtime.block_on(async {
                let [mirror, servers, credentials, prober] = [(); 4].map(|()| Arc::clone(&running));
                tokio::spawn(async move {
                    if let Some(copy) = &mirror.mirror {
                        copy.follow(&mirror.store).await;
                    }
                });
                tokio::spawn(async move { servers.store.follow_servers().await });
                tokio::spawn(async move { credentials.store.follow_credentials().await });
                tokio::spawn(async move { prober.prober.run(&prober).await });
                running.sender.run(&running).await;
            });
        });
        if let Ok(mask) = blocked {
            let _ = mask.thread_set_mask();
        }
        thread.map_err(failed)?;
        Ok(process)
    }

    pub(crate) fn count(&self, (kind, reason): (Kind, &'static str)) {
        self.recorder.count(kind, reason);
    }

    /// Notes a look-up that began then and has failed.
    fn failed(&self, failure: Failure, began: Instant) {
        if failure == Failure::Limited {
            self.limited();
        } else if !(failure == Failure::Late && self.breaker.held_back(Instant::now()))
            && self.breaker.failed(began, Instant::now())
        {
            log::warn!("the store at {} keeps failing ({}), resumption rests", self.store.target(), failure.reason());
            self.prober.start();
        }
    }

    /// Notes a look-up that was refused because of a limit, which is no outage.
    pub(crate) fn limited(&self) {
        self.answers(self.breaker.reached());
        self.breaker.limited(Instant::now());
    }

    pub(crate) fn succeeded(&self) {
        self.answers(self.breaker.succeeded());
    }

    fn answers(&self, again: bool) {
        if again {
            log::info!("the store at {} answers again", self.store.target());
        }
    }

    /// Asks the store, unless there is a reason not to.
    fn call(self: &Arc<Self>, ask: Ask, how: How, fresh: bool) -> Found {
        if !self.breaker.closed() {
            return Err("breaker-open");
        }
        if self.breaker.resting(Instant::now()) {
            return Err("limited");
        }
        let left = ask.end.saturating_duration_since(Instant::now());
        if !ask.waited.is_zero() && left < LEAST_ASK {
            // A call that the earlier look-ups of a handshake have left no time for would count as a failure of the store.
            return Err("timeout");
        }
        let (flight, mine) = self.board(ask.key, how).ok_or("too-many-lookups")?;
        if mine {
            let (process, flight) = (Arc::clone(self), Arc::clone(&flight));
            // A call that is too late is to be noticed here, and to open the breaker: so it gets a little less.
            let time = left / 10 * 9;
            self.handle.clone().spawn(async move { process.fly(&flight, ask, how, fresh, time).await });
        }
        let (value, reason) = flight.wait(ask.end)?;
        Ok((value, if mine { reason } else { "coalesced" }))
    }

    /// Returns the look-up of `key` that is under way, or a new one and true: whoever gets that has to `fly` it.
    fn board(&self, key: StoreKey, how: How) -> Option<(Arc<Flight>, bool)> {
        let mut flights = self.flights();
        if let Some(flight) = flights.get(&key).filter(|_| how == How::Get) {
            return Some((Arc::clone(flight), false));
        }
        if self.lookups.fetch_add(1, Ordering::Relaxed) >= self.max_lookups {
            self.lookups.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        let flight = Arc::new(Flight::default());
        if how == How::Get {
            // of all who ask for a single use one is answered
            flights.insert(key, Arc::clone(&flight));
        }
        Some((flight, true))
    }

    async fn fly(&self, flight: &Flight, ask: Ask, how: How, fresh: bool, time: Duration) {
        let started = Instant::now();
        let found = self.ask(ask, how, fresh, started + time).await;
        self.recorder.observe(started.elapsed());
        self.lookups.fetch_sub(1, Ordering::Relaxed);
        if how == How::Get {
            self.flights().remove(&ask.key);
        }
        flight.land(found);
    }

    async fn ask(&self, ask: Ask, how: How, fresh: bool, end: Instant) -> Found {
        let key = &ask.key;
        let (began, end) = (Instant::now(), tokio::time::Instant::from_std(end));
        let since = self.mirror.as_ref().map_or(0, Mirror::removals);
        let mut answer = self.store.look_up(key, how, end).await;
        let (mut reason, mut answered) = ("store", ask.answered);
        for pause in FRESH_PAUSES.into_iter().filter(|_| fresh) {
            let left = end.saturating_duration_since(tokio::time::Instant::now()).saturating_sub(LEAST_ASK);
            if !matches!(answer, Ok(None)) || left.is_zero() {
                break;
            }
            tokio::time::sleep(pause.min(left)).await;
            answer = self.store.look_up(key, how, end).await;
            (reason, answered) = ("retried", true);
        }
        match answer {
            Err(Failure::Late) if answered => Err("timeout"),
            Err(failure) => {
                self.failed(failure, began);
                Err(failure.reason())
            }
            Ok(found) => {
                self.succeeded();
                match &self.mirror {
                    Some(mirror) if how == How::Take => mirror.remove(key),
                    Some(mirror) => found.iter().for_each(|session| mirror.found(key, session, since)),
                    None => {}
                }
                found.map(|session| (session.value, reason)).ok_or("unknown")
            }
        }
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<StoreKey, Arc<Flight>>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A look-up under way, which several handshakes may wait for.
#[derive(Default)]
struct Flight {
    found: Mutex<Option<Found>>,
    landed: Condvar,
}

impl Flight {
    fn land(&self, found: Found) {
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        self.landed.notify_all();
    }

    fn wait(&self, end: Instant) -> Found {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let patience = end.saturating_duration_since(Instant::now());
        let waited = self.landed.wait_timeout_while(found, patience, |found| found.is_none());
        waited.map_or(Err("internal-error"), |(found, _)| found.clone().unwrap_or(Err("timeout")))
    }
}

/// Whether the Put of a session may still be under way. One that was issued far ahead of this machine's clock is not: the clock is wrong.
fn is_fresh(issued: u64, now: u64) -> bool {
    now.abs_diff(issued) <= FRESHNESS
}

/// The present, in Unix seconds.
pub(crate) fn unix_time() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_clock_ahead_of_this_one_has_issued_is_not_fresh_for_ever() {
        assert!(is_fresh(1000, 1000) && is_fresh(1000, 1000 + FRESHNESS) && is_fresh(1000 + FRESHNESS, 1000));
        assert!(!is_fresh(1000, 1001 + FRESHNESS) && !is_fresh(1001 + FRESHNESS, 1000));
    }
}
