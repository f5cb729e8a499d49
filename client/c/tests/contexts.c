/*
 * Which contexts resume whose sessions: servers with libresumed and their clients in one process, over memory. Prints how many
 * handshakes it made and how many resumed, or the first thing that went otherwise than docs/contexts.md says, and then exits 1.
 *
 *     contexts --certificate FILE --other FILE --ca FILE --client FILE --short FILE --stranger FILE --target 127.0.0.1:7400
 *              --keyring fleet.keys [--life 4] [--tickets 1]
 *
 * `certificate` and `other` are of two hosts. `client`, `short` and `stranger` are of clients: the first two by the authority `ca`, the
 * second one with so many seconds to live.
 */
#include <getopt.h>
#include <stddef.h>

#include <resumed.h>

#include "support.h"

enum file { CERTIFICATE, OTHER, CA, CLIENT, SHORT, STRANGER, TARGET, KEYRING, FILES };
enum outcome { FAILED, FULL, RESUMED, ENDED };

static const char *files[FILES];
static int informed, made, reused, life = 4, tickets;

static SSL_CTX *server(enum file certificate)
{
    return server_context(files[certificate]);
}

static int tolerate(int verified, X509_STORE_CTX *unused)
{
    (void)unused;
    return verified || 1;
}

static SSL_CTX *verifying(int mode)
{
    SSL_CTX *context = server(CERTIFICATE);

    MUST(SSL_CTX_load_verify_locations(context, files[CA], NULL) == 1);
    MUST(SSL_CTX_set_session_id_context(context, (const unsigned char *)"verifying", 9) == 1);
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER | mode, NULL);
    return context;
}

static SSL_CTX *client(enum file certificate)
{
    SSL_CTX *context = client_context(version);

    if (certificate != FILES)
        use_certificate(context, files[certificate]);
    return context;
}

/* Returns how many sessions were not resumed for a reason. */
static long refused(SSL_CTX *context, const char *reason)
{
    char what[64];

    snprintf(what, sizeof what, "%s %s ", tickets ? "refused" : "misses", reason);
    return count_of(context, what);
}

static SSL_CTX *installed(SSL_CTX *context, const char *namespace_, resumed_options options)
{
    const char *complaint;

    options.size = sizeof options;
    options.target = files[TARGET];
    options.keyring = files[KEYRING];
    options.namespace_ = namespace_;
    options.deadline_ms = 10000;
    options.tickets = options.tickets_tls12 = tickets;
    if ((complaint = resumed_install(context, &options))) {
        fprintf(stderr, "contexts: %s\n", complaint);
        _exit(1);
    }
    if (tickets)
        await_tickets(context);
    return context;
}

static const resumed_options HOST = {.single_host = 1}, NAMES = {0};

static void inform(const SSL *ssl, int kind, int value)
{
    (void)ssl, (void)value;
    informed += kind == SSL_CB_HANDSHAKE_DONE;
}

/* Makes a handshake for a name with the session in *session, or none, and leaves the new one there. */
static enum outcome meet(SSL_CTX *servers, SSL_CTX *clients, const char *name, SSL_SESSION **session)
{
    connection new = new_connection(servers, clients, name, *session);
    enum outcome outcome = FAILED;
    char byte;

    SSL_set_info_callback(new.server, inform);
    made++;
    if (shake_hands(new)) {
        reused += SSL_session_reused(new.server);
        outcome = SSL_session_reused(new.server) ? RESUMED : FULL;
        MUST(SSL_write(new.client, "request", 7) == 7);
        int received = SSL_read(new.server, &byte, 1);
        if (received == 1) {
            deliver_tickets(new);
        } else {
            MUST(received == 0 && SSL_get_error(new.server, received) != SSL_ERROR_WANT_READ && SSL_write(new.server, "x", 1) != 1);
            ERR_clear_error();
            received = SSL_read(new.client, &byte, 1);
            MUST(received == 0 && SSL_get_error(new.client, received) == SSL_ERROR_ZERO_RETURN);
            outcome = ENDED;
        }
        keep_session(new, session);
        mark_closed(new.client);
    }
    free_connection(new);
    MUST(resumed_flush(servers, PATIENCE) == 1);
    return outcome;
}

