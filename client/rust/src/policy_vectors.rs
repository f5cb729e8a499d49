//! `protos/vectors/policy.json`: the policy that the clients of all languages share.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::breaker::{BACKOFF, Breaker, MAX_FAILURES, PROBE_PAUSES, PROBE_RESET, SCARCITY};
use crate::pauses::Pauses;
use crate::sealing::KEY_BYTES;
use crate::stats::{HITS, MISSES, PUTS, REMOVALS, Stats, TERMINATIONS};
use crate::{Keyring, Options, agreement, lookups, options, removals, sender, shim, ticket_secret, tickets, watching};

#[derive(Deserialize)]
struct Policy {
    constants: Value,
    reasons: BTreeMap<String, Vec<String>>,
    sequences: Vec<Sequence>,
    tickets: Part,
}

/// The constants and reasons of fleet tickets.
#[derive(Deserialize)]
struct Part {
    constants: Value,
    reasons: BTreeMap<String, Vec<String>>,
}

#[derive(Deserialize)]
struct Sequence {
    name: String,
    steps: Vec<Step>,
}

#[derive(Debug, Deserialize)]
struct Step {
    at_ms: u64,
    #[serde(default)]
    began_ms: u64,
    event: String,
    result: Option<String>,
    lookups: String,
    new_sessions: Option<String>,
    next_probe_ms: Option<u128>,
}

fn policy() -> Policy {
    serde_json::from_str(include_str!("../../../protos/vectors/policy.json")).unwrap()
}

fn pauses(pauses: &Pauses) -> Value {
    json!({"first": pauses.first.as_millis(), "max": pauses.longest.as_millis()})
}

#[test]
fn the_constants_are_those_of_all_clients() {
    let defaults = Options::new("store:7400", "shop", Keyring::from_keys(&[[0; KEY_BYTES]]).unwrap());
    let mut own = json!({
        "default_lifetime_seconds": defaults.lifetime.as_secs(),
        "max_lifetime_seconds": options::LONGEST_LIFETIME.as_secs(),
        "default_deadline_ms": defaults.deadline.as_millis(),
        "deadline_share": f64::from(lookups::DEADLINE_PERCENT) / 100.0,
        "default_max_lookups": defaults.max_lookups,
        "fresh_seconds": shim::FRESHNESS.as_secs(),
        "retry_pauses_ms": lookups::RETRY_PAUSES.map(|pause| pause.as_millis()),
        "min_call_ms": lookups::LEAST_TIME.as_millis(),
        "breaker_failures": MAX_FAILURES,
        "probe_pause_ms": pauses(&PROBE_PAUSES),
        "probe_reset_ms": PROBE_RESET.as_millis(),
        "limit_pause_ms": pauses(&BACKOFF),
        "scarcity_ms": SCARCITY.as_millis(),
        "queue_bytes": sender::QUEUE_BYTES,
        "queue_item_bytes": sender::ITEM_BYTES,
        "batch_operations": sender::BATCH_OPERATIONS,
        "busy_batch_operations": sender::BUSY_OPERATIONS,
        "busy_batch_pause_ms": sender::BUSY_PAUSE.as_millis(),
        "batch_deadline_ms": sender::BATCH_DEADLINE.as_millis(),
        "batch_retry_ms": pauses(&sender::RETRY_PAUSES),
        "max_value_bytes": shim::LARGEST_VALUE,
    });
    let buckets = Stats::LOOKUP_BOUNDS.map(|bound| bound.as_secs_f64() * 1000.0);
    let constants = policy().constants;
    let expected: Vec<f64> = serde_json::from_value(constants["lookup_buckets_ms"].clone()).unwrap();
    assert!(buckets.iter().zip(expected).all(|(bound, expected)| (bound - expected).abs() < 1e-9));
    // options.rs tests the pattern; rustls and OpenSSL look one id up at a time.
    for elsewhere in ["lookup_buckets_ms", "namespace_pattern", "max_lookups_per_handshake"] {
        own[elsewhere] = constants[elsewhere].clone();
    }
    assert_eq!(own, constants);
}

