//! Frontends agree on ticket secrets, with a store in memory and clocks of their own.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::clock::fake::FakeClock;
use crate::v1::{GetResponse, PutResponse, StoredSession};

const START: u64 = 1_800_000_000; // a multiple of an hour
const ROTATION: u64 = 3600;
const LIFETIME: u64 = 7200;
const KEY: [u8; 32] = [7; 32];

/// A store of secrets in memory.
#[derive(Default)]
pub(crate) struct FakeStore {
    /// None: it was removed.
    values: Mutex<HashMap<Vec<u8>, Option<Vec<u8>>>>,
    calls: AtomicUsize,
    operations: AtomicUsize,
    silent: AtomicBool,
    /// How many Batches of Gets find nothing: they come before the Puts of others.
    early: AtomicUsize,
    purge_time: AtomicU64,
}

impl FakeStore {
    fn carry_out(&self, operation: batch_operation::Operation) -> batch_result::Result {
        let mut values = self.values.lock().unwrap();
        match operation {
            batch_operation::Operation::Get(get) => {
                assert_eq!(get.namespace, "shop");
                let value = values.get(&get.key).cloned().flatten();
                let session = value.map(|value| StoredSession { value, ttl: Some(ttl(1)) });
                batch_result::Result::Get(GetResponse { session: session.filter(|_| self.early.load(Ordering::Relaxed) == 0) })
            }
            batch_operation::Operation::Put(put) => {
                assert!(put.pinned && put.ttl.unwrap().seconds > 0);
                let issued = microseconds(put.issue_time.unwrap().try_into().unwrap());
                if values.contains_key(&put.key) || issued < self.purge_time.load(Ordering::Relaxed) {
                    let code = Code::AlreadyExists as i32;
                    return batch_result::Result::Error(crate::stubs::google::rpc::Status { code, ..Default::default() });
                }
                values.insert(put.key, Some(put.value));
                batch_result::Result::Put(PutResponse { ttl: put.ttl })
            }
            _ => panic!("an operation that the agreement does not need"),
        }
    }

    fn value(&self, address: &StoreKey) -> Vec<u8> {
        self.values.lock().unwrap()[&address[..]].clone().unwrap()
    }

    fn calls(&self) -> usize {
        self.calls.swap(0, Ordering::Relaxed)
    }

    /// Removes the values of all secrets.
    fn remove_all(&self) {
        self.values.lock().unwrap().values_mut().for_each(|value| *value = None);
    }

    pub(crate) fn purge(&self, time: u64) {
        self.values.lock().unwrap().clear();
        self.purge_time.store(time, Ordering::Relaxed);
    }
}

impl Batches for FakeStore {
    async fn batch(&self, operations: Vec<BatchOperation>) -> Result<Results, Failure> {
        assert!((1..=BATCH_OPERATIONS).contains(&operations.len()));
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.silent.load(Ordering::Relaxed) {
            return Err(Failure::Late);
        }
        self.operations.fetch_add(operations.len(), Ordering::Relaxed);
        let gets = matches!(operations[0].operation, Some(batch_operation::Operation::Get(_)));
        let results = operations.into_iter().map(|each| Some(self.carry_out(each.operation.unwrap()))).collect();
        if gets {
            let _ = self.early.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        }
        Ok(results)
    }
}

struct Frontend {
    agreement: Agreement,
    clock: Arc<FakeClock>,
}

impl Frontend {
    fn new() -> Self {
        Self::with_keys(&[KEY])
    }

    fn with_keys(keys: &[[u8; 32]]) -> Self {
        Self::with(keys, |_| ())
    }

    fn with(keys: &[[u8; 32]], change: impl FnOnce(&mut Options)) -> Self {
        let clock = Arc::new(FakeClock::at(START));
        let mut options = Options::new("store:7400", "shop", Keyring::from_keys(keys).unwrap());
        change(&mut options);
        Self { agreement: Agreement::new(&options, Arc::clone(&clock) as _), clock }
    }

    fn step(&self, store: &FakeStore) -> Duration {
        // The store in memory responds at once.
        let step = pin!(self.agreement.step(store)).poll(&mut Context::from_waker(Waker::noop()));
        let Poll::Ready(pause) = step else { panic!("a step that waits") };
        pause
    }

    /// Lets time pass, as `run` does.
    fn pass(&self, store: &FakeStore, seconds: u64) {
        let end = self.clock.seconds() + seconds;
        while self.clock.seconds() < end {
            self.clock.advance(self.step(store).max(Duration::from_millis(500)));
        }
        self.clock.set(end);
        self.step(store);
    }

