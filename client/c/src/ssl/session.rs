//! An `SSL_SESSION`.

use std::ffi::{CString, c_long, c_void};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use store::{Fingerprint, TicketState};

use super::owner::{self, Owner};
use super::{bytes, copied, ffi, length_of, seconds};
use crate::lineage::{Foreign, Lineage};

/// Length of the id of a session in a ticket, which no store has: OpenSSL reports the end of a connection only if its session has an id.
const TICKET_ID_BYTES: usize = 16;

/// An `SSL_SESSION`.
pub(crate) struct Session {
    pointer: NonNull<ffi::SSL_SESSION>,
    owned: bool,
}

impl Session {
    /// Decodes a session, any bytes at all.
    pub(crate) fn decode(serialized: &[u8]) -> Option<Self> {
        let length = c_long::try_from(serialized.len()).ok()?;
        let mut cursor = serialized.as_ptr();
        // SAFETY: no more is read than there is. A failure must not stay in the thread's error queue, where the connection would
        // find it.
        let session = unsafe {
            ffi::ERR_set_mark();
            let session = ffi::d2i_SSL_SESSION(ptr::null_mut(), &raw mut cursor, length);
            ffi::ERR_pop_to_mark();
            Self { pointer: NonNull::new(session)?, owned: true }
        };
        (cursor == serialized.as_ptr_range().end).then_some(session)
    }

    /// Returns the session behind a pointer.
    ///
    /// # Safety
    ///
    /// It points to a session that outlives the returned reference.
    pub(crate) unsafe fn borrowed(pointer: *mut ffi::SSL_SESSION) -> Option<Self> {
        NonNull::new(pointer).map(|pointer| Self { pointer, owned: false })
    }

    /// Gives the session away.
    pub(crate) fn into_raw(mut self) -> *mut ffi::SSL_SESSION {
        self.owned = false;
        self.raw()
    }

    pub(crate) fn id(&self) -> Vec<u8> {
        let mut length = 0;
        // SAFETY: the session lives; the id is its own, and copied.
        unsafe { bytes(ffi::SSL_SESSION_get_id(self.raw(), &raw mut length), length as usize) }
    }

    pub(crate) fn set_id<const N: usize>(&self, id: &[u8; N]) {
        // SAFETY: the session lives, and copies the id.
        unsafe { ffi::SSL_SESSION_set1_id(self.raw(), id.as_ptr(), length_of(id)) };
    }

    /// Gives the session of a ticket an id, if it has none.
    pub(crate) fn ensure_id(&self) {
        if self.id().is_empty() {
            self.set_id(&ticket_id());
        }
    }

    pub(crate) fn is_resumable(&self) -> bool {
        // SAFETY: the session lives.
        unsafe { ffi::SSL_SESSION_is_resumable(self.raw()) == 1 }
    }

    /// Returns the length of the serialized session.
    pub(crate) fn size(&self) -> usize {
        // SAFETY: the session lives; nothing is written.
        usize::try_from(unsafe { ffi::i2d_SSL_SESSION(self.raw(), ptr::null_mut()) }).unwrap_or(usize::MAX)
    }

    pub(crate) fn serialize(&self) -> Vec<u8> {
        // SAFETY: the session lives; OpenSSL writes as many bytes as it returned before.
        unsafe {
            let length = usize::try_from(ffi::i2d_SSL_SESSION(self.raw(), ptr::null_mut())).unwrap_or(0);
            let mut serialized = vec![0; length];
            let mut cursor = serialized.as_mut_ptr();
            ffi::i2d_SSL_SESSION(self.raw(), &raw mut cursor);
            serialized
        }
    }

    pub(crate) fn set_id_context(&self, id_context: &[u8; 32]) {
        // SAFETY: the session lives, and copies the id context.
        unsafe { ffi::SSL_SESSION_set1_id_context(self.raw(), id_context.as_ptr(), length_of(id_context)) };
    }

    pub(crate) fn id_context(&self) -> Vec<u8> {
        let mut length = 0;
        // SAFETY: the session lives; the id context is its own, and copied.
        unsafe { bytes(ffi::SSL_SESSION_get0_id_context(self.raw(), &raw mut length), length as usize) }
    }

    pub(crate) fn hostname(&self) -> Vec<u8> {
        // SAFETY: the session lives; the name is its own, and copied.
        unsafe { copied(ffi::SSL_SESSION_get0_hostname(self.raw())).unwrap_or_default() }
    }

    pub(crate) fn set_hostname(&self, name: &[u8]) {
        let name = CString::new(name).ok().filter(|name| !name.is_empty());
        // SAFETY: the session lives, and copies the name.
        unsafe { ffi::SSL_SESSION_set1_hostname(self.raw(), name.as_ref().map_or(ptr::null(), |name| name.as_ptr())) };
    }

    pub(crate) fn timeout(&self) -> u64 {
        // SAFETY: the session lives.
        unsafe { u64::try_from(ffi::SSL_SESSION_get_timeout(self.raw())).unwrap_or(0) }
    }

    /// Sets when the session ends, in Unix seconds: the lifetime hint of its next ticket follows from that.
    pub(crate) fn set_end(&self, end: u64) {
        // SAFETY: the session lives.
        unsafe {
            let begin = u64::try_from(ffi::SSL_SESSION_get_time(self.raw())).unwrap_or(0);
            ffi::SSL_SESSION_set_timeout(self.raw(), seconds(end.saturating_sub(begin)));
        }
    }

