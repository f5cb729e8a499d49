//! Sessions of TLS servers in the central store of [resumed](https://github.com/resumed/resumed), so that any frontend of a fleet
//! resumes what any other negotiated.
//!
//! [`Installation`] keeps those of rustls servers. A handshake never waits for the store beyond a deadline, and not at all while the store
//! keeps failing. Each failure costs a full handshake and is counted in [`Stats`].
//!
//! ```no_run
//! # fn server_config() -> rustls::ServerConfig { unimplemented!() }
//! let keyring = resumed::Keyring::load("fleet.keys")?;
//! let sessions = resumed::Installation::new(resumed::Options::new("127.0.0.1:7400", "shop", keyring))?;
//! let config = server_config();
//! // For each connection that is accepted:
//! let connection = rustls::ServerConnection::new(sessions.for_connection(&config, &resumed::Scope::default()));
//! # Ok::<(), resumed::Error>(())
//! ```
//!
//! In tickets mode ([`SessionMode::Tickets`]) clients have the sessions, and the store has the secrets of the tickets' keys; a resumption is no
//! call.
//!
//! [`Shim`] and [`Tickets`] are for bindings to other TLS stacks: `libresumed`, which puts the store under OpenSSL servers, is made of them.

mod agreement;
mod breaker;
mod clock;
mod credentials;
mod envelope;
mod error;
pub mod fingerprint;
mod guarded_store;
mod keyring;
mod lookups;
mod metrics;
mod mirror;
mod options;
mod pauses;
#[cfg(test)]
mod policy_vectors;
mod prober;
mod process;
mod removals;
mod removed;
#[cfg(feature = "rustls")]
mod rustls;
#[cfg(feature = "rustls")]
mod scope;
#[cfg(feature = "rustls")]
mod sealed_ticket;
mod sealing;
mod sender;
mod servers;
mod shim;
mod sockets;
mod stats;
mod store;
#[allow(missing_docs, clippy::all, clippy::pedantic, rustdoc::all)]
mod stubs;
mod target;
mod ticket_secret;
mod ticket_state;
mod tickets;
mod turn;
mod watching;

pub use credentials::Credentials;
pub use envelope::{Envelope, from_microseconds, microseconds};
pub use error::Error;
pub use fingerprint::{Expected, Fingerprint};
pub use keyring::Keyring;
pub use metrics::metrics;
pub use options::{Ids, Options, Puts, SessionMode, When};
pub use sealing::{Format, ID_BYTES, KEY_BYTES};
pub use shim::{Lookup, Shim};
pub use sockets::close_inherited_sockets;
pub use stats::{RemovalReason, Stats};
pub use stubs::resumed::v1;
pub use ticket_secret::{Epoch, NAME_BYTES, TicketName, TicketSecret};
pub use ticket_state::{Lineage, NameHash, STATE_BYTES, TicketState, hash_name};
pub use tickets::{HEAD_BYTES, MAX_SESSION_BYTES, TicketStats, Tickets};

#[cfg(feature = "rustls")]
pub use crate::rustls::{Connection, Installation};
#[cfg(feature = "rustls")]
pub use crate::scope::Scope;