/* Offers a session of one server to another one. */
static enum outcome offered(SSL_CTX *first, SSL_CTX *second, SSL_CTX *clients)
{
    SSL_SESSION *session = NULL;

    MUST(meet(first, clients, "localhost", &session) == FULL);
    enum outcome outcome = meet(second, clients, "localhost", &session);
    SSL_SESSION_free(session);
    return outcome;
}

static void server_identities(void)
{
    SSL_CTX *one = installed(server(CERTIFICATE), "identities", HOST), *same = installed(server(CERTIFICATE), "identities", HOST);
    SSL_CTX *other = installed(server(OTHER), "identities", HOST), *anyone = client(FILES);

    MUST(offered(one, same, anyone) == RESUMED);
    MUST(offered(one, other, anyone) == FULL);
    MUST(refused(one, "context-mismatch") == 1);
    MUST(offered(other, one, anyone) == FULL);
    free_contexts((SSL_CTX *[]){one, same, other, anyone}, 4);
}

static void client_certificates(void)
{
    static const int INSIST = SSL_VERIFY_FAIL_IF_NO_PEER_CERT;
    SSL_CTX *strict = verifying(INSIST), *same = verifying(INSIST), *optional = verifying(0), *deep = verifying(INSIST);
    SSL_CTX *more = verifying(INSIST), *open = server(CERTIFICATE), *lenient = verifying(INSIST), *nameless = verifying(INSIST);
    SSL_CTX *flagged = verifying(INSIST);
    SSL_CTX *all[] = {strict, same, optional, deep, more, open, lenient, nameless, flagged};
    SSL_CTX *certified = client(CLIENT), *anyone = client(FILES), *strange = client(STRANGER);

    X509_VERIFY_PARAM_set_flags(SSL_CTX_get0_param(flagged), X509_V_FLAG_TRUSTED_FIRST); /* the default of OpenSSL, and of Python */
    SSL_CTX_set_verify_depth(deep, 7);
    MUST(SSL_CTX_load_verify_locations(more, files[STRANGER], NULL) == 1);
    SSL_CTX_set_verify(lenient, SSL_VERIFY_PEER, tolerate);
    MUST(SSL_CTX_set_session_id_context(open, (const unsigned char *)"verifying", 9) == 1);
    MUST(SSL_CTX_set_session_id_context(nameless, NULL, 0) == 1);
    for (size_t number = 0; number < sizeof all / sizeof *all; number++)
        installed(all[number], "clients", HOST);

    MUST(offered(strict, same, certified) == RESUMED && offered(strict, flagged, certified) == RESUMED);
    MUST(offered(strict, optional, certified) == FULL && offered(optional, strict, certified) == FULL);
    MUST(offered(strict, deep, certified) == FULL && offered(strict, more, certified) == FULL);
    MUST(offered(strict, open, certified) == FULL && offered(open, strict, certified) == FULL);
    MUST(offered(open, strict, anyone) == FAILED && offered(optional, strict, anyone) == FAILED);
    MUST(offered(optional, optional, anyone) == RESUMED);
    MUST(offered(lenient, lenient, certified) == RESUMED);
    MUST(offered(lenient, lenient, strange) == FULL); /* its certificate failed */
    MUST(offered(nameless, nameless, certified) == FULL);
    free_contexts(all, sizeof all / sizeof *all);
    free_contexts((SSL_CTX *[]){certified, anyone, strange}, 3);
}

