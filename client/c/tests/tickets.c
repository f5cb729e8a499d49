/*
 * Tickets of the fleet: servers with libresumed and their clients in one process, over memory. Prints how many handshakes it made and how
 * many resumed, or the first thing that went otherwise than include/resumed.h says, and then exits 1.
 *
 *     tickets --certificate FILE --ca FILE --target 127.0.0.1:7400 --keyring fleet.keys
 *
 * `certificate` is of the host localhost; `ca` is an authority of clients.
 */
#include <getopt.h>
#include <sys/wait.h>

#include <resumed.h>

#include "support.h"

enum file { CERTIFICATE, CA, TARGET, KEYRING, FILES };
enum ending { CLOSED, ALERT_SENT, ALERT_RECEIVED, REMOVED };

static const size_t ID = 32; /* length of the id of a stored session; tickets are longer */
static const char *files[FILES];
static int made, reused;

static SSL_CTX *server(const char *namespace_, resumed_options options)
{
    SSL_CTX *context = server_context(files[CERTIFICATE]);

    MUST(SSL_CTX_load_verify_locations(context, files[CA], NULL) == 1);
    MUST(SSL_CTX_set_session_id_context(context, (const unsigned char *)"tickets", 7) == 1);
    options.size = sizeof options;
    options.target = files[TARGET];
    options.keyring = files[KEYRING];
    options.namespace_ = namespace_;
    options.deadline_ms = 10000;
    options.single_host = 1;
    MUST(resumed_install(context, &options) == NULL);
    if (options.tickets)
        await_tickets(context);
    return context;
}

static const resumed_options TICKETS = {.tickets = 1, .tickets_tls12 = 1}, STORED = {0};
static const resumed_options ONCE = {.tickets = 1, .tickets_tls12 = 1, .single_use = 1};

static size_t ticket(SSL_SESSION *session)
{
    const unsigned char *data;
    size_t length = 0;

    SSL_SESSION_get0_ticket(session, &data, &length);
    return length;
}

static void end(connection it, enum ending ending)
{
    switch (ending) {
    case ALERT_SENT: send_bad_record(it.client, it.server); break;
    case ALERT_RECEIVED: receive_alert(it); break;
    case REMOVED: resumed_remove_connection(it.server); /* falls through */
    case CLOSED: SSL_shutdown(it.server);
    }
    mark_closed(it.client);
}

/* Shakes hands with the session in *session, or none, and leaves the new one there; returns whether it resumed. */
static int meet_and(SSL_CTX *servers, SSL_CTX *clients, SSL_SESSION **session, enum ending ending)
{
    connection new = new_connection(servers, clients, "localhost", *session);

    MUST(shake_hands(new));
    deliver_tickets(new);
    int resumed = SSL_session_reused(new.server);
    made++;
    reused += resumed;
    keep_session(new, session);
    end(new, ending);
    free_connection(new);
    MUST(resumed_flush(servers, PATIENCE) == 1);
    return resumed;
}

static int meet(SSL_CTX *servers, SSL_CTX *clients, SSL_SESSION **session)
{
    return meet_and(servers, clients, session, CLOSED);
}

/* Offers a session, drops the new one, and returns whether it resumed. */
static int offer(SSL_CTX *servers, SSL_CTX *clients, SSL_SESSION *session)
{
    SSL_SESSION *copy = SSL_SESSION_dup(session);
    int resumed = meet(servers, clients, &copy);

    SSL_SESSION_free(copy);
    return resumed;
}

/* An end removes all that stem from the same full handshake, whichever connection of them it is. */
static void endings(void)
{
    SSL_CTX *servers = server("endings", TICKETS), *anyone = client_context(version);

    for (int ending = ALERT_SENT; ending <= REMOVED; ending++)
        for (int depth = 0; depth < 3; depth++) {
            SSL_SESSION *first = NULL, *last, *other = NULL;

            MUST(!meet(servers, anyone, &other));
            MUST(!meet_and(servers, anyone, &first, depth ? CLOSED : (enum ending)ending));
            last = SSL_SESSION_dup(first);
            for (int turn = 1; turn <= depth; turn++)
                MUST(meet_and(servers, anyone, &last, turn < depth ? CLOSED : (enum ending)ending));
            MUST(!offer(servers, anyone, first) && !offer(servers, anyone, last) && offer(servers, anyone, other));
            SSL_SESSION_free(first);
            SSL_SESSION_free(last);
            SSL_SESSION_free(other);
        }
    MUST(count_of(servers, "refused revoked ") == 18 && count_of(servers, "puts ") == 0);
    free_contexts((SSL_CTX *[]){servers, anyone}, 2);
}