    fn issues(&self) -> Option<(TicketName, bool)> {
        self.agreement.secret_for_issue().map(|(secret, held_over)| (*secret.name(), held_over))
    }

    fn current(&self) -> TicketName {
        let (name, held_over) = self.issues().unwrap();
        assert!(!held_over);
        name
    }

    fn opens(&self, name: TicketName) -> bool {
        self.agreement.secret_for_name(&name).is_some()
    }

    fn generation(&self) -> u8 {
        self.agreement.secret_for_issue().unwrap().0.epoch.generation
    }
}

#[test]
fn frontends_find_the_secret_that_the_first_one_has_proposed() {
    let (store, one, other) = (FakeStore::default(), Frontend::new(), Frontend::new());
    assert_eq!(one.issues(), None);
    one.step(&store);
    assert_eq!(store.calls(), 2, "Gets, then Puts");
    other.step(&store);
    assert_eq!(store.calls(), 1, "Gets");
    assert_eq!(one.current(), other.current());
    assert_eq!((one.agreement.count(), other.agreement.count()), (2, 2), "the present epoch's and the next one's");
    one.step(&store);
    assert_eq!(store.calls(), 0);
}

#[test]
fn of_two_proposals_one_wins_in_three_calls() {
    let (store, one, other) = (FakeStore::default(), Frontend::new(), Frontend::new());
    one.step(&store);
    store.calls();
    store.early.store(1, Ordering::Relaxed);
    other.step(&store);
    assert_eq!(store.calls(), 3);
    assert_eq!(one.current(), other.current());
}

#[test]
fn each_epoch_has_a_secret_and_all_open_until_their_tickets_have_ended() {
    let (store, one, other) = (FakeStore::default(), Frontend::new(), Frontend::new());
    let (mut names, mut at) = (Vec::new(), 0);
    for epoch in 0..6 {
        one.pass(&store, epoch * ROTATION - at);
        other.pass(&store, epoch * ROTATION - at);
        at = epoch * ROTATION;
        assert_eq!(one.current(), other.current());
        names.push(one.current());
    }
    assert_eq!(names.iter().collect::<HashSet<_>>().len(), 6);
    // The secret of epoch 0 ends with epoch 3: two epochs, and the lifetime.
    assert_eq!(names.iter().map(|name| one.opens(*name)).collect::<Vec<_>>(), [false, false, true, true, true, true]);
    assert!(one.agreement.count() <= 5, "those that have ended are erased");
}

#[test]
fn the_secret_of_the_next_epoch_is_there_before_it_begins() {
    let (store, ahead, behind) = (FakeStore::default(), Frontend::new(), Frontend::new());
    for frontend in [&ahead, &behind] {
        frontend.pass(&store, 2 * ROTATION - 1);
    }
    store.silent.store(true, Ordering::Relaxed);
    ahead.clock.advance(Duration::from_secs(1));
    assert!(behind.opens(ahead.current()), "a clock that is behind");
    assert_ne!(ahead.current(), behind.current());
}

#[test]
fn the_next_secret_is_agreed_on_at_different_moments_of_the_first_sixth_of_an_epoch() {
    let moments: HashSet<_> = (0..8)
        .map(|_| {
            let frontend = Frontend::new();
            frontend.pass(&FakeStore::default(), 1);
            frontend.agreement.plan().next.unwrap()
        })
        .collect();
    assert!(moments.len() > 1);
    assert!(moments.iter().all(|(start, at)| u64::from(*start) == START && (START..START + ROTATION / 6).contains(at)));
}

#[test]
fn a_frontend_that_starts_later_opens_the_tickets_of_earlier_epochs() {
    let (store, old, young) = (FakeStore::default(), Frontend::new(), Frontend::new());
    old.step(&store);
    let first = old.current();
    old.pass(&store, 3 * ROTATION);
    young.clock.set(old.clock.seconds());
    store.calls();
    young.step(&store);
    assert_eq!(store.calls(), 2, "Gets, and a Put for the next epoch at most");
    assert!(young.opens(first) && young.current() == old.current());
}

#[test]
fn a_frontend_that_starts_without_the_store_finds_all_secrets_later() {
    let (store, old, young) = (FakeStore::default(), Frontend::new(), Frontend::new());
    old.step(&store);
    let first = old.current();
    old.pass(&store, 2 * ROTATION);
    young.clock.set(old.clock.seconds());
    store.silent.store(true, Ordering::Relaxed);
    young.step(&store);
    store.silent.store(false, Ordering::Relaxed);
    young.pass(&store, 1);
    assert!(young.opens(first) && young.current() == old.current());
}

