"""The servers behind a RedisUrl: connections to them, which of them has a key, and what their errors mean.

A Redis that does not answer must not hold up calls: what would wait for its time-out one after the other is refused at
once, while one call after each pause finds out whether it is back.
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
from typing import TYPE_CHECKING, Any

import redis
import redis.sentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.credentials import CredentialProvider
from redis.retry import Retry

from resumed_server.storage.engine import EngineError, EngineFull, EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from resumed_server.storage.redis.url import RedisUrl

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two attempts to reach a Redis that does not answer; each is twice as long as the one before."""

_RESP2 = 2
"""The older protocol: of the newer one nothing is needed, and a connection begins with a round trip less."""
READERS = 4
"""How many read the log of changes at the same time: more than watchers.MOST_CATCHING_UP."""
_OTHER_THREADS = READERS + 8
"""Those that call the engine beside the ones that answer RPCs: readers, operators (2), watchers that begin, the
sweeper, the count, the probe and metrics."""
_LONGEST_CAUSE = 200
_TLS_HINT = " (if it speaks no TLS, use redis:; if it wants a client certificate, give cert and key)"
_PLAINTEXT_HINT = " (if it speaks TLS, use rediss:)"
PERMISSIONS = (
    "+eval +evalsha +script|load +get +set +pttl +wait +info +cluster +xadd +xrange +xrevrange +xgroup +xinfo +pexpire "
    "+time +scan +unlink"
)
"""What a user needs, as ACL SETUSER takes it."""
_REFUSALS = {
    "MISCONF": "refuses writes, because it cannot save its snapshot (MISCONF); see its log, and free its disk",
    "NOREPLICAS": "refuses writes, because it has too few replicas (NOREPLICAS); see its min-replicas-to-write",
}
"""What the codes of errors mean that an operator can mend."""
_LATE_WAIT = 0.15
"""Seconds after its time-out in which WAIT answers: Redis looks ten times a second only, where it has nothing to do."""

logging.getLogger("redis").setLevel(logging.INFO)  # below that, it logs keys and values


class UnusableServer(EngineUnavailable):
    """It answers, but cannot be the store before somebody puts something right."""


class SlotsMoving(EngineUnavailable):
    """A script needed what another node has by now, and changed nothing."""


