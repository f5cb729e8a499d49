//! The keys of OpenSSL's tickets: AES-256-CBC and HMAC-SHA256 (RFC 5077 section 4).

use std::ffi::c_uint;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::OnceLock;

use store::{HEAD_BYTES, NAME_BYTES, TicketSecret};

use super::ffi;

const IV_BYTES: usize = HEAD_BYTES - NAME_BYTES;

/// A cipher of OpenSSL's, which lives as long as the process.
struct Cipher(NonNull<ffi::EVP_CIPHER>);

// SAFETY: nothing changes a cipher that was fetched.
unsafe impl Send for Cipher {}
// SAFETY: as above.
unsafe impl Sync for Cipher {}

/// The parts of a ticket that OpenSSL is about to encrypt or decrypt.
pub(crate) struct TicketKeys {
    name: *mut u8,
    iv: *mut u8,
    cipher: *mut ffi::EVP_CIPHER_CTX,
    mac: *mut ffi::EVP_MAC_CTX,
}

impl TicketKeys {
    /// # Safety
    ///
    /// They are the arguments of a ticket key callback, which has not returned: there are 16 bytes at `name` and `iv`.
    pub(crate) unsafe fn new(name: *mut u8, iv: *mut u8, cipher: *mut ffi::EVP_CIPHER_CTX, mac: *mut ffi::EVP_MAC_CTX) -> Self {
        Self { name, iv, cipher, mac }
    }

    /// Returns name and IV of a ticket that a client offers.
    pub(crate) fn head(&self) -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        // SAFETY: new()'s.
        unsafe {
            head[..NAME_BYTES].copy_from_slice(slice::from_raw_parts(self.name, NAME_BYTES));
            head[NAME_BYTES..].copy_from_slice(slice::from_raw_parts(self.iv, IV_BYTES));
        }
        head
    }

    /// Has OpenSSL encrypt with a secret; returns whether it can.
    pub(crate) fn encrypt(&self, secret: &TicketSecret) -> bool {
        let mut iv = [0; IV_BYTES];
        let Some(cipher) = cipher().filter(|_| getrandom::fill(&mut iv).is_ok()) else { return false };
        // SAFETY: new()'s. OpenSSL copies the keys.
        unsafe {
            ptr::copy_nonoverlapping(secret.name().as_ptr(), self.name, NAME_BYTES);
            ptr::copy_nonoverlapping(iv.as_ptr(), self.iv, IV_BYTES);
            let key = secret.aes_key().as_ptr();
            self.authenticate(secret) && ffi::EVP_EncryptInit_ex(self.cipher, cipher, ptr::null_mut(), key, self.iv) == 1
        }
    }

    /// Has OpenSSL decrypt with a secret; returns whether it can.
    pub(crate) fn decrypt(&self, secret: &TicketSecret) -> bool {
        let Some(cipher) = cipher() else { return false };
        // SAFETY: new()'s. OpenSSL copies the keys.
        unsafe {
            let key = secret.aes_key().as_ptr();
            self.authenticate(secret) && ffi::EVP_DecryptInit_ex(self.cipher, cipher, ptr::null_mut(), key, self.iv) == 1
        }
    }

    fn authenticate(&self, secret: &TicketSecret) -> bool {
        let (key, digest) = (secret.hmac_key(), c"SHA256");
        let param = |name: *const _, data_type: c_uint, data: *const u8, data_size| ffi::OSSL_PARAM {
            key: name,
            data_type,
            data: data.cast_mut().cast(),
            data_size,
            return_size: 0,
        };
        let params = [
            param(c"key".as_ptr(), ffi::OSSL_PARAM_OCTET_STRING, key.as_ptr(), key.len()),
            param(c"digest".as_ptr(), ffi::OSSL_PARAM_UTF8_STRING, digest.as_ptr().cast(), digest.count_bytes()),
            param(ptr::null(), 0, ptr::null(), 0),
        ];
        // SAFETY: new()'s; the last parameter has no name.
        unsafe { ffi::EVP_MAC_CTX_set_params(self.mac, params.as_ptr()) == 1 }
    }
}

/// Prepares the cipher: fetching it takes longer than all the rest, and takes locks.
pub(crate) fn prepare() {
    cipher();
}

fn cipher() -> Option<*const ffi::EVP_CIPHER> {
    static CIPHER: OnceLock<Option<Cipher>> = OnceLock::new();
    // SAFETY: the names end with a NUL.
    let fetch = || NonNull::new(unsafe { ffi::EVP_CIPHER_fetch(ptr::null_mut(), c"AES-256-CBC".as_ptr(), ptr::null()) });
    CIPHER.get_or_init(|| fetch().map(Cipher)).as_ref().map(|cipher| cipher.0.as_ptr().cast_const())
}
