//! The context fingerprint of a connection, as OpenSSL shows it: `protos/README.md` has the encoding.
//!
//! Names of certificates and digests of trust stores are kept, since reading them takes longer than all the rest. An entry keeps a
//! reference to the object that it is of, so that no other object gets its address.

use std::collections::BTreeSet;
use std::ffi::{CStr, c_int, c_uchar, c_uint};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use store::Fingerprint;
use store::fingerprint::{Anchor, ClientPolicy, Name, client_authentication, fingerprint, server_identity};

use super::{Connection, bytes, ffi, wide};
use crate::lru::Lru;
use crate::policy::NO_CLIENT_AUTHENTICATION;
use crate::shared::Shared;

const CERTIFICATES: usize = 1024;
const TRUST_STORES: usize = 64;

type Names = Arc<BTreeSet<Vec<u8>>>;
type Anchors = Arc<BTreeSet<Anchor>>;

impl Connection<'_> {
    /// Returns the fingerprint of the context that serves the connection at this moment.
    pub(crate) fn fingerprint(self) -> Fingerprint {
        let names = self.certificates();
        let identity = match names.as_slice() {
            [names] => server_identity(names.iter()),
            several => server_identity(several.iter().flat_map(|names| names.iter())),
        };
        let clients = if self.verifies() { client_authentication(Some(&self.policy())) } else { *NO_CLIENT_AUTHENTICATION };
        fingerprint(identity, clients)
    }

    /// Returns the names of each certificate that the connection could show.
    fn certificates(&self) -> Vec<Names> {
        let ssl = self.raw();
        let mut all = Vec::new();
        // SAFETY: the connection lives, keeps its certificates, and has the same one as its present one afterwards.
        unsafe {
            let present = ffi::SSL_get_certificate(ssl);
            let mut step = ffi::SSL_CERT_SET_FIRST;
            while ffi::SSL_ctrl(ssl, ffi::SSL_CTRL_SET_CURRENT_CERT, step, ptr::null_mut()) == 1 {
                all.extend(NonNull::new(ffi::SSL_get_certificate(ssl)).map(|certificate| names(certificate)));
                step = ffi::SSL_CERT_SET_NEXT;
            }
            if !present.is_null() {
                ffi::SSL_ctrl(ssl, ffi::SSL_CTRL_SELECT_CURRENT_CERT, 0, present.cast());
            }
        }
        all
    }

    /// Returns how the connection verifies its client's certificate.
    fn policy(&self) -> ClientPolicy {
        let ssl = self.raw();
        // SAFETY: the connection lives, and keeps its parameters and its trust store; host names are copied.
        unsafe {
            let param = ffi::SSL_get0_param(ssl);
            let hosts = (0..).map_while(|index| {
                let host = ffi::X509_VERIFY_PARAM_get0_host(param, index);
                (!host.is_null()).then(|| CStr::from_ptr(host).to_bytes().to_vec())
            });
            let mut store: *mut ffi::X509_STORE = ptr::null_mut();
            ffi::SSL_ctrl(ssl, ffi::SSL_CTRL_GET_VERIFY_CERT_STORE, 0, (&raw mut store).cast());
            if store.is_null() {
                store = ffi::SSL_CTX_get_cert_store(ffi::SSL_get_SSL_CTX(ssl));
            }
            let store = NonNull::new(store);
            let store_flags =
                store.map_or(0, |store| ffi::X509_VERIFY_PARAM_get_flags(ffi::X509_STORE_get0_param(store.as_ptr())));
            ClientPolicy {
                mode: u8::try_from(ffi::SSL_get_verify_mode(ssl)).unwrap_or(u8::MAX),
                depth: ffi::SSL_get_verify_depth(ssl),
                security_level: u32::try_from(ffi::SSL_get_security_level(ssl)).unwrap_or(u32::MAX),
                // Some stacks set it, and it is OpenSSL's default anyway.
                flags: wide(ffi::X509_VERIFY_PARAM_get_flags(param)) & !ffi::X509_V_FLAG_TRUSTED_FIRST,
                store_flags: wide(store_flags) & !ffi::X509_V_FLAG_TRUSTED_FIRST,
                hosts: hosts.collect(),
                anchors: store.map(|store| anchors(store)).unwrap_or_default(),
            }
        }
    }
}

/// A certificate that is kept.
struct Certificate(NonNull<ffi::X509>);

/// A trust store that is kept.
struct TrustStore(NonNull<ffi::X509_STORE>);

// SAFETY: OpenSSL counts references atomically, and nothing but the reference is used.
unsafe impl Send for Certificate {}
// SAFETY: as above.
unsafe impl Send for TrustStore {}

