//! The statistics in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::options::SessionMode;
use crate::shim::Shim;
use crate::stats::{HITS, MISSES, PUTS, REMOVALS, Stats, TERMINATIONS};
use crate::tickets::{ISSUED, REFUSED, RESUMED, TicketStats, WITHHELD};

type Counts = BTreeMap<&'static str, u64>;

/// The statistics of a namespace.
#[derive(Default)]
struct Group {
    stats: Stats,
    breaker_open: bool,
    /// Whether the present content of the keyring file is in use, and when content that is in use was last read.
    keyring: Option<(bool, u64)>,
    /// Those of its shims that have tickets.
    tickets: Option<TicketStats>,
}

/// A counter.
struct Family {
    name: &'static str,
    label: &'static str,
    help: &'static str,
    reasons: &'static [&'static str],
    counts: fn(&Group) -> Option<&Counts>,
}

const fn family(
    name: &'static str,
    label: &'static str,
    help: &'static str,
    reasons: &'static [&'static str],
    counts: fn(&Group) -> Option<&Counts>,
) -> Family {
    Family { name, label, help, reasons, counts }
}

#[rustfmt::skip]
const FAMILIES: [Family; 9] = [
    family("hits", "source", "Sessions that were resumed, by where they came from.", &HITS, |group| Some(&group.stats.hits)),
    family("misses", "reason", "Sessions that clients offered and that were not resumed.", &MISSES, |group| Some(&group.stats.misses)),
    family("puts", "outcome", "Sessions that were negotiated, by outcome.", &PUTS, |group| Some(&group.stats.puts)),
    family("removals", "reason", "Sessions that were removed from the fleet.", &REMOVALS, |group| Some(&group.stats.removals)),
    family("terminations", "reason", "Resumed connections that were ended after their handshake.", &TERMINATIONS, |group| Some(&group.stats.terminations)),
    family("tickets_issued", "secret", "Tickets that were issued, by the epoch of their secret.", &ISSUED, |group| group.tickets.as_ref().map(|tickets| &tickets.issued)),
    family("tickets_withheld", "reason", "Tickets that were not issued.", &WITHHELD, |group| group.tickets.as_ref().map(|tickets| &tickets.withheld)),
    family("tickets_resumed", "secret", "Tickets that resumed, by the epoch of their secret.", &RESUMED, |group| group.tickets.as_ref().map(|tickets| &tickets.resumed)),
    family("tickets_refused", "reason", "Tickets that clients offered and that did not resume.", &REFUSED, |group| group.tickets.as_ref().map(|tickets| &tickets.refused)),
];

