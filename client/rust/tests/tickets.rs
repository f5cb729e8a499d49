//! Real handshakes with tickets of the fleet, and a real store: `RESUMED_COMMAND=.../resumed cargo test`. Without a store, what needs one is
//! skipped.

#[allow(dead_code)]
mod support;

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use resumed::{Installation, Options, Scope, SessionMode, TicketStats};
use rustls::server::ProducesTickets;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConnection, ServerConfig, SupportedProtocolVersion};
use support::{PATIENCE, Peers, Relay, Store, eventually, resumes, sessions, shake_hands, shared_store};

/// The beginning of a session of TLS 1.3 without a server name, as rustls encodes it.
const SESSION: &[u8] = b"\x00\x03\x04 session";
const SESSION_TLS12: &[u8] = b"\x01\x0cshop.example\x03\x03 session";
const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS12, &TLS13];

/// Returns the sessions of a frontend in tickets mode, also for TLS 1.2.
fn frontend(target: &str, namespace: &str, change: impl FnOnce(&mut Options)) -> Installation {
    sessions(target, namespace, |options| {
        (options.sessions, options.tickets_tls12) = (SessionMode::Tickets, true);
        options.rotation = Duration::from_secs(6 * 24 * 3600); // or an epoch could end during a test
        change(options);
    })
}

/// Returns those of a frontend that has agreed on its secrets, and knows the removals.
fn ready(target: &str, namespace: &str, change: impl FnOnce(&mut Options)) -> Installation {
    let sessions = frontend(target, namespace, change);
    eventually(|| is_ready(&sessions));
    sessions
}

fn is_ready(sessions: &Installation) -> bool {
    let stats = stats(sessions);
    stats.live && stats.secrets_held >= 2
}

fn stats(sessions: &Installation) -> TicketStats {
    sessions.ticket_stats().unwrap()
}

/// Returns the sum of the counts that a session mode must not have.
fn stored(sessions: &Installation) -> u64 {
    let stats = sessions.stats();
    [stats.puts, stats.hits, stats.misses].iter().flat_map(|counts| counts.values()).sum()
}

fn issue(sessions: &Installation) -> Vec<u8> {
    sessions.connection(&Scope::default()).encrypt(SESSION).unwrap()
}

fn accepts(sessions: &Installation, ticket: &[u8]) -> bool {
    let session = sessions.connection(&Scope::default()).decrypt(ticket);
    assert!(session.is_none() || session.as_deref() == Some(SESSION));
    session.is_some()
}

#[test]
fn any_frontend_resumes_the_tickets_of_any_other_without_a_call() {
    let Some(store) = shared_store() else { return };
    for version in VERSIONS {
        let (one, other) = (ready(store, "tickets", |_| ()), ready(store, "tickets", |_| ()));
        let peers = Peers::new(version);
        assert!(!peers.connect(&one), "{version:?}: the first handshake is a full one");
        for sessions in [&other, &one, &other] {
            assert!(peers.connect(sessions), "{version:?}: {:?}", stats(sessions));
        }
        assert_eq!(stats(&other).resumed, [("current", 2)].into());
        assert_eq!(stats(&one).issued.keys().collect::<Vec<_>>(), [&"current"]);
        assert_eq!((stored(&one), stored(&other)), (0, 0));
        assert_eq!(other.stats().lookups.iter().sum::<u64>(), 0);
    }
}

#[test]
fn frontends_that_start_at_once_agree() {
    let Some(store) = shared_store() else { return };
    let start = Barrier::new(12);
    let fleet: Vec<_> = thread::scope(|scope| {
        let starting: Vec<_> = (0..12)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    ready(store, "at-once", |_| ())
                })
            })
            .collect();
        starting.into_iter().map(|each| each.join().unwrap()).collect()
    });
    let tickets: Vec<_> = fleet.iter().map(issue).collect();
    assert!(tickets.iter().all(|ticket| ticket[..16] == tickets[0][..16]));
    assert!(fleet.iter().all(|sessions| tickets.iter().all(|ticket| accepts(sessions, ticket))));
}