    pub(crate) fn set_life(&self, begin: u64, timeout: u64) {
        // SAFETY: the session lives.
        unsafe {
            ffi::SSL_SESSION_set_time(self.raw(), seconds(begin));
            ffi::SSL_SESSION_set_timeout(self.raw(), seconds(timeout));
        }
    }

    /// Returns another reference to the session.
    pub(crate) fn another(&self) -> Option<Self> {
        // SAFETY: the session lives.
        unsafe { ffi::SSL_SESSION_up_ref(self.raw()) == 1 }.then_some(Self { pointer: self.pointer, owned: true })
    }

    /// Returns when the peer's certificate ends, in Unix seconds at a given present; None if there is no certificate.
    pub(crate) fn peer_not_after(&self, now: u64) -> Option<u64> {
        let (mut days, mut seconds) = (0, 0);
        // SAFETY: the session and its certificate live; a NULL time is the present.
        let known = unsafe {
            let peer = ffi::SSL_SESSION_get0_peer(self.raw());
            if peer.is_null() {
                return None;
            }
            ffi::ASN1_TIME_diff(&raw mut days, &raw mut seconds, ptr::null(), ffi::X509_get0_notAfter(peer)) == 1
        };
        let left = i64::from(days) * 86_400 + i64::from(seconds);
        Some(if known { now.saturating_add_signed(left) } else { 0 })
    }

    /// Returns the session's cipher, which is not NULL: OpenSSL decodes no session with one that it does not know.
    pub(super) fn cipher(&self) -> *const c_void {
        // SAFETY: the session lives.
        unsafe { ffi::SSL_SESSION_get0_cipher(self.raw()) }
    }

    pub(crate) fn has_peer(&self) -> bool {
        // SAFETY: the session lives.
        unsafe { !ffi::SSL_SESSION_get0_peer(self.raw()).is_null() }
    }

    /// Returns the session's lineage, from its ticket application data.
    pub(crate) fn lineage(&self) -> Result<Option<Lineage>, Foreign> {
        Lineage::decode(&self.ticket_data())
    }

    pub(crate) fn set_lineage(&self, lineage: &Lineage) {
        self.set_ticket_data(&lineage.encode());
    }

    pub(crate) fn clear_lineage(&self) {
        self.set_ticket_data(&[]);
    }

    /// Returns the state of the ticket that the session was in, or that is being issued for it, from its ticket application data.
    pub(crate) fn ticket_state(&self) -> Option<TicketState> {
        TicketState::decode(&self.ticket_data())
    }

    pub(crate) fn set_ticket_state(&self, state: &TicketState) {
        self.set_ticket_data(&state.encode());
    }

    /// Returns the fingerprint of the context that negotiated the session; None if its ticket application data do not tell.
    pub(crate) fn fingerprint(&self) -> Option<Fingerprint> {
        let of_ticket = || self.ticket_state().map(|state| state.fingerprint);
        self.lineage().ok().flatten().map(|lineage| lineage.fingerprint).or_else(of_ticket)
    }

    /// Records the connection that has the session, if sessions of this program can have data of ours.
    pub(crate) fn set_owner(&self, owner: Arc<Owner>) {
        let Some(index) = owner::index() else { return };
        let owner = Arc::into_raw(owner);
        // SAFETY: the session lives, and takes the new owner over unless OpenSSL returns that it could not.
        unsafe {
            let before = ffi::SSL_SESSION_get_ex_data(self.raw(), index).cast::<Owner>().cast_const();
            let set = ffi::SSL_SESSION_set_ex_data(self.raw(), index, owner.cast_mut().cast()) == 1;
            let unused = if set { before } else { owner };
            if !unused.is_null() {
                drop(Arc::from_raw(unused));
            }
        }
    }

    /// Returns whether the connection that has the session lives, and has failed; true if that is not known.
    pub(crate) fn may_have_failed(&self) -> bool {
        let Some(index) = owner::index() else { return true };
        // SAFETY: the session lives, and keeps its owner.
        let owner = unsafe { ffi::SSL_SESSION_get_ex_data(self.raw(), index).cast::<Owner>().as_ref() };
        owner.is_some_and(Owner::has_failed)
    }

    fn ticket_data(&self) -> Vec<u8> {
        let (mut data, mut length) = (ptr::null_mut(), 0);
        // SAFETY: the session lives; the data is its own, and copied.
        unsafe {
            if ffi::SSL_SESSION_get0_ticket_appdata(self.raw(), &raw mut data, &raw mut length) == 1 {
                return bytes(data.cast(), length);
            }
        }
        Vec::new()
    }

    fn set_ticket_data(&self, data: &[u8]) {
        // SAFETY: the session lives, and copies the data.
        unsafe { ffi::SSL_SESSION_set1_ticket_appdata(self.raw(), data.as_ptr().cast(), data.len()) };
    }

    fn raw(&self) -> *mut ffi::SSL_SESSION {
        self.pointer.as_ptr()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: the reference is ours.
            unsafe { ffi::SSL_SESSION_free(self.raw()) };
        }
    }
}

/// Returns an id for the session of a ticket.
pub(crate) fn ticket_id() -> [u8; TICKET_ID_BYTES] {
    let mut id = [1; TICKET_ID_BYTES];
    let _ = getrandom::fill(&mut id);
    id
}
