//! Sessions of rustls servers.
//!
//! rustls keeps sessions in two ways. Of a *ticket* it lets us choose the bytes: ours is a sealed id, the session itself goes to
//! the store. Of what goes into its *session storage* it chooses the id, and takes it out when it is used (TLS 1.3); only such
//! sessions may carry early data. So tickets are the rule, and the session storage is for single use.
//!
//! In tickets mode ([`SessionMode::Tickets`](crate::SessionMode::Tickets)) the session itself is in the ticket, encrypted for the fleet.

use std::fmt;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use ::rustls::ServerConfig;
use ::rustls::server::{NoServerSessionStorage, ProducesTickets, StoresServerSessions};

use crate::ticket_secret::{NAME_BYTES, TicketSecret};
use crate::ticket_state::TicketState;
use crate::tickets::{HEAD_BYTES, MAX_SESSION_BYTES, TicketStats, Tickets};
use crate::{
    Envelope, Error, Expected, Fingerprint, Format, HandshakeLookups, ID_BYTES, Ids, Lookup, Options, RemovalReason, Scope,
    SessionMode, Shim, Stats, When, from_microseconds, sealed_ticket,
};

const CLOSE_PATIENCE: Duration = Duration::from_secs(1);
const TLS13: u16 = 0x0304;

/// The sessions of rustls servers, in the store.
///
/// Give each connection a config of its own with [`Installation::for_connection`]: rustls does not tell its hooks which connection
/// they are called for, and a session that a resumed connection issues has to end with the one that it resumed.
///
/// A look-up blocks the thread that handles the client hello, for [`Options::deadline`] at most (50 ms); with a mirror
/// ([`Options::mirror`]) most make no call. An async server that cannot spare that thread makes its handshakes where blocking is
/// allowed (`tokio::task::spawn_blocking`, or `block_in_place` around the accept).
///
/// A session resumes only on a connection of an equal [`Scope`]: rustls resumes the session of a client that showed a certificate without
/// verifying it again, and one of a client that showed none where a certificate is required.
#[derive(Clone, Debug)]
pub struct Installation(Arc<Shim>);

impl Installation {
    /// Makes sessions. Opens no connection and starts no thread until the first is stored or looked up; in tickets mode it does so at
    /// once, since the agreement on secrets takes its time.
    ///
    /// [`Options::ids`], [`Options::puts`] and [`Options::mirror`] are about tickets, whose ids are sealed. In the session storage every id
    /// is looked up, and `put` waits until the session is stored, at most for the deadline: rustls' ids contain no issue
    /// time, so a client that came back sooner would miss.
    ///
    /// # Errors
    ///
    /// An option is outside its range, or a file cannot be used; the message says which, and what to do.
    pub fn new(options: Options) -> Result<Self, Error> {
        let shim = Shim::new(options, Format::Rustls)?;
        shim.begin_tickets();
        Ok(Self(Arc::new(shim)))
    }

    /// Returns a copy of `config` for one connection, which keeps its sessions here. `scope` describes the config: rustls has
    /// no getters for its certificates and its client verifier.
    ///
    /// Without [`Options::single_use`] they are tickets. With it they are in the session storage, and every session resumes once in the
    /// whole fleet; then `config.max_early_data_size` may be above 0. (Of TLS 1.2 sessions rustls issues no new ones when it
    /// resumes: with single use they resume once and are gone.)
    ///
    /// In tickets mode they are tickets, also with single use, and rustls refuses early data.
    #[must_use]
    pub fn for_connection(&self, config: &ServerConfig, scope: &Scope) -> Arc<ServerConfig> {
        let connection = Arc::new(Connection { tickets: config.send_tls13_tickets, ..self.connection(scope) });
        let mut config = config.clone();
        if self.0.options().single_use && self.0.options().sessions == SessionMode::Stored {
            config.session_storage = connection;
        } else {
            // In TLS 1.2 rustls puts a session into its storage as well, although it sends a ticket, and so would wait for the store.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            if self.0.options().single_use {
                config.session_storage = Arc::new(Stored(Arc::clone(&connection)));
            }
            config.ticketer = connection;
        }
        Arc::new(config)
    }

    /// Returns the hooks of one connection, for callers that make its config themselves.
    #[must_use]
    pub fn connection(&self, scope: &Scope) -> Connection {
        Connection { shim: Arc::clone(&self.0), fingerprint: scope.fingerprint(), tickets: 1, sessions: Mutex::default() }
    }

    /// Removes a session from the whole fleet, in the background. `id` is the ticket, or rustls' own id.
    ///
    /// With a ticket of the fleet all tickets end that stem from the same full handshake. [`Connection::remove`] needs no ticket.
    pub fn remove(&self, id: &[u8]) {
        match self.0.tickets().filter(|_| id.len() > ID_BYTES) {
            None => self.0.remove(id, RemovalReason::Application),
            Some(tickets) => match open(&tickets, id) {
                Ok(state) => tickets.remove(&state.lineage, state.end, RemovalReason::Application),
                Err(reason) => log::warn!("a ticket was not removed, since it does not open: {reason}"),
            },
        }
    }

    /// Waits until all sessions and removals so far are sent, and returns false if that took too long, or if a removal was refused or dropped
    /// and not requested again.
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

    /// The statistics of the tickets of this process; None if its sessions are stored.
    #[must_use]
    pub fn ticket_stats(&self) -> Option<TicketStats> {
        self.0.tickets().map(|tickets| tickets.stats())
    }

    /// Sends the rest of the queue, for up to a second, and stops; nothing more is stored. Connections go on. Dropping the last copy
    /// does the same.
    pub fn close(&self) {
        self.0.close(CLOSE_PATIENCE);
    }
}

