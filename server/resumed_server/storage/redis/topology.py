"""Connections to Redis servers, clusters and Sentinels; routing of keys, and translation of errors.

A Redis that does not answer must not delay every call by its timeout. So calls fail at once, except for one call after
each pause of an exponential backoff, which tries whether the Redis answers again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

import redis
import redis.sentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.credentials import CredentialProvider
from redis.retry import Retry

from resumed_server.storage.engine import EngineError, EngineFull, EngineUnavailable
from resumed_server.storage.redis.script_loader import load_script

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from resumed_server.storage.redis.url import RedisUrl

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Bounds of the exponential backoff, in seconds, between attempts to reach a Redis that does not answer."""

_RESP2 = 2
"""The older protocol: the engine needs nothing of RESP3, and a connection begins with one round trip less."""
READERS = 4
"""Threads that read the change log at the same time: more than the watchers that may catch up at once."""
_OTHER_THREADS = READERS + 8
"""Threads that call the engine beside those of RPCs: readers, operators (2), new watchers, the sweeper, the count, the
probe and metrics."""
_LONGEST_CAUSE = 200
_TLS_HINT = " (if it does not use TLS, use redis:; if it requires a client certificate, set cert and key)"
_PLAINTEXT_HINT = " (if it uses TLS, use rediss:)"
PERMISSIONS = (
    "+eval +evalsha +script|load +get +set +pttl +wait +info +cluster +xadd +xrange +xrevrange +xgroup +xinfo +pexpire "
    "+time +scan +unlink +zadd +zrange +zrem +zscan +zscore +zcard"
)
"""The permissions that the Redis user needs, in the syntax of ACL SETUSER."""
_DENIAL = f"Redis at {{}} denies the user permissions that the server needs: {PERMISSIONS}"
_DENIALS_IN_SCRIPTS = ("no permissions to run", "can't run this command")
"""Parts of the errors of scripts whose commands the user may not run: of Valkey, and of Redis."""
_REFUSALS = {
    "MISCONF": "refuses writes, because it cannot save its snapshot (MISCONF); see its log, and free its disk",
    "NOREPLICAS": "refuses writes, because it has too few replicas (NOREPLICAS); see its min-replicas-to-write",
}
"""Meanings of error codes, with their remedies."""
_LATE_WAIT = 0.15
"""Seconds by which WAIT can exceed its timeout, since an idle Redis checks timeouts ten times a second only."""

logging.getLogger("redis").setLevel(logging.INFO)  # at DEBUG, redis-py logs keys and values


class UnusableServer(EngineUnavailable):
    """The server answers, but cannot be used until an operator changes its configuration or the URL."""


class SlotsMoving(EngineUnavailable):
    """A script needed a key that another node has by now, and changed nothing."""


