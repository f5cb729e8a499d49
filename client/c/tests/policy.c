/*
 * The policy that the clients of all languages share (protos/vectors/policy.json), as far as resumed.h shows it: the ranges and defaults of
 * options, the look-ups of a handshake, the circuit breaker, and the reasons in the statistics. CMake writes the file to policy_vectors.h. It needs no store: no server
 * listens at its target.
 */
#include <fcntl.h>
#include <regex.h>

#include <openssl/rand.h>
#include <resumed.h>

#include "policy_vectors.h"
#include "support.h"

#define OFFERED 12 /* more than a handshake looks up */

static char keyring[] = "/tmp/resumed-policy-XXXXXX";
static SSL_CTX *servers;
static unsigned char identities[OFFERED][32];
static size_t collected;

static void write_keyring(void)
{
    unsigned char key[32], line[45];
    int file = mkstemp(keyring);

    MUST(file >= 0 && RAND_bytes(key, sizeof key) == 1 && EVP_EncodeBlock(line, key, sizeof key) == 44);
    line[44] = '\n';
    MUST(write(file, line, sizeof line) == (ssize_t)sizeof line && close(file) == 0);
}

/* Returns whether a new context accepts the options. */
static int accepts(const char *namespace_, unsigned lifetime)
{
    resumed_options options = {.size = sizeof options, .target = "127.0.0.1:1", .namespace_ = namespace_, .keyring = keyring};
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());

    options.lifetime_seconds = lifetime;
    int accepted = resumed_install(context, &options) == NULL;
    MUST(!accepted || SSL_CTX_get_timeout(context) == (lifetime ? (long)lifetime : POLICY_DEFAULT_LIFETIME_SECONDS));
    SSL_CTX_free(context);
    return accepted;
}

static void check_lifetimes(void)
{
    MUST(accepts("policy", 0) && accepts("policy", POLICY_MAX_LIFETIME_SECONDS));
    MUST(!accepts("policy", POLICY_MAX_LIFETIME_SECONDS + 1));
}

static void check_namespaces(void)
{
    char names[][65] = {"shop", "a.b-c.0", "-", "", "Shop", "shop/eu", "sh op", "sh\xc3\xb6p", {0}, {0}};
    size_t count = sizeof names / sizeof *names;
    regex_t pattern;

    memset(names[count - 2], 'a', 63);
    memset(names[count - 1], 'a', 64);
    MUST(regcomp(&pattern, "^" POLICY_NAMESPACE_PATTERN "$", REG_EXTENDED | REG_NOSUB) == 0);
    for (size_t number = 0; number < count; number++)
        MUST(accepts(names[number], 0) == (regexec(&pattern, names[number], 0, NULL, 0) == 0));
    regfree(&pattern);
}

/* Makes a context of servers without a store: no server listens at its target. */
static void install(const char *namespace_)
{
    resumed_options options = {.size = sizeof options, .target = "127.0.0.1:1", .namespace_ = namespace_, .keyring = keyring};

    options.deadline_ms = PATIENCE;
    options.single_host = 1;
    servers = SSL_CTX_new(TLS_server_method());
    self_sign(servers, 0);
    MUST(resumed_install(servers, &options) == NULL);
}

static int collect(SSL *unused, SSL_SESSION *session)
{
    const unsigned char *ticket;
    size_t length;

    (void)unused;
    SSL_SESSION_get0_ticket(session, &ticket, &length);
    MUST(collected < OFFERED && length == sizeof identities[0]);
    memcpy(identities[collected++], ticket, length);
    return 0;
}

static unsigned char *put_number(unsigned char *at, size_t number)
{
    at[0] = (unsigned char)(number >> 8);
    at[1] = (unsigned char)number;
    return at + 2;
}

static void add_to_number(unsigned char *at, size_t more)
{
    put_number(at, ((size_t)at[0] << 8 | at[1]) + more);
}

