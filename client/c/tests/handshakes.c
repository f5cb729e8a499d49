/*
 * Servers with libresumed and their clients in one process, over memory, for sanitizers. Prints the numbers of handshakes and of resumptions at its end;
 * exits 1 at the first handshake that does not go as it must.
 *
 *     handshakes --certificate FILE --target 127.0.0.1:7400 --namespace shop --keyring fleet.keys [--mirror BYTES]
 *                [--single-use] [--families NUMBER] [--threads NUMBER] [--children NUMBER] [--lies]
 *
 * A family is a full handshake and the resumptions of its sessions. Families run in `threads` at once, and then in each of `children` forked processes.
 * With --lies the store returns arbitrary answers: no session need resume, and a value with a valid seal may be
 * a session that the client does not have.
 */
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <openssl/err.h>
#include <resumed.h>

/* How a connection ends. */
enum ending { CLOSED, CUT, ALERT_SENT, ALERT_RECEIVED, ENDINGS };

static const unsigned char BAD_RECORD[5 + 64] = {0x17, 3, 3, 0, 64};
static const unsigned PATIENCE = 20000; /* milliseconds */

static resumed_options options = {.size = sizeof options, .deadline_ms = 10000};
static const char *certificate;
static int lies;
static long families = 100;
static atomic_long handshakes, resumptions;
static SSL_CTX *shared;

#define MUST(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

static void fail(const char *what, int line)
{
    fprintf(stderr, "handshakes: line %d: not so: %s\n", line, what);
    ERR_print_errors_fp(stderr);
    _exit(1);
}

static SSL_CTX *server_context(void)
{
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());

    MUST(SSL_CTX_use_certificate_chain_file(context, certificate) == 1);
    MUST(SSL_CTX_use_PrivateKey_file(context, certificate, SSL_FILETYPE_PEM) == 1);
    return context;
}

static SSL_CTX *client_context(int version)
{
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());

    MUST(SSL_CTX_set_min_proto_version(context, version) == 1 && SSL_CTX_set_max_proto_version(context, version) == 1);
    return context;
}