#[test]
fn tls_1_2_sessions_are_stored_unless_tickets_are_for_them_too() {
    let Some(store) = shared_store() else { return };
    let stored = |options: &mut Options| options.tickets_tls12 = false;
    let (one, other) = (ready(store, "versions", stored), ready(store, "versions", stored));
    let (tls12, tls13) = (Peers::new(&TLS12), Peers::new(&TLS13));
    assert!(!tls12.connect(&one) && tls12.connect(&other));
    assert_eq!((stats(&one).issued, stats(&other).resumed), ([].into(), [].into()));
    assert_eq!(other.stats().hits.values().sum::<u64>(), 1);
    assert!(!tls13.connect(&one) && tls13.connect(&other));
    assert_eq!(stats(&other).resumed, [("current", 1)].into());
    // A frontend whose TLS 1.2 sessions are tickets, and one whose are not, resume each other's.
    let tickets = ready(store, "versions", |_| ());
    assert!(tls12.connect(&tickets) && tls12.connect(&other));
}

#[test]
fn a_fleet_moves_to_tickets_without_losing_its_sessions() {
    let Some(store) = shared_store() else { return };
    for (version, single_use) in [(&TLS12, false), (&TLS13, false), (&TLS12, true), (&TLS13, true)] {
        let namespace = if single_use { "moves-once" } else { "moves" };
        let before = sessions(store, namespace, |options| options.single_use = single_use);
        let after = ready(store, namespace, |options| options.single_use = single_use);
        let peers = Peers::new(version);
        assert!(!peers.connect(&before));
        assert!(before.flush(PATIENCE));
        assert!(peers.connect(&after), "{version:?}, single use {single_use}: {:?}", after.stats());
        // One that has not moved yet makes full handshakes with tickets.
        let peers = Peers::new(version);
        assert!(!peers.connect(&after) && !peers.connect(&before));
    }
}

#[test]
fn tickets_that_follow_a_stored_session_end_with_it() {
    let Some(store) = shared_store() else { return };
    let before = sessions(store, "inherits", |options| options.lifetime = Duration::from_secs(100));
    let after = ready(store, "inherits", |_| ());
    let id = before.connection(&Scope::default()).encrypt(SESSION).unwrap();
    let resumed = after.connection(&Scope::default());
    assert_eq!(resumed.decrypt(&id).unwrap(), SESSION);
    let ticket = resumed.encrypt(SESSION).unwrap();
    assert!(ticket.len() > 32 && accepts(&after, &ticket) && resumed.lifetime() <= 100);
}

#[test]
fn the_lifetime_of_a_ticket_is_what_remains_of_its_lineage() {
    let Some(store) = shared_store() else { return };
    let one = ready(store, "hints", |options| options.lifetime = Duration::from_secs(100));
    let other = ready(store, "hints", |_| ());
    let first = one.connection(&Scope::default());
    let ticket = first.encrypt(SESSION).unwrap();
    assert!((95..=100).contains(&first.lifetime()));
    let resumed = other.connection(&Scope::default());
    assert!(resumed.decrypt(&ticket).is_some());
    let next = resumed.encrypt(SESSION).unwrap();
    assert!(resumed.lifetime() <= 100 && accepts(&one, &next));
    let fresh = other.connection(&Scope::default());
    fresh.encrypt(SESSION).unwrap();
    assert!(fresh.lifetime() > 7000);
}

#[test]
fn a_removed_lineage_resumes_nowhere() {
    let Some(store) = shared_store() else { return };
    let (one, other) = (ready(store, "removes", |_| ()), ready(store, "removes", |_| ()));
    let first = one.connection(&Scope::default());
    let tickets = [(); 2].map(|()| first.encrypt(SESSION).unwrap());
    let resumed = other.connection(&Scope::default());
    assert!(resumed.decrypt(&tickets[0]).is_some());
    let (successor, kept) = (resumed.encrypt(SESSION).unwrap(), issue(&one));
    one.remove(&tickets[1]);
    assert!(!accepts(&one, &tickets[0]) && !accepts(&one, &successor), "at once");
    eventually(|| !accepts(&other, &tickets[0]));
    assert!(!accepts(&other, &tickets[1]) && !accepts(&other, &successor) && accepts(&other, &kept));
    let young = ready(store, "removes", |_| ());
    assert!(!accepts(&young, &successor) && accepts(&young, &kept), "a frontend that starts later");
    assert!(stats(&young).refused["revoked"] == 1 && stats(&young).removals_held == 1);
    let connection = one.connection(&Scope::default());
    assert!(connection.decrypt(&kept).is_some());
    connection.remove();
    assert!(!accepts(&one, &kept));
    eventually(|| !accepts(&young, &kept));
}

