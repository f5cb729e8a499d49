//! The state of one process: its connections to the store, and the thread in which all calls are made.

use std::sync::Arc;
use std::thread;

use nix::sys::signal::{SigSet, SigmaskHow};
use tokio::runtime::Builder;
use tonic::transport::Endpoint;

use crate::clock::SystemClock;
use crate::error::Error;
use crate::guarded_store::GuardedStore;
use crate::lookups::Lookups;
use crate::mirror::Mirror;
use crate::options::{Options, SessionMode};
use crate::prober;
use crate::sender::Sender;
use crate::store::Store;
use crate::target::Target;
use crate::tickets::Tickets;
use crate::watching;

pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) store: Arc<GuardedStore>,
    pub(crate) sender: Arc<Sender>,
    pub(crate) mirror: Option<Arc<Mirror>>,
    pub(crate) lookups: Arc<Lookups>,
    pub(crate) tickets: Option<Arc<Tickets>>,
}

impl Process {
    /// Starts the thread. `parent` is the state of the process that this one was forked from.
    pub(crate) fn start(
        options: &Options,
        target: &Target,
        endpoint: &Endpoint,
        parent: Option<&Self>,
    ) -> Result<Arc<Self>, Error> {
        let failed = |error: std::io::Error| Error::new(format!("no thread for the store: {error}"));
        let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let entered = runtime.enter();
        let store = Store::new(options, target, endpoint);
        drop(entered);
        let store = Arc::new(GuardedStore::new(options.namespace.clone(), options.deadline, store));
        let mirror = (options.mirror > 0).then(|| Arc::new(Mirror::new(options.mirror)));
        let handle = runtime.handle().clone();
        let sender = Arc::new(Sender::new(parent.map(|parent| &*parent.sender)));
        let lookups = Arc::new(Lookups::new(Arc::clone(&store), mirror.clone(), handle, options.max_lookups));
        let tickets = (options.sessions == SessionMode::Tickets).then(|| {
            let parent = parent.and_then(|parent| parent.tickets.as_deref());
            let (store, lookups, sender) = (Arc::clone(&store), Arc::clone(&lookups), Arc::clone(&sender));
            Arc::new(Tickets::new(options, store, lookups, sender, Arc::new(SystemClock), parent))
        });
        let process = Arc::new(Self { pid: std::process::id(), store, sender, mirror, lookups, tickets });
        let running = Arc::clone(&process);
        // Signals are for the program's own threads: many servers rely on system calls of theirs being interrupted.
        let blocked = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
        let thread = thread::Builder::new().name("resumed".into()).spawn(move || {
            runtime.block_on(async {
                let [mirror, servers, credentials, prober] = [(); 4].map(|()| Arc::clone(&running.store));
                if let Some(copy) = running.mirror.clone() {
                    tokio::spawn(async move {
                        copy.wait().await;
                        watching::follow(&*copy, &mirror.calls).await;
                    });
                }
                if let Some(tickets) = running.tickets.clone() {
                    let (followed, store) = (Arc::clone(&tickets), Arc::clone(&running.store));
                    tokio::spawn(async move { watching::follow(&*followed, &store.calls).await });
                    let store = Arc::clone(&running.store);
                    tokio::spawn(async move { tickets.agreement.run(&store).await });
                }
                tokio::spawn(async move { servers.calls.follow_servers().await });
                tokio::spawn(async move { credentials.calls.follow_credentials().await });
                tokio::spawn(async move { prober::run(&prober).await });
                running.sender.run(&running.store).await;
            });
        });
        if let Ok(mask) = blocked {
            let _ = mask.thread_set_mask();
        }
        thread.map_err(failed)?;
        Ok(process)
    }
}
