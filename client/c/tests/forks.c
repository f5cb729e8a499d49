/*
 * A server with libresumed that forks after a handshake, over memory. Exits 1 at the first condition that does not hold.
 *
 *     forks --certificate FILE --target 127.0.0.1:7400 --keyring fleet.keys
 *
 * It prints "stored" when the store has its session, and waits for a line: from then on the store must receive nothing on the connections
 * that exist. The parent removes the session. A forked child, whose connections are its own, must neither resume it nor have a socket of
 * its parent's.
 */
#include <dirent.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <openssl/err.h>
#include <resumed.h>

static const unsigned PATIENCE = 20000; /* milliseconds */

#define MUST(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

static void fail(const char *condition, int line)
{
    fprintf(stderr, "forks: line %d: does not hold: %s\n", line, condition);
    ERR_print_errors_fp(stderr);
    _exit(1);
}

/* Makes a connection that offers the session in *session, or none, and leaves the new one there; returns whether it resumed. */
static int meet(SSL_CTX *servers, SSL_CTX *clients, SSL_SESSION **session)
{
    SSL *server = SSL_new(servers), *client = SSL_new(clients);
    BIO *ours, *theirs;
    char byte;

    MUST(server && client && BIO_new_bio_pair(&ours, 0, &theirs, 0) == 1);
    SSL_set_bio(server, ours, ours);
    SSL_set_bio(client, theirs, theirs);
    if (*session)
        MUST(SSL_set_session(client, *session) == 1);
    for (int turn = 0; turn < 4; turn++) {
        SSL_connect(client);
        SSL_accept(server);
    }
    MUST(SSL_write(server, "x", 1) == 1 && SSL_read(client, &byte, 1) == 1); /* tickets precede it */
    int resumed = SSL_session_reused(server);
    SSL_SESSION_free(*session);
    *session = SSL_SESSION_dup(SSL_get0_session(client));
    SSL_set_shutdown(server, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
    SSL_set_shutdown(client, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
    SSL_free(server);
    SSL_free(client);
    ERR_clear_error();
    return resumed;
}

static int sockets(void)
{
    DIR *directory = opendir("/proc/self/fd");
    struct dirent *entry;
    struct stat status;
    int count = 0;

    MUST(directory);
    while ((entry = readdir(directory)))
        count += fstat(atoi(entry->d_name), &status) == 0 && S_ISSOCK(status.st_mode);
    closedir(directory);
    return count;
}

int main(int argc, char **argv)
{
    enum { CERTIFICATE, TARGET, KEYRING };
    static const struct option names[] = {
        {"certificate", required_argument, NULL, CERTIFICATE},
        {"target", required_argument, NULL, TARGET},
        {"keyring", required_argument, NULL, KEYRING},
        {0},
    };
    resumed_options options = {.size = sizeof options, .namespace_ = "forks", .deadline_ms = 10000, .single_host = 1};
    const char *certificate = NULL;
    SSL_SESSION *session = NULL, *removed;
    int name, status, before = sockets();

    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1)
        switch (name) {
        case CERTIFICATE: certificate = optarg; break;
        case TARGET: options.target = optarg; break;
        case KEYRING: options.keyring = optarg; break;
        default: return 2;
        }
    SSL_CTX *servers = SSL_CTX_new(TLS_server_method()), *clients = SSL_CTX_new(TLS_client_method());
    MUST(SSL_CTX_set_max_proto_version(servers, TLS1_2_VERSION) == 1); /* its session id is the id of the session in the store */
    MUST(SSL_CTX_use_certificate_chain_file(servers, certificate) == 1);
    MUST(SSL_CTX_use_PrivateKey_file(servers, certificate, SSL_FILETYPE_PEM) == 1);
    MUST(resumed_install(servers, &options) == NULL);

    MUST(!meet(servers, clients, &session) && resumed_flush(servers, PATIENCE) == 1);
    MUST(meet(servers, clients, &session) && sockets() > before);
    printf("stored\n");
    fflush(stdout);
    MUST(getchar() == '\n');
    removed = SSL_SESSION_dup(session);
    unsigned length;
    const unsigned char *id = SSL_SESSION_get_id(removed, &length);
    resumed_remove(servers, id, length);
    pid_t child = fork();
    MUST(child >= 0);
    if (child == 0) {
        MUST(sockets() == before);
        MUST(!meet(servers, clients, &removed)); /* the store still has it */
        MUST(meet(servers, clients, &removed) && sockets() > before);
        _exit(0);
    }
    MUST(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    return 0;
}
