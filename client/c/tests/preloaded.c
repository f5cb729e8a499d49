/*
 * A program without libresumed, which runs with libresumed-preload: its servers and clients are in one process, over memory.
 *
 * Its servername callback sets an info callback for the connection, and chooses a host by an argument. A session
 * resumes at its host; then the other host is chosen, and the connection must end. Id contexts are set for each connection, too.
 */
#include "support.h"

static int informed;
static SSL_CTX *chosen;

static void inform(const SSL *ssl, int kind, int value)
{
    (void)ssl, (void)value;
    informed += kind == SSL_CB_HANDSHAKE_DONE;
}

static int choose(SSL *ssl, int *unused, void *argument)
{
    (void)unused, (void)argument;
    SSL_set_info_callback(ssl, inform);
    SSL_set_SSL_CTX(ssl, chosen);
    return SSL_TLSEXT_ERR_OK;
}

/* Returns whether the session resumed; -1 if the connection ended then. */
static int meet(SSL_CTX *servers, SSL_CTX *clients, const char *id_context, SSL_SESSION **session)
{
    connection new = new_connection(servers, clients, "localhost", *session);
    int before = informed, resumed;
    char byte;

    MUST(SSL_set_session_id_context(new.server, (const unsigned char *)id_context, (unsigned)strlen(id_context)) == 1);
    MUST(shake_hands(new) && informed == before + 1);
    resumed = SSL_session_reused(new.server);
    MUST(SSL_write(new.client, "x", 1) == 1);
    if (SSL_read(new.server, &byte, 1) == 1)
        deliver_tickets(new);
    else
        resumed = -1;
    keep_session(new, session);
    mark_closed(new.server);
    mark_closed(new.client);
    free_connection(new);
    return resumed;
}

int main(int argc, char **argv)
{
    MUST(argc == 3);
    for (version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        SSL_CTX *first = server_context(argv[1]), *other = server_context(argv[2]), *clients = client_context(version);
        SSL_SESSION *session = NULL, *kept;

        SSL_CTX_set_tlsext_servername_callback(first, choose);
        chosen = first;
        MUST(meet(first, clients, "a", &session) == 0);
        kept = SSL_SESSION_dup(session);
        MUST(meet(first, clients, "b", &session) == 0); /* and the single use is not spent */
        MUST(meet(first, clients, "a", &kept) == 1);
        SSL_SESSION_free(session);
        session = NULL;
        MUST(meet(first, clients, "a", &session) == 0);
        chosen = other;
        MUST(meet(first, clients, "a", &session) == -1);
        SSL_SESSION_free(session);
        SSL_SESSION_free(kept);
        free_contexts((SSL_CTX *[]){first, other, clients}, 3);
    }
    return 0;
}
