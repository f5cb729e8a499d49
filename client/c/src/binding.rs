//! The decisions at each session callback of OpenSSL, the same as in the other clients with OpenSSL: they resume each other's sessions.
//!
//! OpenSSL's rules are in `SSL_CTX_sess_set_get_cb(3)`, `SSL_CTX_set_session_cache_mode(3)` and
//! `SSL_CTX_set_generate_session_id(3)`. Those about what may resume where are in `docs/contexts.md`.

use std::sync::Arc;
use std::time::SystemTime;

use store::fingerprint::halves;
use store::{Envelope, Expected, Fingerprint, ID_BYTES, Lookup, RemovalReason, Shim};

use crate::learned::{self, Place};
use crate::lineage::Lineage;
use crate::policy::{Binding, Policy, Requirements, Verified, requests_certificate};
use crate::shared::Notice;
use crate::ssl::{Connection, Context, Handshake, Issue, Pending, PendingHit, Session, last_error_reason, ticket_id};

/// OpenSSL's reason when the peer ended the connection without `close_notify`.
const UNEXPECTED_EOF_WHILE_READING: u64 = 294;

/// Checks a connection whose handshake is done, if it resumed a session of ours: returns whether the context that serves it in the end is
/// the one that the session is for. If it is not, the process resumes no more sessions of the server name.
pub(crate) fn check(connection: Connection) -> bool {
    let Some(handshake) = connection.handshake() else { return true };
    let Some(pending) = handshake.pending.take() else { return true };
    let Some(session) = connection.session().filter(|_| connection.is_resumed()) else { return true };
    // Without a fingerprint it is not the session that was found, but one of the application's own.
    let Some(fingerprint) = session.fingerprint() else { return true };
    pending.resumed();
    session.ensure_id();
    let proved = if session.has_peer() { connection.is_verified() } else { !connection.insists() };
    if proved && agrees(connection, &fingerprint) && is_of_one_namespace(connection, handshake) {
        return true;
    }
    if let Some(policy) = handshake.policy.borrow().as_ref() {
        policy.unsettle(connection, &fingerprint, handshake.name.take());
    }
    false
}

/// Returns whether the context that serves a connection keeps its sessions in the namespace of the one that the connection began with, or in
/// none.
fn is_of_one_namespace(connection: Connection, handshake: &Handshake) -> bool {
    let began = handshake.policy.borrow();
    let first = began.as_deref().or_else(|| Some(&connection.binding()?.policy));
    let serving = connection.context().and_then(|context| context.binding());
    let (Some(first), Some(serving)) = (first, serving) else { return true };
    first.shim.options().namespace == serving.shim().options().namespace
}

/// Returns whether a connection asks for a client certificate only since its certificate callback, as lighttpd's do: OpenSSL calls none for a
/// resumed connection, whose end of the handshake would not look like the session's.
fn asks_late(connection: Connection, verifies: bool) -> bool {
    verifies && connection.context().is_some_and(|context| context.has_certificate_callback() && !context.verifies_clients())
}

/// Returns whether a resumed connection is served by the context of its session.
pub(crate) fn agrees(connection: Connection, fingerprint: &Fingerprint) -> bool {
    let present = connection.fingerprint();
    let ((identity, clients), (its_identity, its_clients)) = (halves(&present), halves(fingerprint));
    // A certificate callback is not called for a resumed connection. Then the fingerprint that was learned for the name decides alone.
    clients == its_clients && (identity == its_identity || !connection.has_its_certificates())
}

/// Where a session belongs that a handshake has negotiated.
pub(crate) struct Origin<'a> {
    /// Its namespace.
    pub(crate) shim: &'a Arc<Shim>,
    /// The server name, in lower case.
    pub(crate) name: Vec<u8>,
    /// The fingerprint of the context that serves the connection.
    pub(crate) fingerprint: Fingerprint,
}

impl Policy {
    fn place(&self, connection: Connection, name: Vec<u8>) -> Place {
        let context = connection.first_context().map_or(0, Context::number);
        Place { shim: self.shim.number(), context, name }
    }

