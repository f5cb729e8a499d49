/*
 * A program with session callbacks of its own and libresumed-preload under it, over memory. Exits 1 at the first condition that does not
 * hold.
 *
 *     observed CERTIFICATE observer|cache
 *
 * An observer has a new and a remove callback, which must be called. A cache has a get callback as well: none of its callbacks may be
 * called. Sessions resume from the store in both cases.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <openssl/err.h>
#include <openssl/ssl.h>

static int added, removed, queried;

#define MUST(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

static void fail(const char *condition, int line)
{
    fprintf(stderr, "observed: line %d: does not hold: %s\n", line, condition);
    ERR_print_errors_fp(stderr);
    _exit(1);
}

static int on_new(SSL *ssl, SSL_SESSION *session)
{
    (void)ssl;
    added++;
    SSL_SESSION_free(session);
    return 1; /* it has taken the reference, and released it */
}

static void on_remove(SSL_CTX *context, SSL_SESSION *session)
{
    (void)context, (void)session;
    removed++;
}

static SSL_SESSION *on_get(SSL *ssl, const unsigned char *id, int length, int *copy)
{
    (void)ssl, (void)id, (void)length, (void)copy;
    queried++;
    return NULL;
}

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
    MUST(SSL_write(server, "x", 1) == 1 && SSL_read(client, &byte, 1) == 1);
    int resumed = SSL_session_reused(server);
    SSL_SESSION_free(*session);
    *session = SSL_SESSION_dup(SSL_get0_session(client));
    SSL_set_shutdown(client, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
    SSL_free(server); /* without a close_notify: OpenSSL calls the remove callback */
    SSL_free(client);
    ERR_clear_error();
    return resumed;
}

int main(int argc, char **argv)
{
    MUST(argc == 3);
    int caches = strcmp(argv[2], "cache") == 0;
    SSL_CTX *servers = SSL_CTX_new(TLS_server_method()), *clients = SSL_CTX_new(TLS_client_method());
    SSL_SESSION *session = NULL;

    MUST(SSL_CTX_set_max_proto_version(servers, TLS1_2_VERSION) == 1);
    MUST(SSL_CTX_use_certificate_chain_file(servers, argv[1]) == 1);
    MUST(SSL_CTX_use_PrivateKey_file(servers, argv[1], SSL_FILETYPE_PEM) == 1);
    SSL_CTX_sess_set_new_cb(servers, on_new);
    SSL_CTX_sess_set_remove_cb(servers, on_remove);
    if (caches)
        SSL_CTX_sess_set_get_cb(servers, on_get);
    MUST(!meet(servers, clients, &session) && meet(servers, clients, &session));
    MUST(caches ? added + removed + queried == 0 : added == 1 && removed == 2);
    SSL_SESSION_free(session);
    SSL_CTX_free(servers);
    SSL_CTX_free(clients);
    return 0;
}
