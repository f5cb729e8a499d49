//! The service as calls with deadlines: one HTTP/2 connection, made when first needed and again when it is lost.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::time::{Instant, timeout_at};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use crate::Error;
use crate::options::Options;
use crate::v1::session_store_service_client::SessionStoreServiceClient;
use crate::v1::{BatchRequest, GetRequest, Operation, Session, TakeRequest, WatchRequest, WatchResponse, result};

/// How often a call is tried where another try is harmless: a connection may have ended since the last one.
const ATTEMPTS: usize = 3;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const CREDENTIALS_CHECK: Duration = Duration::from_secs(1);
/// A Batch of the largest values that one request asks for.
const LARGEST_ANSWER: usize = (16 << 20) + (1 << 20);
const USE: &str = "use host:port, dns:///host:port or unix:/path";

/// How a frontend trusts the store, and proves to it who it is: PEM files, which are read again when they change.
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

/// Why a call failed, as misses are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    Late,
    Down,
    /// The store is well, but a limit of the caller or of the namespace is used up.
    Limited,
    Refused,
}

impl Failure {
    pub(crate) const fn reason(self) -> &'static str {
        match self {
            Self::Late => "late",
            Self::Down => "down",
            Self::Limited => "limited",
            Self::Refused => "refused",
        }
    }

    fn of(status: &Status) -> Self {
        match status.code() {
            Code::DeadlineExceeded => Self::Late,
            // Unknown and Internal without the store's own words: the connection broke.
            Code::Unavailable | Code::Cancelled | Code::Unknown => Self::Down,
            Code::Internal if std::error::Error::source(status).is_some() => Self::Down,
            Code::ResourceExhausted => Self::Limited,
            _ => Self::Refused,
        }
    }
}

pub(crate) struct StoredSession {
    pub(crate) value: Vec<u8>,
    pub(crate) ttl: Duration,
}

impl StoredSession {
    pub(crate) fn of(session: Session) -> Option<Self> {
        let ttl = session.ttl.and_then(|ttl| Duration::try_from(ttl).ok())?;
        Some(Self { value: session.value, ttl })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    Get,
    Take,
}

pub(crate) struct Store {
    target: String,
    namespace: String,
    endpoint: ArcSwap<Endpoint>,
    credentials: Option<Credentials>,
    client: ArcSwap<SessionStoreServiceClient<Channel>>,
}

impl Store {
    /// Makes a store. To be called in a runtime; connects when first used.
    pub(crate) fn new(options: &Options, endpoint: &Endpoint) -> Self {
        Self {
            target: options.target.clone(),
            namespace: options.namespace.clone(),
            endpoint: ArcSwap::from_pointee(endpoint.clone()),
            credentials: options.credentials.clone(),
            client: ArcSwap::from_pointee(connect(endpoint)),
        }
    }

    pub(crate) fn target(&self) -> &str {
        &self.target
    }

    /// Looks a session up until `end`.
    pub(crate) async fn look_up(&self, key: &[u8], how: How, end: Instant) -> Result<Option<StoredSession>, Failure> {
        let (namespace, key) = (self.namespace.clone(), key.to_vec());
        let session = match how {
            How::Get => {
                let request = GetRequest { namespace, key };
                let call = || {
                    let (mut client, request) = (self.client(), request.clone());
                    async move { client.get(request).await }
                };
                repeated(end, call).await?.session
            }
            How::Take => {
                // Not repeated: who took a session and was not heard has used it up.
                let mut client = self.client();
                let call = client.take(TakeRequest { namespace, key });
                within(end, call).await?.session
            }
        };
        session.map(|session| StoredSession::of(session).ok_or(Failure::Refused)).transpose()
    }

    /// Carries out operations, in their order, until `end`.
    pub(crate) async fn batch(&self, operations: Vec<Operation>, end: Instant) -> Result<Vec<Option<result::Result>>, Failure> {
        let (sent, request) = (operations.len(), BatchRequest { operations });
        let call = || {
            let (mut client, request) = (self.client(), request.clone());
            async move { client.batch(request).await }
        };
        let results = repeated(end, call).await?.results;
        if results.len() == sent { Ok(results.into_iter().map(|each| each.result).collect()) } else { Err(Failure::Refused) }
    }

    pub(crate) async fn watch(&self, position: Vec<u8>) -> Result<Streaming<WatchResponse>, Status> {
        let request = WatchRequest { namespace: self.namespace.clone(), position };
        Ok(self.client().watch(request).await?.into_inner())
    }

    /// Makes a connection anew: one whose peer went without a word is never told so.
    pub(crate) fn reconnect(&self) {
        self.client.store(Arc::new(connect(&self.endpoint.load())));
    }

    /// Connects anew whenever the files of the credentials have changed, until the task is dropped.
    pub(crate) async fn follow_credentials(&self) {
        let Some(credentials) = &self.credentials else { return };
        let (mut seen, mut complaint) = (credentials.versions(), String::new());
        loop {
            tokio::time::sleep(CREDENTIALS_CHECK).await;
            let current = credentials.versions();
            if current == seen {
                continue;
            }
            match endpoint(&self.target, Some(credentials)) {
                Ok(endpoint) => {
                    log::info!("credentials of the store read again");
                    self.endpoint.store(Arc::new(endpoint));
                    self.reconnect();
                    (seen, complaint) = (current, String::new());
                }
                Err(error) if complaint == error.to_string() => {} // once, not every second
                Err(error) => {
                    complaint = error.to_string();
                    log::error!("credentials of the store not read again, those read before stay: {complaint}");
                }
            }
        }
    }