#[test]
fn a_purge_ends_all_tickets_and_the_fleet_goes_on_with_another_secret() {
    let Some(store) = Store::launch(&[]) else { return };
    let (one, other) = (ready(&store.target, "purges", |_| ()), ready(&store.target, "purges", |_| ()));
    let ticket = issue(&one);
    assert!(accepts(&other, &ticket));
    store.purge("purges");
    eventually(|| !accepts(&one, &ticket) && !accepts(&other, &ticket));
    eventually(|| is_ready(&one) && is_ready(&other) && accepts(&other, &issue(&one)));
    let young = ready(&store.target, "purges", |_| ());
    assert!(!accepts(&young, &ticket) && accepts(&young, &issue(&one)));
}

#[test]
fn a_single_use_ticket_resumes_once_in_the_whole_fleet() {
    let Some(store) = shared_store() else { return };
    let single = |options: &mut Options| options.single_use = true;
    let fleet: Vec<_> = (0..4).map(|_| ready(store, "single-ticket", single)).collect();
    for _ in 0..10 {
        let (ticket, start) = (issue(&fleet[0]), Barrier::new(fleet.len()));
        let accepted: usize = thread::scope(|scope| {
            let racing = fleet.iter().map(|sessions| {
                scope.spawn(|| {
                    start.wait();
                    usize::from(accepts(sessions, &ticket))
                })
            });
            racing.collect::<Vec<_>>().into_iter().map(|each| each.join().unwrap()).sum()
        });
        assert_eq!(accepted, 1);
        assert!(!accepts(&fleet[0], &ticket));
    }
    let replayed: u64 = fleet.iter().map(|sessions| stats(sessions).refused["replayed"]).sum();
    assert_eq!(replayed, 40);
    for version in VERSIONS {
        let peers = Peers::new(version);
        assert!(!peers.connect(&fleet[0]) && peers.connect(&fleet[1]), "{version:?}: {:?}", stats(&fleet[1]));
    }
}

/// Such a handshake has two client hellos.
#[test]
fn a_single_use_is_claimed_once_in_a_handshake_with_a_retry_request() {
    let Some(store) = shared_store() else { return };
    let single = |options: &mut Options| options.single_use = true;
    let (one, other) = (ready(store, "retried", single), ready(store, "retried", single));
    let peers = Peers::new(&TLS13);
    let mut provider = rustls::crypto::ring::default_provider();
    provider.kx_groups.retain(|group| group.name() == rustls::NamedGroup::secp384r1);
    let server = peers.with_provider(provider);
    assert!(!resumes(peers.client(), &one, &server, &Scope::default()));
    assert!(resumes(peers.client(), &other, &server, &Scope::default()), "{:?}", stats(&other));
}

#[test]
fn a_ticket_of_another_context_is_refused_and_its_single_use_is_not_spent() {
    let Some(store) = shared_store() else { return };
    let sessions = ready(store, "ticket-contexts", |options| options.single_use = true);
    let private = Scope::default().data("private");
    let ticket = issue(&sessions);
    assert_eq!(sessions.connection(&private).decrypt(&ticket), None);
    assert!(accepts(&sessions, &ticket));
    assert_eq!(stats(&sessions).refused, [("context-mismatch", 1)].into());
    for version in VERSIONS {
        let peers = Peers::new(version);
        let (verifying, roots) = peers.verifying();
        let private = Scope::default().requires_clients_of(&roots);
        let connect = |config: &ServerConfig, scope: &Scope| resumes(peers.client(), &sessions, config, scope);
        assert!(!connect(&peers.server, &Scope::default()));
        assert!(!connect(&verifying, &private), "{version:?}: a session without a certificate");
        assert!(connect(&verifying, &private), "{version:?}: the same scope");
        assert!(!connect(&peers.server, &Scope::default()), "{version:?}: a session with a certificate");
    }
}

#[test]
fn a_ticket_of_others_is_no_ticket_of_the_fleet() {
    let Some(store) = shared_store() else { return };
    let one = ready(store, "mine", |_| ());
    let (namespace, keys) = (ready(store, "yours", |_| ()), |options: &mut Options| {
        options.keyring = resumed::Keyring::from_keys(&[[8; 32]]).unwrap().into();
    });
    let keys = ready(store, "mine", keys);
    for ticket in [issue(&namespace), issue(&keys), vec![1; 200], vec![2; 33], issue(&one)[..33].to_vec()] {
        assert!(!accepts(&one, &ticket));
    }
    let mut changed = issue(&one);
    *changed.last_mut().unwrap() ^= 1;
    assert!(!accepts(&one, &changed));
    assert_eq!(stats(&one).refused, [("not-authentic", 2)].into());
}

