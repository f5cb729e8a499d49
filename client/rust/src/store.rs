//! The service as calls with deadlines, to whichever of its servers.

use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout_at};
use tonic::transport::Endpoint;
use tonic::{Code, ConnectError, Status, Streaming};

use crate::options::Options;
use crate::reload::{CHECK_INTERVAL, Followed};
use crate::servers::{Client, Servers};
use crate::target::Target;
use crate::v1::{BatchOperation, BatchRequest, GetRequest, TakeRequest, WatchRequest, WatchResponse, batch_result};
use crate::{Credentials, Error, v1};

/// The least number of attempts of a call, where another one is harmless: a connection may have ended since the last one.
const ATTEMPTS: usize = 3;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The key of a session that does not exist: its look-up shows whether the store answers.
pub(crate) const PROBE_KEY: &[u8] = b"resumed/v1 probe";

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
            Self::Late => "timeout",
            Self::Down => "unavailable",
            Self::Limited => "limited",
            Self::Refused => "rejected",
        }
    }

    /// Whether another server may do better.
    const fn is_of_server(self) -> bool {
        matches!(self, Self::Late | Self::Down)
    }

    fn of(status: &Status) -> Self {
        match status.code() {
            // Without the store's own words: the connection broke.
            Code::Internal if std::error::Error::source(status).is_some() => Self::Down,
            code => Self::of_code(code),
        }
    }

    /// Returns why an operation of a Batch failed, by its result, which is not the expected one.
    pub(crate) fn of_result(result: &batch_result::Result) -> Self {
        let batch_result::Result::Error(status) = result else { return Self::Refused };
        log::debug!("an operation of a Batch failed: {} {}", status.code, status.message);
        Self::of_code(status.code.into())
    }

    const fn of_code(code: Code) -> Self {
        match code {
            Code::DeadlineExceeded => Self::Late,
            Code::Unavailable | Code::Cancelled | Code::Unknown => Self::Down,
            Code::ResourceExhausted => Self::Limited,
            _ => Self::Refused,
        }
    }
}

pub(crate) struct StoredSession {
    pub(crate) value: Vec<u8>,
    pub(crate) ttl: Duration,
    /// The time that a purge goes by, if it is known.
    pub(crate) issued: Option<SystemTime>,
}

impl StoredSession {
    pub(crate) fn of(session: v1::StoredSession) -> Option<Self> {
        let ttl = session.ttl.and_then(|ttl| Duration::try_from(ttl).ok())?;
        Some(Self { value: session.value, ttl, issued: None })
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
    servers: Servers,
    credentials: Option<Credentials>,
}

impl Store {
    /// Makes a store. To be called in a runtime; connects when first used.
    pub(crate) fn new(options: &Options, target: &Target, endpoint: &Endpoint) -> Self {
        Self {
            target: options.target.clone(),
            namespace: options.namespace.clone(),
            servers: Servers::new(target.clone(), endpoint.clone()),
            credentials: options.credentials.clone(),
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
                let call = |mut client: Client| {
                    let request = request.clone();
                    async move { client.get(request).await }
                };
                self.call(end, true, call).await?.session
            }
            How::Take => {
                // Not repeated: a Take whose answer was lost has used the session up.
                let request = TakeRequest { namespace, key };
                let call = |mut client: Client| {
                    let request = request.clone();
                    async move { client.take(request).await }
                };
                self.call(end, false, call).await?.session
            }
        };
        session.map(|session| StoredSession::of(session).ok_or(Failure::Refused)).transpose()
    }

    /// Carries out operations, in their order, until `end`.
    pub(crate) async fn batch(
        &self,
        operations: Vec<BatchOperation>,
        end: Instant,
    ) -> Result<Vec<Option<batch_result::Result>>, Failure> {
        let (sent, request) = (operations.len(), BatchRequest { operations });
        let call = |mut client: Client| {
            let request = request.clone();
            async move { client.batch(request).await }
        };
        let results = self.call(end, true, call).await?.results;
        if results.len() == sent { Ok(results.into_iter().map(|each| each.result).collect()) } else { Err(Failure::Refused) }
    }

    /// Begins to watch the namespace, on a connection of its own, until `end` at the latest.
    pub(crate) async fn watch(&self, position: Vec<u8>, removals_only: bool, end: Instant) -> Result<Watch, String> {
        let server = self.servers.next().await.ok_or("its name does not resolve")?;
        let request = WatchRequest { namespace: self.namespace.clone(), position, removals_only };
        let (mut client, asked) = (server.connection(), Instant::now());
        let (failure, words) = match timeout_at(end, client.watch(request)).await {
            Ok(Ok(answers)) => {
                server.answered();
                return Ok(Watch { namespace: self.namespace.clone(), client, answers: answers.into_inner(), asked });
            }
            Ok(Err(status)) => (Failure::of(&status), status.to_string()),
            Err(_) => (Failure::Late, "no answer in time".into()),
        };
        if failure.is_of_server() {
            self.servers.failed(&server);
        }
        Err(words)
    }

