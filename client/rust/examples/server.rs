//! A TLS server that keeps its sessions in the store: it answers each message of a client. Threads, no async runtime.
//!
//! `cargo run --example server -- --certificate FILE --target 127.0.0.1:7400 --namespace shop --keyring fleet.keys
//! [--listen 127.0.0.1:0] [--client-ca FILE] [--single-use] [--mirror BYTES] [--deadline MILLISECONDS] [--tickets]
//! [--rotation SECONDS] [--lifetime SECONDS]`; without `--target` it uses no store.

use std::collections::HashMap;
use std::error::Error;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use resumed::{Installation, Keyring, Options, Scope, SessionMode};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};

/// The options without a value.
const FLAGS: [&str; 2] = ["single-use", "tickets"];

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = arguments()?;
    let certificate = required(&arguments, "certificate")?;
    let sessions = arguments.get("target").map(|target| sessions(target, &arguments)).transpose()?;

    let certificates = CertificateDer::pem_file_iter(certificate)?.collect::<Result<_, _>>()?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let (verifier, scope) = clients(&arguments, &provider)?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates, PrivateKeyDer::from_pem_file(certificate)?)?;
    let config = Arc::new(config);

    let listener = TcpListener::bind(arguments.get("listen").map_or("127.0.0.1:0", String::as_str))?;
    println!("{}", listener.local_addr()?);
    for accepted in listener.incoming() {
        let config = sessions.as_ref().map_or_else(|| Arc::clone(&config), |sessions| sessions.for_connection(&config, &scope));
        let connection = ServerConnection::new(config)?;
        let accepted = accepted?;
        // What becomes of one connection is nothing to the others.
        thread::spawn(move || serve(connection, accepted));
    }
    Ok(())
}

/// The verifier of client certificates, and the scope of the sessions that it lets in.
fn clients(
    arguments: &HashMap<String, String>,
    provider: &Arc<CryptoProvider>,
) -> Result<(Arc<dyn ClientCertVerifier>, Scope), Box<dyn Error>> {
    let Some(file) = arguments.get("client-ca") else {
        return Ok((WebPkiClientVerifier::no_client_auth(), Scope::default()));
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(file)? {
        roots.add(certificate?)?;
    }
    let scope = Scope::default().requires_clients_of(&roots);
    Ok((WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build()?, scope))
}

fn sessions(target: &str, arguments: &HashMap<String, String>) -> Result<Installation, Box<dyn Error>> {
    let keyring = Keyring::load(required(arguments, "keyring")?)?;
    let mut options = Options::new(target, required(arguments, "namespace")?, keyring);
    options.single_use = arguments.contains_key("single-use");
    if arguments.contains_key("tickets") {
        (options.sessions, options.tickets_tls12) = (SessionMode::Tickets, true);
    }
    for (name, duration) in [("rotation", &mut options.rotation), ("lifetime", &mut options.lifetime)] {
        if let Some(seconds) = arguments.get(name) {
            *duration = Duration::from_secs(seconds.parse()?);
        }
    }
    if let Some(bytes) = arguments.get("mirror") {
        options.mirror = bytes.parse()?;
    }
    if let Some(milliseconds) = arguments.get("deadline") {
        options.deadline = Duration::from_millis(milliseconds.parse()?);
    }
    Ok(Installation::new(options)?)
}

fn required<'a>(arguments: &'a HashMap<String, String>, name: &str) -> Result<&'a String, String> {
    arguments.get(name).ok_or_else(|| format!("--{name} is missing"))
}

fn serve(connection: ServerConnection, accepted: TcpStream) -> std::io::Result<()> {
    accepted.set_nodelay(true)?;
    let mut stream = StreamOwned::new(connection, accepted);
    let mut request = [0; 4096];
    while stream.read(&mut request)? > 0 {
        stream.write_all(b"ok\n")?;
    }
    Ok(())
}

fn arguments() -> Result<HashMap<String, String>, Box<dyn Error>> {
    let (mut arguments, mut given) = (HashMap::new(), std::env::args().skip(1));
    while let Some(argument) = given.next() {
        let name = argument.strip_prefix("--").ok_or_else(|| format!("{argument}: options begin with --"))?;
        let value = if FLAGS.contains(&name) { Some(String::new()) } else { given.next() };
        arguments.insert(name.to_owned(), value.ok_or_else(|| format!("{argument} needs a value"))?);
    }
    Ok(arguments)
}
