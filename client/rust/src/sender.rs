//! Sends Puts and Removes while no handshake waits: a bounded queue, many operations in one Batch.

use std::collections::{HashSet, VecDeque};
use std::mem;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::sealing::StoreKey;
use crate::shim::{Process, unix_time};
use crate::stats::Kind;
use crate::store::Failure;
use crate::v1::{BatchOperation, PutRequest, RemoveRequest, batch_operation, batch_result};

/// What may wait to be sent; beyond that Puts and Removes are dropped, and counted.
const QUEUE_BYTES: usize = 16 << 20;
/// An item's own memory, roughly, beside its value.
const ITEM_BYTES: usize = 256;
const BATCH_OPERATIONS: usize = 256;
const BATCH_DEADLINE: Duration = Duration::from_secs(1);
/// How long to wait for company before a Batch is sent. Clients that come back sooner are asked for again.
const LINGER: Duration = Duration::from_millis(3);
/// How long to wait before a Batch is sent again, twice as long each time in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(800);
/// After how many failures in a row nobody who closes waits for more.
const PATIENCE: u32 = 3;
/// How many of the last removals are remembered: no look-up of this process finds what it has removed.
const REMOVALS: usize = 4096;

pub(crate) enum Item {
    /// A session, when it was negotiated, and when its life ends, in Unix seconds: waiting in the queue neither brings it past a purge
    /// nor prolongs it.
    Put { key: StoreKey, value: Vec<u8>, issued: SystemTime, not_after: u64 },
    /// The reason under which the removal is counted.
    Remove { key: StoreKey, reason: &'static str },
}

impl Item {
    fn size(&self) -> usize {
        ITEM_BYTES + if let Self::Put { value, .. } = self { value.len() } else { 0 }
    }

    fn counted(&self, outcome: &'static str) -> (Kind, &'static str) {
        match self {
            Self::Put { .. } => (Kind::Puts, outcome),
            Self::Remove { reason, .. } if outcome == "stored" => (Kind::Removals, reason),
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
                ttl: Some(prost_types::Duration { seconds: i64::try_from(not_after - now).ok()?, nanos: 0 }),
                issue_time: Some((*issued).into()),
            }),
            Self::Remove { key, .. } => batch_operation::Operation::Remove(RemoveRequest { namespace, key: key.to_vec() }),
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
    /// How often in a row no Batch was carried out.
    failures: u32,
    /// Whether nobody will look into the queue without being told.
    idle: bool,
    closing: bool,
}

#[derive(Default)]
struct Removed {
    keys: HashSet<StoreKey>,
    order: VecDeque<StoreKey>,
}

impl Removed {
    fn add(&mut self, key: StoreKey) {
        if self.keys.insert(key) {
            self.order.push_back(key);
        }
        if self.order.len() > REMOVALS
            && let Some(oldest) = self.order.pop_front()
        {
            self.keys.remove(&oldest);
        }
    }
}

#[derive(Default)]
pub(crate) struct Sender {
    queue: Mutex<Queue>,
    removed: Mutex<Removed>,
    work: Notify,
    finished: Condvar,
}

impl Sender {
    /// Queues an item and returns its number for `wait`, or None if there was no room. `urgent` if somebody waits for it.
    pub(crate) fn submit(&self, process: &Process, item: Item, urgent: bool) -> Option<u64> {
        if let Item::Remove { key, .. } = &item {
            self.removed().add(*key);
        }
        let mut queue = self.lock();
        if queue.closing || queue.bytes + item.size() > QUEUE_BYTES {
            drop(queue);
            process.count(item.counted("dropped"));
            return None;
        }
        queue.bytes += item.size();
        queue.items.push_back(item);
        queue.submitted += 1;
        let number = queue.submitted;
        if urgent {
            queue.urgent = number;
        }
        // Who lingers or sends finds it in the queue: to be woken would cost this handshake its turn.
        let wake = mem::take(&mut queue.idle) || urgent || queue.items.len() >= BATCH_OPERATIONS;
        drop(queue);
        if wake {
            self.work.notify_one();
        }
        Some(number)
    }

