//! The removals of a namespace, which end tickets before their time.
//!
//! A stream of the store brings them. Tickets resume only while it is live, or was a short time ago: [`Removals::check`].

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use crate::clock::{self, Clock};
use crate::envelope::microseconds;
use crate::sealing::StoreKey;
use crate::stats::RemovalReason;
use crate::ticket_secret::MAX_REMOVAL;
use crate::watching::STALE;

/// How many removals are kept.
pub(crate) const MAX_REMOVALS: usize = 262_144;

/// How many of its own removals a process sends again to a store that has lost its storage.
pub(crate) const MAX_OWN_REMOVALS: usize = 16_384;

/// How many void entries the order may have at least.
const VOID_ENTRIES: usize = 1024;

/// The first half of a store key.
type Key = [u8; 16];

/// The removals of one namespace, as one process knows them.
pub(crate) struct Removals {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    /// For how long tickets resume after the stream was last live.
    grace: Duration,
    max: usize,
}

#[derive(Default)]
struct State {
    /// By the monotonic clock: no step of the other one ends a removal.
    ends: HashMap<Key, Instant>,
    /// The same, the first to end first; an entry whose end was put off since is void.
    order: BinaryHeap<Reverse<(Instant, Key)>>,
    /// Tickets that were negotiated before this time are purged: in microseconds after the Unix epoch.
    purged_before: u64,
    /// The same for the last time when there were too many removals.
    forgotten_before: u64,
    /// When the stream was last known to have delivered every removal; None before its first snapshot was complete.
    last_live: Option<Instant>,
}

impl Removals {
    pub(crate) fn new(grace: Duration, clock: Arc<dyn Clock>) -> Self {
        Self { state: Mutex::default(), clock, grace, max: MAX_REMOVALS }
    }

    /// Takes over the removals of the process that this one was forked from. If a thread of it was about to change them, this process
    /// begins without, and accepts no ticket until its own stream is live.
    pub(crate) fn inherit(&self, parent: &Self) {
        let state = match parent.state.try_lock() {
            Ok(mut state) => std::mem::take(&mut *state),
            Err(TryLockError::Poisoned(_) | TryLockError::WouldBlock) => return,
        };
        *self.lock() = state;
    }

    /// Adds the removal of a store key, which is in force until `end`, in Unix seconds.
    pub(crate) fn add(&self, key: &StoreKey, end: u64) {
        let (now, state) = (self.clock.now(), &mut *self.lock());
        let remaining = Duration::from_secs(end.saturating_sub(clock::seconds(now)).min(MAX_REMOVAL.as_secs()));
        if state.add(half(key), remaining, self.clock.instant(), self.max) {
            return;
        }
        (state.ends, state.order) = Default::default();
        if std::mem::replace(&mut state.forgotten_before, microseconds(now)) == 0 {
            log::warn!("more than {} removals are in force: all tickets up to now are refused", self.max);
        }
    }

    /// Refuses tickets that were negotiated before a time, in microseconds after the Unix epoch. Returns false if a purge of that time, or
    /// a later one, was known.
    pub(crate) fn purge(&self, before: u64) -> bool {
        let state = &mut *self.lock();
        let news = before > state.purged_before;
        state.purged_before = state.purged_before.max(before);
        news
    }

    /// Records that the stream had delivered every removal up to then.
    pub(crate) fn record_live(&self, then: Instant) {
        let state = &mut *self.lock();
        state.last_live = state.last_live.max(Some(then));
    }

    /// Whether the stream is live.
    pub(crate) fn live(&self) -> bool {
        self.lock().last_live.is_some_and(|last| self.age(last) < STALE)
    }

    /// Returns how many removals are kept.
    pub(crate) fn count(&self) -> usize {
        self.lock().ends.len()
    }

