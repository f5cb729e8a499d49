/*
 * A server with libresumed that forks after a handshake, over memory. Exits 1 at the first condition that does not hold.
 *
 *     forks --certificate FILE --target 127.0.0.1:7400 --keyring fleet.keys
 *
 * It prints "stored" when the store has its session, and waits for a line: from then on the store must receive nothing on the connections
 * that exist. The parent removes the session. A forked child, whose connections are its own, must neither resume it nor have a socket of
 * its parent's.
 */
#include <dirent.h>
#include <getopt.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <resumed.h>

#include "support.h"

static int sockets(void)
{
    DIR *directory = opendir("/proc/self/fd");
    struct dirent *entry;
    struct stat status;
    int count = 0;

    MUST(directory);
    while ((entry = readdir(directory)))
        count += fstat(atoi(entry->d_name), &status) == 0 && S_ISSOCK(status.st_mode);
    closedir(directory);
    return count;
}

int main(int argc, char **argv)
{
    enum { CERTIFICATE, TARGET, KEYRING };
    static const struct option names[] = {
        {"certificate", required_argument, NULL, CERTIFICATE},
        {"target", required_argument, NULL, TARGET},
        {"keyring", required_argument, NULL, KEYRING},
        {0},
    };
    resumed_options options = {.size = sizeof options, .namespace_ = "forks", .deadline_ms = 10000, .single_host = 1};
    const char *certificate = NULL;
    SSL_SESSION *session = NULL, *removed;
    int name, status, before = sockets();

    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1)
        switch (name) {
        case CERTIFICATE: certificate = optarg; break;
        case TARGET: options.target = optarg; break;
        case KEYRING: options.keyring = optarg; break;
        default: return 2;
        }
    /* The session id of TLS 1.2 is the id of the session in the store. */
    SSL_CTX *servers = server_context(certificate), *clients = client_context(TLS1_2_VERSION);
    MUST(resumed_install(servers, &options) == NULL);

    MUST(!resumes(servers, clients, NULL, &session) && resumed_flush(servers, PATIENCE) == 1);
    MUST(resumes(servers, clients, NULL, &session) && sockets() > before);
    printf("stored\n");
    fflush(stdout);
    MUST(getchar() == '\n');
    removed = SSL_SESSION_dup(session);
    unsigned length;
    const unsigned char *id = SSL_SESSION_get_id(removed, &length);
    resumed_remove(servers, id, length);
    pid_t child = fork();
    MUST(child >= 0);
    if (child == 0) {
        MUST(sockets() == before);
        MUST(!resumes(servers, clients, NULL, &removed)); /* the store still has it */
        MUST(resumes(servers, clients, NULL, &removed) && sockets() > before);
        _exit(0);
    }
    MUST(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    return 0;
}