    /// Records that a connection was served by another context than its session.
    fn unsettle(&self, connection: Connection, fingerprint: &Fingerprint, name: Vec<u8>) {
        if let Some(shim) = self.shim_for(requests_certificate(fingerprint)) {
            shim.terminated();
        }
        let shown = String::from_utf8_lossy(&name).into_owned();
        if learned::unsettle(self.place(connection, name)) {
            log::warn!(
                "a resumed connection was ended: different contexts serve {shown:?}, so its sessions resume here no more"
            );
        }
    }
}

impl Binding {
    /// Records where a handshake begins, before a servername callback, and returns the properties of a session that may resume there.
    pub(crate) fn begin(&self, connection: Connection, handshake: &Handshake) -> Requirements {
        self.note_beginning(connection, handshake);
        let name = requested_name(connection);
        let (expected, settled) = self.expected(connection, &name);
        let verifies = verifies(connection, &expected);
        Requirements { name, expected, settled, verifies }
    }

    fn note_beginning(&self, connection: Connection, handshake: &Handshake) {
        let mut policy = handshake.policy.borrow_mut();
        if policy.is_none() {
            *policy = Some(Arc::clone(&self.policy));
            handshake.began.set(connection.context().map_or(0, Context::number));
        }
    }

    /// Returns the id for a session about to be negotiated, of the namespace where it will be kept.
    pub(crate) fn issue_id(&self, connection: Connection) -> Vec<u8> {
        if connection.is_tls13() && self.uses_tickets(connection) {
            // That of the stored session which the connection has resumed, if it has: a fatal alert removes both.
            return connection.handshake().and_then(Handshake::found_id).unwrap_or_else(|| ticket_id().to_vec());
        }
        // TLS 1.2 needs it before the servername callback, as it does look-ups.
        if !connection.is_tls13() {
            connection.handshake().inspect(|handshake| self.note_beginning(connection, handshake));
        }
        let learned = || learned::expected(&self.policy.place(connection, requested_name(connection)));
        let verifies = match self.policy.verified {
            Verified::Apart(_) if !connection.is_tls13() => verifies(connection, &learned()),
            _ => connection.verifies(),
        };
        let shim = self.policy.shim_for(verifies).unwrap_or(&self.policy.shim);
        let id = if connection.is_resumed() || !shim.sheds() { shim.issue_id() } else { shim.issue_expired_id() };
        id.to_vec()
    }

    /// Stores a session that a handshake has negotiated, unless its client has it in a ticket.
    pub(crate) fn negotiated(&self, connection: Connection, session: &Session) {
        let handshake = connection.handshake();
        if handshake.is_some_and(|handshake| matches!(*handshake.issue.borrow(), Issue::Ticket { .. } | Issue::Withheld)) {
            return;
        }
        if self.store(connection, session).is_none() {
            self.shim().unresumable();
        }
    }

    /// Stores a session, or returns None if it must not resume anywhere.
    fn store(&self, connection: Connection, session: &Session) -> Option<()> {
        let (id, tls13, resumed) = (session.id(), connection.is_tls13(), connection.is_resumed());
        let handshake = connection.handshake()?;
        let Origin { shim, name, fingerprint: present } = self.origin(connection, handshake, session)?;
        // A stateless ticket carries its session itself: in TLS 1.2 it has no id, in TLS 1.3 the option tells.
        if id.is_empty() || (tls13 && !connection.has_no_ticket()) || !session.is_resumable() {
            return None;
        }
        let Ok(lineage) = session.lineage() else {
            note_foreign_data();
            return None;
        };
        let (now, present_time) = (unix_time(), SystemTime::now());
        let mut lineage = match lineage {
            Some(lineage) if resumed && !agrees(connection, &lineage.fingerprint) => return None,
            // A ticket of a full handshake is a copy of the one before.
            Some(lineage) if resumed || lineage.fingerprint == present => lineage,
            _ => Lineage::new(present, present_time),
        };
        // OpenSSL records the name only where the server has a servername callback, and compares it nowhere: see decode().
        session.set_hostname(&name);
        session.clear_lineage();
        let serialized = session.serialize();
        let number = lineage.add(&id);
        session.set_lineage(&lineage);
        session.set_owner(handshake.owner());
        // The timeout begins with the ticket, and so after a handshake that a client can delay.
        let end = if lineage.end > 0 { lineage.end } else { now + session.timeout() };
        let not_after = session.peer_not_after(now).map_or(end, |of_peer| of_peer.min(end));
        let tickets = if resumed { 1 } else { connection.tickets() };
        let last = !tls13 || number >= tickets;
        if !resumed && shim.sheds() {
            shim.shed();
            return Some(());
        }
        let envelope = Envelope { fingerprint: lineage.fingerprint, issued: lineage.issued, session: &serialized };
        shim.negotiated(&id, &envelope, not_after, shim.options().puts.when(last));
        Some(())
    }

