//! The agreement on ticket secrets: each epoch has one, which the frontends of a namespace find in the store or put there.
//!
//! A process holds the secrets of all epochs whose tickets may still live, and that of the next epoch. Store keys are write-once, so of
//! several proposals one wins, and the others Get it.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::Notify;
use tokio::time::timeout;
use tonic::Code;

use crate::Keyring;
use crate::clock::{self, Clock};
use crate::envelope::{from_microseconds, microseconds};
use crate::guarded_store::GuardedStore;
use crate::options::{LONGEST_LIFETIME, Options};
use crate::pauses::Pauses;
use crate::sealing::{self, FleetKey, KeyId, StoreKey, StoreKeys};
use crate::sender::BATCH_OPERATIONS;
use crate::store::{Failure, ttl};
use crate::ticket_secret::{self, Epoch, MAX_GENERATION, TicketName, TicketSecret};
use crate::v1::{BatchOperation, GetRequest, GetResponse, PutRequest, batch_operation, batch_result};

/// How many generations of a secret are tried in a row.
pub(crate) const MAX_GENERATIONS: usize = 8;
/// The time, or else an epoch, after which a secret is compared with the store's again.
pub(crate) const MAX_RECHECK: Duration = Duration::from_secs(3600);
/// The next epoch's secret is agreed on in the first of so many parts of an epoch, so that clocks may differ by the others.
pub(crate) const NEXT_SECRET_PARTS: u32 = 6;
/// The deadline of a Batch.
pub(crate) const DEADLINE: Duration = Duration::from_secs(1);
/// The pauses after Batches that failed, with exponential backoff.
pub(crate) const RETRY_PAUSES: Pauses = Pauses { first: Duration::from_millis(50), longest: Duration::from_secs(5) };
/// The least time between two look-ups of the secrets of unknown names.
pub(crate) const UNKNOWN_NAME_PAUSE: Duration = Duration::from_secs(1);
/// How often at least the process looks whether something is due: clocks may be set.
const TICK: Duration = Duration::from_secs(1);
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);

/// The results of the operations of a Batch.
type Results = Vec<Option<batch_result::Result>>;

/// A store that carries out Batches.
pub(crate) trait Batches: Sync {
    fn batch(&self, operations: Vec<BatchOperation>) -> impl Future<Output = Result<Results, Failure>> + Send;
}

impl Batches for GuardedStore {
    async fn batch(&self, operations: Vec<BatchOperation>) -> Result<Results, Failure> {
        let began = tokio::time::Instant::now();
        let outcome = self.calls.batch(operations, began + DEADLINE).await;
        if outcome.as_ref().is_err_and(|failure| *failure == Failure::Limited) {
            self.limited(began.into());
        }
        outcome
    }
}

/// The secrets of one namespace, as one process has them.
pub(crate) struct Agreement {
    namespace: String,
    keyring: Arc<Keyring>,
    addresses: StoreKeys,
    rotation: u32,
    lifetime: u64,
    /// Whether the secret of the present epoch is stored again after the store has lost it. Not with single use, where its presence proves
    /// that the store has not lost the uses of its tickets.
    restores: bool,
    clock: Arc<dyn Clock>,
    /// Never locked, so that a forked child finds them whole.
    secrets: ArcSwap<Secrets>,
    /// Secrets that were created before this time are purged: in microseconds after the Unix epoch.
    purged_before: AtomicU64,
    plan: Mutex<Plan>,
    wake: Notify,
    exhausted: AtomicBool,
}

#[derive(Clone, Default)]
struct Secrets {
    by_name: HashMap<TicketName, Arc<TicketSecret>>,
    /// The one with which tickets are issued, by the start of its epoch.
    encrypting: BTreeMap<u32, Arc<TicketSecret>>,
}

#[derive(Default)]
struct Plan {
    /// Whether the secrets of all epochs were looked for, since the start, a purge, or a failure.
    begun: bool,
    /// The start of an epoch, and when in it the secret of the next one is agreed on.
    next: Option<(u32, u64)>,
    recheck: Option<Instant>,
    /// The pause after the last failure, and its end.
    pause: Duration,
    paused_until: Option<Instant>,
    requested: Option<(KeyId, Epoch)>,
    last_request: Option<Instant>,
}

