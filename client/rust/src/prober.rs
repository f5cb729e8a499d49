//! Probes a store whose breaker is open until it answers, so that no handshake has to.

use tokio::time::{Instant, sleep};

use crate::guarded_store::GuardedStore;
use crate::store::{Failure, How, PROBE_KEY};

/// Probes the store whenever its breaker has opened, until the task is dropped.
pub(crate) async fn run(store: &GuardedStore) {
    loop {
        store.opened().await;
        while !store.breaker.closed() {
            sleep(store.breaker.next_probe_pause()).await;
            // With the deadline of a handshake: a store that answers later than that must stay excluded.
            let began = Instant::now();
            match store.calls.look_up(PROBE_KEY, How::Get, began + store.deadline).await {
                Ok(_) => store.succeeded(),
                Err(Failure::Limited) => store.limited(began.into()),
                Err(_) => {}
            }
        }
    }
}
