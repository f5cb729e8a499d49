//! An `SSL`.

use std::ffi::c_int;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};

use super::handshake::Handshake;
use super::{Context, Session, bytes, copied, ex_data, ffi, length_of, number_of};
use crate::policy::Binding;

const ENDED: c_int = ffi::SSL_SENT_SHUTDOWN | ffi::SSL_RECEIVED_SHUTDOWN;

/// An `SSL`, while something else keeps it.
#[derive(Clone, Copy)]
pub struct Connection<'a>(NonNull<ffi::SSL>, PhantomData<&'a ()>);

impl<'a> Connection<'a> {
    /// Returns the connection behind a pointer; None if it is NULL.
    ///
    /// # Safety
    ///
    /// It points to a connection that lives for `'a`, and that no other thread uses.
    #[must_use]
    pub unsafe fn new(pointer: *mut ffi::SSL) -> Option<Self> {
        NonNull::new(pointer).map(|pointer| Self(pointer, PhantomData))
    }

    /// Returns the context that it has at present.
    #[must_use]
    pub fn context(&self) -> Option<Context<'a>> {
        // SAFETY: the connection lives, and keeps its context.
        unsafe { Context::new(ffi::SSL_get_SSL_CTX(self.0.as_ptr())) }
    }

    /// Returns whether it is a server's.
    #[must_use]
    pub fn is_server(&self) -> bool {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_is_server(self.0.as_ptr()) == 1 }
    }

    /// Switches stateless tickets off.
    pub fn set_no_ticket(&self) {
        if !self.has_no_ticket() {
            // SAFETY: the connection lives.
            unsafe { ffi::SSL_set_options(self.0.as_ptr(), ffi::SSL_OP_NO_TICKET) };
        }
    }

    /// Switches stateless tickets on.
    pub fn clear_no_ticket(&self) {
        if self.has_no_ticket() {
            // SAFETY: the connection lives.
            unsafe { ffi::SSL_clear_options(self.0.as_ptr(), ffi::SSL_OP_NO_TICKET) };
        }
    }

    /// Has the order of the server's ciphers decide: see [`Context::set_server_order`].
    pub(crate) fn set_server_order(&self) {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_set_options(self.0.as_ptr(), ffi::SSL_OP_CIPHER_SERVER_PREFERENCE) };
    }

    pub(crate) fn has_no_ticket(&self) -> bool {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_get_options(self.0.as_ptr()) & ffi::SSL_OP_NO_TICKET != 0 }
    }

    pub(crate) fn is_tls13(&self) -> bool {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_version(self.0.as_ptr()) == ffi::TLS1_3_VERSION }
    }

    pub(crate) fn is_resumed(&self) -> bool {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_session_reused(self.0.as_ptr()) == 1 }
    }

    pub(crate) fn tickets(&self) -> usize {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_get_num_tickets(self.0.as_ptr()) }
    }

    /// Has our callback called with each identity that the client offers in TLS 1.3, as in connections that are made from now on.
    pub(crate) fn watch_identities(&self, callback: ffi::FindPskCallback) {
        if self.context().is_some_and(Context::sees_identities) {
            // SAFETY: the connection and the callback live.
            unsafe { ffi::SSL_set_psk_find_session_callback(self.0.as_ptr(), Some(callback)) };
        }
    }

    /// Returns how many bytes of early data the connection accepts.
    pub(crate) fn max_early_data(&self) -> u32 {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_get_max_early_data(self.0.as_ptr()) }
    }

    pub(crate) fn client_random(&self) -> [u8; 32] {
        let mut random = [0; 32];
        // SAFETY: the connection lives; as much is written as there is room for.
        unsafe { ffi::SSL_get_client_random(self.0.as_ptr(), random.as_mut_ptr(), random.len()) };
        random
    }

    pub(crate) fn server_name(&self) -> Option<Vec<u8>> {
        // SAFETY: the connection lives; the name is its own, and copied.
        unsafe { copied(ffi::SSL_get_servername(self.0.as_ptr(), ffi::TLSEXT_NAMETYPE_HOST_NAME)) }
    }

    /// Returns the client's `server_name` extension as it came; only for the get callback.
    pub(crate) fn server_name_extension(&self) -> Vec<u8> {
        let (mut data, mut length) = (ptr::null(), 0);
        // SAFETY: the connection lives; the extension is its own, and copied.
        unsafe {
            let kind = ffi::TLSEXT_TYPE_SERVER_NAME;
            if ffi::SSL_client_hello_get0_ext(self.0.as_ptr(), kind, &raw mut data, &raw mut length) == 1 {
                return bytes(data, length);
            }
        }
        Vec::new()
    }

    /// Records the session id context that the connection gets of its own.
    pub fn note_id_context(&self, id_context: &[u8]) {
        let (number, of_context) = (number_of(id_context), self.context().map_or(0, Context::id_context));
        if let Some(handshake) = self.handshake() {
            // One that is the context's is exchanged with it.
            handshake.id_context.set(if number == of_context { 0 } else { number });
        }
    }

    /// Returns whether OpenSSL will find that the session has the session id context of the connection, as far as that is known.
    pub(crate) fn fits_id_context(self, session: &Session) -> bool {
        let own = self.known_handshake().map(|handshake| handshake.id_context.get()).filter(|number| *number > 0);
        let expected = own.unwrap_or_else(|| self.context().map_or(0, Context::id_context));
        expected == 0 || expected == number_of(&session.id_context())
    }

    pub(crate) fn set_id_context(&self, id_context: &[u8; 32]) {
        // SAFETY: the connection lives, and copies the id context.
        unsafe { ffi::SSL_set_session_id_context(self.0.as_ptr(), id_context.as_ptr(), length_of(id_context)) };
    }

    /// Records the context that the connection begins with: its callbacks are called, also if the connection switches to another one.
    pub fn note_first_context(&self, context: Context<'a>) {
        // SAFETY: the connection lives. It keeps its first context for as long.
        unsafe { ffi::SSL_set_ex_data(self.0.as_ptr(), ex_data::first_context(), context.raw().cast()) };
    }

    /// Returns the context that the connection began with, if that was noted.
    #[must_use]
    pub fn first_context(&self) -> Option<Context<'a>> {
        // SAFETY: the connection lives, and keeps its first context.
        unsafe { Context::new(ffi::SSL_get_ex_data(self.0.as_ptr(), ex_data::first_context()).cast()) }
    }

    /// Returns the binding whose callbacks are called for the connection.
    #[must_use]
    pub fn binding(&self) -> Option<&'a Binding> {
        self.first_context().and_then(|first| first.binding()).or_else(|| self.context()?.binding())
    }

    /// Returns the state of the present handshake; None if there is no memory for it.
    pub(crate) fn handshake(&self) -> Option<&'a Handshake> {
        let random = self.client_random();
        let handshake = self.known_handshake().or_else(|| {
            // SAFETY: the state goes with the connection.
            let handshake = Box::into_raw(Box::new(unsafe { Handshake::new(self.0.as_ptr()) }));
            // SAFETY: the connection lives, and takes the state over unless it says that it could not.
            unsafe {
                if ffi::SSL_set_ex_data(self.0.as_ptr(), ex_data::handshake(), handshake.cast()) == 1 {
                    return handshake.as_ref();
                }
                drop(Box::from_raw(handshake));
            }
            None
        })?;
        handshake.begin(random);
        Some(handshake)
    }

    /// Returns the state of the last handshake in which there was something to record.
    fn known_handshake(&self) -> Option<&'a Handshake> {
        // SAFETY: the pointer is a state of handshake(), which goes with the connection.
        unsafe { ffi::SSL_get_ex_data(self.0.as_ptr(), ex_data::handshake()).cast::<Handshake>().as_ref() }
    }

    /// Returns whether the connection requests a certificate of its client.
    #[must_use]
    pub fn verifies(&self) -> bool {
        self.verify_mode() & ffi::SSL_VERIFY_PEER != 0
    }

    /// Returns whether no handshake of the connection succeeds without a client certificate.
    pub(crate) fn insists(self) -> bool {
        let (mode, both) = (self.verify_mode(), ffi::SSL_VERIFY_PEER | ffi::SSL_VERIFY_FAIL_IF_NO_PEER_CERT);
        // With the third flag it requests one after a handshake of TLS 1.3, when the application wants to.
        mode & both == both && !(self.is_tls13() && mode & ffi::SSL_VERIFY_POST_HANDSHAKE != 0)
    }

    fn verify_mode(&self) -> c_int {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_get_verify_mode(self.0.as_ptr()) }
    }

    /// Returns whether nothing was wrong with the peer's certificate, or there was none.
    pub(crate) fn is_verified(&self) -> bool {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_get_verify_result(self.0.as_ptr()) == ffi::X509_V_OK }
    }

    /// Returns whether the connection's present certificates are those that it shows in a full handshake.
    pub(crate) fn has_its_certificates(&self) -> bool {
        // SAFETY: the connection lives.
        let has_one = unsafe { !ffi::SSL_get_certificate(self.0.as_ptr()).is_null() };
        has_one && !self.context().is_some_and(Context::has_certificate_callback)
    }

    /// Returns whether it has finished a handshake before this one: then no servername callback will choose another context.
    pub(crate) fn is_renegotiating(&self) -> bool {
        // SAFETY: the connection lives; nothing is written.
        unsafe { ffi::SSL_get_finished(self.0.as_ptr(), ptr::null_mut(), 0) > 0 }
    }

    /// Returns whether a session's secret fits the cipher that OpenSSL has chosen. In TLS 1.3 a session of another hash is dropped after
    /// its look-up, and no ticket is issued (RFC 8446 section 4.2.11).
    pub(crate) fn fits_cipher(&self, session: &Session) -> bool {
        // SAFETY: the connection and the session live; ciphers and digests always do.
        unsafe {
            let chosen = ffi::SSL_get_pending_cipher(self.0.as_ptr());
            let digest = |cipher| ffi::SSL_CIPHER_get_handshake_digest(cipher);
            !self.is_tls13() || chosen.is_null() || digest(chosen) == digest(session.cipher())
        }
    }

    pub(crate) fn is_renegotiated(&self) -> bool {
        let count = ffi::SSL_CTRL_GET_TOTAL_RENEGOTIATIONS;
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_ctrl(self.0.as_ptr(), count, 0, ptr::null_mut()) > 0 }
    }

    /// Returns the session that the connection has, which lives until it gets another one.
    pub(crate) fn session(&self) -> Option<Session> {
        // SAFETY: the connection lives, and keeps its session.
        unsafe { Session::borrowed(ffi::SSL_get_session(self.0.as_ptr())) }
    }

    /// Returns whether the application sees the connection as ended.
    pub(crate) fn is_ended(&self) -> bool {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_get_shutdown(self.0.as_ptr()) == ENDED }
    }

    /// Ends the connection: the client gets a `close_notify`, the application reads the end of the stream, and nothing that the client sent.
    pub(crate) fn terminate(&self) {
        // SAFETY: the connection lives. An alert that cannot be sent must leave no error for the application to find.
        unsafe {
            ffi::ERR_set_mark();
            ffi::SSL_shutdown(self.0.as_ptr());
            ffi::ERR_pop_to_mark();
            ffi::SSL_set_shutdown(self.0.as_ptr(), ENDED);
        }
    }

    /// Has our info callback called at the end of this handshake, before the application reads any data.
    pub(crate) fn watch(&self, callback: ffi::InfoCallback) {
        let Some(handshake) = self.handshake().filter(|handshake| !handshake.watched.get()) else { return };
        // SAFETY: the connection lives, and so does the callback.
        unsafe {
            handshake.info.set(ffi::SSL_get_info_callback(self.0.as_ptr()));
            ffi::SSL_set_info_callback(self.0.as_ptr(), Some(callback));
        }
        // Only now: a preloaded SSL_set_info_callback takes the callback of a watched connection for the application's.
        handshake.watched.set(true);
    }

    /// Sets the info callback of the application, called before ours, and returns whether there is one of ours.
    #[must_use]
    pub fn chain_info_callback(&self, callback: Option<ffi::InfoCallback>) -> bool {
        let watched = self.known_handshake().filter(|handshake| handshake.watched.get());
        watched.inspect(|handshake| handshake.info.set(callback)).is_some()
    }

    /// Returns the application's own info callback: the connection's, or else that of its present context.
    pub(crate) fn info_callback(&self) -> Option<ffi::InfoCallback> {
        // SAFETY: the connection lives, and keeps its context.
        let of_context = || unsafe { ffi::SSL_CTX_get_info_callback(ffi::SSL_get_SSL_CTX(self.0.as_ptr())) };
        self.known_handshake().and_then(|handshake| handshake.info.get()).or_else(of_context)
    }

    pub(super) fn raw(&self) -> *mut ffi::SSL {
        self.0.as_ptr()
    }
}
