/*
 * libresumed: sessions of OpenSSL servers in the central store of resumed, so that any frontend resumes what any other
 * negotiated.
 *
 * A handshake never waits for the store beyond a deadline, and not at all while the store keeps failing. Each failure costs a full
 * handshake and is counted. All functions may be called from any thread.
 */
#ifndef RESUMED_H
#define RESUMED_H

#include <stddef.h>

#include <openssl/ssl.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * How sessions are kept. Set all fields to zero first, then size, target, namespace_ and keyring; zero means the default. A program that
 * was built with an older header works with this library; a program with a newer header works if it leaves the new fields zero.
 */
typedef struct resumed_options {
    size_t size;               /* sizeof(resumed_options) */
    const char *target;        /* the store, as a gRPC name: dns:///store:7400, 127.0.0.1:7400, unix:/run/resumed.sock */
    const char *namespace_;    /* of the sessions that frontends share: 1 to 63 characters of [a-z0-9.-] */
    const char *keyring;       /* path of the fleet's keys, which are read again when they change */
    unsigned lifetime_seconds; /* of a session, from its negotiation: up to 604,800; 7,200 by default */
    unsigned deadline_ms;      /* milliseconds that a handshake may wait for the store; 50 by default */
    unsigned max_lookups;      /* look-ups under way at once; beyond that, handshakes make none; 64 by default */
    size_t mirror_bytes;       /* bytes of the namespace's sealed sessions to keep in memory; none by default */
    int single_use;            /* whether a session resumes once in the whole fleet */
    int any_ids;               /* whether ids that the fleet did not issue are looked up as well */
    int wait_for_puts;         /* whether a full handshake waits until its sessions are stored, at most for the deadline */
    int tls;                   /* whether the store is reached over TLS; the following are for that */
    const char *ca;            /* PEM file of the authorities of the store's certificate; the system's by default */
    const char *cert;          /* PEM files of the frontend's own certificate and key; none by default */
    const char *key;
    const char *server_name;   /* the name that the store's certificate must have; the target's host by default */
    int ignore_id_context;     /* for fleets of unlike stacks: unlike session id contexts do not count, and the order of the server's ciphers decides */
    int single_host;           /* whether the context has no servername, ClientHello or certificate callback */
    int tickets;               /* whether clients keep sessions in tickets, and the store only has what the tickets need */
    int tickets_tls12;         /* with tickets, whether TLS 1.2 uses them as well; its sessions are stored otherwise */
    unsigned rotation_seconds; /* with tickets, after how long they get another key: up to 604,800; 3,600 by default */
    int revocation_grace_seconds; /* with tickets, for how long they resume after the store was last reached: 300 by default; -1 for not at all */
} resumed_options;

