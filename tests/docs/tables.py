"""How the docs' commands are tested that are not simply run, and why. Every entry must be in the docs."""

from __future__ import annotations

ELSEWHERE = {
    # The first words of a command: the test that covers it instead.
    # README's first steps: test_quick_start.py goes through them, except those that need the network.
    "sudo apt-get install": "asks for root and the network: stopwatch.py runs it on an empty Debian",
    "git clone": "stopwatch.py runs it, with this tree",
    ". .venv/bin/activate": "stopwatch.py runs it",
    "resumed serve > store.log": "test_quick_start.py",
    "python frontend.py": "test_quick_start.py",
    "openssl s_client -quiet": "test_quick_start.py",
    "resumed locally": "no command: the heading of a column",
    # What asks the network or the user's own machine.
    "pip install": "asks the network; the extras are tested here, what they bring by CI's `make setup`",
    "resumed --install-completion": "changes the shell; completion is tested in tests/end_to_end/cli/test_commands.py",
    "buf generate": "needs a plugin for Java; `make stubs-go` and `make stubs-node` do the same with theirs",
    "buf lint": "`make lint`, in CI",
    "buf build": "tests/server/rpc/test_contract.py",
    "kill -9": "named; tests/chaos do it",
    "resumed ticket-keys": "serves until it is stopped: tests/end_to_end/ticket_keys runs it with real servers",
    "redis-cli --latency": "advice about a Redis that is not ours",
    # Containers and clusters: `make image-test` and `make deploy-test` do the same without an engine and a cluster.
    "docker build": "tests/deploy/image.py builds the Dockerfile with buildah",
    "docker run": "tests/deploy/test_image.py runs the image",
    "docker compose": "needs an engine, as image.yml has; tests/deploy/test_compose.py runs the services without one",
    "cd examples/compose": "as docker compose",
    # systemd.md, as root; tests/deploy/test_systemd.py tests the files.
    "apt-get install": "needs root and the network",
    "python3 -m venv /opt/resumed": "needs root",
    "/opt/resumed/bin/": "needs root and the network",
    "cp ": "needs root; that its files are there is tested here",
    "mkdir -p": "needs root",
    "systemd-sysusers": "tests/deploy/test_systemd.py, in an empty root directory",
    "systemd-tmpfiles": "tests/deploy/test_systemd.py, in an empty root directory",
    "systemctl": "needs systemd",
    "journalctl": "needs systemd",
    "helm install": "tests/deploy/test_manifests.py renders the chart; that the values exist is tested here",
    "helm upgrade": "as helm install",
    "helm template": "tests/deploy/test_manifests.py",
    "helm test": "needs a cluster; tests/deploy/test_manifests.py renders it",
    "REGISTRY=": "the reader's own",
    "kubectl create namespace": "needs a cluster",
    "kubectl apply -k": "tests/deploy renders every directory and validates it; that it is there is tested here",
    "kubectl exec": "named; needs a cluster",
    "kubectl set env": "tests/deploy/test_manifests.py runs it",
    "resumed keygen fleet.keys && kubectl": "needs a cluster; the first half is run elsewhere",
    # Clients in other languages: their own toolchains run these.
    "cargo add": "asks the network",
    # RELEASING.md, for maintainers.
    "cargo update --workspace": "asks the network",
    "git tag -s": "needs the key of a maintainer",
    "cargo publish": "publishes; `make release-check` builds the package",
    "npm publish": "publishes; `make release-check` builds the package",
    "go list": "asks the network",
    "helm push": "publishes; `make release-check` builds the package",
    "docker buildx": "publishes; `make image-test` builds the image",
    "go get": "asks the network",
    "npm install": "asks the network",
    "go test": "`make go`",
    "RESUMED_COMMAND=.../resumed": "`make go`, `make node` and `make rust` do that",
    "RESUMED_LEAK_HANDSHAKES=100000 cargo test": "takes minutes, and Rust",
    "RESUMED_LEAK_HANDSHAKES=100000 go test": "takes an hour",
    "RESUMED_COMPARE_ROUNDS=300 go test": "takes minutes",
    "RESUMED_COST_HANDSHAKES=1500 cargo test": "takes minutes, and Rust",
    "npm run leak": "takes minutes",
    "npm test": "`make node`",
    "LD_PRELOAD=": "tests/preload, `make preload-test`",
    "cc server.c": "`make c` builds the example",
    "cmake -S client/c": "`make c`, with a prefix of its own",
    # Tutorials: test_tutorials.py goes through that of nginx.
    "sed 's/nginx-a/": "test_tutorials.py",
    "env $(cat resumed.env) nginx": "test_tutorials.py",
    "visit localhost": "test_tutorials.py",
    "resumed doctor 127.0.0.1:7400 --namespace shop --keyring fleet.keys --frontend localhost": "test_tutorials.py",
    "resumed bench localhost:8443": "test_tutorials.py",
    "nginx -p .": "test_tutorials.py",
    "kubectl apply -f": "needs a cluster",
    "kubectl --namespace": "needs a cluster",
    "apt-get update": "asks the network, in a pod",
    "kubectl run client": "needs a cluster",
    "(sleep 1) | openssl s_client -connect shop.shop:443": "needs a cluster",
    "for i in 1 2 3": "needs a cluster",
}

