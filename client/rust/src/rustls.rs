//! Sessions of rustls servers.
//!
//! rustls keeps sessions in two ways. Of a *ticket* it lets us choose the bytes: ours is a sealed id, the session itself goes to
//! the store. Of what goes into its *session storage* it chooses the id, and takes it out when it is used (TLS 1.3); only such
//! sessions may carry early data. So tickets are the rule, and the session storage is for single use.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ::rustls::ServerConfig;
use ::rustls::server::{NoServerSessionStorage, ProducesTickets, StoresServerSessions};

use crate::{Envelope, Error, Expected, Fingerprint, Format, Ids, Lookup, Options, Puts, RemovalReason, Scope, Shim, Stats};

const CLOSE_PATIENCE: Duration = Duration::from_secs(1);

/// The sessions of rustls servers, in the store.
///
/// Give each connection a config of its own with [`Sessions::for_connection`]: rustls does not tell its hooks which connection
/// they are called for, and a session that a resumed connection issues has to end with the one that it resumed.
///
/// A look-up blocks the thread that handles the client hello, for [`Options::deadline`] at most (50 ms); with a mirror
/// ([`Options::mirror`]) most make no call. An async server that cannot spare that thread makes its handshakes where blocking is
/// allowed (`tokio::task::spawn_blocking`, or `block_in_place` around the accept).
///
/// A session resumes only on a connection of an equal [`Scope`]: rustls resumes the session of a client that showed a certificate without
/// verifying it again, and one of a client that showed none where a certificate is required.
#[derive(Clone, Debug)]
pub struct Sessions(Arc<Shim>);

impl Sessions {
    /// Makes sessions. Opens no connection and starts no thread until the first is stored or looked up.
    ///
    /// [`Options::ids`], [`Options::puts`] and [`Options::mirror`] are about tickets, whose ids are sealed. In the session storage every id
    /// is looked up, and `put` waits until the session is stored, at most for the deadline: rustls' ids contain no issue
    /// time, so a client that came back sooner would miss.
    ///
    /// # Errors
    ///
    /// An option is outside its range, or a file cannot be used; the message says which, and what to do.
    pub fn new(options: Options) -> Result<Self, Error> {
        Ok(Self(Arc::new(Shim::new(options, Format::Rustls)?)))
    }

    /// Returns a copy of `config` for one connection, which keeps its sessions here. `scope` describes the config: rustls has
    /// no getters for its certificates and its client verifier.
    ///
    /// Without [`Options::single_use`] they are tickets. With it they are in the session storage, and every session resumes once in the
    /// whole fleet; then `config.max_early_data_size` may be above 0. (Of TLS 1.2 sessions rustls issues no new ones when it
    /// resumes: with single use they resume once and are gone.)
    #[must_use]
    pub fn for_connection(&self, config: &ServerConfig, scope: &Scope) -> Arc<ServerConfig> {
        let connection = Arc::new(self.connection(scope));
        let mut config = config.clone();
        if self.0.options().single_use {
            config.session_storage = connection;
        } else {
            // In TLS 1.2 rustls puts a session into its storage as well, although it sends a ticket, and so would wait for the store.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.ticketer = connection;
        }
        Arc::new(config)
    }

    /// Returns the hooks of one connection, for callers that make its config themselves.
    #[must_use]
    pub fn connection(&self, scope: &Scope) -> Connection {
        Connection { shim: Arc::clone(&self.0), fingerprint: scope.fingerprint(), resumed: Mutex::default() }
    }

    /// Removes a session from the whole fleet, in the background. `id` is the ticket, or rustls' own id.
    pub fn remove(&self, id: &[u8]) {
        self.0.remove(id, RemovalReason::Application);
    }

    /// Waits until all sessions and removals so far are sent, and returns false if that took too long.
    #[must_use]
    pub fn flush(&self, patience: Duration) -> bool {
        self.0.flush(patience)
    }

    /// Whether the store kept failing, so that handshakes do not call it at present.
    #[must_use]
    pub fn breaker_open(&self) -> bool {
        self.0.breaker_open()
    }

    /// What happened in this process so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.0.stats()
    }

    /// Sends the rest of the queue, for up to a second, and stops; nothing more is stored. Connections go on. Dropping the last copy
    /// does the same.
    pub fn close(&self) {
        self.0.close(CLOSE_PATIENCE);
    }
}

/// The hooks of one connection.
pub struct Connection {
    shim: Arc<Shim>,
    fingerprint: Fingerprint,
    resumed: Mutex<Resumed>,
}

/// The look-ups of a connection.
#[derive(Clone, Copy, Default)]
struct Resumed {
    /// When the session that was found was negotiated, and the end of its life.
    life: Option<(SystemTime, u64)>,
    /// How long the handshake has waited, in all its look-ups together.
    waited: Duration,
}

impl Connection {
    fn find(&self, id: &[u8], once: bool, ids: Option<Ids>) -> Option<Vec<u8>> {
        let mut resumed = self.resumed.lock().unwrap_or_else(PoisonError::into_inner);
        let lookup = Lookup { expected: Expected::Fingerprint(self.fingerprint), once, ids, waited: resumed.waited };
        let began = Instant::now();
        let found =
            self.shim.look_up(id, lookup, |envelope, not_after| Ok((envelope.session.to_vec(), envelope.issued, not_after)));
        resumed.waited += began.elapsed();
        let (value, issued, not_after) = found?;
        // rustls may still refuse it. Then its life bounds the new session's needlessly, which does no harm.
        let earlier = resumed.life.unwrap_or((issued, not_after));
        resumed.life = Some((earlier.0.min(issued), earlier.1.min(not_after)));
        Some(value)
    }

    fn keep(&self, id: &[u8], value: &[u8], wait: bool) -> bool {
        let resumed = *self.resumed.lock().unwrap_or_else(PoisonError::into_inner);
        if resumed.life.is_none() && self.shim.sheds() {
            self.shim.shed();
            return false;
        }
        let (issued, not_after) = resumed.life.unwrap_or_else(|| (SystemTime::now(), self.shim.not_after()));
        let envelope = Envelope { fingerprint: self.fingerprint, issued, session: value };
        self.shim.negotiated(id, &envelope, not_after, wait)
    }
}

impl StoresServerSessions for Connection {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.keep(&key, &value, true)
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.find(key, false, Some(Ids::Any))
    }

    /// At most one frontend of the fleet receives the session.
    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.find(key, true, Some(Ids::Any))
    }

    fn can_cache(&self) -> bool {
        true
    }
}

impl ProducesTickets for Connection {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(self.shim.options().lifetime.as_secs()).unwrap_or(u32::MAX)
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let id = self.shim.issue_id();
        self.keep(&id, plain, self.shim.options().puts == Puts::Wait).then(|| id.to_vec())
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        self.find(cipher, false, None)
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Connection").field(&self.shim).finish()
    }
}
