//! Sessions of OpenSSL servers in the central store of [resumed](https://github.com/resumed/resumed).
//!
//! `include/resumed.h` declares its functions. `binding` decides at each callback; unsafe code is in `ssl` and `callbacks`, which know
//! libssl, and in `api`, which knows C.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod api;
mod binding;
#[allow(unsafe_code)]
mod callbacks;
#[allow(unsafe_code)]
mod fork;
mod install;
mod learned;
mod lineage;
mod logger;
mod lru;
mod policy;
mod settings;
mod shared;
#[allow(unsafe_code)]
mod ssl;
mod statistics;
mod tickets;

pub use install::{bind, install, is_our_callback, prepare_connection};
pub use logger::{log_to_file, start_logging};
pub use policy::{Binding, Policy, Verified};
pub use settings::{Settings, shim};
pub use shared::Notice;
pub use ssl::{Connection, Context, ffi, frees_our_session_data};
pub use statistics::counts;