class RedisTopology(ABC):
    """Where commands go. Thread-safe.

    Attributes:
        name: What a log calls it.
    """

    def __init__(self, url: RedisUrl) -> None:
        self.name = ", ".join(f"{host}:{port}" for host, port in url.hosts)
        self._timeout, self._topology = url.timeout, url.topology
        self._backoffs: defaultdict[str, NodeBackoff] = defaultdict(lambda: NodeBackoff(url))

    def execute(self, node: str, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Send commands to a node in one go; return an answer for each, or the EngineError that it got.

        Scripts go by their hashes, and whole only where Redis does not know them. Connections begin with those of
        sessions (see redis_admission.py), so that happens after SCRIPT FLUSH; then they come behind the other commands.

        Raises:
            EngineError: Nothing was answered.
        """
        backoff = self._backoffs[node]
        backoff.check(node)
        with self._translate_errors(node, backoff):
            answers = self._execute(node, list(map(_by_hash, commands)))
            if any(isinstance(answer, redis.exceptions.NoScriptError) for answer in answers):
                self._repeat(node, commands, answers)
        backoff.record_success()
        for position, answer in enumerate(answers):
            if isinstance(answer, Exception):
                answers[position] = self._translate(answer, node, backoff)
        return answers

    def primary_infos(self) -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
        """Yield every primary, and how to ask it about itself. Asked whether or not it seems absent.

        Raises:
            EngineError: Nobody knows the primaries.
        """
        for node, ask in self._infos():

            def info(node: str = node, ask: Callable[[], Mapping[str, Any]] = ask) -> Mapping[str, Any]:
                backoff = self._backoffs[node]
                with self._translate_errors(node, backoff):
                    answer = ask()
                backoff.record_success()
                return answer

            yield node, info

    @abstractmethod
    def node_for(self, key: bytes) -> str:
        """Return the node that has `key`; raise EngineError if nobody knows."""

    @abstractmethod
    def refresh(self) -> None:
        """Find out anew which node has which key; raise EngineError if nobody knows."""

    @abstractmethod
    def reconnect(self) -> None:
        """Close the connections that are idle: another server may be behind the name by now."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections."""

    def replica_error(self, node: str) -> EngineUnavailable:
        """Return what it means that a node is a replica."""
        message = f"Redis at {node} is a replica, which is read-only; use its primary"
        # Behind Sentinels, it will be told soon that it is the primary now, or we that another one is.
        return UnusableServer(message) if self._topology == "server" else EngineUnavailable(message)

    def _repeat(self, node: str, commands: Sequence[Sequence[Any]], answers: list[Any]) -> None:
        """Send scripts whole that Redis did not know, and what waits for them; replace their answers."""
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
    def _infos(self) -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]: ...

    @contextlib.contextmanager
    def _translate_errors(self, node: str, backoff: NodeBackoff) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, redis.exceptions.RedisClusterException, OSError) as error:
            raise self._translate(error, node, backoff) from None

    def _translate(  # noqa: PLR0911 - a table
        self, error: Exception, node: str, backoff: NodeBackoff
    ) -> EngineError:
        """Return what `error` means; what Redis or the driver says of it may carry keys and values."""
        exceptions = redis.exceptions
        if isinstance(error, exceptions.RedisClusterException):
            if "not enabled" in str(error):
                return UnusableServer(f"Redis at {node} is no cluster; use redis:// for a single server")
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(error, exceptions.OutOfMemoryError):
            return EngineFull(f"Redis at {node} is full (OOM); raise its maxmemory, or give it less to keep")
        if isinstance(error, exceptions.AuthenticationError):
            return UnusableServer(f"Redis at {node} refuses the user or the password of the URL")
        if isinstance(error, exceptions.NoPermissionError):
            return UnusableServer(f"Redis at {node} does not permit the user all that is needed: {PERMISSIONS}")
        if reason := _tls_failure(error):
            return UnusableServer(f"TLS with Redis at {node} fails ({reason}); see to ca, cert and key, or use redis:")
        if isinstance(error, redis.ResponseError) and not isinstance(error, exceptions.ClusterError):
            return self._response_error(error, node)
        if isinstance(error, exceptions.MaxConnectionsError):  # which says nothing of the node
            return EngineUnavailable(f"all connections to Redis at {node} are in use")
        hint = backoff.record_failure(late=isinstance(error, redis.TimeoutError))
        return EngineUnavailable(self._connection_error_text(error, node, hint))

    def _response_error(self, error: redis.ResponseError, node: str) -> EngineUnavailable:
        if isinstance(error, redis.exceptions.ReadOnlyError):
            self.reconnect()
            return self.replica_error(node)
        if "unknown command" in str(error).lower() and "sentinel" in str(error).lower():
            return UnusableServer(f"{node} is no Sentinel; give the addresses of Sentinels, or use redis://")
        if "non local key" in str(error):
            return SlotsMoving(f"the slots of Redis at {node} are moving")
        code = _code(error)
        return EngineUnavailable(f"Redis at {node} {_REFUSALS.get(code, f'answers {code}')}")

    def _connection_error_text(self, error: Exception, node: str, hint: str) -> str:
        if isinstance(error, redis.sentinel.MasterNotFoundError):
            return f"the Sentinels at {node} do not answer, or know no such primary that is up"
        if isinstance(error, redis.TimeoutError):
            return f"Redis at {node} does not answer within {self._timeout * 1e3:.0f} ms{hint}"
        cause = str(error)[:_LONGEST_CAUSE].rstrip(".")
        return f"Redis at {node} cannot be reached: {cause}{'' if 'refused' in cause else hint}"


class _SingleServer(RedisTopology):
    """One server, or the primary that Sentinels name."""

    def __init__(self, url: RedisUrl, client: redis.Redis) -> None:
        super().__init__(url)
        self._client: Any = client

    def node_for(self, key: bytes) -> str:  # noqa: ARG002 - it has them all
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
        if len(commands) == 1:
            return [_answer(self._client.execute_command, *commands[0])]
        with self._client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers

    def _infos(self) -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
        yield self.name, self._client.info


class _Cluster(RedisTopology):
    """The primaries of a cluster. Met when they are first needed, since redis-py asks for them at once."""

    def __init__(self, url: RedisUrl, options: Mapping[str, Any]) -> None:
        super().__init__(url)
        self._url, self._options = url, options
        self._lock = threading.Lock()
        self._cluster_client: Any = None

    def node_for(self, key: bytes) -> str:
        """See RedisTopology."""
        with self._translate_errors(self.name, self._backoffs[self.name]):
            name: str = self._client().get_node_from_key(key).name
        return name

    def refresh(self) -> None:
        """See RedisTopology."""
        with self._translate_errors(self.name, self._backoffs[self.name]):
            self._client().nodes_manager.initialize()

    def reconnect(self) -> None:
        """See RedisTopology. RedisTopology of a cluster say themselves who has their slots."""

    def close(self) -> None:
        """See RedisTopology."""
        with self._lock:
            if self._cluster_client:
                self._cluster_client.close()

    def _execute(self, node: str, commands: Sequence[Sequence[Any]]) -> list[Any]:
        client = self._client()
        # To name the node spares redis-py asking Redis, command by command, which keys it has; it follows
        # redirections all the same.
        target = client.get_node(node_name=node)
        if target is None:
            raise redis.ConnectionError
        if len(commands) == 1:
            return [_answer(client.execute_command, *commands[0], target_nodes=target)]
        with client.pipeline() as pipeline:
            for command in commands:
                pipeline.execute_command(*command, target_nodes=target)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers

    def _infos(self) -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
        with self._translate_errors(self.name, self._backoffs[self.name]):
            client = self._client()
            primaries = client.get_primaries()
        for node in primaries:
            yield node.name, lambda node=node: client.execute_command("INFO", target_nodes=node)  # type: ignore[misc]

    def _client(self) -> Any:
        if self._cluster_client is None:
            self._backoffs[self.name].check(self.name)
            with self._lock:
                if self._cluster_client is None:
                    nodes = [ClusterNode(host, port) for host, port in self._url.hosts]
                    self._cluster_client = RedisCluster(startup_nodes=nodes, **self._options)
        return self._cluster_client


