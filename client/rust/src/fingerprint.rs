//! The context fingerprint: the properties that a full handshake proved, in 32 bytes that are the same in every language.
//!
//! The encoding is in `protos/README.md` and `protos/vectors/contexts.json`; `docs/contexts.md` describes its purpose.

use std::collections::BTreeSet;
use std::sync::Arc;

use sha2::{Digest, Sha256};

/// Length of a fingerprint.
pub const FINGERPRINT_BYTES: usize = 32;
const HALF_BYTES: usize = FINGERPRINT_BYTES / 2;

/// Server identity (16) | client authentication (16).
pub type Fingerprint = [u8; FINGERPRINT_BYTES];
/// One of the two parts of a fingerprint.
pub type Half = [u8; HALF_BYTES];

/// The context fingerprint that a session must have, so that it may resume on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// This one.
    Fingerprint(Fingerprint),
    /// The process has not seen yet which context serves such connections.
    Unknown,
    /// Different contexts serve such connections.
    Unstable,
}

impl Expected {
    pub(crate) fn fingerprint(self) -> Result<Fingerprint, &'static str> {
        match self {
            Self::Fingerprint(fingerprint) => Ok(fingerprint),
            Self::Unknown => Err("context-unknown"),
            Self::Unstable => Err("context-unstable"),
        }
    }
}

/// A name of a server's certificate, in the order of the encoded names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// A dNSName of the subjectAltName.
    Dns(Vec<u8>),
    /// An iPAddress of the subjectAltName: 4 or 16 bytes.
    Address(Vec<u8>),
    /// A common name of the subject as UTF-8, where the certificate has none of the above.
    Common(Vec<u8>),
    /// The SHA-256 of a certificate (DER) that has no name.
    Digest([u8; 32]),
}

/// A certificate or a CRL of a trust store, as the SHA-256 of its DER. The order is that of the encoded trust anchors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Anchor {
    /// A certificate.
    Certificate([u8; 32]),
    /// A CRL.
    Crl([u8; 32]),
}

/// How a connection verifies the certificate that it requests of its client.
#[derive(Clone, Debug)]
pub struct ClientPolicy {
    /// OpenSSL's `SSL_VERIFY_` flags: `SSL_CTX_set_verify(3)`.
    pub mode: u8,
    /// `SSL_CTX_set_verify_depth(3)`; -1 for OpenSSL's default.
    pub depth: i32,
    /// `SSL_CTX_set_security_level(3)`.
    pub security_level: u32,
    /// `X509_V_FLAG_` of the connection: `X509_VERIFY_PARAM_set_flags(3)`.
    pub flags: u64,
    /// Those of the trust store.
    pub store_flags: u64,
    /// Names of which the certificate must have one.
    pub hosts: Vec<Vec<u8>>,
    /// The contents of the trust store.
    pub anchors: Arc<BTreeSet<Anchor>>,
}

impl Name {
    /// Returns the encoded name: kind (1) | length (2) | value. ASCII letters of host names are in lower case.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Dns(name) => encoded(b'D', &name.to_ascii_lowercase()),
            Self::Address(address) => encoded(b'I', address),
            Self::Common(name) => encoded(b'C', &name.to_ascii_lowercase()),
            Self::Digest(digest) => encoded(b'X', digest),
        }
    }
}

/// Returns the first half of a fingerprint, from the encoded names of all certificates that a connection could show.
#[must_use]
pub fn server_identity<'a>(names: impl IntoIterator<Item = &'a Vec<u8>>) -> Half {
    let names: BTreeSet<_> = names.into_iter().collect();
    let digest = Sha256::new_with_prefix(b"resumed/v1 identity\0");
    half(names.into_iter().fold(digest, Digest::chain_update))
}