/* A connection that asks behind the handshake lets clients in without a certificate, in TLS 1.3. */
static void post_handshake_authentication(void)
{
    SSL_CTX *later = installed(verifying(SSL_VERIFY_FAIL_IF_NO_PEER_CERT | SSL_VERIFY_POST_HANDSHAKE), "later", HOST);
    SSL_CTX *anyone = client(FILES);

    MUST(version == TLS1_2_VERSION || offered(later, later, anyone) == RESUMED);
    free_contexts((SSL_CTX *[]){later, anyone}, 2);
}

/* A connection that asked for nothing in its handshake asks afterwards, and then issues a ticket: it proves nothing. */
static void late_demand(void)
{
    static const int STRICT = SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT;
    SSL_CTX *strict = installed(verifying(SSL_VERIFY_FAIL_IF_NO_PEER_CERT), "demand", HOST), *anyone = client(FILES);
    connection late = new_connection(strict, anyone, "localhost", NULL);
    SSL_SESSION *session = NULL;

    SSL_set_verify(late.server, SSL_VERIFY_NONE, NULL);
    MUST(shake_hands(late));
    SSL_set_verify(late.server, STRICT, NULL);
    MUST(version == TLS1_2_VERSION || SSL_new_session_ticket(late.server) == 1);
    deliver_tickets(late);
    keep_session(late, &session);
    mark_closed(late.server);
    mark_closed(late.client);
    free_connection(late);
    MUST(resumed_flush(strict, PATIENCE) == 1);
    MUST(meet(strict, anyone, "localhost", &session) == FAILED);
    SSL_SESSION_free(session);
    free_contexts((SSL_CTX *[]){strict, anyone}, 2);
}

