"""Fuzzes a running server over the wire: `python fuzz/wire.py --transport native --seconds 60`.

Valid and mutated messages, frames and byte streams, in batches. After each batch the server has to be healthy, to
answer an honest client correctly, to have logged no defect, and to be no larger than before. Coverage does not guide
it; all choices follow from --seed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import random
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hpack import Encoder

import resumed.v1
from fuzz.target import mutated
from resumed._client.store import StoreClient
from resumed._transport.http2 import request_headers
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.protobuf.descriptor import Descriptor, MethodDescriptor
    from google.protobuf.message import Message

    from support.server import RunningServer

BATCH = 100
PATIENCE = 30.0
"""Seconds that the server may take for anything; beyond that it hangs."""
LOOK = 0.02
"""Seconds of silence after which a connection whose last frame is incomplete is closed."""
WARM_UP = 3
"""Batches after which the server has its size."""
GROWTH = 48 << 20
DESCRIPTORS, THREADS = 32, 16
"""What its memory (bytes), descriptors and threads may grow by, once it is warm."""

LINES, LINES_A_SECOND = 50, 2
"""How long the log may get."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_KINDS = (*range(11), 0xFA)
_FLAGS = (0, 0x1, 0x4, 0x5, 0x8, 0x20, 0x25, 0xFF)
_STREAMS = (0, 1, 1, 1, 2, 3, 2**31 - 1, 2**32 - 1)
_NUMBERS = (60, 60, 60, 60, 0, 1, -1, 315_576_000_001, 2**31 - 1, 2**63 - 1, -(2**63))
_TEXTS = (*["shop"] * 12, "shop.eu", "", "a" * 63, "a" * 64, "Shop", "ä", "a\0b", "x" * 70_000)
_BYTES = (*[bytes(32)] * 6, b"k", b"", b"k" * 64, b"k" * 65, bytes(65_536), bytes(65_537))
_INTEGERS = {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_ENUM}


@dataclass
class Outcome:
    """Result of a run."""

    inputs: int = 0
    batches: int = 0
    seconds: float = 0.0
    answers: dict[str, int] = field(default_factory=dict)
    size: dict[str, list[int]] = field(default_factory=dict)
    """Bytes, descriptors and threads when warm, and at the end."""


class ConnectionBroken(AssertionError):
    """The server broke a promise; the message has the seed to see it again."""


def methods() -> list[MethodDescriptor]:
    """Return all unary methods of the contract."""
    found = []
    for module in pkgutil.iter_modules(resumed.v1.__path__):
        if module.name.endswith("_pb2"):
            file = importlib.import_module(f"resumed.v1.{module.name}").DESCRIPTOR
            found += [method for service in file.services_by_name.values() for method in service.methods]
    return [method for method in found if not method.server_streaming]