    /// Keeps to where the store is, until the task is dropped.
    pub(crate) async fn follow_servers(&self) {
        self.servers.follow().await;
    }

    /// Connects anew whenever the files of the credentials have changed, until the task is dropped.
    pub(crate) async fn follow_credentials(&self) {
        let Some(credentials) = &self.credentials else { return };
        let mut followed = Followed::new(credentials.files());
        let parse = || Target::parse(&self.target).and_then(|target| endpoint(&target, Some(credentials)));
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            match followed.follow(SystemTime::now(), parse) {
                None => {}
                Some(Ok(endpoint)) => {
                    log::info!("credentials of the store read again");
                    self.servers.renew(endpoint);
                }
                Some(Err(error)) => log::error!("credentials of the store not read again, those read before stay: {error}"),
            }
        }
    }

    /// Makes a call until `end`, at another server where the first one fails and that is harmless.
    async fn call<T, F>(&self, end: Instant, repeatable: bool, call: impl Fn(Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let mut tried = 0;
        loop {
            let server = timeout_at(end, self.servers.next()).await.map_err(|_| Failure::Late)?.ok_or(Failure::Down)?;
            let others = self.servers.count().saturating_sub(tried + 1);
            tried += 1;
            // One that may not be there leaves time for the others.
            let share = if repeatable && !server.reached() { share_of(end, others) } else { end };
            let (failure, harmless) = match timeout_at(share, call(server.client())).await {
                Ok(Ok(response)) => {
                    server.answered();
                    return Ok(response.into_inner());
                }
                Ok(Err(status)) => {
                    log::debug!("a call to the store failed: {:?} {}", status.code(), status.message());
                    (Failure::of(&status), repeatable || never_sent(&status))
                }
                Err(_) => (Failure::Late, repeatable && share < end),
            };
            if !failure.is_of_server() {
                server.answered();
                return Err(failure);
            }
            self.servers.failed(&server);
            if !harmless || (tried >= ATTEMPTS && others == 0) {
                return Err(failure);
            }
        }
    }
}

/// The changes of a namespace.
pub(crate) struct Watch {
    namespace: String,
    client: Client,
    pub(crate) answers: Streaming<WatchResponse>,
    /// When the stream was requested: its changes are not older.
    pub(crate) asked: Instant,
}

impl Watch {
    /// Makes a call on the connection of the changes, and returns when, once it is answered: then all changes of before have come.
    pub(crate) fn confirmation(&self) -> impl Future<Output = Result<Instant, String>> + 'static {
        let request = GetRequest { namespace: self.namespace.clone(), key: PROBE_KEY.to_vec() };
        let (mut client, asked) = (self.client.clone(), Instant::now());
        async move {
            match client.get(request).await {
                Err(status) if Failure::of(&status).is_of_server() => Err(status.to_string()),
                _ => Ok(asked),
            }
        }
    }
}

/// Returns a time to live for the contract.
pub(crate) fn ttl(seconds: u64) -> prost_types::Duration {
    prost_types::Duration { seconds: i64::try_from(seconds).unwrap_or(i64::MAX), nanos: 0 }
}

/// Returns when a call has to end, so that as many others as this have as much time until `end`.
fn share_of(end: Instant, others: usize) -> Instant {
    let now = Instant::now();
    now + end.saturating_duration_since(now) / u32::try_from(others + 1).unwrap_or(u32::MAX)
}

/// Whether a call was not made, since there was no connection.
fn never_sent(status: &Status) -> bool {
    std::iter::successors(std::error::Error::source(status), |error| error.source())
        .any(<dyn std::error::Error>::is::<ConnectError>)
}

/// Makes of a target what connections to its servers have in common, without connecting.
pub(crate) fn endpoint(target: &Target, credentials: Option<&Credentials>) -> Result<Endpoint, Error> {
    let scheme = if credentials.is_some() { "https" } else { "http" };
    let uri = match target {
        Target::Unix(path) => format!("unix:{}", path.display()),
        Target::Hosts(_) => format!("{scheme}://{}", target.authority()),
    };
    let endpoint = Endpoint::from_shared(uri).map_err(|_| Error::new(format!("target {:?} is no name", target.authority())))?;
    let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT);
    match credentials {
        None => Ok(endpoint),
        Some(credentials) => credentials.secured(endpoint),
    }
}
