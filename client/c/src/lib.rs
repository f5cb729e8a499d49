//! Sessions of OpenSSL servers in the central store of [resumed](https://github.com/resumed/resumed).
//!
//! `include/resumed.h` declares its functions. `binding` is what to do at each callback; unsafe code is in `ssl`, which knows libssl, and
//! `api`, which knows C.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod api;
mod binding;
mod handshake;
mod learned;
mod lineage;
mod logger;
mod lru;
mod settings;
mod shared;
#[allow(unsafe_code)]
mod ssl;

pub use binding::{Binding, Policy, Verified, install};
pub use logger::{log_to_file, start_logging};
pub use settings::{Settings, shim};
pub use shared::Notice;
pub use ssl::{Connection, Context, ffi};