static void single_use(void)
{
    SSL_CTX *servers = server("once", ONCE), *anyone = client_context(version), *retrying = server("once", ONCE);
    SSL_SESSION *session = NULL, *kept;

    MUST(!meet(servers, anyone, &session));
    kept = SSL_SESSION_dup(session);
    MUST(meet(servers, anyone, &session) && !offer(servers, anyone, kept) && count_of(servers, "refused replayed ") == 1);
    SSL_SESSION_free(session);
    SSL_SESSION_free(kept);
    /* OpenSSL decrypts the ticket again after a HelloRetryRequest. */
    session = NULL;
    MUST(SSL_CTX_set1_groups_list(retrying, "P-384") == 1 && SSL_CTX_set1_groups_list(anyone, "P-256:P-384") == 1);
    MUST(!meet(retrying, anyone, &session) && meet(retrying, anyone, &session));
    SSL_SESSION_free(session);
    free_contexts((SSL_CTX *[]){servers, retrying, anyone}, 3);
}

/* A child has the secrets and the removals of its parent: at once, and without the store. */
static void forks(void)
{
    SSL_CTX *servers = server("forks", TICKETS), *anyone = client_context(version);
    SSL_SESSION *kept = NULL, *removed = NULL;
    int status;

    MUST(!meet(servers, anyone, &kept) && !meet_and(servers, anyone, &removed, REMOVED));
    pid_t child = fork();
    MUST(child >= 0);
    if (child == 0)
        MUST(offer(servers, anyone, kept) && !offer(servers, anyone, removed));
    else
        MUST(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    MUST(offer(servers, anyone, kept));
    SSL_SESSION_free(kept);
    SSL_SESSION_free(removed);
    free_contexts((SSL_CTX *[]){servers, anyone}, 2);
    if (child == 0)
        _exit(0); /* without exit handlers: the memory of the parent's thread has no owner here */
}

/* A stored session resumes; its ticket takes over, and ends when it would. A fatal alert removes both. */
static void moves(void)
{
    SSL_CTX *before = server("moves", STORED), *after = server("moves", TICKETS), *anyone = client_context(version);
    SSL_SESSION *session = NULL, *stored;

    MUST(!meet(before, anyone, &session));
    MUST(version == TLS1_2_VERSION || ticket(session) == ID);
    stored = SSL_SESSION_dup(session);
    MUST(meet(after, anyone, &session) && ticket(session) > ID);
    MUST(count_of(after, "hits store ") == 1 && meet(after, anyone, &session) && count_of(after, "resumed current ") == 1);
    SSL_SESSION_free(session);
    session = SSL_SESSION_dup(stored);
    MUST(meet_and(after, anyone, &session, ALERT_SENT));
    MUST(!offer(after, anyone, session) && !offer(after, anyone, stored) && !offer(before, anyone, stored));
    SSL_SESSION_free(session);
    SSL_SESSION_free(stored);
    free_contexts((SSL_CTX *[]){before, after, anyone}, 3);
}

/* Without tickets_tls12 a session of TLS 1.2 is stored, and a ticket of TLS 1.2 that another configuration has issued does not resume. */
static void tls12(void)
{
    resumed_options only13 = {.tickets = 1};
    SSL_CTX *tickets = server("tls12", TICKETS), *stored = server("tls12", only13), *anyone = client_context(version);
    SSL_SESSION *session = NULL;

    MUST(!meet(stored, anyone, &session) && ticket(session) == 0 && meet(stored, anyone, &session));
    MUST(count_of(stored, "hits store ") == 1 && count_of(stored, "issued ") == 0);
    SSL_SESSION_free(session);
    session = NULL;
    MUST(!meet(tickets, anyone, &session) && ticket(session) > ID);
    MUST(!meet(stored, anyone, &session) && ticket(session) == 0 && meet(stored, anyone, &session));
    SSL_SESSION_free(session);
    free_contexts((SSL_CTX *[]){tickets, stored, anyone}, 3);
}

static int tolerate(int verified, X509_STORE_CTX *store)
{
    X509_STORE_CTX_set_error(store, X509_V_OK);
    return verified || 1;
}

/* A large certificate does not fit into a ticket. TLS 1.3 stores its session; TLS 1.2 has promised a ticket by then. */
static void large_certificates(void)
{
    SSL_CTX *servers = server("large", TICKETS);

    SSL_CTX_set_verify(servers, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, tolerate);
    for (int large = 0; large < 2; large++) {
        SSL_CTX *certified = client_context(version);
        SSL_SESSION *session = NULL;
        long stored = count_of(servers, "puts stored ");
        int fits = !large || version == TLS1_3_VERSION;

        self_sign(certified, large ? 9000 : 1000);
        for (int turn = 0; turn < 3; turn++)
            MUST(meet(servers, certified, &session) == (fits && turn > 0));
        MUST(large ? (version == TLS1_2_VERSION ? ticket(session) == 0 : ticket(session) == ID) : ticket(session) > 1000);
        MUST((count_of(servers, "puts stored ") > stored) == (large && version == TLS1_3_VERSION));
        SSL_SESSION_free(session);
        SSL_CTX_free(certified);
    }
    SSL_CTX_free(servers);
}

/* A client may offer a ticket without a session id (RFC 5077 section 3.4); then the server's answer has none, either. */
static void clients_without_id(void)
{
    SSL_CTX *servers = server("no-id", TICKETS), *anyone = client_context(version);
    SSL_SESSION *session = NULL, *kept;
    unsigned length = 1;

    MUST(!meet(servers, anyone, &session));
    kept = SSL_SESSION_dup(session);
    MUST(SSL_SESSION_set1_id(session, (const unsigned char *)"", 0) == 1);
    connection cut = new_connection(servers, anyone, "localhost", session);
    SSL_connect(cut.client);
    MUST(SSL_accept(cut.server) < 0 && SSL_session_reused(cut.server) == 1);
    SSL_SESSION_get_id(SSL_get_session(cut.server), &length);
    MUST(length == 0);
    free_connection(cut);
    MUST(offer(servers, anyone, kept)); /* the connection was cut, not ended by an alert */
    SSL_SESSION_free(session);
    SSL_SESSION_free(kept);
    free_contexts((SSL_CTX *[]){servers, anyone}, 2);
}

/* Early data could be replayed: a connection that accepts some issues no ticket that allows it. */
static void early_data(void)
{
    SSL_CTX *servers = server("early", TICKETS), *anyone = client_context(version);
    SSL_SESSION *session = NULL;

    SSL_CTX_set_max_early_data(servers, 1000);
    SSL_CTX_set_options(servers, SSL_OP_NO_ANTI_REPLAY);
    MUST(!meet(servers, anyone, &session) && ticket(session) == ID);
    MUST(!offer(servers, anyone, session));
    SSL_SESSION_free(session);
    free_contexts((SSL_CTX *[]){servers, anyone}, 2);
}

/* Garbage and tickets of another fleet cost a full handshake, and the client gets a ticket of this one. */
static void other_tickets(void)
{
    SSL_CTX *servers = server("garbage", TICKETS), *strange = server_context(files[CERTIFICATE]), *anyone = client_context(version);
    SSL_SESSION *session = NULL;

    MUST(!meet(strange, anyone, &session) && ticket(session) > ID);
    MUST(!meet(servers, anyone, &session) && meet(servers, anyone, &session));
    MUST(count_of(servers, "refused ") == 0);
    SSL_SESSION_free(session);
    free_contexts((SSL_CTX *[]){servers, strange, anyone}, 3);
}

int main(int argc, char **argv)
{
    static const struct option names[] = {
        {"certificate", required_argument, NULL, CERTIFICATE},
        {"ca", required_argument, NULL, CA},
        {"target", required_argument, NULL, TARGET},
        {"keyring", required_argument, NULL, KEYRING},
        {0},
    };
    int name;

    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
        if (name < 0 || name >= FILES)
            return 2;
        files[name] = optarg;
    }
    for (version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        endings();
        single_use();
        moves();
        large_certificates();
        other_tickets();
        forks();
    }
    version = TLS1_2_VERSION;
    tls12();
    clients_without_id();
    version = TLS1_3_VERSION;
    early_data();
    printf("%d %d\n", made, reused);
    return 0;
}