/// Returns the counts of sessions in Prometheus' text format (content type `text/plain; version=0.0.4`), under the names that the clients
/// in other languages use and the dashboard of frontends draws. The counts of one namespace are added up.
#[must_use]
pub fn metrics<'a>(shims: impl IntoIterator<Item = &'a Shim>) -> String {
    let mut groups = BTreeMap::<&str, Group>::new();
    for shim in shims {
        groups.entry(&shim.options().namespace).or_default().add(shim);
    }
    let mut text = String::new();
    for family in &FAMILIES {
        let counted = groups.iter().filter_map(|(namespace, group)| Some((namespace, (family.counts)(group)?)));
        let name = format!("{}_total", family.name);
        for (number, (namespace, counts)) in counted.enumerate() {
            if number == 0 {
                head(&mut text, &name, "counter", family.help);
            }
            // Zeros too: Prometheus does not see the first increase of a series that begins above zero.
            for reason in family.reasons {
                let count = counts.get(reason).copied().unwrap_or_default();
                let labels = format!("session_namespace=\"{namespace}\",{}=\"{reason}\"", family.label);
                line(&mut text, &name, &labels, count);
            }
        }
    }
    head(&mut text, "lookup_duration_seconds", "histogram", "Time that look-ups at the store took.");
    for (namespace, Group { stats, .. }) in &groups {
        let labels = format!("session_namespace=\"{namespace}\"");
        let bounds = Stats::LOOKUP_BOUNDS.iter().map(|bound| bound.as_secs_f64().to_string()).chain(["+Inf".to_owned()]);
        let mut count = 0;
        for (bound, bucket) in bounds.zip(stats.lookups) {
            count += bucket;
            line(&mut text, "lookup_duration_seconds_bucket", &format!("{labels},le=\"{bound}\""), count);
        }
        line(&mut text, "lookup_duration_seconds_count", &labels, count);
        line(&mut text, "lookup_duration_seconds_sum", &labels, stats.lookup_time.as_secs_f64());
    }
    gauge(
        &mut text,
        &groups,
        "breaker_open",
        "Whether the circuit breaker is open, so that handshakes make no look-ups.",
        |group| Some(group.breaker_open.into()),
    );
    gauge(
        &mut text,
        &groups,
        "keyring_last_reload_successful",
        "Whether the present content of the keyring file is in use.",
        |group| Some(group.keyring?.0.into()),
    );
    gauge(
        &mut text,
        &groups,
        "keyring_last_reload_success_timestamp_seconds",
        "Time of the last successful reload of the keyring file, in Unix seconds.",
        |group| Some(group.keyring?.1),
    );
    gauge(&mut text, &groups, "removals_live", "Whether the removals of tickets are received.", |group| {
        Some(group.tickets.as_ref()?.live.into())
    });
    gauge(&mut text, &groups, "removals_held", "Removals of tickets that are in force.", |group| {
        u64::try_from(group.tickets.as_ref()?.removals_held).ok()
    });
    gauge(&mut text, &groups, "ticket_secrets_held", "Secrets that may open a ticket.", |group| {
        u64::try_from(group.tickets.as_ref()?.secrets_held).ok()
    });
    gauge(
        &mut text,
        &groups,
        "ticket_secret_created_timestamp_seconds",
        "Creation of the secret that encrypts new tickets, in Unix seconds.",
        |group| group.tickets.as_ref()?.secret_created,
    );
    gauge(
        &mut text,
        &groups,
        "ticket_secret_held_over",
        "Whether the secret that encrypts new tickets is that of an epoch that has ended.",
        |group| group.tickets.as_ref().and_then(|tickets| tickets.secret_created.and(Some(tickets.secret_held_over.into()))),
    );
    text
}

impl Group {
    fn add(&mut self, shim: &Shim) {
        let Stats { hits, misses, puts, removals, terminations, lookups, lookup_time } = shim.stats();
        let own = &mut self.stats;
        for (sum, counts) in [
            (&mut own.hits, hits),
            (&mut own.misses, misses),
            (&mut own.puts, puts),
            (&mut own.removals, removals),
            (&mut own.terminations, terminations),
        ] {
            add(sum, counts);
        }
        own.lookups.iter_mut().zip(lookups).for_each(|(sum, count)| *sum += count);
        own.lookup_time += lookup_time;
        self.breaker_open |= shim.breaker_open();
        if let Some((in_use, read_at)) = shim.options().keyring.last_reload() {
            let (all_in_use, earliest) = self.keyring.unwrap_or((true, u64::MAX));
            self.keyring = Some((all_in_use && in_use, earliest.min(read_at)));
        }
        if shim.options().sessions == SessionMode::Tickets {
            let stats = shim.ticket_stats();
            let Some(own) = &mut self.tickets else {
                self.tickets = Some(stats);
                return;
            };
            let TicketStats {
                issued,
                withheld,
                resumed,
                refused,
                removals_held,
                secrets_held,
                live,
                secret_created,
                secret_held_over,
            } = stats;
            for (sum, counts) in [
                (&mut own.issued, issued),
                (&mut own.withheld, withheld),
                (&mut own.resumed, resumed),
                (&mut own.refused, refused),
            ] {
                add(sum, counts);
            }
            own.removals_held = own.removals_held.max(removals_held);
            own.secrets_held = own.secrets_held.min(secrets_held);
            own.live &= live;
            own.secret_created = [own.secret_created, secret_created].into_iter().flatten().min();
            own.secret_held_over |= secret_held_over;
        }
    }
}