class RedisTopology(ABC):
    """The servers behind a URL, and the routing of commands to them. Thread-safe.

    Attributes:
        name: The addresses of the URL, for logs.
    """

    def __init__(self, url: RedisUrl) -> None:
        self.name = ", ".join(f"{host}:{port}" for host, port in url.hosts)
        self._timeout, self._topology = url.timeout, url.topology
        self._backoffs: defaultdict[str, NodeBackoff] = defaultdict(lambda: NodeBackoff(url))

    def execute(self, node: str, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Send commands to a node in one pipeline; return the answer to each, or its EngineError.

        Scripts are called by their hashes, and sent in full only if Redis does not have them. Connections begin with
        loading the scripts of sessions (see admission.py), so this happens after SCRIPT FLUSH only. Scripts that are
        sent in full run after the other commands.

        Raises:
            EngineError: No command was answered.
        """
        backoff = self._backoffs[node]
        backoff.check(node)
        with self._translate_errors(node):
            answers = self._execute(node, list(map(_by_hash, commands)))
            if any(isinstance(answer, redis.exceptions.NoScriptError) for answer in answers):
                self._repeat(node, commands, answers)
        backoff.record_success()
        for position, answer in enumerate(answers):
            if isinstance(answer, Exception):
                answers[position] = self._translate(answer, node)
        return answers

    def query(self, node: str, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Do the same as execute(), and raise the first EngineError of an answer."""
        answers = self.execute(node, commands)
        for answer in answers:
            if isinstance(answer, EngineError):
                raise answer
        return answers

    def evaluate(self, node: str, script: str, keys: int, *arguments: Any) -> Any:
        """Return the answer of a script to `arguments`, of which the first `keys` are keys; see query()."""
        (answer,) = self.query(node, [("EVAL", load_script(script), keys, *arguments)])
        return answer

    def info(self, node: str) -> Mapping[str, Any]:
        """Return the INFO of a node, regardless of the backoff; raise EngineError if it does not answer."""
        with self._translate_errors(node):
            (answer,) = self._execute(node, [("INFO",)])
            if isinstance(answer, redis.ResponseError):
                raise answer
        self._backoffs[node].record_success()
        return cast("Mapping[str, Any]", answer)

    @abstractmethod
    def primaries(self) -> list[str]:
        """Return every primary; raise EngineError if they are unknown."""

    @abstractmethod
    def node_for(self, key: bytes) -> str:
        """Return the node that has `key`; raise EngineError if it is unknown."""

    @abstractmethod
    def refresh(self) -> None:
        """Query the placement of keys on nodes again; raise EngineError if it is unknown."""

    @abstractmethod
    def reconnect(self) -> None:
        """Close idle connections: the name may lead to another server by now."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections."""

    def connections(self) -> tuple[int, int, int]:
        """Return how many connections calls use, how many are idle, and how many there may be, of all pools."""
        # Private names of redis-py, the same in all versions that pyproject.toml allows.
        pools = list(self._pools())
        return (
            sum(len(pool._in_use_connections) for pool in pools),  # noqa: SLF001
            sum(len(pool._available_connections) for pool in pools),  # noqa: SLF001
            sum(pool.max_connections for pool in pools),
        )

    def replica_error(self, node: str) -> EngineUnavailable:
        """Return the error for a node that is a replica."""
        message = f"Redis at {node} is a replica, which is read-only; use its primary"
        # With Sentinels this is temporary: they promote it, or name another primary.
        return UnusableServer(message) if self._topology == "server" else EngineUnavailable(message)

    def _repeat(self, node: str, commands: Sequence[Sequence[Any]], answers: list[Any]) -> None:
        """Send scripts in full that Redis did not have, and WAIT again; replace their answers."""
        again = [
            position
            for position, (command, answer) in enumerate(zip(commands, answers, strict=True))
            if isinstance(answer, redis.exceptions.NoScriptError) or command[0] == "WAIT"
        ]
        for position, answer in zip(again, self._execute(node, [commands[each] for each in again]), strict=True):
            answers[position] = answer

    @abstractmethod
    def _execute(self, node: str, commands: Sequence[Sequence[Any]]) -> list[Any]: ...

    @abstractmethod
    def _pools(self) -> Iterable[Any]: ...

    @contextlib.contextmanager
    def _translate_errors(self, node: str) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, redis.exceptions.RedisClusterException, OSError) as error:
            raise self._translate(error, node) from None

    def _translate(self, error: Exception, node: str) -> EngineError:  # noqa: PLR0911 - a table
        """Return the EngineError for `error`, without its text, which may contain keys and values."""
        exceptions = redis.exceptions
        if isinstance(error, exceptions.RedisClusterException):
            if "not enabled" in str(error):
                return UnusableServer(f"Redis at {node} is not a cluster; use redis:// for a single server")
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(error, exceptions.OutOfMemoryError):
            return EngineFull(f"Redis at {node} is full (OOM); raise its maxmemory, or give it less to keep")
        if isinstance(error, exceptions.AuthenticationError):
            return UnusableServer(f"Redis at {node} rejects the user or the password of the URL")
        if isinstance(error, exceptions.NoPermissionError):
            return UnusableServer(_DENIAL.format(node))
        if reason := _tls_failure(error):
            return UnusableServer(f"TLS with Redis at {node} fails ({reason}); check ca, cert and key, or use redis:")
        if isinstance(error, redis.ResponseError) and not isinstance(error, exceptions.ClusterError):
            return self._response_error(error, node)
        if isinstance(error, exceptions.MaxConnectionsError):  # which concerns this process, and not the node
            return EngineUnavailable(f"all connections to Redis at {node} are in use")
        hint = self._backoffs[node].record_failure(late=isinstance(error, redis.TimeoutError))
        return EngineUnavailable(self._connection_error_text(error, node, hint))

    def _response_error(self, error: redis.ResponseError, node: str) -> EngineUnavailable:
        if isinstance(error, redis.exceptions.ReadOnlyError):
            self.reconnect()
            return self.replica_error(node)
        if "unknown command" in str(error).lower() and "sentinel" in str(error).lower():
            return UnusableServer(f"{node} is not a Sentinel; use the addresses of Sentinels, or redis://")
        if "non local key" in str(error):
            return SlotsMoving(f"the slots of Redis at {node} are moving")
        if any(text in str(error) for text in _DENIALS_IN_SCRIPTS):
            return UnusableServer(_DENIAL.format(node))
        code = _code(error)
        return EngineUnavailable(f"Redis at {node} {_REFUSALS.get(code, f'answers {code}')}")

    def _connection_error_text(self, error: Exception, node: str, hint: str) -> str:
        if isinstance(error, redis.sentinel.MasterNotFoundError):
            return f"the Sentinels at {node} do not answer, or report no running primary of this name"
        if isinstance(error, redis.TimeoutError):
            return f"Redis at {node} does not answer within {self._timeout * 1e3:.0f} ms{hint}"
        cause = str(error)[:_LONGEST_CAUSE].rstrip(".")
        return f"Redis at {node} cannot be reached: {cause}{'' if 'refused' in cause else hint}"