/// Returns the second half of a fingerprint; None stands for a connection that requests no certificate.
#[must_use]
pub fn client_authentication(policy: Option<&ClientPolicy>) -> Half {
    let mut digest = Sha256::new_with_prefix(b"resumed/v1 client authentication\0");
    if let Some(policy) = policy {
        digest.update([policy.mode]);
        digest.update(policy.depth.to_be_bytes());
        digest.update(policy.security_level.to_be_bytes());
        digest.update(policy.flags.to_be_bytes());
        digest.update(policy.store_flags.to_be_bytes());
        digest.update(length(policy.hosts.len()));
        for host in &policy.hosts {
            digest.update(length(host.len()));
            digest.update(host);
        }
        for anchor in &*policy.anchors {
            let (kind, of) = match anchor {
                Anchor::Certificate(of) => (b'A', of),
                Anchor::Crl(of) => (b'R', of),
            };
            digest.update([kind]);
            digest.update(of);
        }
    }
    half(digest)
}

/// Returns the fingerprint of its two halves.
#[must_use]
pub fn fingerprint(identity: Half, clients: Half) -> Fingerprint {
    let mut fingerprint = [0; FINGERPRINT_BYTES];
    fingerprint[..HALF_BYTES].copy_from_slice(&identity);
    fingerprint[HALF_BYTES..].copy_from_slice(&clients);
    fingerprint
}

/// Returns server identity and client authentication.
#[must_use]
pub fn halves(fingerprint: &Fingerprint) -> (&[u8], &[u8]) {
    fingerprint.split_at(HALF_BYTES)
}

/// Returns the first half of a digest.
pub(crate) fn half(digest: Sha256) -> Half {
    let mut half = Half::default();
    half.copy_from_slice(&digest.finalize()[..HALF_BYTES]);
    half
}

fn encoded(kind: u8, value: &[u8]) -> Vec<u8> {
    [&[kind][..], &length(value.len()), value].concat()
}

fn length(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Vectors {
        client_authentications: Vec<Vector>,
    }

    #[derive(Deserialize)]
    struct Vector {
        case: String,
        policy: Option<Policy>,
        client_authentication: String,
    }

    #[derive(Deserialize)]
    struct Policy {
        mode: u8,
        depth: i32,
        security_level: u32,
        flags: u64,
        store_flags: u64,
        hosts: Vec<String>,
        certificates: Vec<String>,
        crls: Vec<String>,
    }

    fn digests(texts: &[String]) -> impl Iterator<Item = [u8; 32]> {
        texts.iter().map(|text| hex::decode(text).unwrap().try_into().unwrap())
    }

    /// The digests of policies are those of the other languages. Those of certificates are tested where OpenSSL reads them.
    #[test]
    fn client_authentication_vectors() {
        let path = format!("{}/../../protos/vectors/contexts.json", env!("CARGO_MANIFEST_DIR"));
        let vectors: Vectors = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(vectors.client_authentications.len() > 1);
        for vector in vectors.client_authentications {
            let policy = vector.policy.map(|policy| ClientPolicy {
                mode: policy.mode,
                depth: policy.depth,
                security_level: policy.security_level,
                flags: policy.flags,
                store_flags: policy.store_flags,
                hosts: policy.hosts.into_iter().map(String::into_bytes).collect(),
                anchors: Arc::new(
                    digests(&policy.certificates)
                        .map(Anchor::Certificate)
                        .chain(digests(&policy.crls).map(Anchor::Crl))
                        .collect(),
                ),
            });
            let digest = client_authentication(policy.as_ref());
            assert_eq!(hex::encode(digest), vector.client_authentication, "{}", vector.case);
        }
    }

    #[test]
    fn names_are_a_set_in_lower_case() {
        let [one, other] = ["Shop.Example", "a.example"].map(|name| Name::Dns(name.into()).encode());
        let again = Name::Dns("shop.example".into()).encode();
        assert_eq!(one, again);
        assert_eq!(server_identity([&one, &other]), server_identity([&other, &again, &other]));
        assert_ne!(server_identity([&one]), server_identity([&Name::Common("shop.example".into()).encode()]));
        assert_eq!(hex::encode(server_identity([])), "022d0fc7767ee3c2a0558e17ce23dad2");
    }
}