/// Why a secret is looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// To have it, if there is one.
    Find,
    /// To have it, and to propose one if there is none.
    Agree,
    /// To see whether the store still has it.
    Recheck,
}

/// The secret of an epoch that is looked for.
struct Target {
    epoch: Epoch,
    purpose: Purpose,
    candidates: Vec<Candidate>,
    done: bool,
}

/// An address at which it may be: that of a key of the fleet, by its place in the keyring, and a generation.
#[derive(Clone, Copy)]
struct Candidate {
    key: usize,
    generation: u8,
    absent: bool,
}

/// The contents of an address.
enum Contents {
    Nothing,
    Unusable,
    Secret(Arc<TicketSecret>),
}

impl Secrets {
    fn drop_unless(&mut self, kept: impl Fn(&TicketSecret) -> bool) {
        self.by_name.retain(|_, secret| kept(secret));
        self.encrypting.retain(|_, secret| kept(secret));
    }
}

impl Target {
    fn candidate_epoch(&self, candidate: usize) -> Epoch {
        Epoch { generation: self.candidates[candidate].generation, ..self.epoch }
    }

    /// Goes on with the next generation of a candidate.
    fn advance(&mut self, candidate: usize) -> Result<(), Failure> {
        let candidate = &mut self.candidates[candidate];
        if candidate.generation == MAX_GENERATION {
            return Err(Failure::Refused);
        }
        candidate.generation += 1;
        candidate.absent = false;
        Ok(())
    }
}

impl Agreement {
    pub(crate) fn new(options: &Options, clock: Arc<dyn Clock>) -> Self {
        Self {
            namespace: options.namespace.clone(),
            keyring: Arc::clone(&options.keyring),
            addresses: ticket_secret::addresses(&options.namespace),
            rotation: u32::try_from(options.rotation.as_secs()).unwrap_or(u32::MAX),
            lifetime: options.lifetime.as_secs(),
            restores: !options.single_use,
            clock,
            secrets: ArcSwap::default(),
            purged_before: AtomicU64::new(0),
            plan: Mutex::default(),
            wake: Notify::new(),
            exhausted: AtomicBool::new(false),
        }
    }

