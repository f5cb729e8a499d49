//! Tries a store that keeps failing until it answers again, so that no handshake has to.

use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::shim::Process;
use crate::store::{Failure, How, PROBE_KEY};

/// How long to wait before a store that keeps failing is tried again, twice as long each time: it may have been a busy moment.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

#[derive(Default)]
pub(crate) struct Prober(Notify);

impl Prober {
    /// Has the store tried, from now on, until it answers again.
    pub(crate) fn start(&self) {
        self.0.notify_one();
    }

    /// Tries it whenever that was started, until the task is dropped.
    pub(crate) async fn run(&self, process: &Process) {
        loop {
            self.0.notified().await;
            let mut pause = FIRST_PAUSE;
            while !process.breaker.closed() {
                sleep(pause).await;
                pause = (2 * pause).min(LONGEST_PAUSE);
                // With the deadline of a handshake: a store that answers, but too late for one, is no help.
                match process.store.look_up(PROBE_KEY, How::Get, Instant::now() + process.deadline).await {
                    Ok(_) => process.succeeded(),
                    Err(Failure::Limited) => process.limited(),
                    Err(_) => {}
                }
            }
        }
    }
}
