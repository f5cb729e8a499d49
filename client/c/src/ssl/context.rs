//! An `SSL_CTX`.

use std::ffi::{CStr, c_int, c_long, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use super::{ex_data, ffi, length_of, seconds, ticket_keys};
use crate::policy::{Binding, NO_CLIENT_AUTHENTICATION, Observers};
use crate::shared::Notice;

/// An `SSL_CTX`, while something else keeps it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Context<'a>(NonNull<ffi::SSL_CTX>, PhantomData<&'a ()>);

/// The functions that OpenSSL calls for sessions of a context's connections.
pub(crate) struct SessionCallbacks {
    pub(crate) new: ffi::NewCallback,
    pub(crate) get: ffi::GetCallback,
    pub(crate) remove: ffi::RemoveCallback,
    pub(crate) id: ffi::IdCallback,
}

/// The functions that OpenSSL calls for tickets of a context's connections.
pub(crate) struct TicketCallbacks {
    pub(crate) key: ffi::TicketKeyCallback,
    pub(crate) generate: ffi::GenerateTicketCallback,
    pub(crate) decrypt: ffi::DecryptTicketCallback,
    pub(crate) identity: ffi::FindPskCallback,
}

/// The first byte of the numbers of TLS 1.3's ciphers, and the first cipher of OpenSSL's default: `TLS_AES_256_GCM_SHA384` (RFC 8446,
/// appendix B.4).
const TLS13_CIPHERS: u16 = 0x13;
const TLS13_DEFAULT: u16 = 0x1302;

/// Our data in a context.
struct Slot {
    number: u64,
    /// Decided once.
    binding: OnceLock<Option<Binding>>,
    /// Whether the context may have a servername callback.
    switches: AtomicBool,
    /// Whether it is known to have a certificate callback.
    certifies: AtomicBool,
    /// The session id context of its connections, as a number; 0 if it is unknown.
    id_context: AtomicU64,
    /// Whether the application has pre-shared keys of its own.
    has_keys: AtomicBool,
}

impl<'a> Context<'a> {
    /// Returns the context behind a pointer; None if it is NULL.
    ///
    /// # Safety
    ///
    /// It points to a context that lives for `'a`.
    #[must_use]
    pub unsafe fn new(pointer: *mut ffi::SSL_CTX) -> Option<Self> {
        NonNull::new(pointer).map(|pointer| Self(pointer, PhantomData))
    }

    /// Returns the context's binding, if it has one.
    #[must_use]
    pub fn binding(&self) -> Option<&'a Binding> {
        self.slot()?.binding.get()?.as_ref()
    }

    /// Returns the context's binding, or the result of `decide` at the first call.
    pub fn binding_or(&self, decide: impl FnOnce() -> Option<Binding>) -> Option<&'a Binding> {
        self.prepare(false);
        self.slot()?.binding.get_or_init(decide).as_ref()
    }

    /// Makes room for a binding, while no other thread uses the context. `observed` is whether a servername callback that it gets from
    /// now on will be noted, and so its session id context.
    pub fn prepare(&self, observed: bool) {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        if self.slot().is_none() {
            // Not in a handshake: a process that forks then would leave it locked in its child.
            ex_data::prepare();
            LazyLock::force(&NO_CLIENT_AUTHENTICATION);
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let slot = Box::into_raw(Box::new(Slot {
                number,
                binding: OnceLock::new(),
                switches: AtomicBool::new(!observed),
                certifies: AtomicBool::new(false),
                id_context: AtomicU64::new(if observed { number_of(&[]) } else { 0 }),
                has_keys: AtomicBool::new(false),
            }));
            // SAFETY: the context lives, and takes the slot over unless it says that it could not.
            unsafe {
                if ffi::SSL_CTX_set_ex_data(self.0.as_ptr(), index(), slot.cast()) != 1 {
                    drop(Box::from_raw(slot));
                }
            }
        }
    }

    /// Records that the context has a servername callback.
    pub fn note_servername_callback(&self) {
        if let Some(slot) = self.slot() {
            slot.switches.store(true, Ordering::Relaxed);
        }
    }

    /// Records that the context has a certificate callback, which supplies certificates in full handshakes only.
    pub fn note_certificate_callback(&self) {
        if let Some(slot) = self.slot() {
            slot.certifies.store(true, Ordering::Relaxed);
        }
    }

    /// Records that the application finds pre-shared keys of its own by a callback (`SSL_CTX_set_psk_find_session_callback(3)`), in which
    /// ours has no place: no connection of the context resumes a stored session of TLS 1.3 by it.
    pub fn note_psk_callback(&self) {
        if let Some(slot) = self.slot() {
            slot.has_keys.store(true, Ordering::Relaxed);
        }
    }

    /// Records the session id context of connections that are made from now on.
    pub fn note_id_context(&self, id_context: &[u8]) {
        if let Some(slot) = self.slot() {
            slot.id_context.store(number_of(id_context), Ordering::Relaxed);
        }
    }

    /// Returns the number of the session id context of its connections; 0 if it is unknown. OpenSSL has no getter.
    pub(super) fn id_context(self) -> u64 {
        self.slot().map_or(0, |slot| slot.id_context.load(Ordering::Relaxed))
    }

    pub(crate) fn has_certificate_callback(self) -> bool {
        self.slot().is_some_and(|slot| slot.certifies.load(Ordering::Relaxed))
    }

    /// Returns whether the context may have a servername callback, which may switch its connections to another one.
    pub(crate) fn may_switch(self) -> bool {
        self.slot().is_none_or(|slot| slot.switches.load(Ordering::Relaxed))
    }

    /// Returns a number that no other context of this process has; 0 if it is none of ours.
    pub(crate) fn number(self) -> u64 {
        self.slot().map_or(0, |slot| slot.number)
    }

    pub(super) fn raw(&self) -> *mut ffi::SSL_CTX {
        self.0.as_ptr()
    }

    fn slot(&self) -> Option<&'a Slot> {
        // SAFETY: the pointer is a slot of prepare(), which goes with the context.
        unsafe { ffi::SSL_CTX_get_ex_data(self.0.as_ptr(), index()).cast::<Slot>().as_ref() }
    }

    /// Returns whether the context is in memory that several processes may share (Kamailio): a pointer of ours in it would lead another
    /// process into its own memory.
    #[must_use]
    pub fn is_in_shared_memory(&self) -> bool {
        // SAFETY: an old size of zero moves nothing: it maps a shareable page a second time, and fails for a private one (mremap(2)).
        unsafe {
            let page = usize::try_from(libc::sysconf(libc::_SC_PAGESIZE)).unwrap_or(4096);
            let start = self.0.as_ptr().map_addr(|address| address & !(page - 1));
            let copy = libc::mremap(start.cast(), 0, page, libc::MREMAP_MAYMOVE);
            copy != libc::MAP_FAILED && libc::munmap(copy, page) == 0
        }
    }

    /// Returns how many bytes of early data the context accepts.
    #[must_use]
    pub fn max_early_data(&self) -> u32 {
        // SAFETY: the context lives.
        unsafe { ffi::SSL_CTX_get_max_early_data(self.0.as_ptr()) }
    }

    /// Returns whether the context requests client certificates.
    #[must_use]
    pub fn verifies_clients(&self) -> bool {
        // SAFETY: the context lives.
        unsafe { ffi::SSL_CTX_get_verify_mode(self.0.as_ptr()) & ffi::SSL_VERIFY_PEER != 0 }
    }

    /// Returns whether the context resumes sessions as it is set up: by stateless tickets, or from a cache.
    #[must_use]
    pub fn resumes(&self) -> bool {
        let context = self.0.as_ptr();
        // SAFETY: the context lives.
        let (mode, options, has_cache) = unsafe {
            let mode = ffi::SSL_CTX_ctrl(context, ffi::SSL_CTRL_GET_SESS_CACHE_MODE, 0, ptr::null_mut());
            (mode, ffi::SSL_CTX_get_options(context), ffi::SSL_CTX_sess_get_get_cb(context).is_some())
        };
        let caches = mode & ffi::SSL_SESS_CACHE_SERVER != 0 && (has_cache || mode & ffi::SSL_SESS_CACHE_NO_INTERNAL == 0);
        caches || options & ffi::SSL_OP_NO_TICKET == 0
    }

    /// Returns the lifetime of a session from its negotiation.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        // SAFETY: the context lives.
        Duration::from_secs(unsafe { ffi::SSL_CTX_get_timeout(self.0.as_ptr()) }.try_into().unwrap_or(0))
    }

    /// Returns the application's own callbacks that are to be called after ours: those that no more than observe sessions. An application
    /// with a get callback has a cache of its own. Ours replace its callbacks: in that cache, a session would outlive its removal from the
    /// fleet.
    pub(crate) fn observers(&self) -> Observers {
        static REPLACED: Notice = Notice::new();
        let context = self.0.as_ptr();
        // SAFETY: the context lives.
        unsafe {
            if ffi::SSL_CTX_sess_get_get_cb(context).is_some() {
                REPLACED.inform("the server's own session cache is not used: the store replaces it");
                return Observers::default();
            }
            Observers { new: ffi::SSL_CTX_sess_get_new_cb(context), remove: ffi::SSL_CTX_sess_get_remove_cb(context) }
        }
    }

    /// Sets the callbacks, and the settings that they need.
    pub(crate) fn set_callbacks(&self, callbacks: &SessionCallbacks, id_context: Option<&[u8; 32]>, lifetime: Duration) {
        let context = self.0.as_ptr();
        // No internal cache: in it a session would outlive its removal from the fleet, and its eviction would remove it there.
        let mode = ffi::SSL_SESS_CACHE_SERVER | ffi::SSL_SESS_CACHE_NO_INTERNAL;
        // SAFETY: the context lives, the callbacks always do, and the id context is copied.
        unsafe {
            ffi::SSL_CTX_ctrl(context, ffi::SSL_CTRL_SET_SESS_CACHE_MODE, mode, ptr::null_mut());
            ffi::SSL_CTX_set_options(context, ffi::SSL_OP_NO_TICKET);
            ffi::SSL_CTX_set_timeout(context, seconds(lifetime.as_secs()));
            if let Some(id_context) = id_context {
                ffi::SSL_CTX_set_session_id_context(context, id_context.as_ptr(), length_of(id_context));
                self.set_server_order();
            }
            ffi::SSL_CTX_sess_set_new_cb(context, Some(callbacks.new));
            ffi::SSL_CTX_sess_set_get_cb(context, Some(callbacks.get));
            ffi::SSL_CTX_sess_set_remove_cb(context, Some(callbacks.remove));
            ffi::SSL_CTX_set_generate_session_id(context, Some(callbacks.id));
        }
    }

    /// Has the order of the server's ciphers decide.
    ///
    /// A session of TLS 1.3 resumes only with a cipher of its hash, so frontends of unlike stacks have to choose the same one for a client;
    /// by default some take the client's order, and some the server's.
    fn set_server_order(&self) {
        static UNUSUAL: Notice = Notice::new();
        let context = self.0.as_ptr();
        // SAFETY: the context lives, and so do its ciphers.
        unsafe {
            ffi::SSL_CTX_set_options(context, ffi::SSL_OP_CIPHER_SERVER_PREFERENCE);
            let ciphers = ffi::SSL_CTX_get_ciphers(context);
            let first = (0..ffi::OPENSSL_sk_num(ciphers))
                .map(|index| ffi::OPENSSL_sk_value(ciphers, index).cast_const())
                .find(|cipher| ffi::SSL_CIPHER_get_protocol_id(*cipher) >> 8 == TLS13_CIPHERS);
            if let Some(cipher) = first.filter(|cipher| ffi::SSL_CIPHER_get_protocol_id(*cipher) != TLS13_DEFAULT) {
                let name = CStr::from_ptr(ffi::SSL_CIPHER_get_name(cipher)).to_string_lossy();
                UNUSUAL.inform(&format!(
                    "a context prefers {name} in TLS 1.3: its sessions resume only at frontends with the same order of ciphersuites, and \
                     theirs only here; configure the same order everywhere"
                ));
            }
        }
    }

    /// Has its connections issue and accept stateless tickets, by callbacks.
    pub(crate) fn set_ticket_callbacks(&self, callbacks: &TicketCallbacks) {
        let context = self.0.as_ptr();
        ticket_keys::prepare();
        // SAFETY: the context lives, and the callbacks always do.
        unsafe {
            ffi::SSL_CTX_clear_options(context, ffi::SSL_OP_NO_TICKET);
            ffi::SSL_CTX_set_tlsext_ticket_key_evp_cb(context, Some(callbacks.key));
            let (generate, decrypt) = (Some(callbacks.generate), Some(callbacks.decrypt));
            ffi::SSL_CTX_set_session_ticket_cb(context, generate, decrypt, ptr::null_mut());
            if self.sees_identities() {
                ffi::SSL_CTX_set_psk_find_session_callback(context, Some(callbacks.identity));
            }
        }
    }

    /// Returns whether our callback may see the identities that clients offer in TLS 1.3. OpenSSL negotiates TLS 1.3 wherever there is such a
    /// callback, and then the handshake fails unless the server's key is of a kind that TLS 1.3 has (RFC 8446 section 4.2.3).
    pub(super) fn sees_identities(self) -> bool {
        // SAFETY: the context lives, and keeps its key.
        let has_key = unsafe { is_of_tls13(ffi::SSL_CTX_get0_privatekey(self.0.as_ptr())) };
        has_key && !self.slot().is_some_and(|slot| slot.has_keys.load(Ordering::Relaxed))
    }
}