/* A connection asks for a certificate by renegotiation: its own session, which has none, does not resume. */
static void renegotiation(void)
{
    resumed_options ignoring = {.ignore_id_context = 1};
    SSL_CTX *asking = server(CERTIFICATE), *certified = client(CLIENT);
    char byte;

    MUST(SSL_CTX_load_verify_locations(asking, files[CA], NULL) == 1);
    installed(asking, "renegotiation", ignoring);
    connection new = new_connection(asking, certified, NULL, NULL);
    MUST(shake_hands(new));
    MUST(resumed_flush(asking, PATIENCE) == 1);
    SSL_set_verify(new.server, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    MUST(SSL_renegotiate(new.server) == 1);
    MUST(SSL_do_handshake(new.server) == 1);
    for (int turn = 0; turn < 6; turn++) {
        SSL_read(new.client, &byte, 1);
        SSL_read(new.server, &byte, 1);
    }
    ERR_clear_error();
    MUST(!SSL_renegotiate_pending(new.server) && !SSL_session_reused(new.server));
    MUST(SSL_get_verify_result(new.server) == X509_V_OK && SSL_SESSION_get0_peer(SSL_get_session(new.server)));
    MUST(SSL_write(new.client, "x", 1) == 1 && SSL_read(new.server, &byte, 1) == 1);
    MUST(count_of(asking, "terminations ") == 0 && refused(asking, "context-mismatch") == 1);
    free_connection(new);
    free_contexts((SSL_CTX *[]){asking, certified}, 2);
}

/* The client's certificate ends, and with it its session. Tickets of resumed connections end then, too. */
static void end_of_a_certificate(void)
{
    SSL_CTX *strict = installed(verifying(SSL_VERIFY_FAIL_IF_NO_PEER_CERT), "ends", HOST), *mortal = client(SHORT);
    SSL_SESSION *session = NULL;

    MUST(meet(strict, mortal, "localhost", &session) == FULL);
    MUST(meet(strict, mortal, "localhost", &session) == RESUMED);
    sleep((unsigned)life + 1);
    MUST(meet(strict, mortal, "localhost", &session) == FAILED);
    SSL_SESSION_free(session);
    free_contexts((SSL_CTX *[]){strict, mortal}, 2);
}

static void id_contexts(void)
{
    resumed_options ignoring = {.single_host = 1, .ignore_id_context = 1};
    SSL_CTX *contexts[] = {server(CERTIFICATE), server(CERTIFICATE), server(CERTIFICATE), server(CERTIFICATE)};
    SSL_CTX *anyone = client(FILES);

    for (unsigned char number = 0; number < 4; number++) {
        MUST(SSL_CTX_set_session_id_context(contexts[number], &number, 1) == 1);
        installed(contexts[number], number < 2 ? "ids" : "no-ids", number < 2 ? HOST : ignoring);
    }
    MUST(offered(contexts[0], contexts[0], anyone) == RESUMED);
    MUST(offered(contexts[0], contexts[1], anyone) == FULL);
    MUST(offered(contexts[2], contexts[3], anyone) == RESUMED);
    free_contexts(contexts, 4);
    SSL_CTX_free(anyone);
}

static SSL_CTX *chosen;

static int choose(SSL *ssl, int *unused, void *argument)
{
    (void)unused;
    if (!argument || strcmp(SSL_get_servername(ssl, TLSEXT_NAMETYPE_host_name), "localhost") != 0)
        SSL_set_SSL_CTX(ssl, chosen);
    return SSL_TLSEXT_ERR_OK;
}

static void virtual_hosts(void)
{
    SSL_CTX *first = installed(server(CERTIFICATE), "names", NAMES), *second = installed(server(OTHER), "names", NAMES);
    SSL_CTX *third = installed(server(CERTIFICATE), "names", NAMES), *anyone = client(FILES);
    SSL_SESSION *session = NULL, *kept = NULL;
    int before = 0;

    SSL_CTX_set_tlsext_servername_callback(first, choose);
    SSL_CTX_set_tlsext_servername_arg(first, first);
    chosen = second;
    for (int name = 0; name < 2; name++) {
        const char *names[] = {"localhost", "other.example"};
        MUST(meet(first, anyone, names[name], &session) == FULL);
        before = informed;
        MUST(meet(first, anyone, names[name], &session) == RESUMED);
        MUST(informed == before + 1); /* the application's own callback */
        if (name == 0) {
            MUST(meet(first, anyone, names[1], &session) == FULL);
            SSL_SESSION_free(session);
            session = NULL;
        }
    }
    /* Another host now serves the second name. It fits the session of neither. */
    kept = SSL_SESSION_dup(session);
    chosen = third;
    MUST(meet(first, anyone, "other.example", &session) == ENDED);
    MUST(count_of(first, "terminations context-mismatch ") == 1);
    MUST(meet(first, anyone, "other.example", &session) == FULL); /* nor what was issued then, nor any other session of the name */
    MUST(meet(first, anyone, "other.example", &kept) == FULL);
    MUST(meet(first, anyone, "other.example", &kept) == FULL);
    MUST(refused(first, "context-unstable") >= 3);
    SSL_SESSION_free(session);
    SSL_SESSION_free(kept);
    free_contexts((SSL_CTX *[]){first, second, third, anyone}, 4);
}

/* A host with a namespace of its own, which the callback chooses, has no part in the sessions of the first one's. */
static void tenants(void)
{
    SSL_CTX *first = installed(server(CERTIFICATE), "landlord", NAMES), *second = installed(server(CERTIFICATE), "landlord", NAMES);
    SSL_CTX *tenant = installed(server(CERTIFICATE), "tenant", NAMES), *anyone = client(FILES);
    SSL_SESSION *session = NULL;

    SSL_CTX_set_tlsext_servername_callback(first, choose);
    chosen = tenant;
    for (int turn = 0; turn < 4; turn++)
        MUST(meet(first, anyone, "localhost", &session) == FULL);
    MUST(count_of(first, "puts stored ") == 0 && count_of(first, "terminations ") == 0);
    chosen = second;
    MUST(meet(first, anyone, "localhost", &session) == FULL && meet(first, anyone, "localhost", &session) == RESUMED);
    chosen = tenant;
    MUST(meet(first, anyone, "localhost", &session) == ENDED);
    MUST(meet(first, anyone, "localhost", &session) == FULL);
    SSL_SESSION_free(session);
    free_contexts((SSL_CTX *[]){first, second, tenant, anyone}, 4);
}

/* OpenSSL drops a session whose hash is not that of the cipher which the server has chosen, and issues no ticket. */
static void other_ciphers(void)
{
    resumed_options once = {.single_host = 1, .single_use = 1};
    SSL_CTX *one = server(CERTIFICATE), *other = server(CERTIFICATE), *anyone = client(FILES);
    SSL_SESSION *session = NULL, *kept;

    MUST(SSL_CTX_set_ciphersuites(other, "TLS_AES_128_GCM_SHA256") == 1);
    installed(one, "ciphers", once);
    installed(other, "ciphers", once);
    MUST(meet(one, anyone, "localhost", &session) == FULL);
    kept = SSL_SESSION_dup(session);
    MUST(meet(other, anyone, "localhost", &session) == FULL && refused(other, "other-cipher") == 1);
    MUST(meet(other, anyone, "localhost", &session) == RESUMED);
    MUST(meet(one, anyone, "localhost", &kept) == RESUMED); /* it was not spent */
    SSL_SESSION_free(session);
    SSL_SESSION_free(kept);
    free_contexts((SSL_CTX *[]){one, other, anyone}, 3);
}

/* OpenSSL resumes no session without an extended master secret for a client that offers one (RFC 7627 section 5.3). */
static void discarded_sessions(void)
{
    SSL_CTX *servers = installed(server(CERTIFICATE), "discarded", HOST), *old = client(FILES), *anyone = client(FILES);
    SSL_SESSION *session = NULL, *kept;

    SSL_CTX_set_options(old, SSL_OP_NO_EXTENDED_MASTER_SECRET);
    MUST(meet(servers, old, "localhost", &session) == FULL);
    kept = SSL_SESSION_dup(session);
    MUST(meet(servers, anyone, "localhost", &session) == FULL);
    MUST(count_of(servers, "misses not-resumed ") == 1 && count_of(servers, "hits store ") == 0);
    MUST(meet(servers, old, "localhost", &kept) == RESUMED);
    MUST(count_of(servers, "misses not-resumed ") == 1 && count_of(servers, "hits store ") == 1);
    SSL_SESSION_free(session);
    SSL_SESSION_free(kept);
    free_contexts((SSL_CTX *[]){servers, old, anyone}, 3);
}

static const unsigned char DATA[32] = "data of the application";

static int attach(SSL *ssl, void *unused)
{
    (void)unused;
    return SSL_SESSION_set1_ticket_appdata(SSL_get_session(ssl), DATA, sizeof DATA);
}

static void application_data(void)
{
    SSL_CTX *attaching = installed(server(CERTIFICATE), "data", HOST), *anyone = client(FILES);

    MUST(SSL_CTX_set_session_ticket_cb(attaching, attach, NULL, NULL) == 1);
    MUST(offered(attaching, attaching, anyone) == FULL);
    connection new = new_connection(attaching, anyone, NULL, NULL);
    void *data;
    size_t length;

    MUST(shake_hands(new));
    MUST(SSL_SESSION_get0_ticket_appdata(SSL_get_session(new.server), &data, &length) == 1);
    MUST(length == sizeof DATA && memcmp(data, DATA, length) == 0); /* it stayed */
    free_connection(new);
    free_contexts((SSL_CTX *[]){attaching, anyone}, 2);
}

static void single_use(void)
{
    resumed_options once = {.single_host = 1, .single_use = 1};
    SSL_CTX *one = installed(server(CERTIFICATE), "once", once), *other = installed(server(OTHER), "once", once);
    SSL_CTX *retrying = installed(server(CERTIFICATE), "once", once), *anyone = client(FILES), *identified = server(CERTIFICATE);
    SSL_SESSION *session = NULL, *kept;

    MUST(SSL_CTX_set_session_id_context(identified, (const unsigned char *)"other", 5) == 1);
    installed(identified, "once", once);

    MUST(meet(one, anyone, "localhost", &session) == FULL);
    kept = SSL_SESSION_dup(session);
    MUST(meet(other, anyone, "localhost", &session) == FULL); /* and the session is not spent */
    MUST(meet(one, anyone, "localhost", &kept) == RESUMED);
    SSL_SESSION_free(kept);
    SSL_SESSION_free(session);
    /* The id context of the other one is known by its last full handshake. */
    session = NULL;
    MUST(meet(identified, anyone, "localhost", &session) == FULL);
    SSL_SESSION_free(session);
    session = NULL;
    MUST(meet(one, anyone, "localhost", &session) == FULL);
    kept = SSL_SESSION_dup(session);
    MUST(meet(identified, anyone, "localhost", &session) == FULL);
    MUST(meet(one, anyone, "localhost", &kept) == RESUMED);
    SSL_SESSION_free(kept);
    SSL_SESSION_free(session);
    /* OpenSSL looks the session up again after a HelloRetryRequest. */
    MUST(SSL_CTX_set1_groups_list(retrying, "P-384") == 1 && SSL_CTX_set1_groups_list(anyone, "P-256:P-384") == 1);
    MUST(offered(retrying, retrying, anyone) == RESUMED);
    free_contexts((SSL_CTX *[]){one, other, retrying, identified, anyone}, 5);
}

static void sizes_of_options(void)
{
    struct {
        resumed_options known;
        char unknown[16];
    } options = {.known = {.target = files[TARGET], .namespace_ = "sizes", .keyring = files[KEYRING]}};
    SSL_CTX *contexts[] = {server(CERTIFICATE), server(CERTIFICATE), server(CERTIFICATE)};

    options.known.size = offsetof(resumed_options, keyring);
    MUST(strstr(resumed_install(contexts[0], &options.known), "sizeof(resumed_options)"));
    options.known.size = offsetof(resumed_options, ignore_id_context); /* the first header */
    MUST(resumed_install(contexts[0], &options.known) == NULL);
    options.known.size = sizeof options;
    MUST(resumed_install(contexts[1], &options.known) == NULL);
    options.unknown[15] = 1;
    MUST(strstr(resumed_install(contexts[2], &options.known), "newer than the library"));
    free_contexts(contexts, 3);
}

int main(int argc, char **argv)
{
    static const struct option names[] = {
        {"certificate", required_argument, NULL, CERTIFICATE},
        {"other", required_argument, NULL, OTHER},
        {"ca", required_argument, NULL, CA},
        {"client", required_argument, NULL, CLIENT},
        {"short", required_argument, NULL, SHORT},
        {"stranger", required_argument, NULL, STRANGER},
        {"target", required_argument, NULL, TARGET},
        {"keyring", required_argument, NULL, KEYRING},
        {"life", required_argument, NULL, FILES},
        {"tickets", required_argument, NULL, FILES + 1},
        {0},
    };
    int name;

    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
        if (name < 0 || name > FILES + 1)
            return 2;
        if (name == FILES)
            life = atoi(optarg);
        else if (name > FILES)
            tickets = atoi(optarg);
        else
            files[name] = optarg;
    }
    for (name = 0; name < FILES; name++)
        MUST(files[name]);
    version = TLS1_3_VERSION;
    end_of_a_certificate();
    sizes_of_options();
    for (version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        server_identities();
        client_certificates();
        id_contexts();
        post_handshake_authentication();
        late_demand();
        virtual_hosts();
        tenants();
        single_use();
    }
    version = TLS1_2_VERSION;
    renegotiation();
    if (!tickets)
        discarded_sessions();
    version = TLS1_3_VERSION;
    other_ciphers();
    application_data();
    printf("%d %d\n", made, reused);
    return 0;
}
