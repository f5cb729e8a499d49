//! The fleet of this process: which contexts keep their sessions in the store, and where.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::unistd::{getresgid, getresuid};
use resumed::{Binding, Connection, Context, Notice, Policy, Verified};
use store::Shim;

use crate::environment::Environment;
use crate::exit;

const EXIT_PATIENCE: Duration = Duration::from_secs(1);
const NO_NAMESPACE: &str = "a context that asks for client certificates is left alone: see RESUMED_VERIFIED_NAMESPACE";
const DATA_LOST: &str = "a context that asks for client certificates is left alone: this program attaches data to its sessions, which is \
                         lost when they are stored";

/// The state that all contexts share.
struct Fleet {
    shim: Arc<Shim>,
    /// For contexts that request client certificates.
    verified: Option<Arc<Shim>>,
    ignore_id_context: bool,
}

/// Whether the program attaches data of its own to sessions.
static SESSION_DATA: AtomicBool = AtomicBool::new(false);

/// Records that the program attaches data of its own to sessions.
pub fn note_session_data() {
    SESSION_DATA.store(true, Ordering::Relaxed);
}

/// The fleet that the environment describes; None if it describes none, a setting is wrong, or the program cannot be in one.
static FLEET: OnceLock<Option<Fleet>> = OnceLock::new();

fn fleet() -> Option<&'static Fleet> {
    FLEET.get_or_init(Fleet::open).as_ref()
}

impl Fleet {
    fn open() -> Option<Self> {
        exit::at_exit(close);
        Self::new(Environment::remembered()).inspect_err(|error| log::error!("no sessions are shared: {error}")).ok()
    }

    fn new(environment: &Environment) -> Result<Self, Box<dyn std::error::Error>> {
        let settings = environment.settings()?;
        let shim = resumed::shim(&settings)?;
        let verified = environment.verified_namespace().map(|namespace| {
            let settings = resumed::Settings { namespace: namespace.to_owned(), ..settings };
            resumed::shim(&settings)
        });
        Ok(Self { shim, verified: verified.transpose()?, ignore_id_context: environment.ignores_id_context()? })
    }

    /// Decides about a context that is set up.
    fn bind(&self, context: Context) -> Option<Binding> {
        static MIXED: Notice = Notice::new();
        static EARLY: Notice = Notice::new();
        static OFF: Notice = Notice::new();
        static VERIFYING: Notice = Notice::new();
        if has_mixed_privileges() {
            MIXED.warn(&format!(
                "all contexts of process {} are left alone: it changes between users, and must have one thread",
                std::process::id()
            ));
            return None;
        }
        if context.max_early_data() > 0 {
            EARLY.warn("a context that accepts early data is left alone: it could be replayed across the fleet");
            return None;
        }
        if !context.resumes() {
            OFF.warn(
                "a context is left alone whose server has switched resumption off: it has neither tickets nor a session cache",
            );
            return None;
        }
        // A certificate that was verified here must not count as verified where other ones are required.
        let verified = match &self.verified {
            _ if SESSION_DATA.load(Ordering::Relaxed) => Verified::Excluded(DATA_LOST),
            Some(shim) => Verified::Apart(Arc::clone(shim)),
            None => Verified::Excluded(NO_NAMESPACE),
        };
        if let Verified::Excluded(why) = verified
            && context.verifies_clients()
        {
            VERIFYING.warn(why);
            return None;
        }
        let (shim, ignore_id_context) = (Arc::clone(&self.shim), self.ignore_id_context);
        let lifetime = shim.options().lifetime.min(context.timeout());
        match &verified {
            Verified::Apart(verified) if context.verifies_clients() => verified.begin_tickets(),
            _ => shim.begin_tickets(),
        }
        Some(resumed::bind(&context, Policy { shim, verified, ignore_id_context, single_host: false, lifetime }))
    }

    fn close(&self) {
        for shim in [Some(&self.shim), self.verified.as_ref()].into_iter().flatten() {
            shim.close(EXIT_PATIENCE);
            let counts = resumed::counts(shim);
            if counts.iter().all(|(_, counts)| counts.is_empty()) {
                continue;
            }
            let show = |(kind, counts): (_, BTreeMap<&str, u64>)| {
                let shown: Vec<_> = counts.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
                format!("{kind}: {}", shown.join(", "))
            };
            let shown: Vec<_> = counts.into_iter().map(show).collect();
            log::info!("process {} ends; {}", std::process::id(), shown.join("; "));
        }
    }
}

/// Sends the rest of the queues when the process ends.
fn close() {
    if let Some(fleet) = fleet() {
        fleet.close();
    }
}

/// Puts the store under a server's connection that has not begun.
pub fn adopt(connection: Connection) {
    if let Some(binding) = connection.context().and_then(|context| adopt_context(context)) {
        // It was made before its context had its binding.
        resumed::prepare_connection(connection, binding);
    }
}

pub fn adopt_context(context: Context<'_>) -> Option<&'_ Binding> {
    let fleet = fleet()?;
    context.binding_or(|| fleet.bind(context))
}

/// Records where a connection begins.
pub fn begin<'a>(connection: Connection<'a>, context: Context<'a>) {
    if fleet().is_some() {
        connection.note_first_context(context);
    }
}

/// Records the session id context that a connection gets of its own.
pub fn identify(connection: Connection, id_context: &[u8]) {
    if fleet().is_some() {
        connection.note_id_context(id_context);
    }
}

/// Gets ready for a context that is being made. A program chooses OpenSSL's memory before its first one.
pub fn prepare(context: Context) {
    let fleet = FLEET.get_or_init(|| {
        if context.is_in_shared_memory() {
            log::warn!("no sessions are shared: this program keeps OpenSSL's objects in memory that its processes share");
            return None;
        }
        Fleet::open()
    });
    if fleet.is_some() {
        context.prepare(true);
    }
}

/// Returns whether the ticket callbacks of a context are ours, and those of the server no longer count.
pub fn has_tickets(context: Context) -> bool {
    context.binding().is_some_and(Binding::has_tickets)
}

/// Returns whether the process changes between users: then the system must change all its threads, and fails to where one of them may
/// not (`ProFTPD`).
fn has_mixed_privileges() -> bool {
    let users = getresuid().is_ok_and(|ids| ids.real == ids.effective && ids.real == ids.saved);
    let groups = getresgid().is_ok_and(|ids| ids.real == ids.effective && ids.real == ids.saved);
    !users || !groups
}