fn add(sum: &mut Counts, counts: Counts) {
    for (reason, count) in counts {
        *sum.entry(reason).or_default() += count;
    }
}

fn gauge(text: &mut String, groups: &BTreeMap<&str, Group>, name: &str, help: &str, value: fn(&Group) -> Option<u64>) {
    let values: Vec<_> = groups.iter().filter_map(|(namespace, group)| Some((namespace, value(group)?))).collect();
    if values.is_empty() {
        return;
    }
    head(text, name, "gauge", help);
    for (namespace, value) in values {
        line(text, name, &format!("session_namespace=\"{namespace}\""), value);
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP resumed_frontend_{name} {help}\n# TYPE resumed_frontend_{name} {kind}"); // a String takes everything
}

fn line(text: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    let _ = writeln!(text, "resumed_frontend_{name}{{{labels}}} {value}");
}

#[cfg(test)]
mod tests {
    use base64::prelude::{BASE64_STANDARD, Engine};

    use super::*;
    use crate::sealing::{Format, KEY_BYTES};
    use crate::{Keyring, Options};

    #[test]
    fn prometheus_sees_what_shims_of_a_namespace_count_together_and_all_reasons_from_the_beginning() {
        let file = tempfile::NamedTempFile::new().unwrap(); // only its owner may read it
        std::fs::write(file.path(), BASE64_STANDARD.encode([0; KEY_BYTES])).unwrap();
        let of = |namespace: &str, sessions| {
            let keys = [[0; KEY_BYTES]];
            let keyring = if namespace == "bank" { Keyring::load(file.path()) } else { Keyring::from_keys(&keys) };
            let mut options = Options::new("127.0.0.1:1", namespace, keyring.unwrap());
            options.sessions = sessions;
            Shim::new(options, Format::Rustls).unwrap()
        };
        let (one, other) = (of("shop", SessionMode::Stored), of("shop", SessionMode::Stored));
        one.unresumable();
        other.unresumable();
        other.unresumable();
        let bank = of("bank", SessionMode::Tickets);
        let text = metrics([&one, &other, &bank]);
        let has = |line: &str| assert!(text.lines().any(|each| each == line), "{line}");
        has("resumed_frontend_puts_total{session_namespace=\"shop\",outcome=\"unresumable\"} 3");
        has("resumed_frontend_puts_total{session_namespace=\"bank\",outcome=\"unresumable\"} 0");
        has("resumed_frontend_hits_total{session_namespace=\"shop\",source=\"mirror\"} 0");
        has("resumed_frontend_lookup_duration_seconds_bucket{session_namespace=\"shop\",le=\"0.0001\"} 0");
        has("resumed_frontend_lookup_duration_seconds_bucket{session_namespace=\"shop\",le=\"+Inf\"} 0");
        has("resumed_frontend_breaker_open{session_namespace=\"shop\"} 0");
        has("resumed_frontend_tickets_refused_total{session_namespace=\"bank\",reason=\"revoked\"} 0");
        has("resumed_frontend_keyring_last_reload_successful{session_namespace=\"bank\"} 1");
        assert!(
            text.contains("\nresumed_frontend_keyring_last_reload_success_timestamp_seconds{session_namespace=\"bank\"} 1")
        );
        assert!(!text.contains("tickets_refused_total{session_namespace=\"shop\""));
        assert!(!text.contains("keyring_last_reload_successful{session_namespace=\"shop\""));
        assert!(!text.contains("ticket_secret_held_over"), "there is no secret");
        assert_eq!(text.matches("# TYPE resumed_frontend_puts_total counter").count(), 1);
    }
}
