//! TLS to the store.

use std::fs;
use std::path::PathBuf;

use tonic::transport::Endpoint;

use crate::Error;

/// The authorities of the store's certificate, and the frontend's own certificate: PEM files, which are read again when they change: a change is used
/// after two identical reads a second apart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Credentials {
    /// Certificates of the authorities that the store's certificate must come from; None for the system's.
    pub ca: Option<PathBuf>,
    /// The frontend's own certificate with its chain, and its private key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name that the store's certificate must have; None for the host of the target.
    pub server_name: Option<String>,
}

impl Credentials {
    /// Returns the files, which belong together.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let (cert, key) = self.identity.clone().unzip();
        [self.ca.clone(), cert, key].into_iter().flatten().collect()
    }

    /// Returns `endpoint` with TLS by the present contents of the files.
    #[cfg(feature = "tls")]
    pub(crate) fn secured(&self, endpoint: Endpoint) -> Result<Endpoint, Error> {
        use tonic::transport::{Certificate, ClientTlsConfig, Identity};

        let read = |path: &PathBuf| fs::read(path).map_err(|error| Error::new(format!("{}: {}", path.display(), error.kind())));
        let mut tls = match &self.ca {
            Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let Some((cert, key)) = &self.identity {
            tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        if let Some(name) = &self.server_name {
            tls = tls.domain_name(name);
        }
        endpoint.tls_config(tls).map_err(|error| {
            let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            Error::new(format!("credentials of the store: {cause}"))
        })
    }

    #[cfg(not(feature = "tls"))]
    #[allow(clippy::unused_self)]
    pub(crate) fn secured(&self, _: Endpoint) -> Result<Endpoint, Error> {
        Err(Error::new("TLS to the store needs the feature \"tls\""))
    }
}
