"""What of a .proto file may change after a release: a client of before must be understood as it was."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)

from twotower.pb.twotower.v1 import generation_pb2 as pb

SCRIPTS = Path(__file__).parents[1] / "scripts"
REQUEST, SERVICE = "twotower.v1.GenerateRequest", "twotower.v1.GenerationService"
Change = Callable[[FileDescriptorProto], None]


@pytest.fixture
def compatibility(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("compatibility")


def current() -> FileDescriptorProto:
    file = FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    return file


def named(items: Any, name: str) -> Any:
    return next(item for item in items if item.name == name)


def message(file: FileDescriptorProto, name: str = "GenerateRequest") -> DescriptorProto:
    kind: DescriptorProto = named(file.message_type, name)
    return kind


def enum(file: FileDescriptorProto, name: str = "Mode") -> EnumDescriptorProto:
    kind: EnumDescriptorProto = named(file.enum_type, name)
    return kind


def field(file: FileDescriptorProto, name: str) -> FieldDescriptorProto:
    one: FieldDescriptorProto = named(message(file).field, name)
    return one


def optional(file: FileDescriptorProto) -> None:
    kind = message(file)
    field(file, "trace").proto3_optional = True
    field(file, "trace").oneof_index = len(kind.oneof_decl)
    kind.oneof_decl.add(name="_trace")


def replaced(file: FileDescriptorProto) -> None:
    field(file, "trace").name = "words"


def with_reserved(file: FileDescriptorProto) -> None:
    """`trace` is gone, as it should be."""
    kind = message(file)
    kind.field.remove(field(file, "trace"))
    kind.reserved_name.append("trace")
    kind.reserved_range.add(start=7, end=8)


BREAKS: dict[str, tuple[Change, str]] = {
    "a field is gone": (lambda f: message(f).field.remove(field(f, "trace")), f"field {REQUEST}.trace is gone"),
    "a field has another number": (
        lambda f: setattr(field(f, "trace"), "number", 70),
        f"field {REQUEST}.trace was 7: bool, and is 70: bool",
    ),
    "a field has another name": (replaced, f"field {REQUEST}.trace is gone, and field {REQUEST}.words has its number"),
    "a field has another type": (
        lambda f: setattr(field(f, "priority"), "type", FieldDescriptorProto.TYPE_SINT64),
        f"field {REQUEST}.priority was 6: int64, and is 6: sint64",
    ),
    "a field has another message": (
        lambda f: setattr(field(f, "params"), "type_name", ".twotower.v1.Usage"),
        f"field {REQUEST}.params was 4: twotower.v1.DecodingParams, and is 4: twotower.v1.Usage",
    ),
    "a list is one": (
        lambda f: setattr(field(f, "stop"), "label", FieldDescriptorProto.LABEL_OPTIONAL),
        f"field {REQUEST}.stop was 5: repeated string, and is 5: string",
    ),
    "a field tells whether it is given": (
        optional,
        f"field {REQUEST}.trace was 7: bool, and is 7: optional bool",
    ),
    "a field leaves its oneof": (
        lambda f: field(f, "text").ClearField("oneof_index"),
        f"field {REQUEST}.text was 2: string in oneof prompt, and is 2: string",
    ),
    "a message is gone": (
        lambda f: f.message_type.remove(message(f, "GetModelInfoRequest")),
        "message twotower.v1.GetModelInfoRequest is gone",
    ),
    "an enum value is gone": (
        lambda f: enum(f).value.remove(named(enum(f).value, "MODE_AUTO")),
        "value twotower.v1.Mode.MODE_AUTO is gone",
    ),
    "an enum value has another number": (
        lambda f: setattr(named(enum(f).value, "MODE_AUTO"), "number", 9),
        "value twotower.v1.Mode.MODE_AUTO was 5, and is 9",
    ),
    "a method is gone": (
        lambda f: f.service[0].method.remove(named(f.service[0].method, "Score")),
        f"method {SERVICE}.Score is gone",
    ),
    "a method streams": (
        lambda f: setattr(named(f.service[0].method, "Score"), "server_streaming", True),
        f"method {SERVICE}.Score was twotower.v1.ScoreRequest -> twotower.v1.ScoreResponse, "
        "and is twotower.v1.ScoreRequest -> stream twotower.v1.ScoreResponse",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), BREAKS.values(), ids=BREAKS)
def test_what_breaks_clients_is_said(compatibility: Any, change: Change, sentence: str) -> None:
    changed = current()
    change(changed)
    assert compatibility.breaks(compatibility.facts(current()), compatibility.facts(changed)) == [sentence]


def test_a_package_of_another_name_breaks_all(compatibility: Any) -> None:
    changed = current()
    changed.package = "twotower.v2"
    before = compatibility.facts(current())
    assert len(compatibility.breaks(before, compatibility.facts(changed))) == len(before)


def test_what_is_new_breaks_nothing(compatibility: Any) -> None:
    changed = current()
    message(changed).field.add(name="new", number=99, type=FieldDescriptorProto.TYPE_BOOL)
    message(changed).field.add(name="ids", number=98, type=FieldDescriptorProto.TYPE_BOOL, oneof_index=0)
    message(changed).reserved_name.append("never")
    enum(changed).value.add(name="MODE_NEW", number=99)
    changed.message_type.add(name="New").field.add(name="one", number=1, type=FieldDescriptorProto.TYPE_STRING)
    changed.service[0].method.add(name="New", input_type=".twotower.v1.New", output_type=".twotower.v1.New")
    before, now = compatibility.facts(current()), compatibility.facts(changed)
    assert compatibility.breaks(before, now) == [] and len(now) == len(before) + 7
    assert compatibility.unreserved(before, now) == []


def test_the_baseline_takes_nothing_out_that_may_come_back_as_something_else(compatibility: Any) -> None:
    bare, kept = current(), current()
    message(bare).field.remove(field(bare, "trace"))
    with_reserved(kept)
    before, now = compatibility.facts(current()), compatibility.facts(kept)
    assert compatibility.unreserved(before, compatibility.facts(bare)) == [
        f"{REQUEST}.trace is gone, and nothing reserves trace and 7"
    ]
    assert compatibility.unreserved(before, now) == []
    assert compatibility.breaks(now, compatibility.facts(bare)) == [
        f"{REQUEST} no longer reserves trace",
        f"{REQUEST} no longer reserves 7",
    ]


def test_reserved_ranges(compatibility: Any) -> None:
    """Of a message without their end, of an enum with it."""
    changed = current()
    message(changed).reserved_range.add(start=60, end=62)
    message(changed).reserved_range.add(start=1000, end=2**29)
    enum(changed).reserved_range.add(start=60, end=62)
    enum(changed).reserved_range.add(start=1000, end=2**31 - 1)
    new = compatibility.facts(changed).keys() - compatibility.facts(current()).keys()
    numbers = {REQUEST: ("60", "61", "1000 to max"), "twotower.v1.Mode": ("60", "61", "62", "1000 to max")}
    assert new == {f"reserved {name} {number}" for name, told in numbers.items() for number in told}


def test_the_baseline_is_read_as_it_was_written(compatibility: Any) -> None:
    changed = current()
    with_reserved(changed)
    found = compatibility.facts(changed)
    assert compatibility.read(compatibility.written(found)) == found and len(found) > 150


def test_the_protos_break_nothing_of_the_baseline(compatibility: Any) -> None:
    """As `make check` says. The baseline is a real one: nothing in it is empty."""
    before = compatibility.read(compatibility.BASELINE.read_text())
    assert compatibility.breaks(before, compatibility.facts(current())) == []
    assert {key.split()[0] for key in before} >= {"message", "field", "enum", "value", "service", "method"}


@pytest.mark.parametrize("arguments", [["--check"], []])
def test_the_command_fails_with_the_sentences(
    compatibility: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    baseline = tmp_path / "baseline.txt"
    found = compatibility.facts(current()) | {f"field {REQUEST}.old": "77: bool"}
    baseline.write_text(compatibility.written(found))
    monkeypatch.setattr(compatibility, "BASELINE", baseline)
    monkeypatch.setattr("sys.argv", ["compatibility.py", *arguments])
    with pytest.raises(SystemExit, match=f"{REQUEST}.old is gone"):
        compatibility.main()
    assert "77: bool" in baseline.read_text()
    baseline.write_text("".join(line for line in baseline.read_text().splitlines(keepends=True) if ".old" not in line))
    compatibility.main()
    baseline.unlink()
    if arguments:
        with pytest.raises(SystemExit, match="is missing"):
            compatibility.main()
