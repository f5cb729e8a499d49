/*
 * A program that knows nothing of libresumed, with libresumed-preload under it: it shakes hands with itself over BIO pairs.
 *
 * Its servername callback sets an info callback for the connection, and chooses a host by an argument. A session
 * resumes at its host; then the other host is chosen, and the connection must end. Id contexts are set for each connection, too.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <openssl/err.h>
#include <openssl/ssl.h>

static int informed;
static SSL_CTX *chosen;

#define MUST(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

static void fail(const char *what, int line)
{
    fprintf(stderr, "preloaded: line %d: not so: %s\n", line, what);
    ERR_print_errors_fp(stderr);
    _exit(1);
}

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

static SSL_CTX *server(const char *certificate)
{
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());

    MUST(SSL_CTX_use_certificate_chain_file(context, certificate) == 1);
    MUST(SSL_CTX_use_PrivateKey_file(context, certificate, SSL_FILETYPE_PEM) == 1);
    return context;
}

/* Returns whether the session resumed; -1 if the connection ended then. */
static int meet(SSL_CTX *servers, SSL_CTX *clients, const char *id_context, SSL_SESSION **session)
{
    SSL *there = SSL_new(servers), *here = SSL_new(clients);
    BIO *ours, *theirs;
    char byte;
    int before = informed, resumed;

    MUST(there && here && BIO_new_bio_pair(&ours, 0, &theirs, 0) == 1);
    SSL_set_bio(there, ours, ours);
    SSL_set_bio(here, theirs, theirs);
    MUST(SSL_set_session_id_context(there, (const unsigned char *)id_context, (unsigned)strlen(id_context)) == 1);
    MUST(SSL_set_tlsext_host_name(here, "localhost") == 1);
    if (*session)
        MUST(SSL_set_session(here, *session) == 1);
    for (int turn = 0; turn < 4; turn++) {
        SSL_connect(here);
        SSL_accept(there);
    }
    MUST(SSL_is_init_finished(there) && SSL_is_init_finished(here) && informed == before + 1);
    resumed = SSL_session_reused(there);
    MUST(SSL_write(here, "x", 1) == 1);
    if (SSL_read(there, &byte, 1) == 1)
        MUST(SSL_write(there, "x", 1) == 1 && SSL_read(here, &byte, 1) == 1); /* tickets come before it */
    else
        resumed = -1;
    SSL_SESSION_free(*session);
    *session = SSL_SESSION_dup(SSL_get0_session(here));
    SSL_set_shutdown(there, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
    SSL_set_shutdown(here, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
    SSL_free(there);
    SSL_free(here);
    ERR_clear_error();
    return resumed;
}

int main(int argc, char **argv)
{
    MUST(argc == 3);
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        SSL_CTX *first = server(argv[1]), *other = server(argv[2]), *clients = SSL_CTX_new(TLS_client_method());
        SSL_SESSION *session = NULL, *kept;

        MUST(SSL_CTX_set_min_proto_version(clients, version) == 1 && SSL_CTX_set_max_proto_version(clients, version) == 1);
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
        SSL_CTX_free(first);
        SSL_CTX_free(other);
        SSL_CTX_free(clients);
    }
    return 0;
}