class _SingleServer(RedisTopology):
    """One server, or the primary that Sentinels name."""

    def __init__(self, url: RedisUrl, client: redis.Redis) -> None:
        super().__init__(url)
        self._client: Any = client

    def primaries(self) -> list[str]:
        """See RedisTopology."""
        return [self.name]

    def node_for(self, key: bytes) -> str:  # noqa: ARG002 - one node has all keys
        """See RedisTopology."""
        return self.name

    def refresh(self) -> None:
        """See RedisTopology."""

    def reconnect(self) -> None:
        """See RedisTopology."""
        self._client.connection_pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        """See RedisTopology."""
        self._client.close()
        self._client.connection_pool.disconnect()

    def _execute(self, node: str, commands: Sequence[Sequence[Any]]) -> list[Any]:  # noqa: ARG002
        return _send(self._client, commands)

    def _pools(self) -> Iterable[Any]:
        return [self._client.connection_pool]


class _Cluster(RedisTopology):
    """The primaries of a cluster. Connects when they are first needed, since redis-py queries them at once."""

    def __init__(self, url: RedisUrl, options: Mapping[str, Any]) -> None:
        super().__init__(url)
        self._url, self._options = url, options
        self._lock = threading.Lock()
        self._cluster_client: Any = None

    def primaries(self) -> list[str]:
        """See RedisTopology."""
        with self._translate_errors(self.name):
            return [node.name for node in self._client().get_primaries()]

    def node_for(self, key: bytes) -> str:
        """See RedisTopology."""
        with self._translate_errors(self.name):
            name: str = self._client().get_node_from_key(key).name
        return name

    def refresh(self) -> None:
        """See RedisTopology."""
        with self._translate_errors(self.name):
            self._client().nodes_manager.initialize()

    def reconnect(self) -> None:
        """See RedisTopology. The nodes of a cluster redirect to the node that has a slot."""

    def close(self) -> None:
        """See RedisTopology."""
        with self._lock:
            if self._cluster_client:
                self._cluster_client.close()

    def _execute(self, node: str, commands: Sequence[Sequence[Any]]) -> list[Any]:
        client = self._client()
        # With the node given, redis-py does not query the keys of each command; it follows redirections all the same.
        target = client.get_node(node_name=node)
        if target is None:
            raise redis.ConnectionError
        return _send(client, commands, target_nodes=target)

    def _pools(self) -> Iterable[Any]:
        nodes = self._cluster_client.get_nodes() if self._cluster_client else []
        return [node.redis_connection.connection_pool for node in nodes if node.redis_connection]

    def _client(self) -> Any:
        if self._cluster_client is None:
            self._backoffs[self.name].check(self.name)
            with self._lock:
                if self._cluster_client is None:
                    nodes = [ClusterNode(host, port) for host, port in self._url.hosts]
                    self._cluster_client = RedisCluster(startup_nodes=nodes, **self._options)
        return self._cluster_client


class NodeBackoff:
    """Exponential backoff for a node that does not answer."""

    def __init__(self, url: RedisUrl) -> None:
        self._timeout = url.timeout
        self._pause = self._next_attempt = 0.0
        self._answered_at = float("-inf")
        self._attempting = False
        # A plaintext server does not answer a ClientHello, and a TLS server closes a plaintext connection.
        self._hint = _TLS_HINT if url.tls else _PLAINTEXT_HINT

    def check(self, node: str) -> None:
        """Raise EngineUnavailable if the node is in backoff; when an attempt is due, this call is the attempt."""
        if self._pause:
            now = time.monotonic()
            if now < self._next_attempt:
                raise EngineUnavailable(f"Redis at {node} did not answer a moment ago")
            self._next_attempt = now + self._timeout  # other calls fail until this attempt has ended
            self._attempting = True

    def record_failure(self, *, late: bool = False) -> str:
        """Record that the node did not answer; return a hint at the cause if it never has.

        Args:
            late: Whether the call timed out. If the node answered another call in the meantime, this call was slow, and
                no backoff begins.
        """
        if late and time.monotonic() - self._answered_at < self._timeout:
            return self._hint
        if self._attempting or not self._pause:  # once for many calls that fail together
            self._pause = min(2 * self._pause, LONGEST_PAUSE) or FIRST_PAUSE
            self._next_attempt = time.monotonic() + self._pause
            self._attempting = False
        return self._hint

    def record_success(self) -> None:
        """Record that the node answered, which ends the backoff."""
        self._pause, self._attempting, self._hint = 0.0, False, ""
        self._answered_at = time.monotonic()


