//! The servers of a store: calls go to one after the other, and to none that has just failed while there is another.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint};

use crate::sockets::Recorded;
use crate::target::{Address, Target};
use crate::v1::session_store_service_client::SessionStoreServiceClient;

pub(crate) type Client = SessionStoreServiceClient<Channel>;

/// The pauses after a server failed, with exponential backoff.
const FIRST_REST: Duration = Duration::from_millis(50);
const LONGEST_REST: Duration = Duration::from_secs(5);
/// Consecutive failures after which a connection is made anew: the end of a peer that vanished is not reported.
const RENEWAL_FAILURES: u32 = 3;
/// How often names are looked up at most, after failures, and at least: new servers are to get calls before old ones go.
const RESOLVE_PAUSE: Duration = Duration::from_secs(1);
const RESOLVE_INTERVAL: Duration = Duration::from_secs(30);
/// The answer to a Batch of the largest values.
const LARGEST_ANSWER: usize = (16 << 20) + (1 << 20);

/// One address of the store, and the connection to it.
pub(crate) struct Server {
    address: Address,
    state: Mutex<State>,
}

struct State {
    client: Client,
    endpoint: Endpoint,
    reached: bool,
    failures: u32,
    rests_until: Option<Instant>,
}

impl Server {
    fn new(address: Address, endpoint: &Endpoint) -> Self {
        let (client, endpoint) = (connect(&address, endpoint, usize::MAX), endpoint.clone());
        Self { address, state: Mutex::new(State { client, endpoint, reached: false, failures: 0, rests_until: None }) }
    }

    pub(crate) fn client(&self) -> Client {
        self.lock().client.clone()
    }

    /// Returns a client for one connection over the network, which is never made anew: when it ends, calls fail.
    pub(crate) fn connection(&self) -> Client {
        connect(&self.address, &self.lock().endpoint, 1)
    }

    /// Whether its last call was answered.
    pub(crate) fn reached(&self) -> bool {
        self.lock().reached
    }

    /// Records a call that was answered.
    pub(crate) fn answered(&self) {
        let state = &mut *self.lock();
        (state.reached, state.failures, state.rests_until) = (true, 0, None);
    }

    /// Records a call that was not answered.
    pub(crate) fn failed(&self) {
        let (state, now) = (&mut *self.lock(), Instant::now());
        state.reached = false;
        // Of several calls that fail at once the first one counts.
        if state.rests_until.is_none_or(|until| until <= now) {
            state.rests_until = Some(now + LONGEST_REST.min(FIRST_REST * 2_u32.saturating_pow(state.failures)));
            state.failures += 1;
        }
        if state.failures >= RENEWAL_FAILURES {
            state.client = connect(&self.address, &state.endpoint, usize::MAX);
        }
    }

    fn rests_until(&self) -> Option<Instant> {
        self.lock().rests_until.filter(|until| Instant::now() < *until)
    }

    fn renew(&self, endpoint: &Endpoint) {
        let state = &mut *self.lock();
        (state.client, state.endpoint) = (connect(&self.address, endpoint, usize::MAX), endpoint.clone());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a connection when it is used, and again when it was lost, that many times in all. To be called in a runtime.
fn connect(address: &Address, endpoint: &Endpoint, times: usize) -> Client {
    let (address, mut made) = (address.clone(), 0);
    let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_| {
        made += 1;
        let (address, allowed) = (address.clone(), made <= times);
        async move { if allowed { dial(&address).await } else { Err(io::Error::other("the connection has ended")) } }
    }));
    SessionStoreServiceClient::new(channel).max_decoding_message_size(LARGEST_ANSWER)
}

async fn dial(address: &Address) -> io::Result<TokioIo<Box<dyn Stream>>> {
    let stream: Box<dyn Stream> = match address {
        Address::Unix(path) => Box::new(Recorded::new(UnixStream::connect(path).await?)),
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Box::new(Recorded::new(stream))
        }
    };
    Ok(TokioIo::new(stream))
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for Recorded<S> {}

pub(crate) struct Servers {
    target: Target,
    endpoint: ArcSwap<Endpoint>,
    /// None until the target's names were looked up for the first time.
    list: watch::Sender<Option<Vec<Arc<Server>>>>,
    turn: AtomicUsize,
    lost: Notify,
}

impl Servers {
    /// Makes the servers of a target. To be called in a runtime; connects to each when first used.
    pub(crate) fn new(target: Target, endpoint: Endpoint) -> Self {
        let servers = |addresses: Vec<_>| addresses.into_iter().map(|each| Arc::new(Server::new(each, &endpoint))).collect();
        let list = watch::Sender::new(target.literal().map(servers));
        Self { target, endpoint: ArcSwap::from_pointee(endpoint), list, turn: AtomicUsize::new(0), lost: Notify::new() }
    }