    /// Returns where a session that a handshake has negotiated belongs, or None if it must not resume anywhere.
    pub(crate) fn origin(&self, connection: Connection, handshake: &Handshake, session: &Session) -> Option<Origin<'_>> {
        let name = connection.server_name().unwrap_or_default().to_ascii_lowercase();
        let (fingerprint, verifies) = (connection.fingerprint(), connection.verifies());
        if !is_of_one_namespace(connection, handshake) {
            return None;
        }
        if !connection.is_resumed() && !connection.is_renegotiated() && !handshake.learned.replace(true) {
            learned::learn(self.policy.place(connection, name.clone()), fingerprint);
            self.learn_id_context(connection, handshake, session);
        }
        if connection.is_ended() {
            return None;
        }
        let shim = self.policy.shim_for(verifies)?;
        let proved = if session.has_peer() { verifies } else { !connection.insists() };
        if !proved || !connection.is_verified() || asks_late(connection, verifies) {
            return None;
        }
        if let Some(id_context) = &self.id_context {
            // Servers set one of their own in each connection.
            session.set_id_context(id_context);
        } else if verifies && session.id_context().is_empty() {
            static SAID: Notice = Notice::new();
            SAID.warn(
                "sessions of a context that requests client certificates are not shared: it has no session id context, see \
                 SSL_CTX_set_session_id_context",
            );
            return None;
        }
        Some(Origin { shim, name, fingerprint })
    }

    /// Records the session id context of a context whose settings are not observed, if the connection has begun with it.
    fn learn_id_context(&self, connection: Connection, handshake: &Handshake, session: &Session) {
        let context = connection.context().filter(|context| {
            let began = self.policy.single_host || handshake.began.get() == context.number();
            began && self.id_context.is_none() && connection.first_context().is_none()
        });
        if let Some(context) = context {
            context.note_id_context(&session.id_context());
        }
    }

    /// Returns a session for the id that a client offered, or None.
    pub(crate) fn look_up(&self, connection: Connection, id: &[u8]) -> Option<Session> {
        let handshake = connection.handshake()?;
        if let Some(session) = handshake.found(id) {
            return Some(session);
        }
        let required = self.begin(connection, handshake);
        let shim = self.policy.shim_for(required.verifies)?;
        let lookups = &mut *handshake.lookups.borrow_mut();
        let (session, reason) = shim.find(id, Lookup::expecting(required.expected), lookups, |envelope, not_after| {
            let session = decode(id, &required.name, envelope, not_after)?;
            self.admit(connection, &session, &required)?;
            Ok(session)
        })?;
        handshake.set_found(id, &session);
        let pending = Pending::Stored(PendingHit::new(Arc::clone(shim), reason));
        self.resume(connection, handshake, &session, required, pending);
        Some(session)
    }

    /// Prepares a handshake for a session that it is about to resume.
    pub(crate) fn resume(
        &self,
        connection: Connection,
        handshake: &Handshake,
        session: &Session,
        required: Requirements,
        pending: Pending,
    ) {
        if let Some(id_context) = &self.id_context {
            // OpenSSL compares it with the session's next.
            session.set_id_context(id_context);
            connection.set_id_context(id_context);
        }
        session.set_owner(handshake.owner());
        *handshake.name.borrow_mut() = required.name;
        *handshake.pending.borrow_mut() = Some(pending);
    }

    /// Returns the fingerprint that a session must have, and whether it is that of the connection itself.
    fn expected(&self, connection: Connection, name: &[u8]) -> (Expected, bool) {
        let learned = learned::expected(&self.policy.place(connection, name.to_vec()));
        let (first, current) = (connection.first_context(), connection.context());
        let seen = first.is_some_and(|first| !first.may_switch() && current == Some(first));
        let settled = connection.is_renegotiating() || ((self.policy.single_host || seen) && connection.has_its_certificates());
        match learned {
            Expected::Unstable => (Expected::Unstable, settled),
            _ if settled => (Expected::Fingerprint(connection.fingerprint()), true),
            learned => (learned, false),
        }
    }

    /// Returns the reason why a session of the expected fingerprint does not resume on a connection, if there is one.
    pub(crate) fn admit(&self, connection: Connection, session: &Session, required: &Requirements) -> Result<(), &'static str> {
        if !connection.fits_cipher(session) {
            return Err("other-cipher");
        }
        // OpenSSL compares it, too, but after the callback. Without one it ends a handshake that asks for a certificate.
        let asks_without = connection.verifies() && session.id_context().is_empty();
        if self.id_context.is_none() && (asks_without || !connection.fits_id_context(session)) {
            return Err("context-mismatch");
        }
        let needs_peer = required.settled && connection.insists();
        let proved = if session.has_peer() { required.verifies } else { !needs_peer };
        if proved && !asks_late(connection, required.verifies) { Ok(()) } else { Err("context-mismatch") }
    }

    /// Removes the sessions of a connection from the whole fleet, in the background.
    pub(crate) fn remove(&self, connection: Connection) {
        if let Some(session) = connection.session() {
            self.remove_lineage(&session, RemovalReason::Application);
        }
    }

    /// Decides about the sessions of a connection that ended without our `close_notify`. May run under the context's lock.
    pub(crate) fn ended(&self, session: &Session) {
        // A cut connection is no reason to remove its session (RFC 5246 section 7.2.1); after a fatal alert, sent or
        // received, it must not be resumed (section 7.2.2). The thread's last error may be of another connection.
        if session.may_have_failed() && !matches!(last_error_reason(), 0 | UNEXPECTED_EOF_WHILE_READING) {
            self.remove_lineage(session, RemovalReason::FatalError);
        } else if let Some(shim) = self.shim_of(session) {
            shim.kept();
        }
    }

    /// Removes a session and all others of its lineage.
    fn remove_lineage(&self, session: &Session, reason: RemovalReason) {
        let Some(shim) = self.shim_of(session) else { return };
        let id = session.id();
        let lineage = session.lineage().ok().flatten();
        for sibling in lineage.iter().flat_map(Lineage::ids).filter(|sibling| *sibling != id) {
            shim.remove(sibling, reason);
        }
        let state = session.ticket_state();
        if let Some((state, tickets)) = state.as_ref().zip(shim.tickets()) {
            tickets.remove(&state.lineage, state.end, reason);
        }
        // A session in a ticket has an id that no store has, unless it stems from a stored one.
        if !id.is_empty() && (state.is_none() || id.len() == ID_BYTES) {
            shim.remove(&id, reason);
        }
    }

    /// Returns the namespace of a session.
    fn shim_of(&self, session: &Session) -> Option<&Arc<Shim>> {
        self.policy.shim_for(session.fingerprint().is_some_and(|fingerprint| requests_certificate(&fingerprint)))
    }
}

