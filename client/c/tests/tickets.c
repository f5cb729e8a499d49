/*
 * Tickets of the fleet: servers with libresumed and their clients in one process, over memory. Prints how many handshakes it made and how
 * many resumed, or the first thing that went otherwise than include/resumed.h says, and then exits 1.
 *
 *     tickets --certificate FILE --ca FILE --target 127.0.0.1:7400 --keyring fleet.keys
 *
 * `certificate` is of the host localhost; `ca` is an authority of clients.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <resumed.h>

enum file { CERTIFICATE, CA, TARGET, KEYRING, FILES };
enum ending { CLOSED, ALERT_SENT, ALERT_RECEIVED, REMOVED };

static const unsigned char BAD_RECORD[5 + 64] = {0x17, 3, 3, 0, 64};
static const unsigned PATIENCE = 20000; /* milliseconds */
static const size_t ID = 32;            /* length of the id of a stored session; tickets are longer */
static const char *files[FILES];
static int version, made, reused;

#define MUST(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

static void fail(const char *what, int line)
{
    fprintf(stderr, "tickets: TLS 1.%d, line %d: not so: %s\n", version - TLS1_2_VERSION + 2, line, what);
    ERR_print_errors_fp(stderr);
    _exit(1);
}

static long counted(SSL_CTX *context, const char *what)
{
    char stats[4096], *found;

    MUST(resumed_stats(context, stats, sizeof stats) < sizeof stats);
    return (found = strstr(stats, what)) ? strtol(found + strlen(what), NULL, 10) : 0;
}

static SSL_CTX *server(const char *namespace_, resumed_options options)
{
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());

    MUST(SSL_CTX_use_certificate_chain_file(context, files[CERTIFICATE]) == 1);
    MUST(SSL_CTX_use_PrivateKey_file(context, files[CERTIFICATE], SSL_FILETYPE_PEM) == 1);
    MUST(SSL_CTX_load_verify_locations(context, files[CA], NULL) == 1);
    MUST(SSL_CTX_set_session_id_context(context, (const unsigned char *)"tickets", 7) == 1);
    options.size = sizeof options;
    options.target = files[TARGET];
    options.keyring = files[KEYRING];
    options.namespace_ = namespace_;
    options.deadline_ms = 10000;
    options.single_host = 1;
    MUST(resumed_install(context, &options) == NULL);
    while (options.tickets && (counted(context, "held secrets ") < 2 || !counted(context, "held stream ")))
        usleep(1000); /* the process agrees on secrets, and gets the removals */
    return context;
}

static SSL_CTX *client(void)
{
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());

    MUST(SSL_CTX_set_min_proto_version(context, version) == 1 && SSL_CTX_set_max_proto_version(context, version) == 1);
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

