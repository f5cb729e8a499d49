//! Follows the changes of a namespace.
//!
//! A stream is live only while messages arrive. The same holds if they arrive late, as a network that delays them could have it: a call each
//! second, on the connection of the stream, bounds their age.

use std::convert::Infallible;
use std::future::poll_fn;
use std::mem;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::store::Store;
use crate::v1::{WatchEvent, WatchResponse};

/// For how long a stream counts as live after its last message: the store sends one each second at least.
pub(crate) const STALE: Duration = Duration::from_secs(3);
const CONFIRMATION_PAUSE: Duration = Duration::from_millis(900);
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// The receiver of the changes of a namespace.
pub(crate) trait Watcher {
    /// Whether to watch lasting removals and purges only.
    const REMOVALS_ONLY: bool;
    /// The log line for a stream that has ended.
    const LOST: &str;

    /// Takes the first response of a stream, or returns why the stream is of no use. `follows` is whether it was to continue an earlier one.
    fn begin(&self, first: &WatchResponse, follows: bool) -> Result<(), String>;

    fn take_in(&self, event: WatchEvent);

    /// Records that all changes up to then were taken in.
    fn record_live(&self, then: Instant);

    /// Records that the stream was lost, and another one did not begin at once.
    fn lose(&self);
}

/// Follows the namespace until the task is dropped.
pub(crate) async fn follow<W: Watcher>(watcher: &W, store: &Store) {
    let (mut position, mut failing) = (Vec::new(), false);
    loop {
        let (began, mut live) = (Instant::now(), false);
        let Err(error) = stream(watcher, store, &mut position, &mut live).await;
        if live && began.elapsed() >= RETRY_PAUSE {
            // Servers end streams whose connection is old, and when they stop. Another one goes on at the same position: until then it is
            // as if the stream had been silent.
            log::debug!("the stream of {} begins again: {error}", store.target());
            failing = false;
            continue;
        }
        if live || !failing {
            // once per outage
            log::warn!("{}: {}: {error}", store.target(), W::LOST);
        }
        failing = true;
        watcher.lose();
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// Follows one stream to its end. `live` is whether the stream had caught up then.
async fn stream<W: Watcher>(watcher: &W, store: &Store, position: &mut Vec<u8>, live: &mut bool) -> Result<Infallible, String> {
    let silent = |_| format!("the store was silent for {STALE:?}");
    let mut first = true;
    let mut watch = store.watch(position.clone(), W::REMOVALS_ONLY, (Instant::now() + STALE).into()).await?;
    let mut confirmed = Instant::from(watch.asked);
    let mut confirmation = None;
    loop {
        if confirmation.is_none() && confirmed.elapsed() >= CONFIRMATION_PAUSE {
            confirmation = Some(Box::pin(timeout(STALE, watch.confirmation())));
        }
        let mut next = pin!(timeout(STALE, watch.answers.message()));
        let next = poll_fn(|context| {
            if let Some(Poll::Ready(outcome)) = confirmation.as_mut().map(|pending| pending.as_mut().poll(context)) {
                confirmation = None;
                match outcome.map_err(silent) {
                    Ok(Ok(asked)) => confirmed = asked.into(),
                    Ok(Err(error)) | Err(error) => return Poll::Ready(Err(error)),
                }
                if *live {
                    watcher.record_live(confirmed);
                }
            }
            next.as_mut().poll(context).map(|answer| answer.map_err(silent)?.map_err(|status| status.to_string()))
        });
        let answer = next.await?.ok_or("the store ended the stream")?;
        if mem::take(&mut first) {
            watcher.begin(&answer, !position.is_empty())?;
        }
        for event in answer.events {
            watcher.take_in(event);
        }
        if !answer.position.is_empty() {
            *position = answer.position;
        }
        if answer.live {
            watcher.record_live(confirmed);
        }
        *live = answer.live;
    }
}