#[test]
fn rustls_takes_no_early_data_with_a_ticket() {
    let Some(store) = shared_store() else { return };
    let sessions = ready(store, "early", |_| ());
    let mut peers = Peers::new(&TLS13);
    peers.server.max_early_data_size = 1000;
    assert!(!peers.connect(&sessions));
    assert!(peers.client().early_data().is_none());
    assert!(peers.connect(&sessions));
}

#[test]
fn a_session_too_large_for_a_ticket_is_stored() {
    let Some(store) = shared_store() else { return };
    let (one, other) = (ready(store, "large", |_| ()), ready(store, "large", |_| ()));
    for (size, ticket) in [(8192, true), (8193, false)] {
        let session = [SESSION, &vec![0; size - SESSION.len()]].concat();
        let issued = one.connection(&Scope::default()).encrypt(&session).unwrap();
        assert_eq!(issued.len() > 32, ticket);
        assert_eq!(other.connection(&Scope::default()).decrypt(&issued), Some(session));
    }
}

/// rustls' encoding of a session is its own affair: of other bytes nothing is known.
#[test]
fn a_session_of_an_unknown_version_is_stored() {
    let Some(store) = shared_store() else { return };
    let sessions = ready(store, "encodings", |options| options.tickets_tls12 = false);
    let issue = |session: &[u8]| sessions.connection(&Scope::default()).encrypt(session).unwrap().len() > 32;
    assert!(issue(SESSION) && !issue(SESSION_TLS12));
    for session in [&b""[..], b"\x02\x03\x04", b"\x01\xff", b"\x00\x03", b"\x00\x03\x05"] {
        assert!(!issue(session), "{session:?}");
    }
}

#[test]
fn without_a_store_handshakes_are_full_ones_and_tickets_begin_when_it_is_there() {
    let Some(store) = shared_store() else { return };
    let relay = Relay::to(store);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap().to_string();
    drop(listener);
    let sessions = frontend(&target, "late", |_| ());
    for version in VERSIONS {
        let peers = Peers::new(version);
        assert!(!peers.connect(&sessions) && !peers.connect(&sessions));
    }
    assert_eq!(stats(&sessions).withheld, [("no-secret", 4)].into());
    let found = frontend(&format!("ipv4:{target},{}", relay.address), "late", |_| ());
    let peers = Peers::new(&TLS13);
    eventually(|| is_ready(&found));
    assert!(!peers.connect(&found) && peers.connect(&found));
}

#[test]
fn tickets_resume_for_a_grace_period_when_the_store_is_gone() {
    let Some(store) = Store::launch(&[]) else { return };
    let without = |options: &mut Options| options.revocation_grace = Duration::ZERO;
    let (graced, strict) = (ready(&store.target, "grace", |_| ()), ready(&store.target, "grace", without));
    let peers = Peers::new(&TLS13);
    assert!(!peers.connect(&graced));
    drop(store);
    let ticket = issue(&graced);
    assert!(accepts(&graced, &ticket));
    eventually(|| !accepts(&strict, &ticket));
    assert!(stats(&strict).refused.contains_key("removals-unknown") && !stats(&strict).live);
    eventually(|| !stats(&graced).live);
    assert!(accepts(&graced, &ticket) && peers.connect(&graced));
    assert_eq!(graced.stats().lookups.iter().sum::<u64>(), 0);
}

#[test]
fn a_stream_that_was_cut_goes_on() {
    let Some(store) = shared_store() else { return };
    let relay = Relay::to(store);
    let (one, other) = (ready(store, "cut", |_| ()), ready(&relay.address, "cut", |_| ()));
    let tickets = [(); 2].map(|()| issue(&one));
    relay.cut();
    one.remove(&tickets[0]);
    assert!(one.flush(PATIENCE));
    eventually(|| !accepts(&other, &tickets[0]));
    assert!(accepts(&other, &tickets[1]));
}

#[test]
fn removals_that_the_store_lost_with_its_storage_are_sent_again() {
    let Some(store) = Store::launch(&[]) else { return };
    let target = store.target.clone();
    let old = ready(&target, "loss", |_| ());
    old.remove(&issue(&old));
    assert!(old.flush(PATIENCE));
    drop(store);
    let _store = Store::launch(&["--listen", &target]).unwrap();
    let young = ready(&target, "loss", |_| ());
    eventually(|| stats(&young).removals_held == 1);
}

