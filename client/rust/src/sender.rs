//! The write queue: sends Puts and Removes in the background, many operations in one Batch.

use std::collections::{HashSet, VecDeque};
use std::mem;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::clock::unix_time;
use crate::guarded_store::GuardedStore;
use crate::options::When;
use crate::pauses::Pauses;
use crate::removed::{REMEMBERED, Removed};
use crate::sealing::StoreKey;
use crate::stats::Kind;
use crate::store::{Failure, ttl};
use crate::v1::{BatchOperation, PutRequest, RemoveRequest, batch_operation, batch_result};

/// The size of the queue, beyond which Puts and Removes are dropped, and counted.
pub(crate) const QUEUE_BYTES: usize = 16 << 20;
/// An item's own memory, roughly, beside its value.
pub(crate) const ITEM_BYTES: usize = 256;
pub(crate) const BATCH_OPERATIONS: usize = 256;
pub(crate) const BATCH_DEADLINE: Duration = Duration::from_secs(1);
/// The operations of a Batch that show load, since a handshake alone has one or two: a Batch of any size costs about as much as a
/// resumption, so the next one gathers more.
pub(crate) const BUSY_OPERATIONS: usize = 3;
/// The pause after such a Batch. Until its end the look-up of a client that comes back is retried.
pub(crate) const BUSY_PAUSE: Duration = Duration::from_millis(5);
/// The pauses before a Batch is sent again, with exponential backoff.
pub(crate) const RETRY_PAUSES: Pauses = Pauses { first: Duration::from_millis(50), longest: Duration::from_millis(800) };
/// Consecutive failures after which `close` does not wait for the rest of the queue.
const PATIENCE: u32 = 3;

pub(crate) enum Item {
    /// A session, the time when it was negotiated, and the end of its lifetime in Unix seconds: its time in the queue neither exempts it
    /// from a purge nor prolongs it.
    Put { key: StoreKey, value: Vec<u8>, issued: SystemTime, not_after: u64 },
    /// The reason under which the removal is counted; for a lasting removal, its end in Unix seconds.
    Remove { key: StoreKey, reason: &'static str, end: Option<u64> },
}

impl Item {
    fn size(&self) -> usize {
        ITEM_BYTES + if let Self::Put { value, .. } = self { value.len() } else { 0 }
    }

    fn counted(&self, outcome: &'static str) -> (Kind, &'static str) {
        match self {
            Self::Put { .. } => (Kind::Puts, outcome),
            // A removal that was not sent before its end has done all that it was for.
            Self::Remove { reason, .. } if matches!(outcome, "stored" | "expired") => (Kind::Removals, reason),
            Self::Remove { .. } => (Kind::Removals, outcome),
        }
    }

    fn operation(&self, namespace: &str, now: u64) -> Option<BatchOperation> {
        let namespace = namespace.to_owned();
        let operation = match self {
            Self::Put { not_after, .. } if *not_after <= now => return None,
            Self::Put { key, value, issued, not_after } => batch_operation::Operation::Put(PutRequest {
                namespace,
                key: key.to_vec(),
                value: value.clone(),
                ttl: Some(ttl(not_after - now)),
                issue_time: Some((*issued).into()),
                pinned: false,
            }),
            Self::Remove { end: Some(end), .. } if *end <= now => return None,
            Self::Remove { key, end, .. } => batch_operation::Operation::Remove(RemoveRequest {
                namespace,
                key: key.to_vec(),
                ttl: end.map(|end| ttl(end - now)),
            }),
        };
        Some(BatchOperation { operation: Some(operation) })
    }
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Item>,
    bytes: usize,
    submitted: u64,
    finished: u64,
    urgent: u64,
    /// Consecutive Batches that were not carried out.
    failures: u32,
    /// Whether the last Batch showed load.
    busy: bool,
    /// Whether the thread reads the queue only after a notification.
    idle: bool,
    /// When the last item is due.
    last: Option<When>,
    /// The sessions, at most `REMEMBERED`, whose removal was refused or dropped.
    not_removed: HashSet<StoreKey>,
    closing: bool,
}

impl Queue {
    /// Remembers the outcome of a removal.
    fn conclude(&mut self, item: &Item, outcome: &'static str) {
        let Item::Remove { key, .. } = item else { return };
        if !matches!(outcome, "refused" | "dropped") {
            self.not_removed.remove(key);
        } else if self.not_removed.len() < REMEMBERED {
            self.not_removed.insert(*key);
        }
    }
}

#[derive(Default)]
pub(crate) struct Sender {
    queue: Mutex<Queue>,
    removed: Removed,
    work: Notify,
    finished: Condvar,
}

impl Sender {
    /// Makes a sender with an empty queue: a parent sends its own queue.
    pub(crate) fn new(parent: Option<&Self>) -> Self {
        let removed = parent.map(|parent| Removed::inherited(&parent.removed)).unwrap_or_default();
        Self { removed, ..Self::default() }
    }