    /// Takes the secrets over from the process that this one was forked from.
    pub(crate) fn inherit(&self, parent: &Self) {
        self.secrets.store(parent.secrets.swap(Arc::default()));
        self.purged_before.store(parent.purged_before.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Returns how many secrets are held.
    pub(crate) fn count(&self) -> usize {
        self.secrets.load().by_name.len()
    }

    /// Returns the secret with which tickets are issued, and whether it is that of an earlier epoch.
    pub(crate) fn secret_for_issue(&self) -> Option<(Arc<TicketSecret>, bool)> {
        let (now, secrets) = (self.now(), self.secrets.load());
        let present = Epoch::at(now, self.rotation).start;
        let mut latest = secrets.encrypting.range(..=present).rev();
        let (start, secret) = latest.find(|(_, secret)| now < secret.not_after())?;
        Some((Arc::clone(secret), *start != present))
    }

    /// Returns the secret of a key name, any bytes at all.
    pub(crate) fn secret_for_name(&self, name: &[u8]) -> Option<Arc<TicketSecret>> {
        let name: &TicketName = name.try_into().ok()?;
        let secret = self.secrets.load().by_name.get(name).map(Arc::clone)?;
        (self.now() < secret.not_after()).then_some(secret)
    }

    /// Has the secret of a name looked up in the background, if the fleet has named it and that was not done a moment ago. Returns whether
    /// the fleet has named it.
    pub(crate) fn request(&self, name: &[u8]) -> bool {
        let keys = self.keyring.current();
        let named = |key: &FleetKey| Some((key.id, ticket_secret::epoch_of_name(&self.namespace, key, name)?));
        let Some((key, epoch)) = keys.iter().find_map(named) else { return false };
        let now = self.clock.instant();
        let plan = &mut *self.plan();
        let soon = plan.last_request.is_some_and(|last| now.saturating_duration_since(last) < UNKNOWN_NAME_PAUSE);
        if !soon && self.now() < epoch.not_after(LONGEST_LIFETIME.as_secs()) {
            (plan.last_request, plan.requested) = (Some(now), Some((key, epoch)));
            self.wake.notify_one();
        }
        true
    }

    /// Drops the secrets that were created before a time, in microseconds after the Unix epoch, or all of them, and agrees anew.
    pub(crate) fn purge(&self, before: u64, all: bool) {
        self.purged_before.fetch_max(before, Ordering::Relaxed);
        self.drop_unless(|secret| !all && secret.created >= before);
        self.plan().begun = false;
        self.wake.notify_one();
    }

    /// Returns whether the store's value at the address of a secret, empty if there is none, is that secret. If not, [`Self::recheck`].
    pub(crate) fn is_stored_as(&self, secret: &TicketSecret, value: &[u8]) -> bool {
        let keys = self.keyring.current();
        let same = keys.iter().find(|key| key.id == secret.key_id).is_some_and(|key| {
            TicketSecret::open(&self.namespace, key, secret.address, secret.epoch, value, self.now())
                .is_ok_and(|stored| stored.name() == secret.name())
        });
        if !same {
            self.recheck();
        }
        same
    }

    /// Compares the secret of the present epoch with the store's soon: the store may have lost its own.
    pub(crate) fn recheck(&self) {
        self.plan().recheck = Some(self.clock.instant());
        self.wake.notify_one();
    }

    /// Drops the secret of an address that was removed.
    pub(crate) fn drop_address(&self, address: &StoreKey) {
        if self.secrets.load().by_name.values().any(|secret| secret.address == *address) {
            log::info!("a ticket secret of {} was removed from the store: its tickets no longer resume", self.namespace);
            self.drop_unless(|secret| secret.address != *address);
            self.wake.notify_one();
        }
    }

    /// Keeps to the store, until the task is dropped.
    pub(crate) async fn run(&self, store: &GuardedStore) {
        loop {
            let pause = self.step(store).await;
            let _ = timeout(pause, self.wake.notified()).await;
        }
    }

    /// Carries out all calls that are due, and returns the time until the next step.
    pub(crate) async fn step(&self, store: &impl Batches) -> Duration {
        let keys = self.keyring.current();
        let now = self.now();
        self.drop_unless(|secret| now < secret.not_after() && keys.iter().any(|key| key.id == secret.key_id));
        let paused = self.plan().paused_until;
        if let Some(left) =
            paused.and_then(|until| until.checked_duration_since(self.clock.instant())).filter(|left| !left.is_zero())
        {
            return left.min(TICK);
        }
        let targets = self.due(&keys);
        if !targets.is_empty() {
            let outcome = self.agree(store, &keys, targets).await;
            self.record(outcome);
        }
        self.until_due()
    }

    fn now(&self) -> u64 {
        clock::seconds(self.clock.now())
    }

    /// Returns the secrets that have to be looked for now.
    fn due(&self, keys: &[FleetKey]) -> Vec<Target> {
        let (now, secrets) = (self.now(), self.secrets.load());
        let present = Epoch::at(now, self.rotation);
        let all: Vec<_> = (0..keys.len()).map(|key| Candidate { key, generation: 0, absent: false }).collect();
        let target = |epoch, purpose, candidates| Target { epoch, purpose, candidates, done: false };
        let candidate = |id, generation| {
            let key = keys.iter().position(|key| key.id == id)?;
            Some(Candidate { key, generation, absent: false })
        };
        let plan = &mut *self.plan();
        let mut targets = Vec::new();
        let recheck =
            *plan.recheck.get_or_insert_with(|| self.clock.instant() + self.interval().mul_f64(sealing::random_share()));
        if plan.begun {
            match secrets.encrypting.get(&present.start) {
                None => targets.push(target(present, Purpose::Agree, all.clone())),
                Some(secret) if recheck <= self.clock.instant() => {
                    plan.recheck = Some(self.clock.instant() + self.interval());
                    let own = candidate(secret.key_id, secret.epoch.generation);
                    targets.extend(own.map(|own| target(present, Purpose::Recheck, vec![own])));
                }
                Some(_) => {}
            }
            let (_, at) = plan.next.filter(|(start, _)| *start == present.start).unwrap_or_else(|| {
                (present.start, u64::from(present.start) + sealing::random_below(self.next_secret_within()))
            });
            plan.next = Some((present.start, at));
            if at <= now && !secrets.encrypting.contains_key(&present.next().start) {
                targets.push(target(present.next(), Purpose::Agree, all));
            }
        } else {
            // The present epoch and the next one, and those before whose tickets may still live.
            let first = Epoch::at(now.saturating_sub(2 * u64::from(self.rotation) + self.lifetime), self.rotation);
            for start in (first.start..=present.next().start).step_by(self.rotation as usize) {
                let epoch = Epoch { start, ..present };
                let purpose = if start >= present.start { Purpose::Agree } else { Purpose::Find };
                if now < epoch.not_after(self.lifetime) && !secrets.encrypting.contains_key(&start) {
                    targets.push(target(epoch, purpose, all.clone()));
                }
            }
            plan.begun = true;
        }
        if let Some((key, epoch)) = plan.requested.take() {
            targets.extend(candidate(key, epoch.generation).map(|named| target(epoch, Purpose::Find, vec![named])));
        }
        targets
    }

    /// Records how an agreement ended.
    fn record(&self, outcome: Result<(), Failure>) {
        let plan = &mut *self.plan();
        match outcome {
            Ok(()) => {
                if !plan.pause.is_zero() {
                    log::info!("ticket secrets of {}: agreed with the store again", self.namespace);
                }
                (plan.pause, plan.paused_until) = (Duration::ZERO, None);
            }
            Err(failure) => {
                if plan.pause.is_zero() {
                    let consequence = match self.secret_for_issue() {
                        Some((_, false)) => "nothing changes during the present epoch",
                        Some((_, true)) => "tickets are issued with the secret of an earlier epoch",
                        None => "no tickets are issued",
                    };
                    let reason = failure.reason();
                    log::warn!("ticket secrets of {}: no agreement with the store ({reason}); {consequence}", self.namespace);
                }
                plan.pause = RETRY_PAUSES.after(plan.pause);
                // At different moments in a fleet.
                let share = sealing::random_share().midpoint(1.0);
                plan.paused_until = Some(self.clock.instant() + plan.pause.mul_f64(share));
                plan.begun = false;
            }
        }
    }

    /// Returns the time until something may be due.
    fn until_due(&self) -> Duration {
        let (now, instant) = (self.clock.now(), self.clock.instant());
        let present = Epoch::at(clock::seconds(now), self.rotation);
        let until = |seconds: u64| Duration::from_micros((seconds * 1_000_000).saturating_sub(microseconds(now)));
        let plan = self.plan();
        let mut pause = TICK.min(until(present.next().start.into()));
        if let Some((_, at)) = plan.next.filter(|(start, at)| *start == present.start && *at > clock::seconds(now)) {
            pause = pause.min(until(at));
        }
        for at in [plan.recheck, plan.paused_until].into_iter().flatten().filter(|at| *at > instant) {
            pause = pause.min(at - instant);
        }
        pause.max(SHORTEST_PAUSE)
    }

    /// Returns the seconds of an epoch within which the secret of the next one is agreed on.
    fn next_secret_within(&self) -> u64 {
        u64::from(self.rotation.div_ceil(NEXT_SECRET_PARTS))
    }

    /// Returns the time after which the secret of the present epoch is compared with the store's.
    fn interval(&self) -> Duration {
        Duration::from_secs(self.rotation.into()).min(MAX_RECHECK)
    }

    /// Looks for secrets, and proposes those that are missing.
    async fn agree(&self, store: &impl Batches, keys: &[FleetKey], mut targets: Vec<Target>) -> Result<(), Failure> {
        for _ in 0..MAX_GENERATIONS {
            self.look_up(store, keys, &mut targets).await?;
            self.propose(store, keys, &mut targets).await?;
            targets.retain(|target| !target.done);
            if targets.is_empty() {
                return Ok(());
            }
        }
        if !self.exhausted.swap(true, Ordering::Relaxed) {
            log::error!(
                "ticket secrets of {}: {MAX_GENERATIONS} generations in a row were removed, or are sealed with keys that are not in \
                 the keyring; give all frontends the same keys",
                self.namespace
            );
        }
        Err(Failure::Refused)
    }

    /// Looks at all candidates about which nothing is known.
    async fn look_up(&self, store: &impl Batches, keys: &[FleetKey], targets: &mut [Target]) -> Result<(), Failure> {
        let unknown: Vec<_> = targets
            .iter()
            .enumerate()
            .flat_map(|(number, target)| (0..target.candidates.len()).map(move |candidate| (number, candidate)))
            .filter(|&(number, candidate)| !targets[number].candidates[candidate].absent)
            .collect();
        let contents = self.get(store, keys, targets, &unknown).await?;
        for ((number, candidate), contents) in unknown.into_iter().zip(contents) {
            let target = &mut targets[number];
            match contents {
                Contents::Secret(secret) if self.hold(&secret, target.purpose) => target.done = true,
                Contents::Secret(_) | Contents::Unusable => target.advance(candidate)?,
                Contents::Nothing => {
                    let address = self.address(keys, target, candidate);
                    if !self.restores && self.at(&address).is_some() {
                        // The next step agrees on another one, from the first generation on.
                        self.drop_address(&address);
                        target.done = true;
                    }
                    target.candidates[candidate].absent = true;
                }
            }
        }
        for target in targets.iter_mut().filter(|target| target.purpose == Purpose::Find) {
            target.done |= target.candidates.iter().all(|candidate| candidate.absent);
        }
        Ok(())
    }

    /// Proposes secrets where there are none, and looks at those that won instead.
    async fn propose(&self, store: &impl Batches, keys: &[FleetKey], targets: &mut [Target]) -> Result<(), Failure> {
        let (now, created) = (self.now(), microseconds(self.clock.now()).max(self.purged_before.load(Ordering::Relaxed)));
        let missing = |target: &Target| !target.done && target.candidates.iter().all(|candidate| candidate.absent);
        let missing: Vec<_> = (0..targets.len()).filter(|number| missing(&targets[*number])).collect();
        let (mut proposals, mut operations) = (Vec::new(), Vec::new());
        for &number in &missing {
            let (epoch, key) = (targets[number].candidate_epoch(0), &keys[targets[number].candidates[0].key]);
            let address = self.address(keys, &targets[number], 0);
            let proposal = self.at(&address).unwrap_or_else(|| {
                let not_after = epoch.not_after(self.lifetime);
                Arc::new(TicketSecret::propose(&self.namespace, key, address, epoch, created, not_after))
            });
            operations.push(batch_operation::Operation::Put(PutRequest {
                namespace: self.namespace.clone(),
                key: address.to_vec(),
                value: proposal.seal(key),
                ttl: Some(ttl(proposal.not_after().saturating_sub(now).max(1))),
                issue_time: from_microseconds(proposal.created).map(Into::into),
                pinned: true,
            }));
            proposals.push(proposal);
        }
        let mut beaten = Vec::new();
        for ((number, proposal), result) in missing.into_iter().zip(proposals).zip(self.batch(store, operations).await?) {
            match result {
                batch_result::Result::Put(_) => targets[number].done = self.hold(&proposal, targets[number].purpose),
                batch_result::Result::Error(status) if status.code == Code::AlreadyExists as i32 => beaten.push((number, 0)),
                other => return Err(Failure::of_result(&other)),
            }
        }
        let contents = self.get(store, keys, targets, &beaten).await?;
        for ((number, candidate), contents) in beaten.into_iter().zip(contents) {
            let target = &mut targets[number];
            match contents {
                Contents::Secret(secret) if self.hold(&secret, target.purpose) => target.done = true,
                Contents::Nothing => {
                    // It was removed: its tickets are revoked.
                    self.drop_address(&self.address(keys, target, candidate));
                    target.advance(candidate)?;
                }
                Contents::Secret(_) | Contents::Unusable => target.advance(candidate)?,
            }
        }
        Ok(())
    }

    /// Returns the contents of candidates, each by the numbers of its target and of itself.
    async fn get(
        &self,
        store: &impl Batches,
        keys: &[FleetKey],
        targets: &[Target],
        candidates: &[(usize, usize)],
    ) -> Result<Vec<Contents>, Failure> {
        let places: Vec<_> = candidates
            .iter()
            .map(|&(number, candidate)| {
                let target = &targets[number];
                let (epoch, key) = (target.candidate_epoch(candidate), &keys[target.candidates[candidate].key]);
                (epoch, key, self.address(keys, target, candidate))
            })
            .collect();
        let operations = places.iter().map(|(_, _, address)| {
            batch_operation::Operation::Get(GetRequest { namespace: self.namespace.clone(), key: address.to_vec() })
        });
        let results = self.batch(store, operations.collect()).await?;
        let (now, mut contents) = (self.now(), Vec::with_capacity(results.len()));
        for ((epoch, key, address), result) in places.into_iter().zip(results) {
            contents.push(match result {
                batch_result::Result::Get(GetResponse { session: None }) => Contents::Nothing,
                batch_result::Result::Get(GetResponse { session: Some(session) }) => {
                    TicketSecret::open(&self.namespace, key, address, epoch, &session.value, now)
                        .map_or(Contents::Unusable, |secret| Contents::Secret(Arc::new(secret)))
                }
                other => return Err(Failure::of_result(&other)),
            });
        }
        Ok(contents)
    }

    /// Carries out operations, in as few Batches as the store allows.
    async fn batch(
        &self,
        store: &impl Batches,
        mut operations: Vec<batch_operation::Operation>,
    ) -> Result<Vec<batch_result::Result>, Failure> {
        let mut results = Vec::with_capacity(operations.len());
        while !operations.is_empty() {
            let rest = operations.split_off(operations.len().min(BATCH_OPERATIONS));
            let batch = operations.into_iter().map(|operation| BatchOperation { operation: Some(operation) }).collect();
            for result in store.batch(batch).await? {
                results.push(result.ok_or(Failure::Refused)?);
            }
            operations = rest;
        }
        Ok(results)
    }

    /// Holds a secret that the store has, and returns false if it was purged.
    fn hold(&self, secret: &Arc<TicketSecret>, purpose: Purpose) -> bool {
        if secret.created < self.purged_before.load(Ordering::Relaxed) {
            return false;
        }
        self.secrets.rcu(|secrets| {
            let mut secrets = Secrets::clone(secrets);
            let held = Arc::clone(secrets.by_name.entry(*secret.name()).or_insert_with(|| Arc::clone(secret)));
            if held.epoch.rotation == self.rotation {
                let encrypting = secrets.encrypting.entry(held.epoch.start).or_insert_with(|| Arc::clone(&held));
                // The store decides between two secrets of one address.
                if purpose == Purpose::Recheck || encrypting.address == held.address {
                    *encrypting = held;
                }
            }
            secrets
        });
        true
    }

    /// Returns the address of a candidate.
    fn address(&self, keys: &[FleetKey], target: &Target, candidate: usize) -> StoreKey {
        let key = &keys[target.candidates[candidate].key];
        ticket_secret::address_of(&self.addresses, key.id, target.candidate_epoch(candidate))
    }

    /// Returns the secret of an address with which tickets are issued.
    fn at(&self, address: &StoreKey) -> Option<Arc<TicketSecret>> {
        self.secrets.load().encrypting.values().find(|secret| secret.address == *address).cloned()
    }

    fn drop_unless(&self, kept: impl Fn(&TicketSecret) -> bool) {
        if self.secrets.load().by_name.values().all(|secret| kept(secret)) {
            return;
        }
        self.secrets.rcu(|secrets| {
            let mut secrets = Secrets::clone(secrets);
            secrets.drop_unless(&kept);
            secrets
        });
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(crate) mod tests;
