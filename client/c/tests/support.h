/*
 * Common parts of the test programs: conditions, contexts, and connections of a server and a client in one process, over memory. Include
 * resumed.h before it in programs that link libresumed.
 */
#ifndef RESUMED_TESTS_SUPPORT_H
#define RESUMED_TESTS_SUPPORT_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#define PATIENCE 20000u /* milliseconds: only a broken store or library reaches this limit */

/* Ends the program with status 1 if a condition does not hold. */
#define MUST(condition) ((condition) ? (void)0 : fail(#condition, __FILE__, __LINE__))

static int version; /* of TLS in this part of the test; 0 if it does not matter */

static inline void fail(const char *condition, const char *file, int line)
{
    fprintf(stderr, "%s:%d: does not hold: %s", file, line, condition);
    fprintf(stderr, version ? " (TLS 1.%d)\n" : "\n", version - TLS1_2_VERSION + 2);
    ERR_print_errors_fp(stderr);
    _exit(1);
}

static inline void use_certificate(SSL_CTX *context, const char *file)
{
    MUST(SSL_CTX_use_certificate_chain_file(context, file) == 1);
    MUST(SSL_CTX_use_PrivateKey_file(context, file, SSL_FILETYPE_PEM) == 1);
}

/* Gives a context a new key and a certificate of it, which `padding` more bytes make larger than necessary. */
static inline void self_sign(SSL_CTX *context, size_t padding)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *certificate = X509_new();
    char *comment = calloc(padding + 1, 1);

    MUST(key && certificate && comment);
    memset(comment, 'x', padding);
    X509_set_version(certificate, X509_VERSION_3);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -60);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    X509_set_pubkey(certificate, key);
    X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_ASC, (const unsigned char *)"test", -1, -1, 0);
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

static inline SSL_CTX *server_context(const char *certificate)
{
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());

    use_certificate(context, certificate);
    return context;
}

/* Returns a context of clients with one version of TLS. */
static inline SSL_CTX *client_context(int only)
{
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());

    MUST(SSL_CTX_set_min_proto_version(context, only) == 1 && SSL_CTX_set_max_proto_version(context, only) == 1);
    return context;
}

static inline void free_contexts(SSL_CTX **contexts, size_t number)
{
    while (number-- > 0)
        SSL_CTX_free(contexts[number]);
}

typedef struct {
    SSL *server, *client;
} connection;

/* Returns a connection whose client offers a session, or none, for a server name, or none. Its handshake has not begun. */
static inline connection new_connection(SSL_CTX *servers, SSL_CTX *clients, const char *name, SSL_SESSION *session)
{
    connection new = {SSL_new(servers), SSL_new(clients)};
    BIO *server_end, *client_end;

    MUST(new.server && new.client && BIO_new_bio_pair(&server_end, 0, &client_end, 0) == 1);
    SSL_set_bio(new.server, server_end, server_end);
    SSL_set_bio(new.client, client_end, client_end);
    MUST(!name || SSL_set_tlsext_host_name(new.client, name) == 1);
    MUST(!session || SSL_set_session(new.client, session) == 1);
    return new;
}

/* Makes the handshake of a connection; returns whether it succeeded. */
static inline int shake_hands(connection it)
{
    int connected, accepted;

    do {
        connected = SSL_connect(it.client);
        accepted = SSL_accept(it.server);
        if ((connected != 1 && SSL_get_error(it.client, connected) != SSL_ERROR_WANT_READ)
            || (accepted != 1 && SSL_get_error(it.server, accepted) != SSL_ERROR_WANT_READ))
            return 0;
    } while (connected != 1 || accepted != 1);
    return 1;
}

/* Sends a byte from the server to the client, which receives the tickets before it. */
static inline void deliver_tickets(connection it)
{
    char byte;

    MUST(SSL_write(it.server, "x", 1) == 1 && SSL_read(it.client, &byte, 1) == 1);
}

/* Replaces the session in *session by a copy of the client's, which no later event of the connection changes. */
static inline void keep_session(connection it, SSL_SESSION **session)
{
    SSL_SESSION_free(*session);
    *session = SSL_SESSION_dup(SSL_get0_session(it.client));
}

/* Marks an end as closed in order: OpenSSL considers the session of a connection that ends otherwise as not resumable. */
static inline void mark_closed(SSL *end)
{
    SSL_set_shutdown(end, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
}

static inline void free_connection(connection it)
{
    SSL_free(it.server);
    SSL_free(it.client);
    ERR_clear_error();
}

/* Makes a connection that offers the session in *session, or none, and leaves the new one there; returns whether it resumed. */
static inline int resumes(SSL_CTX *servers, SSL_CTX *clients, const char *name, SSL_SESSION **session)
{
    connection new = new_connection(servers, clients, name, *session);

    MUST(shake_hands(new));
    deliver_tickets(new);
    int resumed = SSL_session_reused(new.server);
    keep_session(new, session);
    mark_closed(new.server);
    mark_closed(new.client);
    free_connection(new);
    return resumed;
}

/* Makes one end of a connection fail with a fatal alert, by a record that does not authenticate. */
static inline void send_bad_record(SSL *from, SSL *to)
{
    static const unsigned char BAD_RECORD[5 + 64] = {0x17, 3, 3, 0, 64};
    char buffer[64];

    BIO_write(SSL_get_wbio(from), BAD_RECORD, sizeof BAD_RECORD);
    MUST(SSL_read(to, buffer, sizeof buffer) <= 0);
}

/* Makes the client fail with a fatal alert, and lets the server receive the alert. */
static inline void receive_alert(connection it)
{
    char buffer[64];

    send_bad_record(it.server, it.client);
    MUST(SSL_read(it.server, buffer, sizeof buffer) <= 0);
}

#ifdef RESUMED_H
/* Returns the number after `kind` in the statistics of the process, such as "misses unknown "; 0 if there is none. */
static inline long count_of(SSL_CTX *context, const char *kind)
{
    char stats[4096], *found;

    MUST(resumed_stats(context, stats, sizeof stats) < sizeof stats);
    return (found = strstr(stats, kind)) ? strtol(found + strlen(kind), NULL, 10) : 0;
}

/* Waits until the process has agreed on the secrets of tickets and receives the removals. */
static inline void await_tickets(SSL_CTX *context)
{
    while (count_of(context, "held secrets ") < 2 || !count_of(context, "held stream "))
        usleep(1000);
}
#endif

#endif
