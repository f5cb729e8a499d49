//! The state of a connection's handshake, which goes with the connection.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use store::{HEAD_BYTES, HandshakeLookups, Shim, TicketName, TicketSecret, Tickets};

use super::owner::{Owner, Ownership};
use super::{Session, ffi};
use crate::policy::{Policy, Requirements};

#[derive(Default)]
pub(crate) struct Handshake {
    ownership: Ownership,
    /// Tells one handshake of a connection from the next one.
    random: Cell<[u8; 32]>,
    /// After a `HelloRetryRequest`, OpenSSL looks up each session, and decrypts each ticket, once more.
    pub(crate) lookups: RefCell<HandshakeLookups>,
    /// Whether its fingerprint was noted for its name. Post-handshake authentication changes the fingerprint, and decides about no
    /// other connection.
    pub(crate) learned: Cell<bool>,
    /// The session that was found, whose single use is spent when OpenSSL looks it up once more.
    found: RefCell<Option<(Vec<u8>, Session)>>,
    /// The number of the context that it began with, and its policy, if that was seen: another one may have been chosen since.
    pub(crate) began: Cell<u64>,
    pub(crate) policy: RefCell<Option<Arc<Policy>>>,
    /// The session id context that the application set for the connection, as a number, or 0.
    pub(crate) id_context: Cell<u64>,
    /// The server name at the look-up.
    pub(crate) name: RefCell<Vec<u8>>,
    /// The session that was found, until the end of the handshake.
    pub(crate) pending: RefCell<Option<Pending>>,
    /// The ticket that OpenSSL is about to decrypt.
    pub(crate) offer: RefCell<Option<Offer>>,
    /// The last ticket that was about to be issued.
    pub(crate) issue: RefCell<Issue>,
    /// Whether the connection has our info callback, now and for all further handshakes.
    pub(crate) watched: Cell<bool>,
    /// The application's own one.
    pub(crate) info: Cell<Option<ffi::InfoCallback>>,
}

impl Handshake {
    /// # Safety
    ///
    /// The connection outlives the result.
    pub(super) unsafe fn new(connection: *mut ffi::SSL) -> Self {
        // SAFETY: the caller's.
        Self { ownership: unsafe { Ownership::new(connection) }, ..Self::default() }
    }

    /// Returns the connection, as its sessions find it.
    pub(crate) fn owner(&self) -> Arc<Owner> {
        self.ownership.owner()
    }

    /// Begins anew if this is another handshake than the one before.
    pub(crate) fn begin(&self, random: [u8; 32]) {
        if self.random.replace(random) != random {
            self.lookups.take();
            self.learned.take();
            self.pending.take();
            self.offer.take();
            self.issue.take();
            self.name.take();
            self.began.take();
            self.policy.take();
            self.found.take();
        }
    }

    /// Returns the id of the stored session that this handshake has found.
    pub(crate) fn found_id(&self) -> Option<Vec<u8>> {
        self.found.borrow().as_ref().map(|(id, _)| id.clone())
    }

    /// Returns the session that this handshake has found already.
    pub(crate) fn found(&self, id: &[u8]) -> Option<Session> {
        self.found.borrow().as_ref().filter(|(found, _)| found == id).and_then(|(_, session)| session.another())
    }

    pub(crate) fn set_found(&self, id: &[u8], session: &Session) {
        *self.found.borrow_mut() = session.another().map(|session| (id.to_vec(), session));
    }
}

/// A ticket that a client offers.
pub(crate) struct Offer {
    pub(crate) head: [u8; HEAD_BYTES],
    pub(crate) tickets: Arc<Tickets>,
    pub(crate) required: Requirements,
}

/// A ticket between two callbacks of OpenSSL: the first completes its session, the second supplies its keys.
#[derive(Default)]
pub(crate) enum Issue {
    /// OpenSSL has issued none.
    #[default]
    Nothing,
    /// None is issued.
    Withheld,
    /// The session is stored; the client gets its id.
    Stored,
    /// The client gets the session.
    Ticket { tickets: Arc<Tickets>, secret: Arc<TicketSecret>, held_over: bool },
}

/// A session that was found, until it is known whether the handshake resumed it.
pub(crate) enum Pending {
    Stored(PendingHit),
    Ticket(Arc<Tickets>, TicketName),
}

impl Pending {
    /// Counts it: the handshake has resumed the session.
    pub(crate) fn resumed(self) {
        match self {
            Self::Stored(hit) => hit.resumed(),
            Self::Ticket(tickets, name) => tickets.count_resumed(&name),
        }
    }
}

/// A look-up that has found a session, until it is known whether the handshake resumed it. If the handshake did not, or failed, it is
/// counted as a miss when dropped.
pub(crate) struct PendingHit {
    shim: Arc<Shim>,
    reason: Option<&'static str>,
}

impl PendingHit {
    pub(crate) fn new(shim: Arc<Shim>, reason: &'static str) -> Self {
        Self { shim, reason: Some(reason) }
    }

    /// Counts the hit: the handshake has resumed the session.
    pub(crate) fn resumed(mut self) {
        self.reason.take().inspect(|reason| self.shim.hit(reason));
    }
}

impl Drop for PendingHit {
    fn drop(&mut self) {
        if self.reason.is_some() {
            self.shim.not_resumed();
        }
    }
}
