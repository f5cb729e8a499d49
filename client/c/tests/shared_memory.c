/*
 * A program that keeps OpenSSL's objects in memory that its processes share, as Kamailio does, with libresumed-preload under it: one
 * process begins a connection, and another one makes its handshake. Exits 1 at the first condition that does not hold.
 *
 *     shared_memory CERTIFICATE
 */
#include <sys/mman.h>
#include <sys/wait.h>

#include "support.h"

#define MEMORY_BYTES ((size_t)64 << 20)

static char **next; /* the first free byte, in the shared memory as well */

static void *allocate(size_t size, const char *file, int line)
{
    size_t *block = (size_t *)*next;

    (void)file, (void)line;
    *block = size;
    *next += (size + 31) / 16 * 16;
    return block + 2;
}

static void *reallocate(void *old, size_t size, const char *file, int line)
{
    void *block = size ? allocate(size, file, line) : NULL;
    size_t before = old ? ((size_t *)old)[-2] : 0;

    if (block && old)
        memcpy(block, old, before < size ? before : size);
    return block;
}

static void release(void *block, const char *file, int line)
{
    (void)block, (void)file, (void)line;
}

/* Calls a function in a child process, and waits for its end. */
static void run(void (*function)(connection *), connection *it)
{
    pid_t child = fork();
    int status;

    MUST(child >= 0);
    if (child == 0) {
        function(it);
        _exit(0);
    }
    MUST(waitpid(child, &status, 0) == child && status == 0);
}

static SSL_CTX *servers, *clients;

static void begin(connection *it)
{
    *it = new_connection(servers, clients, NULL, NULL);
    SSL_set_accept_state(it->server);
    SSL_set_connect_state(it->client);
    SSL_do_handshake(it->client);
    SSL_do_handshake(it->server);
}

static void finish(connection *it)
{
    MUST(shake_hands(*it));
    free_connection(*it);
}

int main(int argc, char **argv)
{
    char *memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    connection *shared = (connection *)(memory + sizeof next);

    MUST(argc == 2 && memory != MAP_FAILED);
    next = (char **)memory;
    *next = memory + 64;
    MUST(CRYPTO_set_mem_functions(allocate, reallocate, release) == 1);
    servers = server_context(argv[1]);
    clients = client_context(TLS1_3_VERSION);
    run(begin, shared);
    run(finish, shared);
    MUST(!SSL_CTX_sess_get_new_cb(servers));
    return 0;
}