    /// Queues an item and returns its number for `wait`, or None if there was no room.
    pub(crate) fn submit(&self, store: &GuardedStore, item: Item, when: When) -> Option<u64> {
        if let Item::Remove { key, .. } = &item {
            self.removed.add(*key);
        }
        let mut queue = self.lock();
        if queue.closing || queue.bytes + item.size() > QUEUE_BYTES {
            queue.conclude(&item, "dropped");
            drop(queue);
            store.count(item.counted("dropped"));
            return None;
        }
        queue.bytes += item.size();
        queue.items.push_back(item);
        queue.submitted += 1;
        let number = queue.submitted;
        if when == When::Now {
            queue.urgent = number;
        }
        // A thread that pauses or sends a Batch finds it in the queue: a notification would cost this handshake its time slice.
        let completes = queue.last.replace(when) == Some(When::WithNext) && when != When::WithNext;
        let wake = mem::take(&mut queue.idle) || completes || when == When::Now || queue.items.len() >= BATCH_OPERATIONS;
        drop(queue);
        if wake {
            self.work.notify_one();
        }
        Some(number)
    }

    /// Waits until the item of this number was sent or given up, and returns false if that took longer than `patience`.
    pub(crate) fn wait(&self, number: u64, patience: Duration) -> bool {
        let waited = self.finished.wait_timeout_while(self.lock(), patience, |queue| queue.finished < number);
        waited.is_ok_and(|(_, outcome)| !outcome.timed_out())
    }

    /// Sends all items of the queue at once, and returns false if that took longer than `patience` or a removal has failed that was not
    /// submitted again.
    pub(crate) fn flush(&self, patience: Duration) -> bool {
        let last = {
            let mut queue = self.lock();
            queue.urgent = queue.submitted;
            queue.submitted
        };
        self.work.notify_one();
        self.wait(last, patience) && self.lock().not_removed.is_empty()
    }

    /// Returns whether this process, or one that it was forked from, has removed a session lately.
    pub(crate) fn is_removed(&self, key: &StoreKey) -> bool {
        self.removed.contains(key)
    }

    /// Returns whether the last Batch was carried out, if there was any.
    pub(crate) fn last_batch_succeeded(&self) -> bool {
        self.lock().failures == 0
    }

    /// Accepts nothing more, and waits until all is sent or the store fails.
    pub(crate) fn close(&self, patience: Duration) {
        self.lock().closing = true;
        self.work.notify_one();
        let busy = |queue: &mut Queue| !queue.items.is_empty() && queue.failures < PATIENCE;
        drop(self.finished.wait_timeout_while(self.lock(), patience, busy));
    }