    /// Waits until what `submit` numbered so was sent or given up, and returns false if it took too long.
    pub(crate) fn wait(&self, number: u64, patience: Duration) -> bool {
        let waited = self.finished.wait_timeout_while(self.lock(), patience, |queue| queue.finished < number);
        waited.is_ok_and(|(_, outcome)| !outcome.timed_out())
    }

    /// Sends all that was submitted so far at once, and returns false if it took too long.
    pub(crate) fn flush(&self, patience: Duration) -> bool {
        let last = {
            let mut queue = self.lock();
            queue.urgent = queue.submitted;
            queue.submitted
        };
        self.work.notify_one();
        self.wait(last, patience)
    }

    /// Returns whether this process has removed a session lately, whatever has become of that.
    pub(crate) fn is_removed(&self, key: &StoreKey) -> bool {
        self.removed().keys.contains(key)
    }

    /// Returns whether the last Batch was carried out, if there was any.
    pub(crate) fn answered(&self) -> bool {
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
    pub(crate) async fn run(&self, process: &Process) {
        loop {
            let over = {
                let queue = self.lock();
                queue.closing && (queue.items.is_empty() || queue.failures >= PATIENCE)
            };
            if over {
                self.finished.notify_all();
                return;
            }
            // Even with nothing to do yet: while handshakes go on, none of them has to wake this thread.
            self.linger().await;
            if self.lock().items.is_empty() {
                self.rest().await;
            } else if !self.send(process).await {
                let failures = {
                    let queue = &mut *self.lock();
                    queue.failures += 1;
                    queue.failures
                };
                self.pause(LONGEST_PAUSE.min(FIRST_PAUSE * 2_u32.saturating_pow(failures - 1))).await;
            }
        }
    }

    /// Waits until there is something to send.
    async fn rest(&self) {
        {
            let mut queue = self.lock();
            if !queue.items.is_empty() || queue.closing {
                return;
            }
            queue.idle = true;
        }
        self.work.notified().await;
        self.lock().idle = false;
    }

    /// Waits for company, unless somebody waits already.
    async fn linger(&self) {
        let company = async {
            while !self.hurried() {
                self.work.notified().await;
            }
        };
        let _ = timeout(LINGER, company).await;
    }

    fn hurried(&self) -> bool {
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

    /// Sends the first of the queue, and returns whether that was carried out.
    async fn send(&self, process: &Process) -> bool {
        let now = unix_time();
        let operations: Vec<_> = {
            let queue = self.lock();
            queue.items.iter().take(BATCH_OPERATIONS).map(|item| item.operation(&process.namespace, now)).collect()
        };
        let alive: Vec<_> = operations.iter().flatten().cloned().collect();
        let mut results = Vec::new().into_iter();
        if !alive.is_empty() {
            match process.store.batch(alive, Instant::now() + BATCH_DEADLINE).await {
                Ok(answered) => results = answered.into_iter(),
                Err(failure) => {
                    // Everything stays in the queue, in its order: ids are write-once, so sending twice does no harm.
                    log::debug!("sending to the store failed: {}", failure.reason());
                    if failure == Failure::Limited {
                        process.limited();
                    }
                    return false;
                }
            }
        }
        let mut queue = self.lock();
        queue.failures = 0;
        for operation in &operations {
            let Some(item) = queue.items.pop_front() else { break };
            queue.bytes -= item.size();
            queue.finished += 1;
            let outcome = match operation.as_ref().and_then(|_| results.next()) {
                None => "expired",
                Some(Some(batch_result::Result::Error(_)) | None) => "refused",
                Some(_) => "stored",
            };
            process.count(item.counted(outcome));
        }
        drop(queue);
        self.finished.notify_all();
        true
    }

    fn removed(&self) -> MutexGuard<'_, Removed> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
