//! Puts the session callbacks into contexts.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::callbacks::{SESSION_CALLBACKS, TICKET_CALLBACKS};
use crate::policy::{Binding, Policy};
use crate::ssl::ffi::FindPskCallback;
use crate::ssl::{Connection, Context};

/// Puts the session callbacks into a context that has none of ours.
///
/// # Errors
///
/// The context accepts early data, or cannot be bound.
pub fn install(context: &Context, policy: Policy) -> Result<(), &'static str> {
    if context.max_early_data() > 0 {
        return Err("this context accepts early data, which can be replayed across a fleet; set max_early_data to 0");
    }
    context.binding_or(|| Some(bind(context, policy))).map(drop).ok_or("this context cannot be bound")
}

/// Sets the session callbacks of a context, and returns its binding, which the context has to get.
#[must_use]
pub fn bind(context: &Context, policy: Policy) -> Binding {
    let namespace = policy.shim.options().namespace.as_bytes();
    let id_context = policy.ignore_id_context.then(|| Sha256::digest(namespace).into());
    let observers = context.observers();
    context.set_callbacks(&SESSION_CALLBACKS, id_context.as_ref(), policy.lifetime);
    let binding = Binding { policy: Arc::new(policy), id_context, observers };
    if binding.has_tickets() {
        context.set_ticket_callbacks(&TICKET_CALLBACKS);
    }
    binding
}

/// Sets up a connection that was made before its context had its binding.
pub fn prepare_connection(connection: Connection, binding: &Binding) {
    if binding.id_context.is_some() {
        connection.set_server_order();
    }
    if binding.has_tickets() {
        connection.clear_no_ticket();
        connection.watch_identities(TICKET_CALLBACKS.identity);
    } else {
        connection.set_no_ticket();
    }
}

/// Returns whether a callback is the one that sees the identities of clients for us.
#[must_use]
pub fn is_our_callback(callback: FindPskCallback) -> bool {
    std::ptr::fn_addr_eq(callback, TICKET_CALLBACKS.identity)
}
