//! Look-ups at the store: single-flight, with a deadline and a limit of how many are under way.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tonic::Code;

use crate::envelope::from_microseconds;
use crate::guarded_store::GuardedStore;
use crate::mirror::Mirror;
use crate::sealing::{self, StoreKey};
use crate::store::{Failure, How, ttl};
use crate::v1::batch_result::Result::{Error, Get, Put};
use crate::v1::{BatchOperation, GetRequest, PutRequest, batch_operation::Operation, batch_result};

/// The pauses before the retries of a look-up whose Put may be on its way, or the time that the deadline leaves.
pub(crate) const RETRY_PAUSES: [Duration; 4] =
    [Duration::from_millis(1), Duration::from_millis(4), Duration::from_millis(16), Duration::from_millis(64)];
/// The time that a further call must have left, so that its timeout is a failure of the store.
pub(crate) const LEAST_TIME: Duration = Duration::from_millis(10);
/// The share of the deadline for calls: the runtime has to notice a timeout before the handshake does, so that the breaker counts it.
pub(crate) const DEADLINE_PERCENT: u32 = 90;

/// A sealed value and the reason of the hit, or the reason of the miss.
pub(crate) type Found = Result<(Vec<u8>, &'static str), &'static str>;

/// One look-up of a handshake.
#[derive(Clone, Copy)]
pub(crate) struct Query {
    pub(crate) key: StoreKey,
    /// The end of the handshake's deadline.
    pub(crate) end: Instant,
    /// How long the handshake has waited in earlier look-ups.
    pub(crate) waited: Duration,
    /// Whether the store has answered an earlier call of this look-up: then a timeout of the next one is no failure of the store, since it
    /// had little time.
    pub(crate) answered: bool,
}

/// The single use of a ticket, which a handshake claims.
pub(crate) struct Claim {
    pub(crate) key: StoreKey,
    /// The address of the secret that encrypts the ticket.
    pub(crate) secret: StoreKey,
    /// For how long the ticket lives, and no other handshake may claim it.
    pub(crate) remaining: Duration,
    /// By how much longer the store keeps the claim: by the clock of another frontend the ticket may live longer.
    pub(crate) margin: Duration,
    /// When its lineage was negotiated, in microseconds after the Unix epoch.
    pub(crate) negotiated: u64,
    /// The end of the handshake's deadline.
    pub(crate) end: Instant,
    /// How long the handshake has waited before.
    pub(crate) waited: Duration,
}

impl Claim {
    /// Returns the Put of the claim, and after it the Get of the secret: a store that has lost its storage before the Put has no secret
    /// either.
    fn operations(&self, namespace: &str) -> Vec<BatchOperation> {
        let put = PutRequest {
            namespace: namespace.to_owned(),
            key: self.key.to_vec(),
            value: sealing::random::<16>().to_vec(),
            ttl: Some(ttl((self.remaining + self.margin).as_secs())),
            // A purge that this process has not heard of refuses it.
            issue_time: from_microseconds(self.negotiated).map(Into::into),
            pinned: true, // neither a full store nor its maximum lifetime of sessions ends it
        };
        let get = GetRequest { namespace: namespace.to_owned(), key: self.secret.to_vec() };
        [Operation::Put(put), Operation::Get(get)].map(|each| BatchOperation { operation: Some(each) }).into()
    }
}

/// Returns for how long the store keeps a claim, and the value of the secret, empty if it has none; None if the store has another claim, or
/// may have had one.
fn evaluate(results: &[Option<batch_result::Result>]) -> Result<Option<(Duration, Vec<u8>)>, Failure> {
    match results {
        [Some(Error(status)), _] if status.code == Code::AlreadyExists as i32 => Ok(None),
        [Some(Put(put)), Some(Get(get))] => {
            let kept = put.ttl.and_then(|ttl| Duration::try_from(ttl).ok()).unwrap_or_default();
            Ok(Some((kept, get.session.as_ref().map(|session| session.value.clone()).unwrap_or_default())))
        }
        [Some(Put(_)), Some(failed)] | [Some(failed), _] => Err(Failure::of_result(failed)),
        _ => Err(Failure::Refused),
    }
}

/// The look-ups of one process.
pub(crate) struct Lookups {
    store: Arc<GuardedStore>,
    mirror: Option<Arc<Mirror>>,
    runtime: Handle,
    flights: Mutex<HashMap<StoreKey, Arc<Flight>>>,
    running: AtomicUsize,
    /// Whether it was logged that the store keeps claims for too short a time.
    complained: AtomicBool,
    max_running: usize,
}

impl Lookups {
    pub(crate) fn new(store: Arc<GuardedStore>, mirror: Option<Arc<Mirror>>, runtime: Handle, max_running: usize) -> Self {
        Self {
            store,
            mirror,
            runtime,
            flights: Mutex::default(),
            running: AtomicUsize::new(0),
            complained: AtomicBool::new(false),
            max_running,
        }
    }

    /// Calls the store, unless there is a reason not to, and waits for the answer until the query's end. `retries` is whether the Put of
    /// the session may still be on its way.
    pub(crate) fn find(self: &Arc<Self>, query: Query, how: How, retries: bool) -> Found {
        let time = self.time_for_call(query.end, query.waited)?;
        let (flight, is_new) = self.join_or_start(query.key, how).ok_or("too-many-lookups")?;
        if is_new {
            let (lookups, flight) = (Arc::clone(self), Arc::clone(&flight));
            self.runtime.spawn(async move { lookups.run(&flight, query, how, retries, time).await });
        }
        let (value, reason) = flight.wait(query.end)?;
        Ok((value, if is_new { reason } else { "coalesced" }))
    }

    /// Puts a random value under a key, unless there is a reason not to, and returns the store's value of the ticket's secret, empty if it
    /// has none. `replayed` is the reason if there is another value under the key, `rejected` if the store would forget the value while the
    /// ticket lives.
    pub(crate) fn claim(self: &Arc<Self>, claim: Claim) -> Result<Vec<u8>, &'static str> {
        let time = self.time_for_call(claim.end, claim.waited)?;
        self.start().ok_or("too-many-lookups")?;
        let (lookups, flight, end, remaining) = (Arc::clone(self), Arc::new(Flight::default()), claim.end, claim.remaining);
        let claimed = Arc::clone(&flight);
        self.runtime.spawn(async move {
            let began = Instant::now();
            let operations = claim.operations(&lookups.store.namespace);
            let outcome = lookups.store.calls.batch(operations, (began + time).into()).await;
            let outcome = outcome.and_then(|results| evaluate(&results));
            lookups.store.observe(began.elapsed());
            lookups.running.fetch_sub(1, Ordering::Relaxed);
            match &outcome {
                Ok(_) => lookups.store.succeeded(),
                Err(failure) => lookups.store.failed(*failure, began),
            }
            claimed.finish(match outcome {
                Ok(Some((kept, _))) if kept < remaining => {
                    if !lookups.complained.swap(true, Ordering::Relaxed) {
                        log::error!(
                            "the store keeps the use of a ticket for {kept:?}, less than the ticket lives: update the store"
                        );
                    }
                    Err("rejected")
                }
                Ok(Some((_, secret))) => Ok((secret, "store")),
                Ok(None) => Err("replayed"),
                Err(failure) => Err(failure.reason()),
            });
        });
        flight.wait(end).map(|(secret, _)| secret)
    }

    /// Returns the time that a call may take which a handshake waits for until `end`, or the reason to make none.
    fn time_for_call(&self, end: Instant, waited: Duration) -> Result<Duration, &'static str> {
        if !self.store.breaker.closed() {
            return Err("breaker-open");
        }
        if self.store.breaker.rate_limited(Instant::now()) {
            return Err("limited");
        }
        let left = end.saturating_duration_since(Instant::now());
        if !waited.is_zero() && left < LEAST_TIME {
            // A call that earlier ones of the handshake have left no time for would count as a failure of the store.
            return Err("timeout");
        }
        Ok(left / 100 * DEADLINE_PERCENT)
    }

    /// Counts a call that begins, unless too many are under way.
    fn start(&self) -> Option<()> {
        if self.running.fetch_add(1, Ordering::Relaxed) >= self.max_running {
            self.running.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(())
    }

    /// Returns the look-up of a key that is under way, or a new one and true: the caller has to `run` that. None if too many are.
    fn join_or_start(&self, key: StoreKey, how: How) -> Option<(Arc<Flight>, bool)> {
        let mut flights = self.flights();
        if let Some(flight) = flights.get(&key).filter(|_| how == How::Get) {
            return Some((Arc::clone(flight), false));
        }
        self.start()?;
        let flight = Arc::new(Flight::default());
        if how == How::Get {
            // A Take has one winner, so handshakes do not share it.
            flights.insert(key, Arc::clone(&flight));
        }
        Some((flight, true))
    }

    async fn run(&self, flight: &Flight, query: Query, how: How, retries: bool, time: Duration) {
        let started = Instant::now();
        let found = self.call(query, how, retries, started + time).await;
        self.store.observe(started.elapsed());
        self.running.fetch_sub(1, Ordering::Relaxed);
        if how == How::Get {
            self.flights().remove(&query.key);
        }
        flight.finish(found);
    }

    async fn call(&self, query: Query, how: How, retries: bool, end: Instant) -> Found {
        let key = &query.key;
        let (began, end) = (Instant::now(), tokio::time::Instant::from_std(end));
        let since = self.mirror.as_ref().map_or(0, |mirror| mirror.removals());
        let mut answer = self.store.calls.look_up(key, how, end).await;
        let (mut reason, mut answered) = ("store", query.answered);
        for pause in RETRY_PAUSES.into_iter().filter(|_| retries) {
            let left = end.saturating_duration_since(tokio::time::Instant::now()).saturating_sub(LEAST_TIME);
            if !matches!(answer, Ok(None)) || left.is_zero() {
                break;
            }
            tokio::time::sleep(pause.min(left)).await;
            answer = self.store.calls.look_up(key, how, end).await;
            (reason, answered) = ("retried", true);
        }
        match answer {
            Err(Failure::Late) if answered => Err("timeout"),
            Err(failure) => {
                self.store.failed(failure, began);
                Err(failure.reason())
            }
            Ok(found) => {
                self.store.succeeded();
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

/// A look-up under way, whose result several handshakes may wait for.
#[derive(Default)]
struct Flight {
    found: Mutex<Option<Found>>,
    finished: Condvar,
}

impl Flight {
    fn finish(&self, found: Found) {
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        self.finished.notify_all();
    }

    fn wait(&self, end: Instant) -> Found {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let patience = end.saturating_duration_since(Instant::now());
        let waited = self.finished.wait_timeout_while(found, patience, |found| found.is_none());
        waited.map_or(Err("internal-error"), |(found, _)| found.clone().unwrap_or(Err("timeout")))
    }
}