#[test]
fn a_value_that_does_not_open_is_passed_over_by_all() {
    let (store, one, other) = (FakeStore::default(), Frontend::new(), Frontend::new());
    Frontend::new().step(&store);
    store.values.lock().unwrap().values_mut().for_each(|value| *value = Some(b"garbage".to_vec()));
    one.step(&store);
    other.step(&store);
    assert_eq!((one.generation(), one.current()), (1, other.current()));
}

#[test]
fn a_secret_that_was_removed_is_passed_over_by_all() {
    let (store, one, other) = (FakeStore::default(), Frontend::new(), Frontend::new());
    Frontend::new().step(&store);
    store.remove_all();
    one.step(&store);
    other.step(&store);
    assert_eq!((one.generation(), one.current()), (1, other.current()));
}

#[test]
fn after_some_generations_in_a_row_a_frontend_tries_again_later() {
    let (store, frontend) = (FakeStore::default(), Frontend::new());
    store.purge_time.store(u64::MAX, Ordering::Relaxed); // each Put is refused, and nothing is to be found
    frontend.step(&store);
    assert_eq!(frontend.issues(), None);
    assert_eq!(store.calls(), 3 * MAX_GENERATIONS);
    store.purge_time.store(0, Ordering::Relaxed);
    frontend.step(&store);
    assert_eq!(store.calls(), 0, "not at once");
    frontend.clock.advance(RETRY_PAUSES.first);
    frontend.step(&store);
    assert_eq!(frontend.generation(), 0);
}

#[test]
fn without_a_store_the_secret_of_an_earlier_epoch_stays_in_use() {
    let (store, frontend) = (FakeStore::default(), Frontend::new());
    frontend.step(&store);
    let next = Epoch::at(START, 3600).next().start;
    store.silent.store(true, Ordering::Relaxed);
    frontend.pass(&store, ROTATION);
    let (name, _) = frontend.issues().unwrap();
    assert_eq!((Epoch::of_name(&name).start, frontend.issues()), (next, Some((name, false))), "the next one is there");
    frontend.pass(&store, ROTATION);
    assert_eq!(frontend.issues(), Some((name, true)));
    // Its end: its epoch, another one, and the lifetime.
    frontend.pass(&store, ROTATION + LIFETIME - 1);
    assert_eq!(frontend.issues(), Some((name, true)));
    frontend.clock.advance(Duration::from_secs(1));
    assert!(frontend.issues().is_none() && !frontend.opens(name));
    frontend.step(&store);
    assert_eq!(frontend.agreement.count(), 0, "it is erased");
    store.silent.store(false, Ordering::Relaxed);
    frontend.pass(&store, 5);
    assert_ne!(frontend.current(), name);
}

#[test]
fn the_pauses_of_a_silent_store_double() {
    let (store, frontend) = (FakeStore::default(), Frontend::new());
    store.silent.store(true, Ordering::Relaxed);
    let mut pauses = Vec::new();
    for _ in 0..10 {
        frontend.step(&store);
        let pause = frontend.agreement.plan().pause;
        pauses.push(pause.as_millis());
        frontend.clock.advance(pause);
    }
    assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
    assert_eq!(store.calls(), 10);
}

#[test]
fn two_secrets_of_one_epoch_become_one() {
    let (store, lost) = (FakeStore::default(), FakeStore::default());
    let (one, other) = (Frontend::new(), Frontend::new());
    one.step(&store);
    other.step(&lost);
    let (kept, given_up) = (one.current(), other.current());
    assert_ne!(kept, given_up);
    // Within an epoch; but not beyond it, where both would have the next secret anyway.
    other.agreement.recheck();
    other.pass(&store, 1);
    assert_eq!(other.current(), kept);
    assert!(other.opens(given_up) && !one.opens(given_up));
}

#[test]
fn a_secret_is_compared_with_the_stores_once_in_an_hour() {
    let (store, frontend) = (FakeStore::default(), Frontend::new());
    frontend.pass(&store, 10 * ROTATION);
    store.calls();
    frontend.pass(&store, 10 * ROTATION);
    // In each epoch a Get for the present one, a Get and a Put for the next one; a few more or less at both ends.
    assert!((27..=33).contains(&store.calls()));
}

#[test]
fn a_secret_that_the_store_has_lost_is_put_again() {
    let (store, frontend) = (FakeStore::default(), Frontend::new());
    frontend.step(&FakeStore::default());
    let before = frontend.current();
    frontend.agreement.recheck();
    frontend.step(&store);
    let young = Frontend::new();
    young.step(&store);
    assert_eq!((frontend.current(), young.current()), (before, before));
}

