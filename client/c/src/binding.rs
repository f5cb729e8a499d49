//! What to do at each session callback of OpenSSL, as in the other clients with OpenSSL: they resume each other's sessions.
//!
//! OpenSSL's rules are in `SSL_CTX_sess_set_get_cb(3)`, `SSL_CTX_set_session_cache_mode(3)` and
//! `SSL_CTX_set_generate_session_id(3)`.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use sha2::{Digest, Sha256};
use store::{ID_BYTES, Look, Puts, Removal, Shim};

use crate::ssl::{Connection, Context, Session, last_error_reason};

/// OpenSSL's reason when the peer ended the connection without `close_notify`.
const UNEXPECTED_EOF_WHILE_READING: u64 = 294;
/// How many ids of the sessions of one connection are remembered.
const SIBLINGS: usize = 16;

thread_local! {
    /// The client random of the handshake that looked up a session last, and when it has waited long enough.
    static WAITING: Cell<([u8; 32], Option<Instant>)> = const { Cell::new(([0; 32], None)) };
}

/// The callbacks of a shim in a TLS context.
pub struct Binding {
    shim: Arc<Shim>,
    id_context: [u8; 32],
}

/// Puts the callbacks of a shim into a context that has no binding.
///
/// # Errors
///
/// The context accepts early data, or cannot be bound.
pub fn install(context: &Context, shim: Arc<Shim>) -> Result<(), &'static str> {
    if context.max_early_data() > 0 {
        return Err("this context accepts early data, which can be replayed across a fleet; set max_early_data to 0");
    }
    context.binding_or(|| Some(Binding::new(context, shim))).map(drop).ok_or("this context cannot be bound")
}

impl Binding {
    /// Sets the callbacks of a shim in a context.
    #[must_use]
    pub fn new(context: &Context, shim: Arc<Shim>) -> Self {
        let id_context = Sha256::digest(shim.options().namespace.as_bytes()).into();
        Self::with_id_context(*context, shim, id_context)
    }

    /// Does so for one of several contexts that ask clients for certificates: its sessions resume only where those of the same
    /// authorities are asked for, in the same way. Who proved to one who they are has proved nothing to another.
    #[must_use]
    pub fn verifying(context: &Context, shim: Arc<Shim>) -> Self {
        let asked = context.asked_certificates();
        let id_context = Sha256::digest([shim.options().namespace.as_bytes(), b"\0", &asked].concat()).into();
        Self::with_id_context(*context, shim, id_context)
    }

    fn with_id_context(context: Context, shim: Arc<Shim>, id_context: [u8; 32]) -> Self {
        context.set_callbacks(&id_context, shim.options().lifetime.as_secs());
        Self { shim, id_context }
    }

    pub(crate) fn id_context(&self) -> &[u8] {
        &self.id_context
    }

    /// What the callbacks ask.
    #[must_use]
    pub fn shim(&self) -> &Shim {
        &self.shim
    }

    /// Stores a session that a handshake has negotiated.
    pub(crate) fn negotiated(&self, connection: Connection, session: &Session) {
        let (id, tls13) = (session.id(), connection.is_tls13());
        // A stateless ticket carries its session itself: in TLS 1.2 it has no id, in TLS 1.3 it is told by the option.
        let stateless = id.is_empty() || (tls13 && !connection.has_no_ticket());
        if stateless || !session.is_resumable() {
            self.shim.unresumable();
            return;
        }
        // Servers set one of their own in each connection.
        session.set_id_context(&self.id_context);
        // OpenSSL notes the name only where the server has a servername callback, and compares it nowhere: see decode().
        session.set_hostname(&connection.server_name().unwrap_or_default().to_ascii_lowercase());
        let (mut last, mut issued) = (true, SystemTime::now());
        let mut not_after = unix_time() + session.timeout();
        let serialized;
        if connection.is_tls13() {
            let remembered = Remembered::of(session);
            issued = remembered.as_ref().map_or(issued, |remembered| remembered.issued);
            let Remembered { end, mut siblings, .. } =
                remembered.unwrap_or(Remembered { issued, end: 0, siblings: Vec::new() });
            // End and siblings are not part of what is stored.
            Remembered { issued, end: 0, siblings: Vec::new() }.note(session);
            serialized = session.serialize();
            siblings.extend(&id);
            let tickets = if connection.is_resumed() { 1 } else { connection.tickets() };
            last = siblings.len() >= tickets * ID_BYTES;
            siblings.drain(..siblings.len().saturating_sub(SIBLINGS * ID_BYTES));
            Remembered { issued, end, siblings }.note(session);
            if end > 0 {
                // The timeout begins with the ticket, and so behind a handshake that a client can draw out.
                not_after = end;
            }
        } else {
            serialized = session.serialize();
        }
        let wait = last && self.shim.options().puts == Puts::Wait;
        self.shim.negotiated(&id, &serialized, issued, not_after, wait);
    }

