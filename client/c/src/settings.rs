//! Settings as C and the environment have them, and one shim for all contexts whose settings are equal.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use store::{Credentials, Error, Format, Ids, Keyring, Options, Puts, SessionMode, Shim};

use crate::fork;
use crate::shared::Shared;

/// How sessions are kept; zero and None mean the default. See `resumed_options` in `resumed.h`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs, clippy::struct_excessive_bools)]
pub struct Settings {
    pub target: String,
    pub namespace: String,
    pub keyring: PathBuf,
    pub lifetime: Duration,
    pub deadline: Duration,
    pub max_lookups: usize,
    pub mirror: usize,
    pub single_use: bool,
    pub any_ids: bool,
    pub wait_for_puts: bool,
    pub tls: bool,
    pub ca: Option<PathBuf>,
    pub identity: Option<(PathBuf, PathBuf)>,
    pub server_name: Option<String>,
    pub tickets: bool,
    pub tickets_tls12: bool,
    pub rotation: Duration,
    pub revocation_grace: Option<Duration>,
}

/// Returns the shim for these settings: the same one as before, while a context has it.
///
/// # Errors
///
/// A setting is outside its range, or a file cannot be used; the message says which, and what to do.
pub fn shim(settings: &Settings) -> Result<Arc<Shim>, Error> {
    static SHIMS: Shared<HashMap<Settings, Weak<Shim>>> = Shared::new(HashMap::new);
    fork::watch();
    SHIMS.with(|shims| {
        if let Some(shim) = shims.get(settings).and_then(Weak::upgrade) {
            return Ok(shim);
        }
        let shim = Arc::new(Shim::new(settings.options()?, Format::OpenSsl)?);
        shims.retain(|_, shim| shim.strong_count() > 0);
        shims.insert(settings.clone(), Arc::downgrade(&shim));
        Ok(shim)
    })
}

impl Settings {
    fn options(&self) -> Result<Options, Error> {
        let mut options = Options::new(&self.target, &self.namespace, Keyring::load(&self.keyring)?);
        if !self.lifetime.is_zero() {
            options.lifetime = self.lifetime;
        }
        if !self.deadline.is_zero() {
            options.deadline = self.deadline;
        }
        if self.max_lookups > 0 {
            options.max_lookups = self.max_lookups;
        }
        options.mirror = self.mirror;
        options.single_use = self.single_use;
        options.ids = if self.any_ids { Ids::Any } else { Ids::Sealed };
        options.puts = if self.wait_for_puts { Puts::Wait } else { Puts::Background };
        options.sessions = if self.tickets { SessionMode::Tickets } else { SessionMode::Stored };
        options.tickets_tls12 = self.tickets_tls12;
        if !self.rotation.is_zero() {
            options.rotation = self.rotation;
        }
        if let Some(grace) = self.revocation_grace {
            options.revocation_grace = grace;
        }
        if self.tls {
            let mut credentials = Credentials::default();
            credentials.ca.clone_from(&self.ca);
            credentials.identity.clone_from(&self.identity);
            credentials.server_name.clone_from(&self.server_name);
            options.credentials = Some(credentials);
        }
        Ok(options)
    }
}
