/*
 * A TLS server that keeps its sessions in the store: it answers each message of a client. A thread for each connection.
 *
 *     server --certificate FILE --target 127.0.0.1:7400 --namespace shop --keyring fleet.keys
 *            [--deadline MILLISECONDS] [--mirror BYTES] [--single-use] [--any-id] [--tickets]
 *            [--ignore-id-context] [--client-ca FILE] [--connections NUMBER]
 */
#include <arpa/inet.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <openssl/err.h>
#include <resumed.h>

static void fail(const char *message)
{
    fprintf(stderr, "server: %s\n", message);
    exit(1);
}

static void *serve(void *argument)
{
    SSL *ssl = argument;
    char buffer[4096];

    if (SSL_accept(ssl) == 1)
        while (SSL_read(ssl, buffer, sizeof buffer) > 0 && SSL_write(ssl, "ok\n", 3) > 0)
            ;
    ERR_clear_error();
    close(SSL_get_fd(ssl)); /* without close_notify, as a server that is killed */
    SSL_free(ssl);
    return NULL;
}

static int listener_on_loopback(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);

    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 128)
        || getsockname(listener, (struct sockaddr *)&address, &length))
        fail("cannot listen");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return listener;
}

int main(int argc, char **argv)
{
    enum {
        CERTIFICATE, TARGET, NAMESPACE, KEYRING, DEADLINE, MIRROR, SINGLE_USE, ANY_ID, TICKETS, IGNORE_ID_CONTEXT, CLIENT_CA, CONNECTIONS
    };
    static const struct option names[] = {
        {"certificate", required_argument, NULL, CERTIFICATE},
        {"target", required_argument, NULL, TARGET},
        {"namespace", required_argument, NULL, NAMESPACE},
        {"keyring", required_argument, NULL, KEYRING},
        {"deadline", required_argument, NULL, DEADLINE},
        {"mirror", required_argument, NULL, MIRROR},
        {"single-use", no_argument, NULL, SINGLE_USE},
        {"any-id", no_argument, NULL, ANY_ID},
        {"tickets", no_argument, NULL, TICKETS},
        {"ignore-id-context", no_argument, NULL, IGNORE_ID_CONTEXT},
        {"client-ca", required_argument, NULL, CLIENT_CA},
        {"connections", required_argument, NULL, CONNECTIONS},
        {0},
    };
    resumed_options options = {.size = sizeof options, .single_host = 1};
    const char *certificate = NULL, *client_ca = NULL, *complaint;
    long connections = -1;
    int name;

    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1)
        switch (name) {
        case CERTIFICATE: certificate = optarg; break;
        case TARGET: options.target = optarg; break;
        case NAMESPACE: options.namespace_ = optarg; break;
        case KEYRING: options.keyring = optarg; break;
        case DEADLINE: options.deadline_ms = (unsigned)strtoul(optarg, NULL, 10); break;
        case MIRROR: options.mirror_bytes = strtoul(optarg, NULL, 10); break;
        case SINGLE_USE: options.single_use = 1; break;
        case ANY_ID: options.any_ids = 1; break;
        case TICKETS: options.tickets = options.tickets_tls12 = 1; break;
        case IGNORE_ID_CONTEXT: options.ignore_id_context = 1; break;
        case CLIENT_CA: client_ca = optarg; break;
        case CONNECTIONS: connections = strtol(optarg, NULL, 10); break;
        default: return 2;
        }
    signal(SIGPIPE, SIG_IGN);

    SSL_CTX *context = SSL_CTX_new(TLS_server_method());
    if (!certificate || SSL_CTX_use_certificate_chain_file(context, certificate) != 1
        || SSL_CTX_use_PrivateKey_file(context, certificate, SSL_FILETYPE_PEM) != 1)
        fail("--certificate is no file with a certificate and its key");
    if (client_ca) {
        if (SSL_CTX_load_verify_locations(context, client_ca, NULL) != 1)
            fail("--client-ca is no file with authorities of client certificates");
        SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    }
    if ((complaint = resumed_install(context, &options)))
        fail(complaint);

    for (int listener = listener_on_loopback(); connections != 0; connections -= connections > 0) {
        pthread_t thread;
        int accepted = accept(listener, NULL, NULL);
        SSL *ssl = SSL_new(context);
        if (accepted < 0 || !ssl || SSL_set_fd(ssl, accepted) != 1 || pthread_create(&thread, NULL, serve, ssl))
            fail("a connection failed");
        pthread_detach(thread);
    }
    resumed_flush(context, 5000);
    char stats[4096];
    resumed_stats(context, stats, sizeof stats);
    fputs(stats, stderr);
    SSL_CTX_free(context);
    return 0;
}
