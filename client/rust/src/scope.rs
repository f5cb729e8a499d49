//! The properties of a rustls config that a full handshake proves: rustls' hooks do not have them.

use std::collections::BTreeSet;

use ::rustls::RootCertStore;
use ::rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};

use crate::fingerprint::{Fingerprint, fingerprint, half};

/// The properties of a config that a full handshake proves. A session resumes only on connections of an equal scope.
///
/// The default stands for a config that requests no client certificates, and whose fleet needs not tell its hosts apart otherwise than by
/// the server name, which rustls compares.
///
/// ```
/// let private = resumed::Scope::default()
///     .server_names(["admin.example"])
///     .requires_clients_of(&rustls::RootCertStore::empty());
/// assert_ne!(private, resumed::Scope::default());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Names, certificates and data, each encoded.
    identity: BTreeSet<Vec<u8>>,
    /// Whether a certificate is required, and the digests of the roots.
    clients: Option<(bool, BTreeSet<[u8; 32]>)>,
}

impl Scope {
    /// The config shows a certificate of these names.
    #[must_use]
    pub fn server_names<N: AsRef<str>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.identity.extend(names.into_iter().map(|name| item(b'N', name.as_ref().to_ascii_lowercase().as_bytes())));
        self
    }

    /// The config shows this certificate chain. With a renewed certificate the sessions of the old one do not resume;
    /// [`Scope::server_names`] avoids that.
    #[must_use]
    pub fn server_certificates(mut self, chain: &[CertificateDer]) -> Self {
        self.identity.extend(chain.iter().map(|certificate| item(b'X', &Sha256::digest(certificate))));
        self
    }

    /// The config lets in only clients with a certificate of one of these roots.
    #[must_use]
    pub fn requires_clients_of(self, roots: &RootCertStore) -> Self {
        self.clients(true, roots)
    }

    /// The config requests a certificate of one of these roots, and lets in clients without one.
    #[must_use]
    pub fn asks_clients_of(self, roots: &RootCertStore) -> Self {
        self.clients(false, roots)
    }

    /// Something else keeps its sessions apart: a tenant, a version of a list of revoked certificates, a verifier of its own.
    #[must_use]
    pub fn data(mut self, data: impl AsRef<[u8]>) -> Self {
        self.identity.insert(item(b'B', data.as_ref()));
        self
    }

    fn clients(mut self, required: bool, roots: &RootCertStore) -> Self {
        let digest = |anchor: &::rustls::pki_types::TrustAnchor| {
            let constraints = anchor.name_constraints.as_ref().map_or(&[][..], |constraints| constraints.as_ref());
            let parts = [anchor.subject.as_ref(), anchor.subject_public_key_info.as_ref(), constraints];
            Sha256::digest(parts.map(|part| item(b'P', part)).concat()).into()
        };
        self.clients = Some((required, roots.roots.iter().map(digest).collect()));
        self
    }

    /// Returns the fingerprint of connections of this scope.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        let identity = Sha256::new_with_prefix(b"resumed/v1 rustls identity\0");
        let identity = self.identity.iter().fold(identity, Digest::chain_update);
        let mut clients = Sha256::new_with_prefix(b"resumed/v1 rustls client authentication\0");
        if let Some((required, roots)) = &self.clients {
            clients.update([1 + u8::from(*required)]);
            clients = roots.iter().fold(clients, Digest::chain_update);
        }
        fingerprint(half(identity), half(clients))
    }
}

fn item(kind: u8, value: &[u8]) -> Vec<u8> {
    [&[kind][..], &value.len().to_be_bytes(), value].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_that_differ_have_different_fingerprints() {
        let (none, mut roots) = (RootCertStore::empty(), RootCertStore::empty());
        let anchor = |subject: &'static [u8]| ::rustls::pki_types::TrustAnchor {
            subject: subject.into(),
            subject_public_key_info: b"key"[..].into(),
            name_constraints: None,
        };
        roots.roots.push(anchor(b"authority"));
        let mut others = roots.clone();
        others.roots[0] = anchor(b"other authority");
        let scopes = [
            Scope::default(),
            Scope::default().requires_clients_of(&none),
            Scope::default().asks_clients_of(&none),
            Scope::default().requires_clients_of(&roots),
            Scope::default().requires_clients_of(&others),
            Scope::default().server_names(["shop.example"]),
            Scope::default().server_names(["shop.example", "other.example"]),
            Scope::default().server_certificates(&[CertificateDer::from_slice(b"shop.example")]),
            Scope::default().data("shop.example"),
        ];
        let distinct: BTreeSet<_> = scopes.iter().map(Scope::fingerprint).collect();
        assert_eq!(distinct.len(), scopes.len());
        let [one, other] = [["Shop.example", "other.example"], ["other.example", "shop.example"]];
        assert_eq!(Scope::default().server_names(one).fingerprint(), Scope::default().server_names(other).fingerprint());
    }
}
