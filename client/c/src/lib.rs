//! Sessions of OpenSSL servers in the central store of [resumed](https://github.com/resumed/resumed).
//!
//! `include/resumed.h` is the face of it. `binding` is what to do at each callback; unsafe code is in `ssl`, which knows libssl, and
//! `api`, which knows C.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod api;
mod binding;
mod logger;
mod settings;
#[allow(unsafe_code)]
mod ssl;

pub use binding::{Binding, install};
pub use logger::log_to_stderr;
pub use settings::{Settings, shim};
pub use ssl::{Connection, Context, ffi};
