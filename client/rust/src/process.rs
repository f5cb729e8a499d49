//! The state of one process: its connections to the store, and the thread in which all calls are made.

use std::sync::Arc;
use std::thread;

use nix::sys::signal::{SigSet, SigmaskHow};
use tokio::runtime::Builder;
use tonic::transport::Endpoint;

use crate::error::Error;
use crate::guarded_store::GuardedStore;
use crate::lookups::Lookups;
use crate::mirror::Mirror;
use crate::options::Options;
use crate::prober;
use crate::sender::Sender;
use crate::store::Store;
use crate::target::Target;

pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) store: Arc<GuardedStore>,
    pub(crate) sender: Sender,
    pub(crate) mirror: Option<Arc<Mirror>>,
    pub(crate) lookups: Arc<Lookups>,
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
        let process = Arc::new(Self {
            pid: std::process::id(),
            sender: Sender::new(parent.map(|parent| &parent.sender)),
            lookups: Arc::new(Lookups::new(Arc::clone(&store), mirror.clone(), handle, options.max_lookups)),
            mirror,
            store,
        });
        let running = Arc::clone(&process);
        // Signals are for the program's own threads: many servers rely on system calls of theirs being interrupted.
        let blocked = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
        let thread = thread::Builder::new().name("resumed".into()).spawn(move || {
            runtime.block_on(async {
                let [mirror, servers, credentials, prober] = [(); 4].map(|()| Arc::clone(&running.store));
                if let Some(copy) = running.mirror.clone() {
                    tokio::spawn(async move { copy.follow(&mirror.calls).await });
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