INSTEAD = {
    # The command of the page: the command that runs, which needs no answers, ends soon, or uses this machine's files.
    "resumed keyring promote fleet.keys": "resumed keyring promote fleet.keys --wait 0s",
    "resumed keyring retire fleet.keys": "resumed keyring retire fleet.keys --wait 0s --lifetime 0s",
    "resumed purge STORE NAMESPACE": "resumed purge STORE NAMESPACE --yes --force",
    "resumed purge store.example:7400 shop --ca ca.crt --cert operator.crt --key operator.key": (
        "resumed purge store.example:7400 shop --ca store-ca.crt --cert operator.crt --key operator.key --yes --force"
    ),
    "resumed top 127.0.0.1:9464 frontend-1:9465 ...": (
        "resumed top 127.0.0.1:9464 frontend-1:9465 --count 1 --interval 1s"
    ),
    "resumed bench shop-a.example:443 shop-b.example:443 --sni shop.example --duration 30s": (
        "resumed bench shop-a.example:443 shop-b.example:443 --sni localhost --ca frontends-ca.crt --count 20"
    ),
}

BEFORE = {
    # Commands that create a file which exists already, and the preparation for each.
    "resumed keygen fleet.keys": "rm -f fleet.keys",
}

NO_COMMANDS = {
    # First lines of blocks that are not commands, and their nature.
    "ACL SETUSER": "a command of Redis: tests/server/storage/test_redis_admission.py has the same permissions",
    "the frontend at": "what `resumed doctor` prints: tests/end_to_end/cli/test_doctor.py",
    "[[grant]]": "a file of grants: every command here that takes one is given those of docs/store.md",
    "[[limit]]": "a file of limits",
}

PROGRAMS: dict[str, tuple[str, dict[str, str]]] = {
    # First lines of programs: what their reader has already, and what stands there for what.
    "context = SSL.Context(": ("from OpenSSL import SSL", {}),
    "installation = resumed.install(context, ...)": (
        """
import prometheus_client, resumed, resumed.prometheus, ssl
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("server.pem")
""",
        {"...": "target='127.0.0.1:7400', namespace='shop', keyring='fleet.keys'", "9465": "0"},
    ),
    "removal = installation.remove(": (
        """
import resumed, socket, ssl, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("server.pem")
installation = resumed.install(context, target='127.0.0.1:7400', namespace='shop', keyring='fleet.keys')
ours, theirs = socket.socketpair()
client = ssl.create_default_context()
client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
threading.Thread(target=lambda: client.wrap_socket(ours).recv(1), daemon=True).start()
connection = context.wrap_socket(theirs, server_side=True)
""",
        {"timeout=1.0": "timeout=30.0"},
    ),
    "provider = opentelemetry.trace": (
        """
import opentelemetry.trace, resumed, ssl
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
""",
        {"...": "target='127.0.0.1:7400', namespace='shop', keyring='fleet.keys'"},
    ),
    "options = twisted.internet.ssl.CertificateOptions(": (
        """
import resumed, resumed.twisted, twisted.internet.ssl
from OpenSSL import crypto
from twisted.internet import protocol, reactor
pem = open("server.pem", "rb").read()
key, certificate = crypto.load_privatekey(1, pem), crypto.load_certificate(1, pem)
factory = protocol.Factory()
""",
        {
            "privateKey=...": "privateKey=key",
            "certificate=...": "certificate=certificate",
            "options.getContext(), ...": "options.getContext(), "
            "target='127.0.0.1:7400', namespace='shop', keyring='fleet.keys'",
            "443": "0",
        },
    ),
}