/// Returns the session in an envelope, or the reason why it is none of this id and name.
fn decode(id: &[u8], name: &[u8], envelope: &Envelope, not_after: u64) -> Result<Session, &'static str> {
    let session = Session::decode(envelope.session).filter(|session| session.id() == id).ok_or("undecodable")?;
    if session.lineage() != Ok(None) {
        return Err("undecodable");
    }
    // RFC 6066 section 3.
    if session.hostname() != name {
        return Err("server-name-mismatch");
    }
    let now = unix_time();
    session.set_life(now, not_after.saturating_sub(now));
    // Tickets issued on the resumed connection end when the negotiated session does.
    let mut lineage = Lineage::new(envelope.fingerprint, envelope.issued);
    lineage.end = not_after;
    lineage.add(id);
    session.set_lineage(&lineage);
    Ok(session)
}

/// Logs once why sessions with application data are not shared.
pub(crate) fn note_foreign_data() {
    static SAID: Notice = Notice::new();
    SAID.warn("sessions with ticket application data of the application are not shared");
}

/// Returns whether a connection will request a client certificate, as far as that is known before the servername callback.
fn verifies(connection: Connection, expected: &Expected) -> bool {
    match expected {
        Expected::Fingerprint(expected) => requests_certificate(expected),
        _ => connection.verifies(),
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

pub(crate) fn unix_time() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_secs())
}
