//! Puts libresumed under unmodified servers: `LD_PRELOAD=libresumed-preload.so RESUMED_TARGET=... nginx`.
//!
//! A context gets its callbacks when its first connection is about to be accepted: by then the server has set it up, so nothing that it
//! sets undoes them, and contexts for connections to other servers are left alone. Keyring and credentials are read when
//! the server makes its first context, while it may still read them; threads and connections begin in each worker process.
#![deny(unsafe_code)]

mod environment;
#[allow(unsafe_code)]
mod hooks;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use resumed::{Binding, Connection, Context};
use store::Shim;

use crate::environment::Environment;

const EXIT_PATIENCE: Duration = Duration::from_secs(1);

/// What all contexts share.
struct Fleet {
    shim: Arc<Shim>,
    /// For contexts that ask clients for certificates.
    verified: Option<Arc<Shim>>,
}

/// Returns the fleet that the environment describes; None if it does not, or not rightly.
fn fleet() -> Option<&'static Fleet> {
    static FLEET: OnceLock<Option<Fleet>> = OnceLock::new();
    FLEET
        .get_or_init(|| {
            resumed::log_to_stderr();
            hooks::at_exit();
            Fleet::new(Environment::remembered()).inspect_err(|error| log::error!("no sessions are shared: {error}")).ok()
        })
        .as_ref()
}

impl Fleet {
    fn new(environment: &Environment) -> Result<Self, Box<dyn std::error::Error>> {
        let settings = environment.settings()?;
        let shim = resumed::shim(&settings)?;
        let verified = environment.verified_namespace().map(|namespace| {
            let settings = resumed::Settings { namespace: namespace.to_owned(), ..settings };
            resumed::shim(&settings)
        });
        Ok(Self { shim, verified: verified.transpose()? })
    }

    /// Decides about a context that is set up.
    fn bind(&self, context: Context) -> Option<Binding> {
        if context.max_early_data() > 0 {
            log::warn!("a context that accepts early data is left alone: it could be replayed across the fleet");
            return None;
        }
        if !context.verifies_clients() {
            return Some(Binding::new(&context, Arc::clone(&self.shim)));
        }
        // Whose certificate was verified here must not count as verified where others are asked for.
        if self.verified.is_none() {
            log::warn!("a context that asks for client certificates is left alone: see RESUMED_VERIFIED_NAMESPACE");
        }
        self.verified.as_ref().map(|shim| Binding::verifying(&context, Arc::clone(shim)))
    }

    fn close(&self) {
        for shim in [Some(&self.shim), self.verified.as_ref()].into_iter().flatten() {
            shim.close(EXIT_PATIENCE);
            let stats = shim.stats();
            let counts = |counts: &BTreeMap<&str, u64>| {
                let shown: Vec<_> = counts.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
                shown.join(", ")
            };
            if stats != store::Stats::default() {
                log::info!(
                    "process {} ends; hits: {}; misses: {}; puts: {}; removals: {}",
                    std::process::id(),
                    counts(&stats.hits),
                    counts(&stats.misses),
                    counts(&stats.puts),
                    counts(&stats.removals)
                );
            }
        }
    }
}

/// Puts the store under a server's connection that has not begun.
fn adopt(connection: Connection) {
    let binding = connection.context().and_then(|context| adopt_context(context));
    if binding.is_some() {
        connection.set_no_ticket();
    }
}

fn adopt_context(context: Context<'_>) -> Option<&'_ Binding> {
    let fleet = fleet()?;
    context.binding_or(|| fleet.bind(context))
}

/// Looks at a connection that has gone over to another context, as servers do for a virtual host.
///
/// By then OpenSSL has resumed what the first context let it. A host that asks for certificates must not take that for a proof.
fn switched(connection: Connection, chosen: Context) {
    if chosen.verifies_clients() {
        connection.distrust_others_sessions();
    }
}

/// Gets ready for a context that is being made.
fn prepare(context: Context) {
    if fleet().is_some() {
        context.prepare();
    }
}