/// Else the store would vouch for uses of tickets that it has lost with the secret.
#[test]
fn with_single_use_another_secret_takes_the_place_of_one_that_the_store_has_lost() {
    let (before, after) = (FakeStore::default(), FakeStore::default());
    let frontend = Frontend::with(&[KEY], |options| options.single_use = true);
    frontend.step(&before);
    let (lost, _) = frontend.agreement.secret_for_issue().unwrap();
    assert!(frontend.agreement.is_stored_as(&lost, &before.value(&lost.address)));
    frontend.step(&after);
    assert_eq!(after.calls(), 0, "nothing to compare");
    assert!(!frontend.agreement.is_stored_as(&lost, &[]));
    frontend.step(&after);
    assert!(!frontend.opens(*lost.name()));
    frontend.step(&after);
    let (new, _) = frontend.agreement.secret_for_issue().unwrap();
    assert!(new.address == lost.address && new.name() != lost.name());
    assert!(!frontend.agreement.is_stored_as(&lost, &after.value(&new.address)), "another one of the same address");
    assert!(frontend.agreement.is_stored_as(&new, &after.value(&new.address)));
}

#[test]
fn a_secret_that_was_removed_from_the_store_is_given_up() {
    let (store, frontend) = (FakeStore::default(), Frontend::new());
    frontend.step(&store);
    let revoked = frontend.current();
    store.remove_all();
    frontend.agreement.recheck();
    frontend.step(&store);
    assert_eq!((frontend.opens(revoked), frontend.generation()), (false, 1));
}

#[test]
fn a_secret_whose_value_was_replaced_is_used_no_longer() {
    let (store, frontend, young) = (FakeStore::default(), Frontend::new(), Frontend::new());
    frontend.step(&store);
    let before = frontend.current();
    store.values.lock().unwrap().values_mut().for_each(|value| *value = Some(b"garbage".to_vec()));
    frontend.agreement.recheck();
    frontend.step(&store);
    young.step(&store);
    assert_eq!((frontend.generation(), frontend.current()), (1, young.current()));
    assert!(frontend.opens(before));
}

#[test]
fn a_removal_of_its_address_ends_a_secret() {
    let (store, frontend) = (FakeStore::default(), Frontend::new());
    frontend.step(&store);
    let (secret, _) = frontend.agreement.secret_for_issue().unwrap();
    frontend.agreement.drop_address(&[0; 32]);
    assert!(frontend.opens(*secret.name()));
    frontend.agreement.drop_address(&secret.address);
    assert!(!frontend.opens(*secret.name()) && frontend.issues().is_none());
    store.remove_all();
    frontend.step(&store);
    assert_eq!(frontend.generation(), 1);
}

#[test]
fn a_purge_ends_the_secrets_that_were_created_before() {
    let (store, frontend) = (FakeStore::default(), Frontend::new());
    frontend.step(&store);
    let before = frontend.current();
    let created = frontend.agreement.secret_for_issue().unwrap().0.created;
    frontend.agreement.purge(created, false);
    assert_eq!(frontend.current(), before, "not before its creation");
    store.purge(created + 1);
    frontend.agreement.purge(created + 1, false);
    assert_eq!(frontend.issues(), None);
    frontend.step(&store);
    assert!(frontend.current() != before && !frontend.opens(before));
    assert_eq!(frontend.generation(), 0, "the address is free again for what is newer than the purge");
}

#[test]
fn a_frontend_whose_clock_is_behind_proposes_a_secret_that_is_newer_than_the_purge() {
    let (store, frontend) = (FakeStore::default(), Frontend::new());
    let purge = (START + 100) * 1_000_000;
    store.purge(purge);
    frontend.agreement.purge(purge, false);
    frontend.step(&store);
    assert_eq!((frontend.generation(), frontend.agreement.secret_for_issue().unwrap().0.created), (0, purge));
}

#[test]
fn a_purge_without_a_time_ends_all_secrets() {
    let (store, frontend) = (FakeStore::default(), Frontend::new());
    frontend.step(&store);
    let before = frontend.current();
    frontend.agreement.purge(1, true);
    assert!(!frontend.opens(before) && frontend.agreement.count() == 0);
    store.purge(1);
    frontend.step(&store);
    assert_ne!(frontend.current(), before);
}

