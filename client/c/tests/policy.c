/*
 * The policy that the clients of all languages share (protos/vectors/policy.json), as far as resumed.h shows it: the ranges and defaults of
 * options, the circuit breaker, and the reasons in the statistics. CMake writes the file to policy_vectors.h. It needs no store: no server
 * listens at its target.
 */
#include <fcntl.h>
#include <regex.h>

#include <openssl/rand.h>
#include <resumed.h>

#include "policy_vectors.h"
#include "support.h"

static char keyring[] = "/tmp/resumed-policy-XXXXXX";
static SSL_CTX *servers;

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

static int meet(SSL_CTX *clients, SSL_SESSION **session)
{
    connection new = new_connection(servers, clients, "localhost", *session);

    MUST(shake_hands(new));
    deliver_tickets(new);
    int resumed = SSL_session_reused(new.server);
    keep_session(new, session);
    mark_closed(new.server);
    mark_closed(new.client);
    free_connection(new);
    return resumed;
}

/* The sequence "three failures one after the other open the breaker": each lookup fails, since no server listens. */
static void check_breaker(void)
{
    resumed_options options = {.size = sizeof options, .target = "127.0.0.1:1", .namespace_ = "policy", .keyring = keyring};
    SSL_CTX *clients = client_context(TLS1_2_VERSION);
    SSL_SESSION *first = NULL;

    options.deadline_ms = PATIENCE;
    options.single_host = 1;
    servers = SSL_CTX_new(TLS_server_method());
    self_sign(servers, 0);
    MUST(resumed_install(servers, &options) == NULL);
    MUST(!meet(clients, &first));
    for (long failures = 0; failures <= POLICY_BREAKER_FAILURES; failures++) {
        SSL_SESSION *session = SSL_SESSION_dup(first);
        MUST(count_of(servers, "misses unavailable ") == failures && count_of(servers, "misses breaker-open ") == 0);
        MUST(!meet(clients, &session));
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
    check_breaker();
    check_reasons();
    SSL_CTX_free(servers);
    return unlink(keyring);
}