impl Drop for Certificate {
    fn drop(&mut self) {
        // SAFETY: the reference is ours.
        unsafe { ffi::X509_free(self.0.as_ptr()) };
    }
}

impl Drop for TrustStore {
    fn drop(&mut self) {
        // SAFETY: the reference is ours.
        unsafe { ffi::X509_STORE_free(self.0.as_ptr()) };
    }
}

/// # Safety
///
/// The certificate lives.
unsafe fn names(certificate: NonNull<ffi::X509>) -> Names {
    static KNOWN: Shared<Lru<usize, (Certificate, Names)>> = Shared::new(|| Lru::new(CERTIFICATES));
    let address = certificate.as_ptr() as usize;
    if let Some(names) = KNOWN.with(|known| known.get(&address).map(|(_, names)| Arc::clone(names))) {
        return names;
    }
    // SAFETY: the caller's.
    let (names, kept) = unsafe { (read_names(certificate.as_ptr()), ffi::X509_up_ref(certificate.as_ptr()) == 1) };
    let names = Arc::new(names);
    if kept {
        let forgotten = KNOWN.with(|known| known.put(address, (Certificate(certificate), Arc::clone(&names))));
        drop(forgotten);
    }
    names
}

/// # Safety
///
/// The store lives.
unsafe fn anchors(store: NonNull<ffi::X509_STORE>) -> Anchors {
    type Known = Lru<(usize, c_int), (TrustStore, Anchors)>;
    static KNOWN: Shared<Known> = Shared::new(|| Lru::new(TRUST_STORES));
    // Objects are only ever added to a store, so their number says whether they are the same.
    // SAFETY: the caller's; the objects are read under the store's lock.
    unsafe {
        let locked = ffi::X509_STORE_lock(store.as_ptr()) == 1;
        let number = ffi::OPENSSL_sk_num(ffi::X509_STORE_get0_objects(store.as_ptr()));
        if locked {
            ffi::X509_STORE_unlock(store.as_ptr());
        }
        let key = (store.as_ptr() as usize, number);
        if let Some(anchors) = KNOWN.with(|known| known.get(&key).map(|(_, anchors)| Arc::clone(anchors))) {
            return anchors;
        }
        let (anchors, number) = read_anchors(store.as_ptr());
        let anchors = Arc::new(anchors);
        if ffi::X509_STORE_up_ref(store.as_ptr()) == 1 {
            let forgotten = KNOWN.with(|known| known.put((key.0, number), (TrustStore(store), Arc::clone(&anchors))));
            drop(forgotten);
        }
        anchors
    }
}

/// Returns the certificates and CRLs of a trust store, and the number of its objects.
///
/// # Safety
///
/// The store lives.
unsafe fn read_anchors(store: *mut ffi::X509_STORE) -> (BTreeSet<Anchor>, c_int) {
    let mut anchors = BTreeSet::new();
    // SAFETY: the caller's; the objects are read under the store's lock.
    unsafe {
        let locked = ffi::X509_STORE_lock(store) == 1;
        let objects = ffi::X509_STORE_get0_objects(store);
        let number = ffi::OPENSSL_sk_num(objects);
        for index in 0..number {
            let object = ffi::OPENSSL_sk_value(objects, index);
            anchors.extend(match ffi::X509_OBJECT_get_type(object) {
                ffi::X509_LU_X509 => {
                    let certificate = ffi::X509_OBJECT_get0_X509(object);
                    digest(|out, length| ffi::X509_digest(certificate, ffi::EVP_sha256(), out, length)).map(Anchor::Certificate)
                }
                ffi::X509_LU_CRL => {
                    let crl = ffi::X509_OBJECT_get0_X509_CRL(object);
                    digest(|out, length| ffi::X509_CRL_digest(crl, ffi::EVP_sha256(), out, length)).map(Anchor::Crl)
                }
                _ => None,
            });
        }
        if locked {
            ffi::X509_STORE_unlock(store);
        }
        (anchors, number)
    }
}

/// Returns the encoded names of a certificate, or its digest if it has none or they cannot be read.
///
/// # Safety
///
/// The certificate lives.
unsafe fn read_names(certificate: *mut ffi::X509) -> BTreeSet<Vec<u8>> {
    // SAFETY: the caller's. A failure must leave no error for the application to find.
    let names = unsafe {
        ffi::ERR_set_mark();
        let names =
            alternative_names(certificate).map(|names| if names.is_empty() { common_names(certificate) } else { names });
        ffi::ERR_pop_to_mark();
        names.unwrap_or_default()
    };
    if !names.is_empty() {
        return names.iter().map(Name::encode).collect();
    }
    // SAFETY: the caller's.
    let digest = unsafe { digest(|out, length| ffi::X509_digest(certificate, ffi::EVP_sha256(), out, length)) };
    digest.map(|digest| Name::Digest(digest).encode()).into_iter().collect()
}