class NodeBackoff:
    """How long a node has not answered, if it does not."""

    def __init__(self, url: RedisUrl) -> None:
        self._timeout = url.timeout
        self._pause = self._next_attempt = 0.0
        self._answered_at = float("-inf")
        self._attempting = False
        # What a server of the other kind makes of a greeting: one is silent, the other hangs up.
        self._hint = _TLS_HINT if url.tls else _PLAINTEXT_HINT

    def check(self, node: str) -> None:
        """Raise EngineUnavailable unless the node is there, or it is this call's turn to see whether it is."""
        if self._pause:
            now = time.monotonic()
            if now < self._next_attempt:
                raise EngineUnavailable(f"Redis at {node} did not answer a moment ago")
            self._next_attempt = now + self._timeout  # others have to wait for what comes of this attempt
            self._attempting = True

    def record_failure(self, *, late: bool = False) -> str:
        """Note that the node did not answer, and return what may be wrong with one that never did.

        Args:
            late: Whether it did not answer in time. One that answered another call meanwhile is there: that took long.
        """
        if late and time.monotonic() - self._answered_at < self._timeout:
            return self._hint
        if self._attempting or not self._pause:  # not for each of many calls that find out together
            self._pause = min(2 * self._pause, LONGEST_PAUSE) or FIRST_PAUSE
            self._next_attempt = time.monotonic() + self._pause
            self._attempting = False
        return self._hint

    def record_success(self) -> None:
        """Note that the node answered."""
        self._pause, self._attempting, self._hint = 0.0, False, ""
        self._answered_at = time.monotonic()


class _PasswordProvider(CredentialProvider):
    """Reads the password anew for every connection, so that it can be changed while the server runs."""

    def __init__(self, user: str | None, password: str | None, password_file: Path | None) -> None:
        self._user, self._password, self._password_file = user, password, password_file

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Return what AUTH needs."""
        password = self._password_file.read_text().strip() if self._password_file else self._password or ""
        return (self._user, password) if self._user else (password,)


def connect(url: RedisUrl, threads: int, admit: Callable[[Any], None]) -> RedisTopology:
    """Return the servers behind `url`, to be used by as many `threads`. Connects when they are first needed.

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
        # Once more where a connection turns out to be dead; what was not answered in time will not be.
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    }
    if url.tls:
        options |= {"ssl": True, "ssl_ca_certs": url.ca and str(url.ca)}
        options |= {"ssl_certfile": url.cert and str(url.cert), "ssl_keyfile": url.key and str(url.key)}
    sentinel_options = options | _password_options(url.sentinel_user, None, url.sentinel_password_file)
    options |= _password_options(url.user, url.password, url.password_file)
    options |= {"max_connections": threads + _OTHER_THREADS, "redis_connect_func": admit}
    if url.topology == "cluster":
        return _Cluster(url, options | {"retry": Retry(NoBackoff(), 0)})  # it would try time-outs again
    if url.topology == "sentinel":
        sentinel = redis.sentinel.Sentinel(url.hosts, sentinel_kwargs=sentinel_options)
        return _SingleServer(url, sentinel.master_for(url.sentinel_name, db=url.database, **options))
    return _SingleServer(url, redis.Redis(*url.hosts[0], db=url.database, **options))


def _password_options(user: str | None, password: str | None, password_file: Path | None) -> dict[str, Any]:
    if user or password or password_file:
        return {"credential_provider": _PasswordProvider(user, password, password_file)}
    return {}


def _by_hash(command: Sequence[Any]) -> Sequence[Any]:
    """Return a command that has a script's hash where it had the script."""
    return ("EVALSHA", _hash(command[1]), *command[2:]) if command[0] == "EVAL" else command


@functools.cache  # there are as many as the engine has scripts
def _hash(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def _answer(execute: Callable[..., Any], *command: Any, **options: Any) -> Any:
    """Return the answer to a command, as a pipeline does: an error that Redis answers is one."""
    try:
        return execute(*command, **options)
    except redis.ResponseError as error:
        return error


def _verify_readable(path: Path | None) -> None:
    try:
        if path:
            path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _tls_failure(error: BaseException | None) -> str:
    """Return why TLS failed, if that is behind `error`."""
    while error:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        if isinstance(error, ssl.SSLError) and error.reason:
            return error.reason.lower().replace("_", " ")
        error = error.__cause__ or error.__context__
    return ""


def _code(error: Exception) -> str:
    """Return the code of an answer: redis-py makes a class of it, or leaves it as the first word. Not the rest."""
    if type(error) is not redis.ResponseError:
        return type(error).__name__
    return str(error).partition(" ")[0][:32]