/// # Safety
///
/// The key lives, or is NULL.
unsafe fn is_of_tls13(key: *const ffi::EVP_PKEY) -> bool {
    const CURVES: [&CStr; 3] = [c"prime256v1", c"secp384r1", c"secp521r1"];
    if key.is_null() {
        return false;
    }
    let mut curve = [0; 32];
    // SAFETY: the caller's. A name is written with its NUL if there is room for both.
    unsafe {
        let is = |kind: &CStr| ffi::EVP_PKEY_is_a(key, kind.as_ptr()) == 1;
        if !is(c"EC") {
            return [c"RSA", c"RSA-PSS", c"ED25519", c"ED448"].into_iter().any(is);
        }
        ffi::ERR_set_mark();
        let named = ffi::EVP_PKEY_get_group_name(key, curve.as_mut_ptr(), curve.len(), ptr::null_mut()) == 1;
        ffi::ERR_pop_to_mark();
        named && CURVES.contains(&CStr::from_ptr(curve.as_ptr()))
    }
}

/// Returns a number that two session id contexts have in common only if they are equal, in all likelihood; never 0.
pub(crate) fn number_of(id_context: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    id_context.hash(&mut hasher);
    hasher.finish().max(1)
}

/// The place of our slot in each context.
fn index() -> c_int {
    static INDEX: OnceLock<c_int> = OnceLock::new();
    // SAFETY: the function that frees a slot always lives.
    *INDEX.get_or_init(|| unsafe {
        let class = ffi::CRYPTO_EX_INDEX_SSL_CTX;
        ffi::CRYPTO_get_ex_new_index(class, 0, ptr::null_mut(), None, None, Some(free_slot))
    })
}

unsafe extern "C" fn free_slot(
    _: *mut c_void,
    slot: *mut c_void,
    _: *mut ffi::CRYPTO_EX_DATA,
    _: c_int,
    _: c_long,
    _: *mut c_void,
) {
    if !slot.is_null() {
        // SAFETY: it is a slot of prepare(), and nothing else has it any more.
        let slot = unsafe { Box::from_raw(slot.cast::<Slot>()) };
        let _ = catch_unwind(AssertUnwindSafe(|| drop(slot)));
    }
}