static void end(SSL *there, SSL *here, enum ending ending)
{
    char buffer[64];

    switch (ending) {
    case ALERT_SENT:
        BIO_write(SSL_get_wbio(here), BAD_RECORD, sizeof BAD_RECORD);
        MUST(SSL_read(there, buffer, sizeof buffer) <= 0);
        break;
    case ALERT_RECEIVED:
        BIO_write(SSL_get_wbio(there), BAD_RECORD, sizeof BAD_RECORD);
        MUST(SSL_read(here, buffer, sizeof buffer) <= 0);
        MUST(SSL_read(there, buffer, sizeof buffer) <= 0);
        break;
    case REMOVED: resumed_remove_connection(there); /* falls through */
    case CLOSED: SSL_shutdown(there);
    }
    SSL_set_shutdown(here, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
}

/* Shakes hands with the session in *session, or none, and leaves the new one there; returns whether it resumed. */
static int meet_and(SSL_CTX *servers, SSL_CTX *clients, SSL_SESSION **session, enum ending ending)
{
    SSL *there = SSL_new(servers), *here = SSL_new(clients);
    BIO *ours, *theirs;
    char byte;
    int connected, accepted;

    MUST(there && here && BIO_new_bio_pair(&ours, 0, &theirs, 0) == 1);
    SSL_set_bio(there, ours, ours);
    SSL_set_bio(here, theirs, theirs);
    MUST(SSL_set_tlsext_host_name(here, "localhost") == 1);
    if (*session)
        MUST(SSL_set_session(here, *session) == 1);
    do {
        connected = SSL_connect(here);
        accepted = SSL_accept(there);
        MUST(connected == 1 || SSL_get_error(here, connected) == SSL_ERROR_WANT_READ);
        MUST(accepted == 1 || SSL_get_error(there, accepted) == SSL_ERROR_WANT_READ);
    } while (connected != 1 || accepted != 1);
    MUST(SSL_write(there, "x", 1) == 1 && SSL_read(here, &byte, 1) == 1); /* tickets come before it */
    int resumed = SSL_session_reused(there);
    made++;
    reused += resumed;
    SSL_SESSION_free(*session);
    *session = SSL_SESSION_dup(SSL_get0_session(here));
    end(there, here, ending);
    SSL_free(there);
    SSL_free(here);
    ERR_clear_error();
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
    SSL_CTX *servers = server("endings", TICKETS), *anyone = client();

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
    MUST(counted(servers, "refused revoked ") == 18 && counted(servers, "puts ") == 0);
    SSL_CTX_free(servers);
    SSL_CTX_free(anyone);
}

static void single_use(void)
{
    SSL_CTX *servers = server("once", ONCE), *anyone = client(), *retrying = server("once", ONCE);
    SSL_SESSION *session = NULL, *kept;

    MUST(!meet(servers, anyone, &session));
    kept = SSL_SESSION_dup(session);
    MUST(meet(servers, anyone, &session) && !offer(servers, anyone, kept) && counted(servers, "refused replayed ") == 1);
    SSL_SESSION_free(session);
    SSL_SESSION_free(kept);
    /* OpenSSL decrypts the ticket again after a HelloRetryRequest. */
    session = NULL;
    MUST(SSL_CTX_set1_groups_list(retrying, "P-384") == 1 && SSL_CTX_set1_groups_list(anyone, "P-256:P-384") == 1);
    MUST(!meet(retrying, anyone, &session) && meet(retrying, anyone, &session));
    SSL_SESSION_free(session);
    SSL_CTX_free(servers);
    SSL_CTX_free(retrying);
    SSL_CTX_free(anyone);
}

/* A child has the secrets and the removals of its parent: at once, and without the store. */
static void forks(void)
{
    SSL_CTX *servers = server("forks", TICKETS), *anyone = client();
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
    SSL_CTX_free(servers);
    SSL_CTX_free(anyone);
    if (child == 0)
        _exit(0); /* without exit handlers: the memory of the parent's thread has no owner here */
}

/* A stored session resumes; its ticket takes over, and ends when it would. A fatal alert removes both. */
static void moves(void)
{
    SSL_CTX *before = server("moves", STORED), *after = server("moves", TICKETS), *anyone = client();
    SSL_SESSION *session = NULL, *stored;

    MUST(!meet(before, anyone, &session));
    MUST(version == TLS1_2_VERSION || ticket(session) == ID);
    stored = SSL_SESSION_dup(session);
    MUST(meet(after, anyone, &session) && ticket(session) > ID);
    MUST(counted(after, "hits store ") == 1 && meet(after, anyone, &session) && counted(after, "resumed current ") == 1);
    SSL_SESSION_free(session);
    session = SSL_SESSION_dup(stored);
    MUST(meet_and(after, anyone, &session, ALERT_SENT));
    MUST(!offer(after, anyone, session) && !offer(after, anyone, stored) && !offer(before, anyone, stored));
    SSL_SESSION_free(session);
    SSL_SESSION_free(stored);
    SSL_CTX_free(before);
    SSL_CTX_free(after);
    SSL_CTX_free(anyone);
}

/* Without tickets_tls12 a session of TLS 1.2 is stored, and a ticket of TLS 1.2 that another configuration has issued does not resume. */
static void tls12(void)
{
    resumed_options only13 = {.tickets = 1};
    SSL_CTX *tickets = server("tls12", TICKETS), *stored = server("tls12", only13), *anyone = client();
    SSL_SESSION *session = NULL;

    MUST(!meet(stored, anyone, &session) && ticket(session) == 0 && meet(stored, anyone, &session));
    MUST(counted(stored, "hits store ") == 1 && counted(stored, "issued ") == 0);
    SSL_SESSION_free(session);
    session = NULL;
    MUST(!meet(tickets, anyone, &session) && ticket(session) > ID);
    MUST(!meet(stored, anyone, &session) && ticket(session) == 0 && meet(stored, anyone, &session));
    SSL_SESSION_free(session);
    SSL_CTX_free(tickets);
    SSL_CTX_free(stored);
    SSL_CTX_free(anyone);
}

/* Has a client show a certificate of so many bytes more than it needs. */
static void certify(SSL_CTX *context, int more)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *certificate = X509_new();
    char *comment = malloc((size_t)more + 1);

    memset(comment, 'x', (size_t)more);
    comment[more] = 0;
    X509_set_version(certificate, X509_VERSION_3);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -60);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    X509_set_pubkey(certificate, key);
    X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_ASC, (const unsigned char *)"client", -1, -1, 0);
    X509_set_issuer_name(certificate, X509_get_subject_name(certificate));
    X509_EXTENSION *extension = X509V3_EXT_conf_nid(NULL, NULL, NID_netscape_comment, comment);
    MUST(extension && X509_add_ext(certificate, extension, -1) == 1);
    MUST(X509_sign(certificate, key, EVP_sha256()) > 0);
    MUST(SSL_CTX_use_certificate(context, certificate) == 1 && SSL_CTX_use_PrivateKey(context, key) == 1);
    X509_EXTENSION_free(extension);
    X509_free(certificate);
    EVP_PKEY_free(key);
    free(comment);
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
        SSL_CTX *certified = client();
        SSL_SESSION *session = NULL;
        long stored = counted(servers, "puts stored ");
        int fits = !large || version == TLS1_3_VERSION;

        certify(certified, large ? 9000 : 1000);
        for (int turn = 0; turn < 3; turn++)
            MUST(meet(servers, certified, &session) == (fits && turn > 0));
        MUST(large ? (version == TLS1_2_VERSION ? ticket(session) == 0 : ticket(session) == ID) : ticket(session) > 1000);
        MUST((counted(servers, "puts stored ") > stored) == (large && version == TLS1_3_VERSION));
        SSL_SESSION_free(session);
        SSL_CTX_free(certified);
    }
    SSL_CTX_free(servers);
}