impl AsRef<Shim> for Installation {
    /// Returns its policy, for [`metrics`](crate::metrics).
    fn as_ref(&self) -> &Shim {
        &self.0
    }
}

/// The hooks of one connection.
pub struct Connection {
    shim: Arc<Shim>,
    fingerprint: Fingerprint,
    /// How many sessions a handshake of TLS 1.3 issues.
    tickets: usize,
    sessions: Mutex<ConnectionSessions>,
}

/// The sessions that a connection was offered, and those that it has issued.
#[derive(Default)]
struct ConnectionSessions {
    /// When the session that was found was negotiated, and the end of its life.
    life: Option<(SystemTime, u64)>,
    /// The state of the ticket that was decrypted, or that was issued.
    ticket: Option<TicketState>,
    /// The remaining life of the ticket that was issued.
    remaining: Option<Duration>,
    /// How many sessions were stored.
    stored: usize,
    /// Whether the connection was counted as one without a ticket.
    withheld: bool,
    lookups: HandshakeLookups,
}

impl Connection {
    /// Removes all tickets from the whole fleet that stem from the full handshake of this connection, or of the one that it resumed: at once
    /// in this process, elsewhere in the background. Only in tickets mode; [`Installation::remove`] removes a stored session.
    pub fn remove(&self) {
        let ticket = self.sessions().ticket;
        if let Some((tickets, state)) = self.shim.tickets().zip(ticket) {
            tickets.remove(&state.lineage, state.end, RemovalReason::Application);
        }
    }

    fn find(&self, id: &[u8], once: bool, ids: Option<Ids>) -> Option<Vec<u8>> {
        let sessions = &mut *self.sessions();
        let lookup = Lookup { expected: Expected::Fingerprint(self.fingerprint), once, ids };
        let decode = |envelope: &Envelope, not_after| Ok((envelope.session.to_vec(), envelope.issued, not_after));
        let ((value, issued, not_after), reason) = self.shim.find(id, lookup, &mut sessions.lookups, decode)?;
        self.shim.hit(reason); // rustls does not report whether it resumes the session
        // rustls may still refuse it. Then its life bounds the new session's needlessly, which does no harm.
        let earlier = sessions.life.unwrap_or((issued, not_after));
        sessions.life = Some((earlier.0.min(issued), earlier.1.min(not_after)));
        Some(value)
    }

    fn keep(&self, id: &[u8], value: &[u8], when: When) -> bool {
        let life = self.sessions().life();
        if life.is_none() && self.shim.sheds() {
            self.shim.shed();
            return false;
        }
        let (issued, not_after) = life.unwrap_or_else(|| (SystemTime::now(), self.shim.not_after()));
        let envelope = Envelope { fingerprint: self.fingerprint, issued, session: value };
        self.shim.negotiated(id, &envelope, not_after, when)
    }

    /// Returns the session of a ticket of the fleet.
    fn accept(&self, tickets: &Tickets, ticket: &[u8]) -> Option<Vec<u8>> {
        let head: &[u8; HEAD_BYTES] = ticket.first_chunk()?;
        let (name, _) = head.split_first_chunk()?;
        let secret = tickets.secret_for_name(name)?;
        let sessions = &mut *self.sessions();
        let accepted = sealed_ticket::open(&secret, ticket).and_then(|(state, session)| {
            // rustls itself compares the server name of the session with the connection's, which its hooks do not have.
            let server_name = Negotiated::of(&session).map(|negotiated| negotiated.server_name).unwrap_or_default();
            tickets.check(&state, name, Expected::Fingerprint(self.fingerprint), server_name)?;
            if self.shim.options().single_use {
                sessions.lookups.claim(tickets, head, &state)?;
            }
            Ok((state, session))
        });
        match accepted {
            Ok((state, session)) => {
                tickets.count_resumed(name);
                // As for stored sessions, the earliest life bounds that of the tickets to come.
                let earlier = sessions.ticket.unwrap_or(state);
                let (negotiated, end) = (earlier.negotiated.min(state.negotiated), earlier.end.min(state.end));
                sessions.ticket = Some(TicketState { negotiated, end, ..state });
                Some(session)
            }
            Err(reason) => {
                tickets.count_refused(reason);
                None
            }
        }
    }

