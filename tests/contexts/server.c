/*
 * A C server whose port has several hosts: it answers with the host that serves and with the client's name. Hosts are chosen by server
 * name, by the ALPN protocol acme-tls/1 ("alpn"), or while a file exists ("switch:FILE"); the first one serves every other name.
 *
 *     server --port N [--target T --namespace N --keyring FILE [--ignore-id-context] [--single-host] [--mirror] [--single-use]
 *            [--tickets]]
 *            --host BY PROFILE --certificate FILE... [--verify MODE --ca FILE] [--depth N] [--crl FILE] [--id-context TEXT]
 *            [--own-namespace NAME] [--security-level N] [--check-host NAME] [--per-connection] [--location] ...
 *
 * A host with --location asks for a certificate when a client sends "admin": by renegotiation, or after the handshake.
 * A host with --per-connection serves on the first host's SSL_CTX; verification and id context are set for the connection.
 */
#include <arpa/inet.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <resumed.h>

#define MOST 8

typedef struct host {
    const char *by, *profile, *verify, *ca, *crl, *id_context, *own_namespace, *check_host;
    const char *certificates[MOST];
    int count, depth, security_level, per_connection, location;
    SSL_CTX *context;
} host;

static host hosts[MOST];
static int number_of_hosts;

static void fail(const char *message)
{
    fprintf(stderr, "server: %s\n", message);
    ERR_print_errors_fp(stderr);
    exit(1);
}

static int mode(const host *h)
{
    if (!h->verify || h->location)
        return SSL_VERIFY_NONE;
    return SSL_VERIFY_PEER | (strcmp(h->verify, "require") ? 0 : SSL_VERIFY_FAIL_IF_NO_PEER_CERT);
}

static int accept_any(int passed, X509_STORE_CTX *store)
{
    (void)passed;
    (void)store;
    return 1;
}

static SSL_verify_cb callback(const host *h)
{
    return h->verify && !strcmp(h->verify, "optional_no_ca") ? accept_any : NULL;
}

static void ask(SSL *ssl, const host *h)
{
    SSL_set_verify(ssl, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    /* As Apache does: else the renegotiation resumes the session that has no certificate. */
    SSL_set_session_id_context(ssl, (const unsigned char *)"asked", 5);
    if (SSL_version(ssl) == TLS1_3_VERSION)
        SSL_verify_client_post_handshake(ssl);
    else
        SSL_renegotiate(ssl);
    SSL_do_handshake(ssl);
    (void)h;
}

static void enter(SSL *ssl, host *h)
{
    SSL_set_app_data(ssl, (char *)h);
    if (SSL_get_SSL_CTX(ssl) != h->context)
        SSL_set_SSL_CTX(ssl, h->context);
    SSL_set_verify(ssl, mode(h), callback(h));
    if (h->depth >= 0)
        SSL_set_verify_depth(ssl, h->depth);
    if (h->per_connection && h->id_context)
        SSL_set_session_id_context(ssl, (const unsigned char *)h->id_context, (unsigned)strlen(h->id_context));
}

static int choose(SSL *ssl, int *alert, void *argument)
{
    const char *name = SSL_get_servername(ssl, TLSEXT_NAMETYPE_host_name);
    (void)alert;
    (void)argument;
    for (int i = 1; i < number_of_hosts; i++)
        if (!strncmp(hosts[i].by, "switch:", 7) ? !access(hosts[i].by + 7, F_OK) : name && !strcasecmp(hosts[i].by, name)) {
            enter(ssl, &hosts[i]);
            return SSL_TLSEXT_ERR_OK;
        }
    enter(ssl, &hosts[0]);
    return SSL_TLSEXT_ERR_OK;
}

static int choose_by_protocol(SSL *ssl, const unsigned char **out, unsigned char *length, const unsigned char *in, unsigned size, void *argument)
{
    (void)argument;
    *out = in + 1;
    *length = in[0];
    if (size == 11 && !memcmp(in + 1, "acme-tls/1", 10))
        for (int i = 1; i < number_of_hosts; i++)
            if (!strcmp(hosts[i].by, "alpn"))
                enter(ssl, &hosts[i]);
    return SSL_TLSEXT_ERR_OK;
}

static void *serve(void *argument)
{
    SSL *ssl = argument;
    char buffer[4096], name[256] = "-";

    if (SSL_accept(ssl) == 1)
        while (SSL_read(ssl, buffer, sizeof buffer) > 0) {
            host *h = (host *)SSL_get_app_data(ssl);
            if (h->location && !strncmp(buffer, "admin", 5)) {
                ask(ssl, h);
                /* In TLS 1.2 the client answers when it next reads; in TLS 1.3 with what comes before its next data. */
                if (SSL_write(ssl, "more\n", 5) <= 0 || SSL_read(ssl, buffer, sizeof buffer) <= 0)
                    break;
            }
            X509 *peer = SSL_get1_peer_certificate(ssl);
            if (peer)
                X509_NAME_get_text_by_NID(X509_get_subject_name(peer), NID_commonName, name, sizeof name);
            X509_free(peer);
            int length = snprintf(buffer, sizeof buffer, "served %s, client %s\n", h->profile, name);
            if (SSL_write(ssl, buffer, length) <= 0)
                break;
        }
    ERR_clear_error();
    close(SSL_get_fd(ssl));
    SSL_free(ssl);
    return NULL;
}

static void set_up(host *h)
{
    SSL_CTX *context = h->context = SSL_CTX_new(TLS_server_method());
    for (int i = 0; i < h->count; i++)
        if (SSL_CTX_use_certificate_chain_file(context, h->certificates[i]) != 1
            || SSL_CTX_use_PrivateKey_file(context, h->certificates[i], SSL_FILETYPE_PEM) != 1)
            fail("--certificate");
    if (h->verify) {
        if (SSL_CTX_load_verify_locations(context, h->ca, NULL) != 1)
            fail("--ca");
        SSL_CTX_set_client_CA_list(context, SSL_load_client_CA_file(h->ca));
        if (!h->per_connection)
            SSL_CTX_set_verify(context, mode(h), callback(h));
    }
    if (h->depth >= 0)
        SSL_CTX_set_verify_depth(context, h->depth);
    if (h->security_level >= 0)
        SSL_CTX_set_security_level(context, h->security_level);
    if (h->check_host)
        X509_VERIFY_PARAM_set1_host(SSL_CTX_get0_param(context), h->check_host, 0);
    if (h->crl) {
        X509_STORE *store = SSL_CTX_get_cert_store(context);
        if (X509_LOOKUP_load_file(X509_STORE_add_lookup(store, X509_LOOKUP_file()), h->crl, X509_FILETYPE_PEM) <= 0)
            fail("--crl");
        X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK);
    }
    const char *id_context = h->id_context && !h->per_connection ? h->id_context : "contexts";
    SSL_CTX_set_session_id_context(context, (const unsigned char *)id_context, (unsigned)strlen(id_context));
}