static void end(SSL *server, SSL *client, enum ending ending)
{
    char buffer[64];

    switch (ending) {
    case CLOSED: SSL_shutdown(server); break;
    case ALERT_SENT:
        BIO_write(SSL_get_wbio(client), BAD_RECORD, sizeof BAD_RECORD);
        MUST(SSL_read(server, buffer, sizeof buffer) <= 0);
        break;
    case ALERT_RECEIVED:
        BIO_write(SSL_get_wbio(server), BAD_RECORD, sizeof BAD_RECORD);
        MUST(SSL_read(client, buffer, sizeof buffer) <= 0);
        MUST(SSL_read(server, buffer, sizeof buffer) <= 0);
        break;
    default: break;
    }
    /* Or OpenSSL takes the client's connection for a failed one, and its session for useless. */
    SSL_set_shutdown(client, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
}

/* Does as much of a handshake as can be done; returns whether it is done, and in `failed` whether it never will be. */
static int shaken(SSL *server, SSL *client, int *failed)
{
    int connected = SSL_connect(client), accepted = SSL_accept(server);

    *failed = (connected != 1 && SSL_get_error(client, connected) != SSL_ERROR_WANT_READ)
        || (accepted != 1 && SSL_get_error(server, accepted) != SSL_ERROR_WANT_READ);
    return connected == 1 && accepted == 1;
}

/*
 * Shakes hands, offering a session or NULL; returns the client's new session, and in `resumed` whether the old one was taken. NULL if
 * the handshake failed.
 */
static SSL_SESSION *meet(SSL_CTX *servers, SSL_CTX *clients, SSL_SESSION *offered, enum ending ending, int *resumed)
{
    SSL *server = SSL_new(servers), *client = SSL_new(clients);
    SSL_SESSION *session = NULL;
    BIO *ours, *theirs;
    char byte;
    int failed = 0;

    MUST(server && client && BIO_new_bio_pair(&ours, 0, &theirs, 0) == 1);
    SSL_set_bio(server, ours, ours);
    SSL_set_bio(client, theirs, theirs);
    MUST(SSL_set_tlsext_host_name(client, "localhost") == 1);
    if (offered)
        MUST(SSL_set_session(client, offered) == 1);
    while (!failed && !shaken(server, client, &failed))
        ;
    handshakes++;
    *resumed = SSL_session_reused(server);
    if (!failed) {
        MUST(SSL_write(server, "x", 1) == 1 && SSL_read(client, &byte, 1) == 1); /* tickets come before it */
        resumptions += *resumed;
        session = SSL_SESSION_dup(SSL_get0_session(client)); /* which does not hear how the connection ends */
        MUST(session && resumed_flush(servers, PATIENCE) == 1);
        end(server, client, ending);
    }
    MUST(!failed || (lies && offered));
    SSL_free(server);
    SSL_free(client);
    ERR_clear_error();
    MUST(resumed_flush(servers, PATIENCE) == 1);
    return session;
}

/* Offers a session, drops the new one, and returns whether it resumed. */
static int offer(SSL_CTX *servers, SSL_CTX *clients, SSL_SESSION *session)
{
    int resumed;

    SSL_SESSION_free(meet(servers, clients, session, CUT, &resumed));
    return resumed;
}

/* Removes a session of the fleet's by the id that a client has of it. */
static void withdraw(SSL_CTX *servers, SSL_SESSION *session)
{
    const unsigned char *id = NULL;
    size_t length = 0;

    if (!session)
        return;
    if (SSL_SESSION_get_protocol_version(session) == TLS1_3_VERSION) {
        SSL_SESSION_get0_ticket(session, &id, &length);
    } else {
        unsigned bytes;
        id = SSL_SESSION_get_id(session, &bytes);
        length = bytes;
    }
    resumed_remove(servers, id, length);
    MUST(resumed_flush(servers, PATIENCE) == 1);
}

static void family(SSL_CTX *servers, SSL_CTX *clients, long number)
{
    int resumed;
    enum ending ending = (enum ending)(number / 2 % ENDINGS);
    SSL_SESSION *first = meet(servers, clients, NULL, CUT, &resumed);

    MUST(!resumed);
    if (options.single_use) {
        resumed = offer(servers, clients, first);
        MUST(lies || resumed);
        resumed = offer(servers, clients, first);
        MUST(lies || !resumed);
    } else {
        SSL_SESSION *second = meet(servers, clients, first, CLOSED, &resumed);
        MUST(lies || resumed);
        SSL_SESSION *last = meet(servers, clients, second, ending, &resumed);
        MUST(lies || resumed);
        int fatal = ending == ALERT_SENT || ending == ALERT_RECEIVED;
        if (!fatal) {
            resumed = offer(servers, clients, last);
            MUST(lies || resumed);
            withdraw(servers, last);
        }
        resumed = offer(servers, clients, last);
        MUST(lies || !resumed);
        SSL_SESSION_free(second);
        SSL_SESSION_free(last);
    }
    SSL_SESSION_free(first);
}

/* Makes a context with a store connection of its own, uses it once, and frees it. */
static void passing_context(SSL_CTX *clients, long number)
{
    resumed_options own = options;
    SSL_CTX *context = server_context();
    int resumed;

    own.lifetime_seconds = 3600 + (unsigned)number;
    MUST(resumed_install(context, &own) == NULL);
    MUST(strstr(resumed_install(context, &own), "already"));
    own.keyring = "/nonexistent";
    MUST(resumed_install(context, &own) != NULL);
    SSL_SESSION_free(meet(context, clients, NULL, CUT, &resumed));
    SSL_CTX_free(context);
}

static void *run(void *unused)
{
    SSL_CTX *clients[] = {client_context(TLS1_2_VERSION), client_context(TLS1_3_VERSION)};

    for (long number = 0; number < families; number++) {
        family(shared, clients[number % 2], number);
        if (number % 10 == 0)
            passing_context(clients[number / 10 % 2], number);
    }
    SSL_CTX_free(clients[0]);
    SSL_CTX_free(clients[1]);
    return unused;
}

static void fork_one(void)
{
    int status;
    pid_t child = fork();

    MUST(child >= 0);
    if (child == 0) {
        run(NULL);
        SSL_CTX_free(shared);
        /* Without exit handlers: the memory of the parent's thread has no owner here, which is no leak of this child. */
        _exit(0);
    }
    MUST(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char **argv)
{
    enum { CERTIFICATE, TARGET, NAMESPACE, KEYRING, MIRROR, SINGLE_USE, FAMILIES, THREADS, CHILDREN, LIES };
    static const struct option names[] = {
        {"certificate", required_argument, NULL, CERTIFICATE},
        {"target", required_argument, NULL, TARGET},
        {"namespace", required_argument, NULL, NAMESPACE},
        {"keyring", required_argument, NULL, KEYRING},
        {"mirror", required_argument, NULL, MIRROR},
        {"single-use", no_argument, NULL, SINGLE_USE},
        {"families", required_argument, NULL, FAMILIES},
        {"threads", required_argument, NULL, THREADS},
        {"children", required_argument, NULL, CHILDREN},
        {"lies", no_argument, NULL, LIES},
        {0},
    };
    enum { MOST_THREADS = 16 };
    pthread_t running[MOST_THREADS];
    long threads = 1, children = 0;
    int name;

    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1)
        switch (name) {
        case CERTIFICATE: certificate = optarg; break;
        case TARGET: options.target = optarg; break;
        case NAMESPACE: options.namespace_ = optarg; break;
        case KEYRING: options.keyring = optarg; break;
        case MIRROR: options.mirror_bytes = strtoul(optarg, NULL, 10); break;
        case SINGLE_USE: options.single_use = 1; break;
        case FAMILIES: families = strtol(optarg, NULL, 10); break;
        case THREADS: threads = strtol(optarg, NULL, 10); break;
        case CHILDREN: children = strtol(optarg, NULL, 10); break;
        case LIES: lies = 1; break;
        default: return 2;
        }
    MUST(certificate && threads <= MOST_THREADS);
    shared = server_context();
    MUST(resumed_install(NULL, &options) && resumed_install(shared, NULL));
    MUST(resumed_install(shared, &options) == NULL);
    if (children)
        fork_one(); /* before there is any connection */
    for (long number = 0; number < threads; number++)
        MUST(pthread_create(&running[number], NULL, run, NULL) == 0);
    for (long number = 0; number < threads; number++)
        MUST(pthread_join(running[number], NULL) == 0);
    for (long number = 1; number < children; number++)
        fork_one();
    char stats[4096];
    MUST(resumed_stats(shared, stats, sizeof stats) < sizeof stats);
    char metrics[32768];
    MUST(resumed_metrics(shared, metrics, sizeof metrics) < sizeof metrics);
    MUST(strstr(metrics, "resumed_frontend_hits_total{namespace=\"") && strstr(metrics, "resumed_frontend_lookup_seconds_count"));
    printf("handshakes %ld\nresumed %ld\n%s", atomic_load(&handshakes), atomic_load(&resumptions), stats);
    SSL_CTX_free(shared);
    return 0;
}
