//! A real store, certificates, and handshakes in memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use resumed::{Installation, Keyring, Options, Scope};
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, RootCertStore, ServerConfig, ServerConnection, SupportedProtocolVersion,
};

/// The longest time of one operation; only a broken one takes it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// `resumed serve` in a process of its own.
pub struct Store {
    pub target: String,
    process: Child,
}

impl Store {
    /// Ends all sessions of a namespace.
    pub fn purge(&self, namespace: &str) {
        let mut purge = Command::new(std::env::var("RESUMED_COMMAND").unwrap());
        purge.args(["purge", "--yes", &self.target, namespace]);
        assert!(purge.stdout(Stdio::null()).status().unwrap().success());
    }

    /// Starts a store, or returns None where there is no command to start one.
    pub fn launch(arguments: &[&str]) -> Option<Self> {
        let Ok(command) = std::env::var("RESUMED_COMMAND") else {
            eprintln!("skipped: needs a store: put the path of the resumed command into RESUMED_COMMAND");
            return None;
        };
        let mut serve = Command::new("sh");
        // It ends when its input does, and so with this process, however that ends.
        serve.args(["-c", r#""$@" & read -r _; kill $!; wait"#, "sh", &command]);
        serve.args(["serve", "--workers", "1", "--shutdown-delay", "0s"]).args(arguments);
        if !arguments.contains(&"--listen") {
            serve.args(["--listen", "127.0.0.1:0"]);
        }
        let mut process = serve.stdin(Stdio::piped()).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut target = String::new();
        loop {
            let line = log.next().expect("the store ended").unwrap();
            let Ok(event) = serde_json::from_str::<serde_json::Value>(&line) else { continue };
            match event["event"].as_str() {
                Some("listening") => event["addresses"][0].as_str().unwrap().clone_into(&mut target),
                Some("ready") => break,
                _ => {}
            }
        }
        std::thread::spawn(move || log.for_each(drop)); // or the store would wait for room in the pipe
        Some(Self { target, process })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.process.wait(); // closes its input first
    }
}

/// Hands connections on to a store, until they are cut, or made deaf: then the store hears nothing more of their clients.
pub struct Relay {
    pub address: String,
    relayed: Arc<Mutex<Vec<TcpStream>>>,
    deaf: Arc<AtomicUsize>,
}

impl Relay {
    pub fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, target) = (listener.local_addr().unwrap().to_string(), target.to_owned());
        let (relayed, deaf) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let (all, deafness) = (Arc::clone(&relayed), Arc::clone(&deaf));
        std::thread::spawn(move || {
            for accepted in listener.incoming() {
                let (client, store) = (accepted.unwrap(), TcpStream::connect(&target).unwrap());
                let (mut from, mut to) = (store.try_clone().unwrap(), client.try_clone().unwrap());
                std::thread::spawn(move || std::io::copy(&mut from, &mut to));
                let (mut from, mut to) = (client.try_clone().unwrap(), store.try_clone().unwrap());
                let (deafness, before) = (Arc::clone(&deafness), deafness.load(Ordering::Relaxed));
                std::thread::spawn(move || {
                    let mut bytes = [0; 16_384];
                    while let Ok(length @ 1..) = from.read(&mut bytes) {
                        if deafness.load(Ordering::Relaxed) == before && to.write_all(&bytes[..length]).is_err() {
                            return;
                        }
                    }
                    let _ = to.shutdown(Shutdown::Write);
                });
                all.lock().unwrap().extend([client, store]);
            }
        });
        Self { address, relayed, deaf }
    }

    /// Makes all connections of now deaf.
    pub fn deafen(&self) {
        self.deaf.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns how many there were.
    pub fn connections(&self) -> usize {
        self.relayed.lock().unwrap().len() / 2
    }

    pub fn cut(&self) {
        for stream in self.relayed.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// The store of all tests that do not harm it. Tests are threads of one process, so it ends with that.
pub fn shared_store() -> Option<&'static str> {
    static STORE: OnceLock<Option<String>> = OnceLock::new();
    STORE
        .get_or_init(|| {
            let store = Store::launch(&[])?;
            let target = store.target.clone();
            std::mem::forget(store);
            Some(target)
        })
        .as_deref()
}

pub fn options(target: &str, namespace: &str) -> Options {
    let mut options = Options::new(target, namespace, Keyring::from_keys(&[[7; 32]]).unwrap());
    options.deadline = Duration::from_secs(5); // the machine may be busy; tests of the deadline set theirs
    options
}

pub fn sessions(target: &str, namespace: &str, change: impl FnOnce(&mut Options)) -> Installation {
    let mut options = options(target, namespace);
    change(&mut options);
    Installation::new(options).unwrap()
}

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub certificate: CertificateDer<'static>,
    pub pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        // Otherwise its subject is that of its certificates, which OpenSSL takes to be self-signed.
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self { pem: certificate.pem(), certificate: certificate.der().clone(), issuer: Issuer::new(params, key) }
    }