class Source:
    """Makes inputs up."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._methods = methods()

    def call(self) -> tuple[str, bytes]:
        """Return the path of a method, and a message for it that is valid, or was."""
        method = self.random.choice(self._methods)
        request = message_factory.GetMessageClass(method.input_type)()
        self._fill(request, method.input_type, 4)
        encoded = request.SerializeToString()[: 1 << 20]
        path = f"/{method.containing_service.full_name}/{method.name}"
        return path, encoded if self.random.random() < 0.5 else self.mutated(encoded)

    def mutated(self, data: bytes) -> bytes:
        """Return `data` changed a little."""
        return mutated(data, self.random)

    def stream(self) -> bytes:
        """Return all that a client might send on one connection."""
        path, encoded = self.call()
        choose = self.random
        block = request_headers("store:7400", path, False)
        if choose.random() < 0.2:
            more = [("grpc-timeout", choose.choice(("1n", "99999999H", "-1S", ""))), ("grpc-encoding", "gzip")]
            block += Encoder().encode(more, huffman=bool(choose.randrange(2)))
        message = bytes((choose.choice((0, 0, 0, 1, 255)),)) + len(encoded).to_bytes(4, "big") + encoded
        frames = [self._frame(4, 0, 0, b""), self._frame(1, 0x4, 1, block)]
        frames += [self._frame(0, 0, 1, message[at : at + 16_384]) for at in range(0, len(message), 16_384)]
        frames.append(self._frame(0, 0x1, 1, b""))
        for _ in range(choose.choice((0, 1, 1, 2, 8))):
            self._disturb(frames)
        data = _PREFACE + b"".join(frames)
        return data if choose.random() < 0.6 else self.mutated(data)

    def _fill(self, message: Message, kind: Descriptor | None, depth: int) -> None:
        """Set some of the fields of a message."""
        choose = self.random
        for each in kind.fields if kind else ():
            if choose.random() < 0.15:
                continue
            if each.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
                if depth == 0:
                    continue
                if each.is_repeated:
                    for _ in range(choose.choice((0, 1, 2, 3, 257))):
                        self._fill(getattr(message, each.name).add(), each.message_type, depth - 1)
                elif each.containing_oneof is None or choose.random() < 0.4:
                    getattr(message, each.name).SetInParent()
                    self._fill(getattr(message, each.name), each.message_type, depth - 1)
            else:
                value = self._value(each)
                if each.is_repeated:
                    getattr(message, each.name).extend([value] * choose.choice((0, 1, 3)))
                else:
                    setattr(message, each.name, value)

    def _value(self, each: FieldDescriptor) -> Any:
        choose = self.random
        if each.type == FieldDescriptor.TYPE_BYTES:
            return choose.choice((*_BYTES, choose.randbytes(32), choose.randbytes(8)))
        if each.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            return choose.choice(_TEXTS)
        if each.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return bool(choose.randrange(2))
        if each.cpp_type in _INTEGERS:
            return choose.choice((0, 0, 0, 1, 7, 2**31 - 1))
        if each.cpp_type == FieldDescriptor.CPPTYPE_UINT64:
            return choose.choice((0, 1, 2**64 - 1))
        return choose.choice(_NUMBERS) if each.cpp_type == FieldDescriptor.CPPTYPE_INT64 else 1.5

    def _disturb(self, frames: list[bytes]) -> None:
        choose = self.random
        at = choose.randrange(len(frames))
        match choose.randrange(4):
            case 0:
                del frames[at]
                frames.append(b"")
            case 1:
                frames[at:at] = [frames[choose.randrange(len(frames))]]
            case 2:
                frames[at] = self.mutated(frames[at])
            case _:
                payload = choose.randbytes(choose.choice((0, 1, 4, 6, 8, 100)))
                more = [self._frame(choose.choice(_KINDS), choose.choice(_FLAGS), choose.choice(_STREAMS), payload)]
                frames[at:at] = more * choose.choice((1, 1, 1, 50))

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


class Wire:
    """Fuzzes one server.

    Args:
        server: The server, without other clients.
        seed: Determines all choices.
    """

    def __init__(self, server: RunningServer, seed: int) -> None:
        self._server = server
        self._seed = seed
        self._source = Source(seed)
        self._channel: Any = grpc.insecure_channel(server.target)
        self._canary = StoreClient(server.target, namespace="canary", deadline=PATIENCE)
        self.outcome = Outcome()

    def run(self, seconds: float, batches: int = 1 << 62) -> Outcome:
        """Send batches until the time is up, but no more than `batches`.

        Raises:
            ConnectionBroken: The server broke a promise.
        """
        self._started = started = time.monotonic()
        with self._channel:
            while self.outcome.batches < batches and time.monotonic() - started < seconds:
                for _ in range(BATCH):
                    kind: Callable[[], str] = self._source.random.choice(
                        (self._make_call, self._make_call, self._send_stream)
                    )
                    answer = kind()
                    self.outcome.answers[answer] = self.outcome.answers.get(answer, 0) + 1
                    self.outcome.inputs += 1
                self.outcome.batches += 1
                self._look_at_it()
        self._canary.close()
        self.outcome.seconds = time.monotonic() - started
        return self.outcome

    def _make_call(self) -> str:
        path, encoded = self._source.call()
        try:
            self._channel.unary_unary(path)(encoded, timeout=PATIENCE)
        except grpc.RpcError as error:
            code = error.code()
            if code in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN}:
                self._broken(f"{path} of {len(encoded)} bytes ended with {code.name}")
            return code.name
        return "OK"

    def _send_stream(self) -> str:
        """Send a stream of bytes and say that it ends: the server has to end the connection."""
        host, _, port = self._server.target.rpartition(":")
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            try:
                connection.sendall(self._source.stream())
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65_536):
                    pass
            except TimeoutError:
                self._broken("a connection whose client is gone stays open")
            except OSError:
                return "reset"
        return "closed"

    def _look_at_it(self) -> None:
        if self._server.process.poll() is not None:
            self._broken(f"the server ended with {self._server.process.returncode}")
        health = health_pb2_grpc.HealthStub(self._channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        if health.status != health_pb2.HealthCheckResponse.SERVING:
            self._broken("not healthy")
        key, value = self._source.random.randbytes(32), self._source.random.randbytes(200)
        seen = (
            self._canary.put(key, value, 60.0) > 0,
            (found := self._canary.get(key)) is not None and found.value == value,
            self._canary.take(key) is not None,
            self._canary.take(key) is None,
            self._canary.remove(key) is False,
        )
        if not all(seen):
            self._broken(f"an honest client was answered wrongly: {seen}")
        # Each purge is logged for the operator.
        lines = [line for line in self._server.log_lines() if line.get("event") != "namespace purged"]
        if len(lines) > LINES + LINES_A_SECOND * (time.monotonic() - self._started):
            self._broken(f"the log has {len(lines)} lines, the last of them {lines[-1]}")
        defects = [line for line in lines if _tells_of_a_defect(line)]
        if defects:
            self._broken(f"the log tells of a defect: {defects[0]}")
        for name, now, most in zip(
            ("bytes", "descriptors", "threads"),
            _size(self._server.process.pid),
            (GROWTH, DESCRIPTORS, THREADS),
            strict=True,
        ):
            if self.outcome.batches <= WARM_UP:
                self.outcome.size[name] = [now, now]
            warm = self.outcome.size[name]
            warm[1] = now
            if now - warm[0] > most:
                self._broken(f"{name} grew from {warm[0]:,} to {now:,}")

    def _broken(self, promise: str) -> None:
        raise ConnectionBroken(
            f"{promise} (seed {self._seed}, batch {self.outcome.batches}, input {self.outcome.inputs})"
        )


def _tells_of_a_defect(line: dict[str, Any]) -> bool:
    """Return whether a log line reveals a defect: a traceback, or an unexpected error."""
    return "text" in line or line.get("event") == "internal error" or "Traceback" in json.dumps(line)


def _size(process: int) -> Sequence[int]:
    """Return the bytes (not counting those of files), descriptors and threads of a process."""
    folder = Path("/proc", str(process))
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) << 10, len(list((folder / "fd").iterdir())), int(status["Threads"])


def main() -> int:
    """Fuzz a server of one kind, and print the outcome as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", choices=("grpcio", "native"), default="grpcio")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    options = parser.parse_args()
    with running_server("--transport", options.transport) as server:
        wire = Wire(server, options.seed)
        failure = ""
        try:
            wire.run(options.seconds)
        except ConnectionBroken as error:
            failure = str(error)
    print(json.dumps({**vars(wire.outcome), "failure": failure}))  # noqa: T201
    return int(bool(failure))


if __name__ == "__main__":
    sys.exit(main())
