"""The message classes of `paramserver.proto`, made from that file itself.

The file is the contract for other languages, too. Nothing generated is kept beside it: generated
code works with few versions of protobuf, and Ray needs one of its own choice. What is read here is
the little of the language that the file uses: messages of single and repeated fields.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FIELD: Final = re.compile(r"(repeated )?(\w+) (\w+) = (\d+);")
_MESSAGE: Final = re.compile(r"^message (\w+) \{\n(.*?)^\}", re.DOTALL | re.MULTILINE)
_FILE: Final = "paramserver.proto"


def described() -> descriptor_pb2.FileDescriptorProto:
    """Return what `paramserver.proto` says of messages."""
    text = resources.files("paramserver.transports").joinpath(_FILE).read_text("utf-8")
    text = re.sub(r"//.*", "", text)
    package = re.search(r"^package ([\w.]+);", text, re.MULTILINE)
    assert package is not None
    file = descriptor_pb2.FileDescriptorProto(name=_FILE, package=package[1], syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, body in _MESSAGE.findall(text):
        message = file.message_type.add(name=name)
        for repeated, kind, field, number in _FIELD.findall(body):
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            added = message.field.add(name=field, number=int(number), label=label)
            if kind.islower():  # uint64, bytes, …
                added.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
            else:
                added.type = kinds.TYPE_MESSAGE
                added.type_name = f".{package[1]}.{kind}"
    return file


def _classes() -> dict[str, Any]:
    file, pool = described(), descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    names = [message.name for message in file.message_type]
    find = pool.FindMessageTypeByName
    return {n: message_factory.GetMessageClass(find(f"{file.package}.{n}")) for n in names}


_made = _classes()

SERVICE: Final = "paramserver.v1.ParameterServer"
Frame = _made["Frame"]
Said = _made["Message"]
RegisterRequest = _made["RegisterRequest"]
RegisterReply = _made["RegisterReply"]
SnapshotRequest = _made["SnapshotRequest"]
StatsRequest = _made["StatsRequest"]
StatsReply = _made["StatsReply"]
HealthRequest = _made["HealthRequest"]
HealthReply = _made["HealthReply"]


def method(name: str) -> str:
    """Return a method's path, as a channel calls it."""
    return f"/{SERVICE}/{name}"
