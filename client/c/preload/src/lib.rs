//! Puts libresumed under unmodified servers: `LD_PRELOAD=libresumed-preload.so RESUMED_TARGET=... nginx`.
//!
//! A context gets its callbacks when its first connection is about to be accepted: by then the server has set it up, so nothing that it
//! sets undoes them, and contexts for connections to other servers are not changed. Keyring and credentials are read when
//! the server makes its first context, while it may still read them; threads and connections begin in each worker process.
#![deny(unsafe_code)]

mod environment;
#[allow(unsafe_code)]
mod exit;
mod fleet;
#[allow(unsafe_code)]
mod hooks;