    fn client(&self) -> SessionStoreServiceClient<Channel> {
        SessionStoreServiceClient::clone(&self.client.load())
    }
}

impl Credentials {
    fn versions(&self) -> Vec<Option<(u64, SystemTime)>> {
        let (cert, key) = self.identity.as_ref().map(|(cert, key)| (cert, key)).unzip();
        let version = |path: &PathBuf| fs::metadata(path).and_then(|metadata| Ok((metadata.len(), metadata.modified()?))).ok();
        [self.ca.as_ref(), cert, key].into_iter().map(|path| path.and_then(version)).collect()
    }
}

/// Checks a target and its credentials without connecting.
pub(crate) fn endpoint(target: &str, credentials: Option<&Credentials>) -> Result<Endpoint, Error> {
    let scheme = if credentials.is_some() { "https" } else { "http" };
    let malformed = || Error::new(format!("target {target:?}: {USE}"));
    let endpoint = if target.starts_with("unix:/") {
        Endpoint::from_shared(target.to_owned())
    } else {
        let prefixes = ["dns:///", "dns:", "ipv4:", "ipv6:"];
        let host_and_port = prefixes.iter().find_map(|prefix| target.strip_prefix(prefix)).unwrap_or(target);
        let port =
            host_and_port.rsplit_once(':').and_then(|(host, port)| if host.is_empty() { None } else { port.parse().ok() });
        if port.is_none_or(|port: u16| port == 0) || host_and_port.contains(['/', ',', '@']) {
            return Err(malformed());
        }
        Endpoint::from_shared(format!("{scheme}://{host_and_port}"))
    };
    let endpoint = endpoint.map_err(|_| malformed())?.connect_timeout(CONNECT_TIMEOUT);
    match credentials {
        None => Ok(endpoint),
        Some(credentials) => secured(endpoint, credentials),
    }
}

#[cfg(feature = "tls")]
fn secured(endpoint: Endpoint, credentials: &Credentials) -> Result<Endpoint, Error> {
    use tonic::transport::{Certificate, ClientTlsConfig, Identity};

    let read = |path: &PathBuf| fs::read(path).map_err(|error| Error::new(format!("{}: {}", path.display(), error.kind())));
    let mut tls = match &credentials.ca {
        Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    if let Some((cert, key)) = &credentials.identity {
        tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
    }
    if let Some(name) = &credentials.server_name {
        tls = tls.domain_name(name);
    }
    endpoint.tls_config(tls).map_err(|error| {
        let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        Error::new(format!("credentials of the store: {cause}"))
    })
}

#[cfg(not(feature = "tls"))]
fn secured(_: Endpoint, _: &Credentials) -> Result<Endpoint, Error> {
    Err(Error::new("TLS to the store needs the feature \"tls\""))
}

fn connect(endpoint: &Endpoint) -> SessionStoreServiceClient<Channel> {
    SessionStoreServiceClient::new(endpoint.connect_lazy()).max_decoding_message_size(LARGEST_ANSWER)
}

async fn within<T>(end: Instant, call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Failure> {
    match timeout_at(end, call).await {
        Err(_) => Err(Failure::Late),
        Ok(Err(status)) => {
            log::debug!("a call to the store failed: {:?} {}", status.code(), status.message());
            Err(Failure::of(&status))
        }
        Ok(Ok(response)) => Ok(response.into_inner()),
    }
}

async fn repeated<T, C, F>(end: Instant, call: C) -> Result<T, Failure>
where
    C: Fn() -> F,
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let mut outcome = Err(Failure::Down);
    for _ in 0..ATTEMPTS {
        outcome = within(end, call()).await;
        if !matches!(outcome, Err(Failure::Down)) {
            break;
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_those_of_grpc() {
        for target in [
            "store:7400",
            "dns:///store:7400",
            "127.0.0.1:7400",
            "[::1]:7400",
            "ipv6:[::1]:7400",
            "unix:/run/r.sock",
            "unix:///run/r.sock",
        ] {
            endpoint(target, None).unwrap_or_else(|error| panic!("{target}: {error}"));
        }
        for target in
            ["", "store", "http://store:7400", "store:0", "store:70000", ":7400", "ipv4:1.1.1.1:1,2.2.2.2:2", "unix:", "a b:1"]
        {
            let error = endpoint(target, None).map(drop).expect_err(target).to_string();
            assert!(error.contains("use host:port"), "{error}");
        }
    }

    #[cfg(feature = "tls")]
    #[test]
    fn credentials_that_cannot_be_read_are_named() {
        let credentials = Credentials { ca: Some("/nonexistent/ca.pem".into()), ..Credentials::default() };
        let error = endpoint("store:7400", Some(&credentials)).map(drop).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/ca.pem"), "{error}");
    }
}