    /// Returns how many there are.
    pub(crate) fn count(&self) -> usize {
        self.list.borrow().as_ref().map_or(0, Vec::len)
    }

    /// Returns the one whose turn it is, or None if the target's name does not resolve.
    pub(crate) async fn next(&self) -> Option<Arc<Server>> {
        let mut list = self.list.subscribe();
        let known = list.wait_for(Option::is_some).await.ok()?;
        let servers = known.as_deref().unwrap_or_default();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let in_turn = (0..servers.len()).map(|offset| &servers[turn.wrapping_add(offset) % servers.len()]);
        let chosen = in_turn.min_by_key(|server| server.rests_until()).cloned(); // the first one, if several do not rest
        if chosen.is_none() {
            self.lost.notify_one();
        }
        chosen
    }

    /// Records that a call to a server was not answered.
    pub(crate) fn failed(&self, server: &Server) {
        server.failed();
        self.lost.notify_one();
    }

    /// Connects to all anew, by other credentials.
    pub(crate) fn renew(&self, endpoint: Endpoint) {
        for server in self.list.borrow().iter().flatten() {
            server.renew(&endpoint);
        }
        self.endpoint.store(Arc::new(endpoint));
    }

    /// Looks the target's names up, again when servers fail and once in a while, until the task is dropped.
    pub(crate) async fn follow(&self) {
        if self.target.literal().is_some() {
            return;
        }
        loop {
            let found = self.target.resolve().await;
            let found = found.inspect_err(|error| log::debug!("{}: {error}", self.target.authority())).unwrap_or_default();
            self.take_over(&found);
            sleep(RESOLVE_PAUSE).await;
            let _ = timeout(RESOLVE_INTERVAL, self.lost.notified()).await;
        }
    }

    /// Makes these addresses the target's, unless there are none: those known before are better than nothing.
    fn take_over(&self, addresses: &[Address]) {
        self.list.send_modify(|list| {
            let before = list.take().unwrap_or_default();
            let known = |address: &Address| before.iter().find(|server| server.address == *address).cloned();
            let new = |address: &Address| Arc::new(Server::new(address.clone(), &self.endpoint.load()));
            let server = |address| known(address).unwrap_or_else(|| new(address));
            *list = Some(if addresses.is_empty() { before } else { addresses.iter().map(server).collect() });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(count: u16) -> Servers {
        let hosts = (1..=count).map(|port| ("127.0.0.1".into(), port)).collect();
        Servers::new(Target::Hosts(hosts), Endpoint::from_static("http://store:7400"))
    }

    async fn ports(servers: &Servers, count: usize) -> Vec<u16> {
        let mut ports = Vec::new();
        for _ in 0..count {
            let Address::Tcp(address) = servers.next().await.unwrap().address else { panic!("a unix socket") };
            ports.push(address.port());
        }
        ports
    }

    fn in_runtime(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    }

    #[test]
    fn calls_go_to_one_after_the_other_and_past_one_that_failed() {
        in_runtime(async {
            let servers = servers(3);
            assert_eq!(ports(&servers, 4).await, [1, 2, 3, 1]);
            let second = servers.next().await.unwrap();
            servers.failed(&second);
            assert_eq!(ports(&servers, 4).await, [3, 1, 3, 3]);
            second.answered();
            assert_eq!(ports(&servers, 3).await, [1, 2, 3]);
        });
    }

    #[test]
    fn when_all_have_failed_the_one_that_rests_the_shortest_is_tried() {
        in_runtime(async {
            let servers = servers(2);
            let (first, second) = (servers.next().await.unwrap(), servers.next().await.unwrap());
            servers.failed(&first);
            servers.failed(&second);
            assert_eq!(ports(&servers, 2).await, [1, 1]);
        });
    }

    #[test]
    fn addresses_that_stay_keep_their_connections_and_none_at_all_change_nothing() {
        in_runtime(async {
            let servers = servers(2);
            let first = servers.next().await.unwrap();
            servers.take_over(&[first.address.clone(), Address::Tcp("127.0.0.1:9".parse().unwrap())]);
            servers.take_over(&[]);
            assert_eq!(ports(&servers, 2).await, [9, 1]);
            assert!(Arc::ptr_eq(&first, &servers.list.borrow().as_ref().unwrap()[0]));
        });
    }
}