#[test]
fn after_a_purge_a_frontend_looks_for_the_secrets_of_all_epochs() {
    let (store, frontend) = (FakeStore::default(), Frontend::new());
    frontend.step(&store);
    let first = frontend.current();
    frontend.pass(&store, 2 * ROTATION);
    frontend.agreement.purge(1, true);
    frontend.step(&store);
    assert!(frontend.opens(first), "the store has it, so it is newer than the purge");
}

#[test]
fn a_secret_from_before_a_purge_that_the_store_still_has_is_not_used() {
    let (store, one, other) = (FakeStore::default(), Frontend::new(), Frontend::new());
    one.step(&store);
    let created = one.agreement.secret_for_issue().unwrap().0.created;
    other.agreement.purge(created + 1, false);
    other.step(&store);
    assert_eq!(other.generation(), 1);
    assert!(!other.opens(one.current()));
}

#[test]
fn the_secret_of_an_unknown_name_is_looked_up_if_the_fleet_has_named_it() {
    let (store, one, other) = (FakeStore::default(), Frontend::new(), Frontend::new());
    other.step(&store);
    let store = FakeStore::default();
    one.step(&store);
    store.calls();
    let mut invented = one.current();
    invented[15] ^= 1;
    for name in [&invented[..], &[], &[0; 16], &[0; 17]] {
        assert!(!other.agreement.request(name));
    }
    other.step(&store);
    assert_eq!(store.calls(), 0);
    assert!(other.agreement.request(&one.current()));
    other.step(&store);
    assert_eq!(store.calls(), 1);
    assert!(other.opens(one.current()) && other.current() == one.current(), "the store's encrypts");
}

#[test]
fn unknown_names_are_looked_up_once_in_a_second() {
    let (store, frontend, stranger) = (FakeStore::default(), Frontend::new(), Frontend::new());
    frontend.step(&store);
    stranger.step(&FakeStore::default());
    store.calls();
    for (milliseconds, calls) in [(0, 1), (999, 0), (1, 1)] {
        frontend.clock.advance(Duration::from_millis(milliseconds));
        assert!(frontend.agreement.request(&stranger.current()));
        frontend.step(&store);
        assert_eq!(store.calls(), calls);
    }
}

#[test]
fn frontends_agree_while_the_fleets_key_is_replaced() {
    let store = FakeStore::default();
    let (old, both) = (Frontend::with_keys(&[KEY, [8; 32]]), Frontend::with_keys(&[[8; 32], KEY]));
    old.step(&store);
    both.step(&store);
    assert_eq!(both.current(), old.current());
    let new = Frontend::with_keys(&[[8; 32]]);
    new.step(&store);
    assert_ne!(new.current(), old.current());
    assert!(old.agreement.request(&new.current()));
    old.clock.advance(UNKNOWN_NAME_PAUSE);
    old.step(&store);
    assert!(old.opens(new.current()));
}

#[test]
fn without_the_key_that_seals_it_a_secret_is_dropped() {
    let (store, frontend) = (FakeStore::default(), Frontend::with_keys(&[KEY, [8; 32]]));
    frontend.step(&store);
    let before = frontend.current();
    frontend.agreement.keyring.replace(&[[8; 32]]);
    frontend.step(&store);
    assert!(!frontend.opens(before) && frontend.current() != before);
}

#[test]
fn a_child_takes_over_the_secrets_and_its_parent_keeps_none_in_it() {
    let (store, parent, child) = (FakeStore::default(), Frontend::new(), Frontend::new());
    parent.step(&store);
    let (name, _) = parent.issues().unwrap();
    store.calls();
    child.agreement.inherit(&parent.agreement);
    assert_eq!((child.current(), parent.agreement.count()), (name, 0));
    child.step(&store);
    assert_eq!(store.calls(), 1, "epochs before the present one");
}

#[test]
fn a_child_knows_the_purges_that_its_parent_knew() {
    let (store, parent, child) = (FakeStore::default(), Frontend::new(), Frontend::new());
    Frontend::new().step(&store);
    parent.agreement.purge(START * 1_000_000 + 1, false);
    child.agreement.inherit(&parent.agreement);
    child.step(&store);
    assert_eq!(child.generation(), 1, "the one in the store was purged");
}

#[test]
fn more_secrets_than_fit_into_a_batch_are_several_batches() {
    let store = FakeStore::default();
    let frontend = Frontend::with(&[KEY], |options| {
        (options.rotation, options.lifetime) = (Duration::from_secs(1), Duration::from_secs(1000));
    });
    frontend.step(&store);
    assert_eq!(store.calls(), 4 + 1);
    assert!(frontend.issues().is_some());
}