/* A client may offer a ticket without a session id (RFC 5077 section 3.4); then the server's answer has none, either. */
static void clients_without_id(void)
{
    SSL_CTX *servers = server("no-id", TICKETS), *anyone = client();
    SSL_SESSION *session = NULL, *kept;
    SSL *there, *here;
    BIO *ours, *theirs;
    unsigned length = 1;

    MUST(!meet(servers, anyone, &session));
    kept = SSL_SESSION_dup(session);
    MUST(SSL_SESSION_set1_id(session, (const unsigned char *)"", 0) == 1);
    there = SSL_new(servers), here = SSL_new(anyone);
    MUST(there && here && BIO_new_bio_pair(&ours, 0, &theirs, 0) == 1);
    SSL_set_bio(there, ours, ours);
    SSL_set_bio(here, theirs, theirs);
    MUST(SSL_set_tlsext_host_name(here, "localhost") == 1 && SSL_set_session(here, session) == 1);
    SSL_connect(here);
    MUST(SSL_accept(there) < 0 && SSL_session_reused(there) == 1);
    SSL_SESSION_get_id(SSL_get_session(there), &length);
    MUST(length == 0);
    SSL_free(there);
    SSL_free(here);
    ERR_clear_error();
    MUST(offer(servers, anyone, kept)); /* the connection was cut, not ended by an alert */
    SSL_SESSION_free(session);
    SSL_SESSION_free(kept);
    SSL_CTX_free(servers);
    SSL_CTX_free(anyone);
}

/* Early data could be replayed: a connection that accepts some issues no ticket that allows it. */
static void early_data(void)
{
    SSL_CTX *servers = server("early", TICKETS), *anyone = client();
    SSL_SESSION *session = NULL;

    SSL_CTX_set_max_early_data(servers, 1000);
    SSL_CTX_set_options(servers, SSL_OP_NO_ANTI_REPLAY);
    MUST(!meet(servers, anyone, &session) && ticket(session) == ID);
    MUST(!offer(servers, anyone, session));
    SSL_SESSION_free(session);
    SSL_CTX_free(servers);
    SSL_CTX_free(anyone);
}

/* Garbage and tickets of another fleet cost a full handshake, and the client gets a ticket of this one. */
static void other_tickets(void)
{
    SSL_CTX *servers = server("garbage", TICKETS), *strange = SSL_CTX_new(TLS_server_method()), *anyone = client();
    SSL_SESSION *session = NULL;

    MUST(SSL_CTX_use_certificate_chain_file(strange, files[CERTIFICATE]) == 1);
    MUST(SSL_CTX_use_PrivateKey_file(strange, files[CERTIFICATE], SSL_FILETYPE_PEM) == 1);
    MUST(!meet(strange, anyone, &session) && ticket(session) > ID);
    MUST(!meet(servers, anyone, &session) && meet(servers, anyone, &session));
    MUST(counted(servers, "refused ") == 0);
    SSL_SESSION_free(session);
    SSL_CTX_free(servers);
    SSL_CTX_free(strange);
    SSL_CTX_free(anyone);
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
