//! The decisions at each ticket callback of OpenSSL, where clients keep their sessions.
//!
//! OpenSSL's rules are in `SSL_CTX_set_tlsext_ticket_key_evp_cb(3)` and `SSL_CTX_set_session_ticket_cb(3)`. Those about what may resume
//! where are the same as for stored sessions.

use store::{
    Fingerprint, ID_BYTES, MAX_SESSION_BYTES, NAME_BYTES, STATE_BYTES, SessionMode, TicketSecret, TicketState, Tickets,
    microseconds,
};

use crate::binding::{Origin, agrees, note_foreign_data, unix_time};
use crate::policy::Binding;
use crate::ssl::{Connection, Handshake, Issue, Offer, Pending, Session, TicketKeys};

/// Why a handshake ends without a ticket.
type Withheld = &'static str;

impl Binding {
    /// Returns whether clients keep sessions, in tickets of one version of TLS at least.
    #[must_use]
    pub fn has_tickets(&self) -> bool {
        self.shim().options().sessions == SessionMode::Tickets
    }

    /// Returns whether clients keep the sessions of a connection.
    pub(crate) fn uses_tickets(&self, connection: Connection) -> bool {
        self.has_tickets() && (connection.is_tls13() || self.shim().options().tickets_tls12)
    }

    /// Has OpenSSL decrypt a ticket that a client offers. Returns whether it can, and whether another ticket replaces this one.
    pub(crate) fn decrypt(&self, connection: Connection, keys: &TicketKeys) -> Option<bool> {
        let handshake = connection.handshake()?;
        handshake.offer.take();
        if !self.uses_tickets(connection) {
            return None;
        }
        let required = self.begin(connection, handshake);
        let tickets = self.policy.shim_for(required.verifies)?.tickets()?;
        let head = keys.head();
        let secret = tickets.secret_for_name(&head[..NAME_BYTES])?;
        if !keys.decrypt(&secret) {
            return None;
        }
        // Clients use a ticket of TLS 1.3 once (RFC 8446 appendix C.4).
        let is_old = || tickets.secret_for_issue().is_some_and(|(present, _)| present.name() != secret.name());
        let renew = connection.is_tls13() || is_old();
        *handshake.offer.borrow_mut() = Some(Offer { head, tickets, required });
        Some(renew)
    }

    /// Returns whether a ticket resumes its session; None if OpenSSL could not decrypt it.
    pub(crate) fn accept(&self, connection: Connection, session: Option<&Session>) -> bool {
        let Some(handshake) = connection.handshake() else { return false };
        let Some(offer) = handshake.offer.take() else { return false };
        let outcome = session.ok_or("not-authentic").and_then(|session| self.check(connection, handshake, session, &offer));
        match (outcome, session) {
            (Ok(()), Some(session)) => {
                let name = *offer.head.first_chunk().expect("it begins with a name");
                self.resume(connection, handshake, session, offer.required, Pending::Ticket(offer.tickets, name));
                true
            }
            (outcome, _) => {
                let _ = outcome.inspect_err(|reason| offer.tickets.count_refused(reason));
                false
            }
        }
    }

