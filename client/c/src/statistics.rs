//! The statistics of a process.

use std::collections::BTreeMap;

use store::{SessionMode, Shim, Stats, TicketStats};

/// Returns the counts of a shim by kind and reason. Those of tickets are there only if it has tickets: `held` are the secrets and removals in
/// memory, and 1 for a stream of removals that is live.
#[must_use]
pub fn counts(shim: &Shim) -> Vec<(&'static str, BTreeMap<&'static str, u64>)> {
    let Stats { hits, misses, puts, removals, terminations, .. } = shim.stats();
    let mut counts =
        vec![("hits", hits), ("misses", misses), ("puts", puts), ("removals", removals), ("terminations", terminations)];
    if shim.options().sessions == SessionMode::Tickets {
        let stats = shim.ticket_stats();
        let held = [("secrets", stats.secrets_held), ("removals", stats.removals_held), ("stream", stats.live.into())];
        let held = held.into_iter().filter(|(_, number)| *number > 0).map(|(kind, number)| (kind, number as u64)).collect();
        let TicketStats { issued, withheld, resumed, refused, .. } = stats;
        counts.extend([("issued", issued), ("withheld", withheld), ("resumed", resumed), ("refused", refused), ("held", held)]);
    }
    counts
}