class _PasswordProvider(CredentialProvider):
    """Reads the password file for every connection, so that it can change while the server runs."""

    def __init__(self, user: str | None, password: str | None, password_file: Path | None) -> None:
        self._user, self._password, self._password_file = user, password, password_file

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Return the arguments of AUTH."""
        password = self._password_file.read_text().strip() if self._password_file else self._password or ""
        return (self._user, password) if self._user else (password,)


def connect(url: RedisUrl, threads: int, admit: Callable[[Any], None]) -> RedisTopology:
    """Return the servers behind `url`, for this many `threads`. Connects when they are first needed.

    `admit` begins each connection.

    Raises:
        ValueError: A file that the URL names cannot be read.
    """
    for path in (url.ca, url.cert, url.key, url.password_file, url.sentinel_password_file):
        _verify_readable(path)
    options: dict[str, Any] = {
        "socket_timeout": url.timeout + (_LATE_WAIT if url.wait_replicas else 0),
        "socket_connect_timeout": url.timeout,
        "socket_keepalive": True,
        "protocol": _RESP2,
        # Retry once on a dead pooled connection, and never after a timeout.
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    }
    if url.tls:
        options |= {"ssl": True, "ssl_ca_certs": url.ca and str(url.ca)}
        options |= {"ssl_certfile": url.cert and str(url.cert), "ssl_keyfile": url.key and str(url.key)}
    sentinel_options = options | _password_options(url.sentinel_user, None, url.sentinel_password_file)
    options |= _password_options(url.user, url.password, url.password_file)
    options |= {"max_connections": threads + _OTHER_THREADS, "redis_connect_func": admit}
    if url.topology == "cluster":
        return _Cluster(url, options | {"retry": Retry(NoBackoff(), 0)})  # it would retry timeouts
    if url.topology == "sentinel":
        sentinel = redis.sentinel.Sentinel(url.hosts, sentinel_kwargs=sentinel_options)
        return _SingleServer(url, sentinel.master_for(url.sentinel_name, db=url.database, **options))
    return _SingleServer(url, redis.Redis(*url.hosts[0], db=url.database, **options))


def _password_options(user: str | None, password: str | None, password_file: Path | None) -> dict[str, Any]:
    if user or password or password_file:
        return {"credential_provider": _PasswordProvider(user, password, password_file)}
    return {}


def _by_hash(command: Sequence[Any]) -> Sequence[Any]:
    """Return a command with the hash of a script in the place of the script."""
    return ("EVALSHA", _hash(command[1]), *command[2:]) if command[0] == "EVAL" else command


@functools.cache  # one entry for each script
def _hash(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def _send(client: Any, commands: Sequence[Sequence[Any]], **options: Any) -> list[Any]:
    """Return the answer to each command, or the error that Redis answered; one command needs no pipeline."""
    if len(commands) == 1:
        try:
            return [client.execute_command(*commands[0], **options)]
        except redis.ResponseError as error:
            return [error]
    with client.pipeline(transaction=False) as pipeline:
        for command in commands:
            pipeline.execute_command(*command, **options)
        answers: list[Any] = pipeline.execute(raise_on_error=False)
    return answers


def _verify_readable(path: Path | None) -> None:
    try:
        if path:
            path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _tls_failure(error: BaseException | None) -> str:
    """Return the reason if a failure of TLS caused `error`, else an empty string."""
    while error:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        if isinstance(error, ssl.SSLError) and error.reason:
            return error.reason.lower().replace("_", " ")
        error = error.__cause__ or error.__context__
    return ""


def _code(error: Exception) -> str:
    """Return only the code of an error: redis-py has a class for it, or leaves it as the first word."""
    if type(error) is not redis.ResponseError:
        return type(error).__name__
    return str(error).partition(" ")[0][:32]