    fn check(
        &self,
        connection: Connection,
        handshake: &Handshake,
        session: &Session,
        offer: &Offer,
    ) -> Result<(), &'static str> {
        let Offer { head, tickets, required } = offer;
        let state = session.ticket_state().ok_or("malformed")?;
        tickets.check(&state, &head[..NAME_BYTES], required.expected, &required.name)?;
        self.admit(connection, session, required)?;
        if self.shim().options().single_use {
            handshake.lookups.borrow_mut().claim(tickets, head, &state)?;
        }
        Ok(())
    }

    /// Decides about the ticket that OpenSSL is about to issue, and completes its session.
    pub(crate) fn prepare_ticket(&self, connection: Connection) {
        let (Some(handshake), Some(session)) = (connection.handshake(), connection.session()) else { return };
        let before = handshake.issue.replace(Issue::Withheld);
        let issue = self.issue(connection, handshake, &session).unwrap_or_else(|reason| {
            if let Some(tickets) = self.shim().tickets().filter(|_| !matches!(before, Issue::Withheld)) {
                tickets.count_withheld(reason);
            }
            Issue::Withheld
        });
        if connection.is_tls13() {
            if matches!(issue, Issue::Ticket { .. }) {
                connection.clear_no_ticket();
            } else {
                // OpenSSL before 3.0.6 sends a malformed message instead of none. So the client gets an id: that of the session
                // that is stored next, or one that is looked up nowhere.
                connection.set_no_ticket();
                session.set_id(&self.id_for(connection, matches!(issue, Issue::Stored)));
            }
        }
        handshake.issue.replace(issue);
    }

    fn issue(&self, connection: Connection, handshake: &Handshake, session: &Session) -> Result<Issue, Withheld> {
        let origin = self.origin(connection, handshake, session).ok_or("unresumable")?;
        // Early data can be replayed across the fleet.
        if connection.max_early_data() > 0 {
            return Err("unresumable");
        }
        let tickets = origin.shim.tickets().ok_or("no-secret")?;
        let (secret, held_over) = tickets.secret_for_issue().ok_or("no-secret")?;
        // A certificate is all that may be large.
        if session.has_peer() && session.size() + STATE_BYTES > MAX_SESSION_BYTES {
            let previous = session.ticket_state();
            if !connection.is_tls13() || (previous.is_some() && connection.is_resumed()) {
                return Err("unresumable");
            }
            previous.inspect(|_| session.clear_lineage());
            return Ok(Issue::Stored);
        }
        let state = self.state(connection, session, &origin, &tickets, &secret).ok_or("unresumable")?;
        if !connection.is_tls13() {
            // As for stored sessions: resumed, SSL_get_servername(3) returns it.
            session.set_hostname(&origin.name);
        }
        session.set_ticket_state(&state);
        session.set_owner(handshake.owner());
        session.set_end(state.end);
        Ok(Issue::Ticket { tickets, secret, held_over })
    }

    /// Returns the state of a ticket; None if it must not resume anywhere.
    fn state(
        &self,
        connection: Connection,
        session: &Session,
        origin: &Origin,
        tickets: &Tickets,
        secret: &TicketSecret,
    ) -> Option<TicketState> {
        let resumed = connection.is_resumed();
        let agrees = |fingerprint: &Fingerprint| !resumed || agrees(connection, fingerprint);
        let peer_end = session.peer_not_after(unix_time()).unwrap_or(u64::MAX);
        let end = peer_end.min(unix_time() + self.policy.lifetime.as_secs());
        let begin = || tickets.begin_state(secret, origin.fingerprint, &origin.name, Some(end));
        if let Some(previous) = session.ticket_state() {
            // The second ticket of a full handshake is a copy of the first one, unless the server has requested a certificate in between.
            return match previous.fingerprint == origin.fingerprint || resumed {
                true if agrees(&previous.fingerprint) => {
                    tickets.continue_state(secret, &TicketState { end: previous.end.min(peer_end), ..previous })
                }
                true => None,
                false => begin(),
            };
        }
        match session.lineage() {
            Ok(Some(lineage)) if resumed => {
                let end = lineage.end.min(peer_end);
                let stored = TicketState { negotiated: microseconds(lineage.issued), end, ..begin()? };
                agrees(&lineage.fingerprint).then(|| tickets.continue_state(secret, &stored)).flatten()
            }
            Ok(_) => begin(),
            Err(_) => {
                note_foreign_data();
                None
            }
        }
    }

    fn id_for(&self, connection: Connection, stored: bool) -> [u8; ID_BYTES] {
        let shim = self.policy.shim_for(connection.verifies()).unwrap_or(&self.policy.shim);
        if stored && !shim.sheds() { shim.issue_id() } else { shim.issue_expired_id() }
    }
}

/// Has OpenSSL encrypt the ticket that was prepared; returns whether it can.
pub(crate) fn encrypt(connection: Connection, keys: &TicketKeys) -> bool {
    let Some(handshake) = connection.handshake() else { return false };
    let issue = handshake.issue.borrow();
    let Issue::Ticket { tickets, secret, held_over } = &*issue else { return false };
    let encrypts = keys.encrypt(secret);
    if encrypts {
        tickets.count_issued(*held_over);
        // In TLS 1.2 it has none, and its session is serialized by now.
        connection.session().inspect(Session::ensure_id);
    }
    encrypts
}