    /// Returns a session for the id that a client offered, or None.
    pub(crate) fn look_up(&self, connection: Connection, id: &[u8]) -> Option<Session> {
        let random = connection.client_random();
        let end = match WAITING.get() {
            (waiting, Some(end)) if waiting == random => end,
            _ => Instant::now() + self.shim.options().deadline,
        };
        WAITING.set((random, Some(end)));
        let look = Look { end: Some(end), ..Look::default() };
        self.shim.look_up(id, look, |serialized, not_after| self.decode(connection, id, serialized, not_after))
    }

    fn decode(&self, connection: Connection, id: &[u8], serialized: &[u8], not_after: u64) -> Result<Session, &'static str> {
        let session = Session::decode(serialized).filter(|session| session.id() == id).ok_or("undecodable")?;
        // RFC 6066 section 3. A servername callback may choose another context, one that wants client certificates, say, only after
        // OpenSSL has accepted the session by what this one wants.
        if session.hostname() != requested_name(connection) || session.id_context() != self.id_context {
            return Err("other-name");
        }
        let now = unix_time();
        session.set_life(now, not_after.saturating_sub(now));
        // Tickets issued on the resumed connection end when the negotiated session does. What nobody knows the time of was before any
        // purge.
        let issued = Remembered::of(&session).map_or(SystemTime::UNIX_EPOCH, |remembered| remembered.issued);
        Remembered { issued, end: not_after, siblings: id.to_vec() }.note(&session);
        // OpenSSL compares it with the session's next: see negotiated().
        connection.set_id_context(&self.id_context);
        Ok(session)
    }

    /// Decides about the sessions of a connection that ended without our `close_notify`. May run under the context's lock.
    pub(crate) fn ended(&self, session: &Session) {
        // A connection that was cut says nothing against its session (RFC 5246 section 7.2.1); after a fatal alert, sent or
        // received, it must not be resumed (section 7.2.2).
        if matches!(last_error_reason(), 0 | UNEXPECTED_EOF_WHILE_READING) {
            self.shim.kept();
            return;
        }
        let (id, siblings) = (session.id(), Remembered::of(session).map_or_else(Vec::new, |remembered| remembered.siblings));
        for sibling in siblings.chunks(ID_BYTES).filter(|sibling| *sibling != id) {
            self.shim.remove(sibling, Removal::FatalError);
        }
        if !id.is_empty() {
            self.shim.remove(&id, Removal::FatalError);
        }
    }
}

/// What a session remembers as its ticket application data: each ticket's session is a copy of the one before.
///
/// TLS 1.3 issues several tickets, and tells of the last one only when the connection fails. So it knows of the others, and those of a
/// resumed connection know when the first one of their line was negotiated, and when it ends.
struct Remembered {
    /// When the full handshake was.
    issued: SystemTime,
    /// When the session that was resumed ends, in Unix seconds, or 0.
    end: u64,
    /// The ids of the sessions of the same connection, one behind the other.
    siblings: Vec<u8>,
}

impl Remembered {
    fn of(session: &Session) -> Option<Self> {
        let data = session.ticket_data();
        let (issued, rest) = data.split_first_chunk::<8>()?;
        let (end, siblings) = rest.split_first_chunk::<8>()?;
        let issued = SystemTime::UNIX_EPOCH.checked_add(Duration::from_micros(u64::from_be_bytes(*issued)))?;
        Some(Self { issued, end: u64::from_be_bytes(*end), siblings: siblings.to_vec() })
    }

    fn note(&self, session: &Session) {
        let issued = self.issued.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros();
        let issued = u64::try_from(issued).unwrap_or(u64::MAX);
        session.set_ticket_data(&[&issued.to_be_bytes()[..], &self.end.to_be_bytes(), &self.siblings].concat());
    }
}

/// Returns the host name that the client asks for, in lower case; empty if it asks for none, or not in a way that RFC 6066
/// section 3 allows.
fn requested_name(connection: Connection) -> Vec<u8> {
    let extension = connection.server_name_extension();
    // A list of one: its length, the type of the name (0), the length of the name.
    let Some((&[list_high, list_low, kind, high, low], name)) = extension.split_first_chunk::<5>() else {
        return Vec::new();
    };
    let (list, length) = (u16::from_be_bytes([list_high, list_low]), u16::from_be_bytes([high, low]));
    let well_formed = kind == 0 && usize::from(length) == name.len() && usize::from(list) == name.len() + 3;
    if well_formed { name.to_ascii_lowercase() } else { Vec::new() }
}

fn unix_time() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_secs())
}
