import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PurgeRequest(_message.Message):
    __slots__ = ("namespace", "issued_before_time")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_BEFORE_TIME_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    issued_before_time: _timestamp_pb2.Timestamp
    def __init__(self, namespace: _Optional[str] = ..., issued_before_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class PurgeResponse(_message.Message):
    __slots__ = ("issued_before_time",)
    ISSUED_BEFORE_TIME_FIELD_NUMBER: _ClassVar[int]
    issued_before_time: _timestamp_pb2.Timestamp
    def __init__(self, issued_before_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ("namespace", "page_size", "page_token")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    page_size: int
    page_token: str
    def __init__(self, namespace: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("namespaces", "next_page_token")
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStats]
    next_page_token: str
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceStats, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class NamespaceStats(_message.Message):
    __slots__ = ("namespace", "session_count", "value_bytes", "tombstone_count", "purged_count", "issued_before_time")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SESSION_COUNT_FIELD_NUMBER: _ClassVar[int]
    VALUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOMBSTONE_COUNT_FIELD_NUMBER: _ClassVar[int]
    PURGED_COUNT_FIELD_NUMBER: _ClassVar[int]
    ISSUED_BEFORE_TIME_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    session_count: int
    value_bytes: int
    tombstone_count: int
    purged_count: int
    issued_before_time: _timestamp_pb2.Timestamp
    def __init__(self, namespace: _Optional[str] = ..., session_count: _Optional[int] = ..., value_bytes: _Optional[int] = ..., tombstone_count: _Optional[int] = ..., purged_count: _Optional[int] = ..., issued_before_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...