    /// Sends until `close` was called and all is sent.
    pub(crate) async fn run(&self, store: &GuardedStore) {
        loop {
            let over = {
                let queue = self.lock();
                queue.closing && (queue.items.is_empty() || queue.failures >= PATIENCE)
            };
            if over {
                self.finished.notify_all();
                return;
            }
            let busy = mem::take(&mut self.lock().busy);
            if busy {
                // Also with an empty queue: under load no handshake has to wake this thread.
                self.gather().await;
            }
            if self.lock().items.is_empty() {
                self.wait_for_items().await;
            } else if !self.send(store).await {
                let failures = {
                    let queue = &mut *self.lock();
                    queue.failures += 1;
                    queue.failures
                };
                self.pause(RETRY_PAUSES.number(failures)).await;
            }
        }
    }

    /// Waits until the queue has an item.
    async fn wait_for_items(&self) {
        {
            let mut queue = self.lock();
            if !queue.items.is_empty() || queue.closing {
                return;
            }
            queue.idle = true;
        }
        self.work.notified().await;
        self.lock().idle = false;
        let complete = async {
            while self.lock().last == Some(When::WithNext) && !self.is_due() {
                self.work.notified().await;
            }
        };
        let _ = timeout(BUSY_PAUSE, complete).await; // the handshake may have ended
        self.lock().last = None;
    }

    /// Waits until a Batch is due under load: after a pause, or at once if a handshake waits or the Batch is full.
    async fn gather(&self) {
        let due = async {
            while !self.is_due() {
                self.work.notified().await;
            }
        };
        let _ = timeout(BUSY_PAUSE, due).await;
    }

    fn is_due(&self) -> bool {
        let queue = self.lock();
        queue.urgent > queue.finished || queue.items.len() >= BATCH_OPERATIONS || queue.closing
    }

    async fn pause(&self, duration: Duration) {
        let closing = async {
            while !self.lock().closing {
                self.work.notified().await;
            }
        };
        let _ = timeout(duration, closing).await;
    }

    /// Sends the first items of the queue, and returns whether the Batch was carried out.
    async fn send(&self, store: &GuardedStore) -> bool {
        let (now, began) = (unix_time(), Instant::now());
        let operations: Vec<_> = {
            let queue = self.lock();
            queue.items.iter().take(BATCH_OPERATIONS).map(|item| item.operation(&store.namespace, now)).collect()
        };
        let alive: Vec<_> = operations.iter().flatten().cloned().collect();
        let mut results = Vec::new().into_iter();
        if !alive.is_empty() {
            match store.calls.batch(alive, began + BATCH_DEADLINE).await {
                Ok(answered) => results = answered.into_iter(),
                Err(failure) => {
                    // All items stay in the queue, in their order: ids are write-once, so a repeated Put does no harm.
                    log::debug!("a Batch failed: {}", failure.reason());
                    if failure == Failure::Limited {
                        store.limited(began.into());
                    }
                    return false;
                }
            }
        }
        let mut queue = self.lock();
        queue.failures = 0;
        queue.busy = operations.len() >= BUSY_OPERATIONS;
        for operation in &operations {
            let Some(item) = queue.items.pop_front() else { break };
            queue.bytes -= item.size();
            queue.finished += 1;
            let outcome = match operation.as_ref().and_then(|_| results.next()) {
                None => "expired",
                Some(Some(batch_result::Result::Error(_)) | None) => "refused",
                Some(_) => "stored",
            };
            queue.conclude(&item, outcome);
            store.count(item.counted(outcome));
        }
        drop(queue);
        self.finished.notify_all();
        true
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_that_failed_is_remembered_until_it_is_repeated() {
        let remove = || Item::Remove { key: [1; 32], reason: "application", end: None };
        let mut queue = Queue::default();
        for outcome in ["refused", "dropped"] {
            queue.conclude(&remove(), outcome);
            assert!(!queue.not_removed.is_empty());
            queue.conclude(&remove(), "stored");
            assert!(queue.not_removed.is_empty());
        }
    }
}
