/*
 * A program with session callbacks of its own and libresumed-preload under it, over memory. Exits 1 at the first condition that does not
 * hold.
 *
 *     observed CERTIFICATE observer|cache
 *
 * An observer has a new and a remove callback, which must be called. A cache has a get callback as well: none of its callbacks may be
 * called. Sessions resume from the store in both cases.
 */
#include "support.h"

static int added, removed, queried;

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
    connection new = new_connection(servers, clients, NULL, *session);

    MUST(shake_hands(new));
    deliver_tickets(new);
    int resumed = SSL_session_reused(new.server);
    keep_session(new, session);
    mark_closed(new.client);
    free_connection(new); /* the server without a close_notify: OpenSSL calls the remove callback */
    return resumed;
}

int main(int argc, char **argv)
{
    MUST(argc == 3);
    int caches = strcmp(argv[2], "cache") == 0;
    SSL_CTX *servers = server_context(argv[1]), *clients = client_context(TLS1_2_VERSION);
    SSL_SESSION *session = NULL;

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