/*
 * Lets a server's context keep its sessions in the store, and resume what any other frontend negotiated. Call it when the context
 * is set up and before its first connection; a server that forks may call it before it does. Contexts that connections switch to
 * (SSL_set_SSL_CTX) need it as well. Contexts installed with equal options share a connection and a mirror. SSL_CTX_free of the last of them
 * waits for the rest of the queue, at most for a second. If the application has set a get callback, its session callbacks are replaced, and
 * its own session cache is not used; otherwise its new and remove callbacks are called after those of the library.
 *
 * It sets the session callbacks and the id generator, switches stateless tickets and the internal cache off, and sets the timeout.
 *
 * A session resumes only where a full handshake would have proved the same (docs/contexts.md):
 *
 * - The names in the server's certificates, and how the connection verifies client certificates (mode, depth, security level, flags, host
 *   names, trust store), are those of the context that served its full handshake. Each look-up compares them. OpenSSL looks sessions
 *   up before a servername callback runs, so the process learns from full handshakes which context serves a name: the first
 *   connection for each name and process makes a full handshake, unless single_host is set.
 * - The server name is the same, and so is the application's own session id context, unless ignore_id_context is set. A context that
 *   verifies clients needs one (SSL_CTX_set_session_id_context), or its sessions are not shared.
 * - A context that a servername callback chooses, and that is installed with another namespace than the first one, resumes nothing of the
 *   first one's, and nothing of its own: look-ups come before.
 * - When the handshake of a resumed connection is done, an info callback of that SSL compares once more. If another context serves the
 *   connection after all, it ends: the client gets a close_notify, and SSL_read returns 0. An info callback that the application has set
 *   before is called as well; the application must not set one for an SSL within its handshake.
 * - A session ends with the client's certificate. One whose certificate failed verification is not shared, nor is one with ticket
 *   application data of the application.
 *
 * The application must use a namespace, or a session id context, of its own where contexts differ in something else:
 *
 * - verify callbacks that reject a client by rules of their own;
 * - data that the application attaches to sessions (SSL_SESSION_set_ex_data), which is lost when they are stored;
 * - contexts of different listeners that serve one name differently: a process learns one context for a name and namespace.
 *
 * With `tickets`, a ticket carries its session, encrypted with a key that all frontends of the namespace derive from a secret in the store.
 * The rules above are the same; beyond them:
 *
 * - The ticket callbacks of the context (SSL_CTX_set_session_ticket_cb, SSL_CTX_set_tlsext_ticket_key_evp_cb) are replaced, and stateless
 *   tickets are switched on. The application must not set them afterwards. The ticket application data of sessions are the library's.
 * - The library reaches the store in the background, from this call on: it agrees on secrets, and follows the removals of sessions. A forked child
 *   has what its parent had, and begins its own at its first ticket. Handshakes wait for the store with single_use only. Until a process
 *   has a secret, it issues no tickets; until it has the removals, it accepts none.
 * - A ticket ends after the lifetime. A fatal alert, and resumed_remove_connection, end all tickets that stem from the same full handshake: at once in this
 *   process, and in the whole fleet when the others receive the removal. While the store is not reached, tickets resume for revocation_grace_seconds.
 * - Stored sessions still resume, those of TLS 1.3 only if the application has no SSL_CTX_set_psk_find_session_callback: the library sets one.
 * - Sessions above 8,192 bytes, which contain large client certificates, are stored in TLS 1.3, and not resumed in TLS 1.2.
 * - In TLS 1.2 a secret opens the recorded connections of its tickets, in TLS 1.3 it does not; so TLS 1.2 uses them only with tickets_tls12.
 *
 * It must not ask for client certificates in a certificate callback (SSL_CTX_set_cert_cb, SSL_set_cert_cb), which OpenSSL skips on
 * resumption: the connection would not look like the one that the session is of, and end. A servername callback is called each time.
 *
 * Returns NULL, or the error, and then nothing was changed; the text is valid until the thread's next call.
 */
const char *resumed_install(SSL_CTX *context, const resumed_options *options);

/* Removes a stored session from the whole fleet, in the background. */
void resumed_remove(SSL_CTX *context, const unsigned char *id, size_t length);

/*
 * Removes the session of a connection from the whole fleet, in the background: with tickets, all that stem from the same full handshake. The
 * connection goes on. To be called when its handshake is done, and not while another thread uses the connection.
 */
void resumed_remove_connection(SSL *connection);

/*
 * Waits until all sessions and removals so far are sent; returns 0 if that took longer than so many milliseconds, or if a removal was
 * refused or dropped and not requested again.
 */
int resumed_flush(SSL_CTX *context, unsigned milliseconds);

/*
 * Writes the statistics of this process, as "hits mirror 3\n" or "issued current 2\n" for each reason, and a NUL. Returns the length of the whole text: if it is
 * not below size, the text was cut.
 */
size_t resumed_stats(SSL_CTX *context, char *text, size_t size);

/* Writes the same in Prometheus' text format, under the names that the clients in other languages use, as resumed_stats() does. */
size_t resumed_metrics(SSL_CTX *context, char *text, size_t size);

#ifdef __cplusplus
}
#endif

#endif
