"""Writes protos/baseline.txt: what clients of the released service rely on, one fact a line. With --check, only says
what of it protos/ has broken. What is new is no fault, and not in the baseline until this is run again: at a release.
"""

from __future__ import annotations

import sys
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "protos" / "baseline.txt"
CURRENT = ROOT / "twotower_client" / "wire" / "generation.binpb"  # as `make check-proto` sees to it, what protos/ gives
NO_END = 2**29  # of a range of reserved numbers: `to max`

Facts = dict[str, str]  # of a kind and a name, such as "field twotower.v1.Usage.num_steps": what is true of it


def facts(file: FileDescriptorProto) -> Facts:
    found = dict[str, str]()
    for message in file.message_type:
        found |= _of_message(message, f"{file.package}.{message.name}")
    for enum in file.enum_type:
        found |= _of_enum(enum, f"{file.package}.{enum.name}")
    for service in file.service:
        name = f"{file.package}.{service.name}"
        found[f"service {name}"] = ""
        for method in service.method:
            asked = "stream " * method.client_streaming + method.input_type.removeprefix(".")
            told = "stream " * method.server_streaming + method.output_type.removeprefix(".")
            found[f"method {name}.{method.name}"] = f"{asked} -> {told}"
    return found


def breaks(before: Facts, now: Facts) -> list[str]:
    """A sentence for each fact that holds no more."""
    numbers = {_place(key, value): key for key, value in now.items() if _place(key, value)}
    return [_sentence(key, was, now, numbers) for key, was in before.items() if now.get(key) != was]


def unreserved(before: Facts, now: Facts) -> list[str]:
    """Of each field and enum value that is gone: a sentence where its name or its number may be taken again."""
    said = []
    for key, was in before.items():
        kind, _, name = key.partition(" ")
        if kind not in ("field", "value") or key in now:
            continue
        parent, _, own = name.rpartition(".")
        number = was.partition(":")[0]
        if _reserves(now, parent):
            wanted = [one for one in (own, number) if f"reserved {parent} {one}" not in now]
            said += [f"{name} is gone, and nothing reserves {' and '.join(wanted)}"] if wanted else []
    return said


def _reserves(now: Facts, parent: str) -> bool:
    """Whether the message or enum is still there to reserve anything."""
    return f"message {parent}" in now or f"enum {parent}" in now


def _of_message(message: DescriptorProto, name: str) -> Facts:
    found = {f"message {name}": "", **_reserved(message, name)}
    for field in message.field:
        found[f"field {name}.{field.name}"] = f"{field.number}: {_described(field, message)}"
    for inner in message.nested_type:
        found |= _of_message(inner, f"{name}.{inner.name}")
    for enum in message.enum_type:
        found |= _of_enum(enum, f"{name}.{enum.name}")
    return found


def _of_enum(enum: EnumDescriptorProto, name: str) -> Facts:
    values = {f"value {name}.{value.name}": f"{value.number}" for value in enum.value}
    return {f"enum {name}": "", **_reserved(enum, name, inclusive=1), **values}


def _reserved(kind: DescriptorProto | EnumDescriptorProto, name: str, inclusive: int = 0) -> Facts:
    """One fact for each name and number; of a range without an end the two words that protoc has for it. An enum's
    ranges include their end, a message's do not."""
    found = {f"reserved {name} {one}": "" for one in kind.reserved_name}
    for span in kind.reserved_range:
        end = span.end + inclusive
        numbers = range(span.start, end) if end < NO_END else ()
        found |= {f"reserved {name} {number}": "" for number in numbers}
        if end >= NO_END:
            found[f"reserved {name} {span.start} to max"] = ""
    return found


def _described(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    """Type and label, and the oneof where it is in one. An optional scalar is a oneof of its own to protoc."""
    kind = field.type_name.removeprefix(".") or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.proto3_optional:
        return f"optional {kind}"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {kind}"
    return f"{kind} in oneof {message.oneof_decl[field.oneof_index].name}" if field.HasField("oneof_index") else kind


def _place(key: str, value: str) -> str:
    """Message and number of a field, enum and number of a value: what the wire knows them by."""
    kind, _, name = key.partition(" ")
    return f"{name.rpartition('.')[0]} {value.partition(':')[0]}" if kind in ("field", "value") else ""


def _sentence(key: str, was: str, now: Facts, numbers: dict[str, str]) -> str:
    kind, _, name = key.partition(" ")
    is_now = now.get(key)
    if is_now is not None:
        return f"{kind} {name} was {was}, and is {is_now}"
    if kind == "reserved":
        return name.replace(" ", " no longer reserves ", 1)
    taken = numbers.get(_place(key, was))
    return f"{kind} {name} is gone" + (f", and {taken} has its number" if taken else "")


def written(found: Facts) -> str:
    lines = (f"{key} = {value}" if value else key for key, value in found.items())
    return "\n".join(["# Written by scripts/compatibility.py at a release; never edited.", *lines]) + "\n"


def read(text: str) -> Facts:
    return dict(_fact(line) for line in text.splitlines() if line and not line.startswith("#"))


def _fact(line: str) -> tuple[str, str]:
    key, _, value = line.partition(" = ")
    return key, value


def main() -> None:
    now = facts(FileDescriptorProto.FromString(CURRENT.read_bytes()))
    checking = "--check" in sys.argv[1:]
    if checking and not BASELINE.exists():
        sys.exit(f"{BASELINE} is missing: there is nothing to compare protos/ with")
    before = read(BASELINE.read_text()) if BASELINE.exists() else {}
    if checking:
        if broken := breaks(before, now):
            sys.exit("\n  ".join(["protos/ breaks clients of the released service:", *broken]))
        return
    if again := unreserved(before, now):
        sys.exit("\n  ".join(["Reserve what is gone, or it may come back as something else:", *again]))
    BASELINE.write_text(written(now))


if __name__ == "__main__":
    main()