    /// Issues a certificate for `name` and `127.0.0.1`.
    pub fn issue(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned(), "127.0.0.1".to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    pub fn write(&self, directory: &Path, name: &str) -> (std::path::PathBuf, std::path::PathBuf) {
        let (certificate, key) = self.issue(name);
        let (cert_path, key_path) = (directory.join(format!("{name}.pem")), directory.join(format!("{name}.key")));
        std::fs::write(&cert_path, certificate.pem()).unwrap();
        std::fs::write(&key_path, key.serialize_pem()).unwrap();
        (cert_path, key_path)
    }
}

/// A fleet's certificate, and a client that trusts it.
pub struct Peers {
    pub server: ServerConfig,
    verifying: ServerConfig,
    roots: RootCertStore,
    pub client: Arc<ClientConfig>,
    version: &'static SupportedProtocolVersion,
}

impl Peers {
    pub fn new(version: &'static SupportedProtocolVersion) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let authority = Authority::new();
        let (certificate, key) = authority.issue("localhost");
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(authority.certificate.clone()).unwrap();
        let server = || ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[version]).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone().into(), provider.clone()).build().unwrap();
        let chain = vec![certificate.der().clone()];
        let verifying = server().with_client_cert_verifier(verifier).with_single_cert(chain.clone(), key.clone_key()).unwrap();
        let server = server().with_no_client_auth().with_single_cert(chain, key).unwrap();
        let (certificate, key) = authority.issue("client");
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(vec![certificate.der().clone()], key)
            .unwrap();
        client.enable_early_data = true;
        Self { server, verifying, roots, client: Arc::new(client), version }
    }

    /// Returns a config that requires client certificates, and the roots that it trusts.
    pub fn verifying(&self) -> (ServerConfig, RootCertStore) {
        (self.verifying.clone(), self.roots.clone())
    }

    /// Returns the config of a server with other algorithms.
    pub fn with_provider(&self, provider: CryptoProvider) -> ServerConfig {
        ServerConfig::builder_with_provider(provider.into())
            .with_protocol_versions(&[self.version])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&self.server.cert_resolver))
    }

    /// Returns a client that remembers no session yet.
    pub fn stranger(&self) -> Arc<ClientConfig> {
        let mut client = ClientConfig::clone(&self.client);
        client.resumption = Resumption::in_memory_sessions(8);
        Arc::new(client)
    }

    /// Returns a client that has the sessions of this one, and keeps its own apart.
    pub fn client(&self) -> ClientConnection {
        ClientConnection::new(self.client.clone(), ServerName::try_from("localhost").unwrap()).unwrap()
    }

    /// Makes a connection to a frontend, and returns whether it resumed a session.
    pub fn connect(&self, sessions: &Installation) -> bool {
        resumes(self.client(), sessions, &self.server, &Scope::default())
    }
}

/// Makes a connection, and returns whether it resumed a session.
pub fn resumes(client: ClientConnection, sessions: &Installation, config: &ServerConfig, scope: &Scope) -> bool {
    shake_hands(client, sessions.for_connection(config, scope))
}

/// Makes a connection, and returns whether it resumed a session.
pub fn shake_hands(mut client: ClientConnection, config: Arc<ServerConfig>) -> bool {
    let mut server = ServerConnection::new(config).unwrap();
    let (mut there, mut back) = (Vec::new(), Vec::new());
    while client.wants_write() || server.wants_write() {
        client.write_tls(&mut there).unwrap();
        if !there.is_empty() {
            server.read_tls(&mut std::mem::take(&mut there).as_slice()).unwrap();
            server.process_new_packets().unwrap();
        }
        while server.wants_write() {
            server.write_tls(&mut back).unwrap();
        }
        if !back.is_empty() {
            let mut received = back.as_slice();
            while !received.is_empty() {
                client.read_tls(&mut received).unwrap();
                client.process_new_packets().unwrap();
            }
            back.clear();
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    assert_eq!(client.handshake_kind(), server.handshake_kind());
    server.handshake_kind() == Some(HandshakeKind::Resumed)
}

/// Tries until it succeeds.
pub fn eventually(mut tried: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !tried() {
        assert!(Instant::now() < end, "it did not come to that");
        std::thread::sleep(Duration::from_millis(5));
    }
}