/// Returns the DNS names and addresses of the subjectAltName; None if it is malformed.
///
/// # Safety
///
/// The certificate lives.
unsafe fn alternative_names(certificate: *mut ffi::X509) -> Option<Vec<Name>> {
    const ABSENT: c_int = -1;
    let (mut critical, mut names) = (0, Vec::new());
    // SAFETY: the caller's; names are copied before they are freed.
    unsafe {
        let nid = ffi::NID_SUBJECT_ALT_NAME;
        let all = ffi::X509_get_ext_d2i(certificate, nid, &raw mut critical, ptr::null_mut()).cast::<ffi::STACK>();
        if all.is_null() {
            return (critical == ABSENT).then_some(names);
        }
        for index in 0..ffi::OPENSSL_sk_num(all) {
            let mut kind = 0;
            let value = ffi::GENERAL_NAME_get0_value(ffi::OPENSSL_sk_value(all, index), &raw mut kind);
            match kind {
                ffi::GEN_DNS => names.push(Name::Dns(string(value))),
                ffi::GEN_IPADD => names.push(Name::Address(string(value))),
                _ => {}
            }
        }
        ffi::GENERAL_NAMES_free(all);
    }
    Some(names)
}

/// # Safety
///
/// The certificate lives.
unsafe fn common_names(certificate: *mut ffi::X509) -> Vec<Name> {
    let mut names = Vec::new();
    // SAFETY: the caller's; each name is copied before it is freed.
    unsafe {
        let subject = ffi::X509_get_subject_name(certificate);
        let mut index = -1;
        loop {
            index = ffi::X509_NAME_get_index_by_NID(subject, ffi::NID_COMMON_NAME, index);
            if index < 0 {
                return names;
            }
            let mut utf8: *mut c_uchar = ptr::null_mut();
            let value = ffi::X509_NAME_ENTRY_get_data(ffi::X509_NAME_get_entry(subject, index));
            if let Ok(length) = usize::try_from(ffi::ASN1_STRING_to_UTF8(&raw mut utf8, value)) {
                names.push(Name::Common(bytes(utf8, length)));
                ffi::CRYPTO_free(utf8.cast(), ptr::null(), 0);
            }
        }
    }
}

/// # Safety
///
/// The string lives.
unsafe fn string(string: *const ffi::ASN1_STRING) -> Vec<u8> {
    // SAFETY: the caller's.
    unsafe { bytes(ffi::ASN1_STRING_get0_data(string), usize::try_from(ffi::ASN1_STRING_length(string)).unwrap_or(0)) }
}

fn digest(compute: impl FnOnce(*mut c_uchar, *mut c_uint) -> c_int) -> Option<[u8; 32]> {
    let (mut digest, mut length) = ([0; 32], 0);
    (compute(digest.as_mut_ptr(), &raw mut length) == 1 && length == 32).then_some(digest)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::ffi::c_long;

    use serde::Deserialize;

    use super::*;

    unsafe extern "C" {
        fn d2i_X509(certificate: *mut *mut ffi::X509, input: *mut *const c_uchar, length: c_long) -> *mut ffi::X509;
    }

    #[derive(Deserialize)]
    struct Vectors {
        certificates: HashMap<String, String>,
        server_identities: Vec<Vector>,
    }

    #[derive(Deserialize)]
    struct Vector {
        certificates: Vec<String>,
        identity: String,
    }

    fn certificate(encoded: &str) -> Certificate {
        let der = hex::decode(encoded).unwrap();
        let mut cursor = der.as_ptr();
        // SAFETY: no more is read than there is.
        let decoded = unsafe { d2i_X509(ptr::null_mut(), &raw mut cursor, c_long::try_from(der.len()).unwrap()) };
        Certificate(NonNull::new(decoded).unwrap())
    }

    /// The names that OpenSSL reads are those of the other languages.
    #[test]
    fn server_identity_vectors() {
        let path = format!("{}/../../protos/vectors/contexts.json", env!("CARGO_MANIFEST_DIR"));
        let vectors: Vectors = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(vectors.server_identities.len() > 4);
        let certificates: HashMap<_, _> =
            vectors.certificates.iter().map(|(name, encoded)| (name.clone(), certificate(encoded))).collect();
        for vector in vectors.server_identities {
            for _ in 0..2 {
                // read, and kept
                // SAFETY: the certificates live.
                let all: Vec<_> = vector.certificates.iter().map(|name| unsafe { names(certificates[name].0) }).collect();
                let identity = server_identity(all.iter().flat_map(|names| names.iter()));
                assert_eq!(hex::encode(identity), vector.identity, "{:?}", vector.certificates);
            }
        }
    }
}