    /// Returns why a ticket does not resume whose lineage has this store key, or Ok. `negotiated` is in microseconds after the Unix epoch.
    pub(crate) fn check(&self, key: &StoreKey, negotiated: u64) -> Result<(), &'static str> {
        let state = self.lock();
        if state.last_live.is_none_or(|last| self.age(last) >= STALE.max(self.grace)) {
            return Err("removals-unknown");
        }
        if negotiated < state.purged_before.max(state.forgotten_before) {
            return Err("purged");
        }
        if state.ends.contains_key(&half(key)) {
            return Err("revoked");
        }
        Ok(())
    }

    fn age(&self, then: Instant) -> Duration {
        self.clock.instant().saturating_duration_since(then)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last removals of this process.
#[derive(Default)]
pub(crate) struct OwnRemovals(Mutex<VecDeque<OwnRemoval>>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OwnRemoval {
    pub(crate) key: StoreKey,
    pub(crate) reason: RemovalReason,
    /// Until when it is in force, in Unix seconds.
    pub(crate) end: u64,
}

impl OwnRemovals {
    pub(crate) fn add(&self, removal: OwnRemoval) {
        let mut removals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if removals.len() == MAX_OWN_REMOVALS {
            removals.pop_front();
        }
        removals.push_back(removal);
    }

    /// Returns those that are in force after `now`, in Unix seconds.
    pub(crate) fn in_force(&self, now: u64) -> Vec<OwnRemoval> {
        let removals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        removals.iter().filter(|removal| removal.end > now).copied().collect()
    }
}

impl State {
    /// Adds a removal that is in force for some time, and returns false if there is no room for it.
    fn add(&mut self, key: Key, remaining: Duration, now: Instant, max: usize) -> bool {
        while let Some(&Reverse((first, ended))) = self.order.peek()
            && first <= now
        {
            self.order.pop();
            if self.ends.get(&ended) == Some(&first) {
                self.ends.remove(&ended);
            }
        }
        let end = now + remaining;
        if remaining.is_zero() || self.ends.get(&key).is_some_and(|known| *known >= end) {
            return true;
        }
        if self.ends.len() >= max && !self.ends.contains_key(&key) {
            return false;
        }
        self.ends.insert(key, end);
        self.order.push(Reverse((end, key)));
        if self.order.len() > 2 * self.ends.len() + VOID_ENTRIES {
            self.order = self.ends.iter().map(|(key, end)| Reverse((*end, *key))).collect();
        }
        true
    }
}

fn half(key: &StoreKey) -> Key {
    let mut half = Key::default();
    half.copy_from_slice(&key[..16]);
    half
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::fake::FakeClock;

    const START: u64 = 1_800_000_000;
    const NOW: u64 = START * 1_000_000;
    const GRACE: Duration = Duration::from_secs(300);

    fn removals(grace: Duration) -> (Removals, Arc<FakeClock>) {
        let clock = Arc::new(FakeClock::at(START));
        (Removals::new(grace, Arc::clone(&clock) as _), clock)
    }

    fn live() -> (Removals, Arc<FakeClock>) {
        let (removals, clock) = removals(GRACE);
        removals.record_live(clock.instant());
        (removals, clock)
    }

    #[test]
    fn tickets_resume_from_the_first_snapshot_until_the_grace_has_passed() {
        for grace in [Duration::ZERO, GRACE] {
            let (removals, clock) = removals(grace);
            let check = || removals.check(&[1; 32], NOW);
            assert_eq!((check(), removals.live()), (Err("removals-unknown"), false));
            removals.record_live(clock.instant());
            assert_eq!((check(), removals.live()), (Ok(()), true));
            clock.advance(Duration::from_micros(2_999_999));
            assert_eq!((check(), removals.live()), (Ok(()), true));
            clock.advance(Duration::from_micros(1));
            assert_eq!((check().is_ok(), removals.live()), (!grace.is_zero(), false));
            clock.advance(grace.saturating_sub(STALE));
            assert_eq!(check(), Err("removals-unknown"));
            removals.record_live(clock.instant());
            assert_eq!((check(), removals.live()), (Ok(()), true));
        }
    }

    #[test]
    fn a_removal_is_in_force_until_its_end_and_another_one_may_put_that_off() {
        let (removals, clock) = live();
        let revoked = |key| removals.check(&[key; 32], NOW) == Err("revoked");
        removals.add(&[1; 32], START + 10);
        removals.add(&[1; 32], START + 20);
        removals.add(&[1; 32], START + 5);
        removals.add(&[2; 32], START + 10);
        removals.add(&[3; 32], START);
        assert!(revoked(1) && revoked(2) && !revoked(3));
        assert_eq!(removals.count(), 2);
        clock.set(START + 10);
        removals.add(&[4; 32], START + 30);
        removals.record_live(clock.instant());
        assert!(revoked(1) && !revoked(2));
        clock.set(START + 20);
        removals.add(&[5; 32], START + 30);
        assert_eq!(removals.count(), 2);
    }

    #[test]
    fn a_step_of_the_clock_ends_no_removal() {
        let (removals, clock) = live();
        removals.add(&[1; 32], START + 10);
        clock.step(Duration::from_secs(3600));
        removals.add(&[2; 32], START + 3600 + 10);
        assert_eq!(removals.check(&[1; 32], NOW), Err("revoked"));
    }

    #[test]
    fn with_more_removals_than_fit_all_tickets_up_to_then_are_refused() {
        let (mut removals, clock) = live();
        removals.max = 2;
        for key in 1..=2 {
            removals.add(&[key; 32], START + 10);
            removals.add(&[key; 32], START + 20);
        }
        assert_eq!(removals.check(&[9; 32], NOW - 1), Ok(()));
        clock.advance(Duration::from_micros(1));
        removals.add(&[3; 32], START + 20);
        assert_eq!(removals.check(&[9; 32], NOW), Err("purged"));
        assert_eq!(removals.check(&[9; 32], NOW + 1), Ok(()));
        assert_eq!(removals.count(), 0);
    }

    #[test]
    fn a_removal_whose_end_is_put_off_again_and_again_takes_no_more_memory() {
        let (removals, _) = live();
        for end in 0..10_000 {
            removals.add(&[1; 32], START + 10 + end);
        }
        assert!(removals.lock().order.len() <= 2 + VOID_ENTRIES);
        assert_eq!(removals.check(&[1; 32], NOW), Err("revoked"));
    }

    #[test]
    fn removals_that_have_ended_make_room() {
        let (mut removals, clock) = live();
        removals.max = 2;
        for number in 0..10_u8 {
            removals.add(&[number; 32], clock.seconds() + 2);
            clock.advance(Duration::from_secs(1));
        }
        assert_eq!((removals.check(&[9; 32], 0), removals.check(&[8; 32], 0)), (Err("revoked"), Err("revoked")));
        assert_eq!(removals.check(&[7; 32], 0), Ok(()));
    }

    #[test]
    fn a_purge_refuses_what_was_negotiated_before_and_an_earlier_one_changes_nothing() {
        let (removals, _) = live();
        let check = |negotiated| removals.check(&[1; 32], negotiated);
        assert!(removals.purge(NOW));
        assert_eq!((check(NOW - 1), check(NOW)), (Err("purged"), Ok(())));
        assert!(!removals.purge(NOW) && !removals.purge(NOW - 10));
        assert_eq!((check(NOW - 1), check(NOW)), (Err("purged"), Ok(())));
    }

    #[test]
    fn the_last_own_removals_are_kept_until_they_end() {
        let (own, reason) = (OwnRemovals::default(), RemovalReason::Application);
        for number in 0..=MAX_OWN_REMOVALS {
            own.add(OwnRemoval { key: [u8::try_from(number % 256).unwrap(); 32], reason, end: START + number as u64 });
        }
        assert_eq!(own.in_force(START).len(), MAX_OWN_REMOVALS, "the first one made room");
        let last = START + MAX_OWN_REMOVALS as u64;
        assert_eq!(own.in_force(last - 1), [OwnRemoval { key: [0; 32], reason, end: last }]);
        assert_eq!(own.in_force(last), []);
    }

    #[test]
    fn a_child_takes_over_the_removals_unless_they_were_about_to_change() {
        let ((parent, clock), (child, _)) = (live(), removals(GRACE));
        parent.add(&[1; 32], START + 10);
        parent.purge(NOW);
        let locked = parent.lock();
        child.inherit(&parent);
        drop(locked);
        assert_eq!(child.check(&[2; 32], NOW), Err("removals-unknown"));
        child.inherit(&parent);
        let check = |key, negotiated| child.check(&[key; 32], negotiated);
        assert_eq!((check(1, NOW), check(2, NOW), check(2, NOW - 1)), (Err("revoked"), Ok(()), Err("purged")));
        let _ = clock;
    }
}
