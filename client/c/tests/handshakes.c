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
#include <sys/wait.h>

#include <resumed.h>

#include "support.h"

/* How a connection ends. */
enum ending { CLOSED, CUT, ALERT_SENT, ALERT_RECEIVED, ENDINGS };


static resumed_options options = {.size = sizeof options, .deadline_ms = 10000};
static const char *certificate;
static int lies;
static long families = 100;
static atomic_long handshakes, resumptions;
static SSL_CTX *shared;

static void end(connection it, enum ending ending)
{
    switch (ending) {
    case CLOSED: SSL_shutdown(it.server); break;
    case ALERT_SENT: send_bad_record(it.client, it.server); break;
    case ALERT_RECEIVED: receive_alert(it); break;
    default: break;
    }
    mark_closed(it.client);
}

/*
 * Shakes hands, offering a session or NULL; returns the client's new session, and in `resumed` whether the old one was taken. NULL if
 * the handshake failed.
 */
static SSL_SESSION *meet(SSL_CTX *servers, SSL_CTX *clients, SSL_SESSION *offered, enum ending ending, int *resumed)
{
    connection new = new_connection(servers, clients, "localhost", offered);
    SSL_SESSION *session = NULL;
    int succeeded = shake_hands(new);

    handshakes++;
    *resumed = SSL_session_reused(new.server);
    if (succeeded) {
        deliver_tickets(new);
        resumptions += *resumed;
        keep_session(new, &session);
        MUST(session && resumed_flush(servers, PATIENCE) == 1);
        end(new, ending);
    }
    MUST(succeeded || (lies && offered));
    free_connection(new);
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
    SSL_CTX *context = server_context(certificate);
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
    shared = server_context(certificate);
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
    MUST(strstr(metrics, "resumed_frontend_hits_total{session_namespace=\"") && strstr(metrics, "resumed_frontend_lookup_duration_seconds_count"));
    printf("handshakes %ld\nresumed %ld\n%s", atomic_load(&handshakes), atomic_load(&resumptions), stats);
    SSL_CTX_free(shared);
    return 0;
}