int main(int argc, char **argv)
{
    resumed_options options = {.size = sizeof options, .deadline_ms = 5000, .wait_for_puts = 1};
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1, by_protocol = 0, by_name = 0;
    host *h = NULL;

#define VALUE (i + 1 < argc ? argv[++i] : (fail("a value is missing"), ""))
#define IS(text) (!strcmp(argv[i], text))
    for (int i = 1; i < argc; i++)
        if (IS("--port")) address.sin_port = htons((uint16_t)atoi(VALUE));
        else if (IS("--target")) options.target = VALUE;
        else if (IS("--namespace")) options.namespace_ = VALUE;
        else if (IS("--keyring")) options.keyring = VALUE;
        else if (IS("--mirror")) options.mirror_bytes = 1 << 20;
        else if (IS("--single-use")) options.single_use = 1;
#ifdef FINGERPRINTS /* the header has the options of docs/contexts.md */
        else if (IS("--ignore-id-context")) options.ignore_id_context = 1;
        else if (IS("--single-host")) options.single_host = 1;
#else
        else if (IS("--ignore-id-context") || IS("--single-host")) continue;
#endif
#ifdef TICKETS /* it has those of tickets */
        else if (IS("--tickets")) options.tickets = options.tickets_tls12 = 1;
#endif
        else if (IS("--host")) {
            h = &hosts[number_of_hosts++];
            h->by = VALUE;
            h->profile = VALUE;
            h->depth = h->security_level = -1;
            by_protocol |= !strcmp(h->by, "alpn");
            by_name |= number_of_hosts > 1 && strcmp(h->by, "alpn");
        } else if (!h) fail("--host comes first");
        else if (IS("--certificate")) h->certificates[h->count++] = VALUE;
        else if (IS("--verify")) h->verify = VALUE;
        else if (IS("--ca")) h->ca = VALUE;
        else if (IS("--crl")) h->crl = VALUE;
        else if (IS("--depth")) h->depth = atoi(VALUE);
        else if (IS("--id-context")) h->id_context = VALUE;
        else if (IS("--own-namespace")) h->own_namespace = VALUE;
        else if (IS("--security-level")) h->security_level = atoi(VALUE);
        else if (IS("--check-host")) h->check_host = VALUE;
        else if (IS("--location")) h->location = 1;
        else if (IS("--per-connection")) h->per_connection = 1;
        else fail(argv[i]);
    signal(SIGPIPE, SIG_IGN);
    for (int i = 0; i < number_of_hosts; i++) {
        if (i && hosts[i].per_connection) {
            hosts[i].context = hosts[0].context;
            continue;
        }
        set_up(&hosts[i]);
        if (!i && by_name)
            SSL_CTX_set_tlsext_servername_callback(hosts[i].context, choose);
        if (!i && by_protocol)
            SSL_CTX_set_alpn_select_cb(hosts[i].context, choose_by_protocol, NULL);
    }
    for (int i = 0; i < number_of_hosts && options.target; i++) {
        resumed_options own = options;
        const char *complaint;
        if (i && hosts[i].per_connection)
            continue;
        if (hosts[i].own_namespace)
            own.namespace_ = hosts[i].own_namespace;
        if ((complaint = resumed_install(hosts[i].context, &own)))
            fail(complaint);
    }
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64))
        fail("cannot listen");
    for (;;) {
        pthread_t thread;
        int accepted = accept(listener, NULL, NULL);
        SSL *ssl = SSL_new(hosts[0].context);
        SSL_set_app_data(ssl, (char *)&hosts[0]);
        if (hosts[0].per_connection)
            enter(ssl, &hosts[0]);
        SSL_set_fd(ssl, accepted);
        pthread_create(&thread, NULL, serve, ssl);
        pthread_detach(thread);
    }
}
