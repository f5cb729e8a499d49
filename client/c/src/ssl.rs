//! libssl's contexts, connections and sessions.

use std::ffi::{CStr, c_char, c_long, c_uint, c_ulong};
use std::slice;

mod connection;
mod context;
mod ex_data;
pub mod ffi;
mod fingerprint;
mod handshake;
mod owner;
mod session;
mod ticket_keys;

pub use connection::Connection;
pub use context::Context;
pub(crate) use context::{SessionCallbacks, TicketCallbacks, number_of};
pub(crate) use handshake::{Handshake, Issue, Offer, Pending, PendingHit};
pub use owner::frees_our_session_data;
pub(crate) use session::{Session, ticket_id};
pub(crate) use ticket_keys::TicketKeys;

/// `ERR_GET_REASON`.
const REASON_MASK: u64 = 0x7F_FFFF;

/// Returns the reason code of the last error in the thread's queue, 0 if there is none.
pub(crate) fn last_error_reason() -> u64 {
    // SAFETY: it may always be called.
    unsafe { wide(ffi::ERR_peek_last_error()) & REASON_MASK }
}

/// # Safety
///
/// There are `length` bytes at `data`, or it is NULL.
pub(crate) unsafe fn bytes(data: *const u8, length: usize) -> Vec<u8> {
    if data.is_null() {
        return Vec::new();
    }
    // SAFETY: the caller's.
    unsafe { slice::from_raw_parts(data, length) }.to_vec()
}

/// # Safety
///
/// It points to a string with a NUL, or is NULL.
unsafe fn copied(text: *const c_char) -> Option<Vec<u8>> {
    // SAFETY: the caller's.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_bytes().to_vec())
}

pub(crate) fn length_of<const N: usize>(_: &[u8; N]) -> c_uint {
    c_uint::try_from(N).unwrap_or(0)
}

/// A number of a size that depends on the system.
#[allow(clippy::useless_conversion)]
fn wide(number: c_ulong) -> u64 {
    u64::from(number)
}

fn seconds(seconds: u64) -> c_long {
    c_long::try_from(seconds).unwrap_or(c_long::MAX)
}
