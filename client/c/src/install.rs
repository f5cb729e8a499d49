//! Puts the session callbacks into contexts.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::callbacks::SESSION_CALLBACKS;
use crate::policy::{Binding, Policy};
use crate::ssl::Context;

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
    Binding { policy: Arc::new(policy), id_context, observers }
}