#[test]
fn the_reasons_are_those_of_all_clients() {
    let own = [
        ("hits", &HITS[..]),
        ("misses", &MISSES[..]),
        ("puts", &PUTS[..]),
        ("removals", &REMOVALS[..]),
        ("terminations", &TERMINATIONS[..]),
    ];
    let own = own.map(|(kind, reasons)| (kind.to_owned(), reasons.iter().map(|reason| (*reason).to_owned()).collect()));
    assert_eq!(BTreeMap::from(own), policy().reasons);
}

#[test]
fn the_constants_of_tickets_are_those_of_all_clients() {
    let defaults = Options::new("store:7400", "shop", Keyring::from_keys(&[[0; KEY_BYTES]]).unwrap());
    let own = json!({
        "default_rotation_seconds": defaults.rotation.as_secs(),
        "max_rotation_seconds": ticket_secret::MAX_ROTATION.as_secs(),
        "default_revocation_grace_seconds": defaults.revocation_grace.as_secs(),
        "stale_stream_ms": watching::STALE.as_millis(),
        "max_generations": agreement::MAX_GENERATIONS,
        "max_recheck_seconds": agreement::MAX_RECHECK.as_secs(),
        "agreement_deadline_ms": agreement::DEADLINE.as_millis(),
        "agreement_retry_ms": pauses(&agreement::RETRY_PAUSES),
        "unknown_name_pause_ms": agreement::UNKNOWN_NAME_PAUSE.as_millis(),
        "next_secret_parts": agreement::NEXT_SECRET_PARTS,
        "max_removals": removals::MAX_REMOVALS,
        "max_own_removals": removals::MAX_OWN_REMOVALS,
        "max_removal_seconds": ticket_secret::MAX_REMOVAL.as_secs(),
        "max_session_bytes": tickets::MAX_SESSION_BYTES,
    });
    assert_eq!(own, policy().tickets.constants);
}

#[test]
fn the_reasons_of_tickets_are_those_of_all_clients() {
    let own = [
        ("issued", &tickets::ISSUED[..]),
        ("withheld", &tickets::WITHHELD[..]),
        ("resumed", &tickets::RESUMED[..]),
        ("refused", &tickets::REFUSED[..]),
    ];
    let own = own.map(|(kind, reasons)| (kind.to_owned(), reasons.iter().map(|reason| (*reason).to_owned()).collect()));
    assert_eq!(BTreeMap::from(own), policy().tickets.reasons);
}

#[test]
fn the_breaker_follows_the_sequences() {
    for Sequence { name, steps } in policy().sequences {
        let (breaker, start) = (Breaker::default(), Instant::now());
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        for step in steps {
            let (began, now) = (at(step.began_ms), at(step.at_ms));
            match (step.event.as_str(), step.result.as_deref()) {
                (_, Some("limited")) => _ = breaker.limited(began, now),
                ("lookup" | "probe", Some("ok")) => _ = breaker.succeeded(),
                ("lookup", Some("timeout")) => _ = breaker.timed_out(began, now),
                ("lookup", Some(_)) => _ = breaker.failed(began, now),
                _ => {}
            }
            let lookups = match (breaker.closed(), breaker.rate_limited(now)) {
                (false, _) => "breaker-open",
                (true, true) => "limited",
                (true, false) => "call",
            };
            assert_eq!(lookups, step.lookups, "{name}: {step:?}");
            if let Some(new_sessions) = &step.new_sessions {
                assert_eq!(breaker.scarce(now), new_sessions == "dropped", "{name}: {step:?}");
            }
            if let Some(pause) = step.next_probe_ms {
                assert_eq!(breaker.next_probe_pause().as_millis(), pause, "{name}: {step:?}");
            }
        }
    }
}
