//! How sessions are kept.

use std::sync::Arc;
use std::time::Duration;

use crate::ticket_secret::{MAX_REMOVAL, MAX_ROTATION};
use crate::{Credentials, Error, Keyring};

/// RFC 8446 section 4.6.1.
pub(crate) const LONGEST_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);
const LONGEST_NAMESPACE: usize = 63;

/// Which ids are looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// Those that the fleet issued: a look-up of an invented, foreign or old id makes no call.
    Sealed,
    /// Every id: for TLS stacks that do not let a server choose its ids.
    Any,
}

/// Whether a handshake waits until its sessions are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Puts {
    /// Never. Of a sealed id it is known that it is fresh: a client that comes back at once is looked up again.
    Background,
    /// A full handshake does, at most for the deadline.
    Wait,
}

/// When a session of a handshake is sent to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// With the next one, which the same handshake is about to issue, or a moment later.
    WithNext,
    /// At once, except under load.
    Soon,
    /// At once: the handshake waits for it.
    Now,
}

impl Puts {
    /// Returns when a session of a handshake is sent. `last` is whether no other one follows.
    #[must_use]
    pub fn when(self, last: bool) -> When {
        match self {
            _ if !last => When::WithNext,
            Self::Background => When::Soon,
            Self::Wait => When::Now,
        }
    }
}

/// How the frontends of a fleet share sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionMode {
    /// The store has the sessions.
    Stored,
    /// Clients have them, as tickets; the store has the secrets of which the tickets' keys are derived, and the removals.
    Tickets,
}

/// How sessions are kept: make them with [`Options::new`], and change what should be otherwise.
///
/// ```no_run
/// use std::time::Duration;
///
/// let keyring = resumed::Keyring::load("fleet.keys")?;
/// let mut options = resumed::Options::new("dns:///store:7400", "shop", keyring);
/// options.lifetime = Duration::from_secs(3600);
/// options.mirror = 64 << 20;
/// # Ok::<(), resumed::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Where the store is, as a gRPC name: `dns:///store:7400`, `127.0.0.1:7400`, `unix:/run/resumed.sock`.
    pub target: String,
    /// The namespace of the sessions that frontends share: 1 to 63 characters of `[a-z0-9.-]`. Servers that verify their clients differently, or serve
    /// different tenants, need different ones.
    pub namespace: String,
    /// The fleet's keys.
    pub keyring: Arc<Keyring>,
    /// How frontends share sessions: [`SessionMode::Stored`] by default. Frontends in tickets mode still accept stored sessions.
    pub sessions: SessionMode,
    /// In tickets mode, whether TLS 1.2 uses tickets as well; false by default. They are not forward secret: a secret opens the
    /// connections that were recorded with its tickets. Without it TLS 1.2 sessions are stored.
    pub tickets_tls12: bool,
    /// The length of an epoch, after which tickets are issued with another secret: 1 second to 7 days in whole seconds, 1 hour by default.
    /// All frontends of a namespace have the same.
    pub rotation: Duration,
    /// How long tickets resume after the stream of removals was last live, 300 s by default; with 0 they resume only while it is.
    pub revocation_grace: Duration,
    /// How long a session lives after its negotiation: 1 second to 7 days, 2 hours by default.
    pub lifetime: Duration,
    /// How long a handshake may wait for the store, 50 ms by default.
    pub deadline: Duration,
    /// Whether a session resumes once in the whole fleet (RFC 8446 section 8.1).
    pub single_use: bool,
    /// Which ids are looked up.
    pub ids: Ids,
    /// Whether a handshake waits until its sessions are stored.
    pub puts: Puts,
    /// How many look-ups may be under way at once, 64 by default; beyond that, handshakes make none.
    pub max_lookups: usize,
    /// Bytes of the namespace's sealed sessions to keep in memory, so that most look-ups cost no call: 0, the default, for none.
    pub mirror: usize,
    /// For TLS to the store; None for none.
    pub credentials: Option<Credentials>,
}

impl Options {
    /// Returns options with defaults for all but these.
    #[must_use]
    pub fn new(target: impl Into<String>, namespace: impl Into<String>, keyring: impl Into<Arc<Keyring>>) -> Self {
        Self {
            target: target.into(),
            namespace: namespace.into(),
            keyring: keyring.into(),
            sessions: SessionMode::Stored,
            tickets_tls12: false,
            rotation: Duration::from_secs(3600),
            revocation_grace: Duration::from_secs(300),
            lifetime: Duration::from_secs(2 * 3600),
            deadline: Duration::from_millis(50),
            single_use: false,
            ids: Ids::Sealed,
            puts: Puts::Background,
            max_lookups: 64,
            mirror: 0,
            credentials: None,
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let (namespace, lifetime) = (&self.namespace, self.lifetime);
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-');
        if !(1..=LONGEST_NAMESPACE).contains(&namespace.len()) || !namespace.bytes().all(allowed) {
            return Err(Error::new(format!("namespace must be 1 to 63 characters of [a-z0-9.-], not {namespace:?}")));
        }
        if !(Duration::from_secs(1)..=LONGEST_LIFETIME).contains(&lifetime) {
            return Err(Error::new(format!("lifetime must be 1 second to 7 days, not {lifetime:?}")));
        }
        let rotation = self.rotation;
        if !(Duration::from_secs(1)..=MAX_ROTATION).contains(&rotation) || rotation.subsec_nanos() > 0 {
            return Err(Error::new(format!("rotation must be 1 second to 7 days in whole seconds, not {rotation:?}")));
        }
        if self.sessions == SessionMode::Tickets && lifetime + rotation > MAX_REMOVAL {
            return Err(Error::new(format!(
                "lifetime and rotation must be 7 days together at most, not {lifetime:?} and {rotation:?}: the store keeps the removal of a \
                 ticket no longer"
            )));
        }
        if self.deadline.is_zero() {
            return Err(Error::new("deadline must be above 0"));
        }
        if self.max_lookups == 0 {
            return Err(Error::new("max_lookups must be above 0"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_option_that_is_outside_its_range() {
        let valid = || Options::new("store:7400", "shop", Keyring::from_keys(&[[0; 32]]).unwrap());
        valid().check().unwrap();
        let complaint = |change: fn(&mut Options)| {
            let mut options = valid();
            change(&mut options);
            options.check().unwrap_err().to_string()
        };
        assert!(complaint(|options| options.namespace = "Shop".into()).contains("\"Shop\""));
        assert!(complaint(|options| options.namespace = "x".repeat(64)).starts_with("namespace"));
        assert!(complaint(|options| options.lifetime = Duration::ZERO).starts_with("lifetime"));
        assert!(complaint(|options| options.lifetime = Duration::from_secs(604_801)).starts_with("lifetime"));
        assert!(complaint(|options| options.rotation = Duration::from_millis(1500)).starts_with("rotation"));
        assert!(complaint(|options| options.rotation = Duration::from_secs(604_801)).starts_with("rotation"));
        let long = |options: &mut Options| (options.sessions, options.lifetime) = (SessionMode::Tickets, MAX_REMOVAL);
        assert!(complaint(long).starts_with("lifetime and rotation"));
        assert!(complaint(|options| options.deadline = Duration::ZERO).starts_with("deadline"));
        assert!(complaint(|options| options.max_lookups = 0).starts_with("max_lookups"));
    }
}