/* Appends the extension pre_shared_key (RFC 8446 section 4.2.11) with all identities to a ClientHello; returns its new length. */
static size_t offer_identities(unsigned char *hello, size_t length)
{
    enum { IDENTITY = 2 + sizeof identities[0] + 4, BINDER = 1 + 32, ADDED = 4 + 2 + OFFERED * IDENTITY + 2 + OFFERED * BINDER };
    unsigned char *at = hello + length, *extensions = hello + 5 + 4 + 2 + 32;

    extensions += 1 + extensions[0];                         /* the session id */
    extensions += 2 + (extensions[0] << 8 | extensions[1]);  /* the cipher suites */
    extensions += 1 + extensions[0];                         /* the compression methods */
    at = put_number(put_number(at, TLSEXT_TYPE_psk), ADDED - 4);
    at = put_number(at, OFFERED * IDENTITY);
    for (size_t number = 0; number < OFFERED; number++) {
        at = put_number(at, sizeof identities[0]);
        memcpy(at, identities[number], sizeof identities[0]);
        memset(at + sizeof identities[0], 0, 4); /* the age of the ticket */
        at += IDENTITY - 2;
    }
    at = put_number(at, OFFERED * BINDER);
    for (size_t number = 0; number < OFFERED; number++, at += BINDER) {
        memset(at, 0, BINDER);
        at[0] = BINDER - 1;
    }
    add_to_number(extensions, ADDED);
    add_to_number(hello + 5 + 2, ADDED); /* the length of the handshake message, without its first byte */
    add_to_number(hello + 3, ADDED);     /* that of the record */
    return length + ADDED;
}

/* A client may offer a thousand sessions. */
static void check_lookups_of_a_handshake(void)
{
    SSL_CTX *clients = client_context(TLS1_3_VERSION);
    SSL_SESSION *session = NULL;
    unsigned char hello[4096];

    install("many");
    MUST(SSL_CTX_set_num_tickets(servers, OFFERED) == 1);
    SSL_CTX_set_session_cache_mode(clients, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
    SSL_CTX_sess_set_new_cb(clients, collect);
    MUST(!resumes(servers, clients, "localhost", &session) && collected == OFFERED);
    connection new = new_connection(servers, clients, "localhost", NULL);
    MUST(SSL_connect(new.client) == -1);
    int length = BIO_read(SSL_get_rbio(new.server), hello, sizeof hello);
    MUST(length > 0 && BIO_write(SSL_get_wbio(new.client), hello, (int)offer_identities(hello, (size_t)length)) > length);
    MUST(SSL_accept(new.server) == -1 && SSL_get_error(new.server, -1) == SSL_ERROR_WANT_READ);
    MUST(count_of(servers, "misses too-many-lookups ") == OFFERED - POLICY_MAX_LOOKUPS_PER_HANDSHAKE);
    free_connection(new);
    SSL_SESSION_free(session);
    free_contexts((SSL_CTX *[]){servers, clients}, 2);
}

/* OpenSSL looks a session up again after a HelloRetryRequest. */
static void check_second_lookup(void)
{
    SSL_CTX *clients = client_context(TLS1_3_VERSION);
    SSL_SESSION *session = NULL;

    install("again");
    MUST(SSL_CTX_set1_groups_list(servers, "P-384") == 1 && SSL_CTX_set1_groups_list(clients, "P-256:P-384") == 1);
    MUST(!resumes(servers, clients, "localhost", &session) && !resumes(servers, clients, "localhost", &session));
    MUST(count_of(servers, "misses unavailable ") == 1);
    SSL_SESSION_free(session);
    free_contexts((SSL_CTX *[]){servers, clients}, 2);
}

/* The sequence "three failures one after the other open the breaker": each lookup fails, since no server listens. */
static void check_breaker(void)
{
    SSL_CTX *clients = client_context(TLS1_2_VERSION);
    SSL_SESSION *first = NULL;

    install("policy");
    MUST(!resumes(servers, clients, "localhost", &first));
    for (long failures = 0; failures <= POLICY_BREAKER_FAILURES; failures++) {
        SSL_SESSION *session = SSL_SESSION_dup(first);
        MUST(count_of(servers, "misses unavailable ") == failures && count_of(servers, "misses breaker-open ") == 0);
        MUST(!resumes(servers, clients, "localhost", &session));
        SSL_SESSION_free(session);
    }
    MUST(count_of(servers, "misses unavailable ") == POLICY_BREAKER_FAILURES && count_of(servers, "misses breaker-open ") == 1);
    SSL_SESSION_free(first);
    SSL_CTX_free(clients);
}

/* POLICY_REASONS has a line for each kind and reason. */
static void check_reasons(void)
{
    char stats[4096], *rest = stats, line[130];

    MUST(resumed_stats(servers, stats, sizeof stats) < sizeof stats);
    for (char *entry; (entry = strsep(&rest, "\n")) && *entry;) {
        char kind[64], reason[64];
        MUST(sscanf(entry, "%63s %63s", kind, reason) == 2);
        snprintf(line, sizeof line, "\n%s %s\n", kind, reason);
        MUST(strstr("\n" POLICY_REASONS, line));
    }
}

int main(void)
{
    write_keyring();
    check_lifetimes();
    check_namespaces();
    check_lookups_of_a_handshake();
    check_second_lookup();
    check_breaker();
    check_reasons();
    SSL_CTX_free(servers);
    return unlink(keyring);
}