#[test]
fn no_single_use_ticket_resumes_after_the_store_has_lost_its_storage() {
    let Some(store) = Store::launch(&[]) else { return };
    let target = store.target.clone();
    let frontend = ready(&target, "loss", |options| options.single_use = true);
    let used = issue(&frontend);
    assert!(accepts(&frontend, &used));
    drop(store);
    let _store = Store::launch(&["--listen", &target]).unwrap();
    let encrypt = || frontend.connection(&Scope::default()).encrypt(SESSION);
    eventually(|| encrypt().is_some_and(|ticket| ticket[..16] != used[..16]));
    assert!(!accepts(&frontend, &used) && accepts(&frontend, &issue(&frontend)));
}

/// Two stores with storages of their own, which get the calls of a frontend by turns. Only one has the secret of the ticket, so the other
/// is like one that has lost its storage before the frontend knows: it stores the claim.
#[test]
fn a_store_that_has_lost_the_secret_of_a_single_use_ticket_grants_no_use_of_it() {
    let (Some(one), Some(other)) = (Store::launch(&[]), Store::launch(&[])) else { return };
    let target = format!("ipv4:{},{}", one.target, other.target);
    let frontend = ready(&target, "lost-secret", |options| options.single_use = true);
    let (ticket, mut uses) = (issue(&frontend), 0);
    eventually(|| {
        uses += usize::from(accepts(&frontend, &ticket));
        assert!(uses <= 1, "two uses of one ticket");
        stats(&frontend).refused.contains_key("unknown-secret")
    });
}

#[test]
fn tickets_outlive_the_epoch_of_their_secret() {
    let Some(store) = shared_store() else { return };
    let short = |options: &mut Options| {
        (options.rotation, options.lifetime) = (Duration::from_secs(1), Duration::from_secs(600));
    };
    let (one, other) = (ready(store, "epochs", short), ready(store, "epochs", short));
    let ticket = issue(&one);
    eventually(|| accepts(&other, &ticket) && stats(&other).resumed.contains_key("older"));
    assert_ne!(issue(&one)[..16], ticket[..16]);
    eventually(|| accepts(&other, &issue(&one)));
}

#[test]
fn no_secret_shows_when_sessions_are_printed() {
    let sessions = frontend("127.0.0.1:1", "prints", |_| ());
    let printed = format!("{sessions:?} {:?} {:?}", sessions.connection(&Scope::default()), stats(&sessions));
    assert!(!printed.contains("[7, 7") && !printed.contains("secret:"), "{printed}");
}

/// Returns the processor time of this thread.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

/// Full and resumed handshakes with rustls' own tickets, and with those of the fleet, by turns in one thread.
#[test]
#[ignore = "takes a minute, alone: RESUMED_COST_HANDSHAKES=2000 cargo test --release --test tickets -- --ignored --nocapture"]
fn a_ticket_of_the_fleet_costs_little_more_than_rustls_own() {
    let Some(store) = shared_store() else { return };
    let handshakes = std::env::var("RESUMED_COST_HANDSHAKES").map_or(200, |number| number.parse().unwrap());
    for version in VERSIONS {
        let (sessions, peers) = (ready(store, "costs", |_| ()), Peers::new(version));
        let mut own = peers.server.clone();
        (own.ticketer, own.session_storage) =
            (rustls::crypto::ring::Ticketer::new().unwrap(), Arc::new(rustls::server::NoServerSessionStorage {}));
        let own = Arc::new(own);
        let configs: [&dyn Fn() -> Arc<ServerConfig>; 2] =
            [&|| Arc::clone(&own), &|| sessions.for_connection(&peers.server, &Scope::default())];
        let mut times = [[Duration::ZERO; 2]; 2];
        for _ in 0..handshakes {
            for (config, times) in configs.iter().zip(&mut times) {
                let client = peers.stranger();
                for (time, resumes) in times.iter_mut().zip([false, true]) {
                    let client = ClientConnection::new(client.clone(), "localhost".try_into().unwrap()).unwrap();
                    let began = processor_time();
                    assert_eq!(shake_hands(client, config()), resumes);
                    *time += processor_time().saturating_sub(began);
                }
            }
        }
        let ratio = |index: usize| times[1][index].as_secs_f64() / times[0][index].as_secs_f64();
        let each = times.map(|pair| pair.map(|time| time / handshakes));
        println!("{version:?}: {each:?}: full {:.3}, resumed {:.3}", ratio(0), ratio(1));
    }
}
