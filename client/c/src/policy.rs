//! How contexts keep their sessions: no more than data, so that `ssl` and the callbacks can both have it.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use store::fingerprint::{Half, client_authentication, halves};
use store::{Expected, Fingerprint, Shim};

use crate::shared::Notice;
use crate::ssl::ffi::{NewCallback, RemoveCallback};

/// The client authentication of a connection that requests no certificate.
pub(crate) static NO_CLIENT_AUTHENTICATION: LazyLock<Half> = LazyLock::new(|| client_authentication(None));

/// Returns whether connections of a fingerprint request client certificates.
pub(crate) fn requests_certificate(fingerprint: &Fingerprint) -> bool {
    halves(fingerprint).1 != *NO_CLIENT_AUTHENTICATION
}

/// The properties that a session must have so that it resumes on a connection.
pub(crate) struct Requirements {
    /// The server name, in lower case.
    pub(crate) name: Vec<u8>,
    pub(crate) expected: Expected,
    /// Whether the fingerprint is that of the connection itself, not one that was learned.
    pub(crate) settled: bool,
    /// Whether the connection will request a client certificate, as far as that is known before the servername callback.
    pub(crate) verifies: bool,
}

/// Where the sessions of connections that request client certificates are kept.
#[derive(Clone)]
pub enum Verified {
    /// With all others.
    Together,
    /// In a namespace of their own.
    Apart(Arc<Shim>),
    /// Nowhere; the log line gives the reason.
    Excluded(&'static str),
}

/// How a context keeps its sessions.
#[derive(Clone)]
pub struct Policy {
    /// The namespace of its sessions.
    pub shim: Arc<Shim>,
    /// The sessions of connections that request client certificates.
    pub verified: Verified,
    /// Whether sessions resume in spite of unlike session id contexts of applications.
    pub ignore_id_context: bool,
    /// Whether the context has no servername callback.
    pub single_host: bool,
    /// The lifetime of sessions after their negotiation.
    pub lifetime: Duration,
}

impl Policy {
    /// Returns the namespace of connections that request client certificates, or do not; None if their sessions are not kept.
    pub(crate) fn shim_for(&self, verifies: bool) -> Option<&Arc<Shim>> {
        static LOGGED: Notice = Notice::new();
        match &self.verified {
            Verified::Apart(shim) if verifies => Some(shim),
            Verified::Excluded(reason) if verifies => {
                LOGGED.warn(reason);
                None
            }
            _ => Some(&self.shim),
        }
    }
}

/// The application's own session callbacks, called after ours.
#[derive(Clone, Copy, Default)]
pub(crate) struct Observers {
    pub(crate) new: Option<NewCallback>,
    pub(crate) remove: Option<RemoveCallback>,
}

/// The policy of a context whose session callbacks are ours.
pub struct Binding {
    pub(crate) policy: Arc<Policy>,
    /// The session id context of all connections, instead of the application's.
    pub(crate) id_context: Option<[u8; 32]>,
    pub(crate) observers: Observers,
}

impl Binding {
    /// Returns the namespace of its sessions.
    #[must_use]
    pub fn shim(&self) -> &Shim {
        &self.policy.shim
    }
}