    /// Returns a ticket of the fleet with a session; None if there is no secret for it.
    fn issue(&self, tickets: &Tickets, session: &[u8], server_name: &[u8]) -> Option<Vec<u8>> {
        let sessions = &mut *self.sessions();
        let issued = self.next_state(tickets, sessions, server_name).map(|(state, secret, held_over)| {
            tickets.count_issued(held_over);
            (sessions.ticket, sessions.remaining) = (Some(state), tickets.remaining(&state));
            sealed_ticket::seal(&secret, &state, session)
        });
        issued
            .inspect_err(|reason| {
                if !mem::replace(&mut sessions.withheld, true) {
                    tickets.count_withheld(reason);
                }
            })
            .ok()
    }

    fn next_state(
        &self,
        tickets: &Tickets,
        sessions: &ConnectionSessions,
        server_name: &[u8],
    ) -> Result<(TicketState, Arc<TicketSecret>, bool), &'static str> {
        let (secret, held_over) = tickets.secret_for_issue().ok_or("no-secret")?;
        let stored = |(issued, not_after)| TicketState::of_stored(self.fingerprint, server_name, issued, not_after);
        let state = match sessions.ticket.or(sessions.life.map(stored)) {
            Some(previous) => tickets.continue_state(&secret, &previous),
            None => tickets.begin_state(&secret, self.fingerprint, server_name, None),
        };
        Ok((state.ok_or("unresumable")?, secret, held_over))
    }

    /// Returns the tickets of this process and the server name of a session, if the session is to be sent as a ticket.
    fn tickets_for<'a>(&self, session: &'a [u8]) -> Option<(Arc<Tickets>, &'a [u8])> {
        let tickets = self.shim.tickets()?;
        let negotiated = Negotiated::of(session)?;
        let takes = negotiated.version == TLS13 || self.shim.options().tickets_tls12;
        (takes && session.len() <= MAX_SESSION_BYTES).then_some((tickets, negotiated.server_name))
    }

    /// Counts a session that is about to be stored, and returns whether no other one of the handshake follows.
    fn is_last(&self, session: &[u8]) -> bool {
        let stored = &mut self.sessions().stored;
        *stored += 1;
        *stored >= self.tickets || Negotiated::of(session).is_none_or(|negotiated| negotiated.version != TLS13)
    }

    fn sessions(&self) -> MutexGuard<'_, ConnectionSessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionSessions {
    /// Returns when the session that the connection resumed was negotiated, and the end of its life.
    fn life(&self) -> Option<(SystemTime, u64)> {
        self.life.or_else(|| self.ticket.and_then(|state| Some((from_microseconds(state.negotiated)?, state.end))))
    }
}

/// Returns the state of a ticket, or why it does not open.
fn open(tickets: &Tickets, ticket: &[u8]) -> Result<TicketState, &'static str> {
    let secret = ticket.get(..NAME_BYTES).and_then(|name| tickets.agreement.secret_for_name(name)).ok_or("unknown-secret")?;
    Ok(sealed_ticket::open(&secret, ticket)?.0)
}

/// The beginning of rustls' encoding of a session: 00, or 01 | length (1) | server name; then the version (2).
struct Negotiated<'a> {
    server_name: &'a [u8],
    version: u16,
}

impl<'a> Negotiated<'a> {
    /// None if rustls encodes its sessions otherwise: they are stored then.
    fn of(session: &'a [u8]) -> Option<Self> {
        let (server_name, rest) = match session {
            [0, rest @ ..] => (&[][..], rest),
            [1, length, rest @ ..] => rest.split_at_checked(usize::from(*length))?,
            _ => return None,
        };
        Some(Self { server_name, version: u16::from_be_bytes(*rest.first_chunk()?) })
    }
}

impl StoresServerSessions for Connection {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.keep(&key, &value, When::Now)
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

/// The sessions that frontends with single use have stored by rustls' ids before the fleet moved to tickets.
#[derive(Debug)]
struct Stored(Arc<Connection>);

impl StoresServerSessions for Stored {
    fn put(&self, _: Vec<u8>, _: Vec<u8>) -> bool {
        false
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.0.take(key)
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.0.take(key)
    }

    fn can_cache(&self) -> bool {
        false
    }
}

impl ProducesTickets for Connection {
    fn enabled(&self) -> bool {
        true
    }

    /// rustls calls it after `encrypt`.
    fn lifetime(&self) -> u32 {
        let lifetime = self.sessions().remaining.unwrap_or(self.shim.options().lifetime);
        u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX)
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        if let Some((tickets, server_name)) = self.tickets_for(plain) {
            return self.issue(&tickets, plain, server_name);
        }
        let id = self.shim.issue_id();
        let last = self.is_last(plain);
        self.keep(&id, plain, self.shim.options().puts.when(last)).then(|| id.to_vec())
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        match self.shim.tickets() {
            Some(tickets) if cipher.len() > ID_BYTES => self.accept(&tickets, cipher),
            // With single use, stored mode has rustls choose the ids.
            Some(_) if self.shim.options().single_use => self.take(cipher),
            _ => self.find(cipher, false, None),
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Connection").field(&self.shim).finish()
    }
}
