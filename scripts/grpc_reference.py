"""Writes docs/grpc.md: every method, message and field of the gRPC API with its comment in protos/. With --check, only
says whether the file is up to date.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PAGE = ROOT / "docs" / "grpc.md"
WELL_KNOWN = Path(protoc.__file__).parent / "_proto"
_HEAD = """# gRPC reference

Made from `protos/twotower/v1/generation.proto` by `make docs`. How the API behaves is in [api.md](api.md), what each
parameter means and may be in [parameters.md](parameters.md).

"""
# The numbers by which a descriptor's comments are found: those of the fields in descriptor.proto.
_MESSAGE, _ENUM, _SERVICE, _SYNTAX = 4, 5, 6, 12
_FIELD_OF_MESSAGE, _VALUE_OF_ENUM, _METHOD_OF_SERVICE = 2, 2, 2
Place = tuple[int, ...]


def parsed() -> FileDescriptorProto:
    """The one file of the API, with its comments."""
    [proto] = PROTOS.rglob("*.proto")
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory) / "set"
        arguments = [f"-I{PROTOS}", f"-I{WELL_KNOWN}", "--include_source_info", f"--descriptor_set_out={made}"]
        if protoc.main(["protoc", *arguments, str(proto)]):
            sys.exit("protoc failed")
        [file] = FileDescriptorSet.FromString(made.read_bytes()).file
    return file


class Reference:
    """The page of one file."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._comments = {
            tuple(location.path): " ".join((location.leading_comments + location.trailing_comments).split())
            for location in file.source_code_info.location
        }

    def page(self) -> str:
        parts = [_HEAD + self._told((_SYNTAX,), "the file")]
        parts += [self._service(service, (_SERVICE, i)) for i, service in enumerate(self._file.service)]
        parts += [self._message(message, (_MESSAGE, i)) for i, message in enumerate(self._file.message_type)]
        parts += [self._enum(enum, (_ENUM, i)) for i, enum in enumerate(self._file.enum_type)]
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def _told(self, place: Place, name: str) -> str:
        told = self._comments.get(place, "")
        if not told:
            sys.exit(f"{self._file.name}: {name} has no comment, wanted one on every method, message, field and value")
        return told.replace("<", "\\<")

    def _service(self, service: ServiceDescriptorProto, place: Place) -> str:
        rows = []
        for i, method in enumerate(service.method):
            stream = "a stream of " if method.server_streaming else ""
            told = self._told((*place, _METHOD_OF_SERVICE, i), method.name)
            rows.append(
                (f"`{method.name}`", self._link(method.input_type), stream + self._link(method.output_type), told)
            )
        about = f"## {self._file.package}.{service.name}\n\n{self._told(place, service.name)}"
        return f"{about.strip()}\n\n{_table(('method', 'takes', 'gives', 'what it does'), rows)}"

    def _message(self, message: DescriptorProto, place: Place) -> str:
        rows = [
            (
                f"`{field.name}`",
                str(field.number),
                self._kind(message, field),
                self._told((*place, _FIELD_OF_MESSAGE, i), f"{message.name}.{field.name}"),
            )
            for i, field in enumerate(message.field)
        ]
        about = f"## {message.name}\n\n{self._told(place, message.name)}"
        return f"{about}\n\n{_table(('field', 'number', 'kind', 'meaning'), rows)}" if rows else about

    def _enum(self, enum: EnumDescriptorProto, place: Place) -> str:
        rows = [
            (f"`{value.name}`", str(value.number), self._told((*place, _VALUE_OF_ENUM, i), value.name))
            for i, value in enumerate(enum.value)
        ]
        about = f"## {enum.name}\n\n{self._told(place, enum.name)}"
        return f"{about}\n\n{_table(('value', 'number', 'meaning'), rows)}"

    def _kind(self, message: DescriptorProto, field: FieldDescriptorProto) -> str:
        maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        entry = maps.get(field.type_name.rpartition(".")[2])
        if entry is not None:
            key, value = (self._kind(entry, part) for part in entry.field)
            return f"map of {key} to {value}"
        kind = self._link(field.type_name) if field.type_name else _plain(field)
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            return f"repeated {kind}"
        if field.HasField("oneof_index") and not field.proto3_optional:
            return f"{kind}, one of `{message.oneof_decl[field.oneof_index].name}`"
        return f"optional {kind}" if field.proto3_optional else kind

    def _link(self, name: str) -> str:
        """To the part of this page that is about a message or an enum; messages of others have none."""
        short = name.rpartition(".")[2]
        ours = name.startswith(f".{self._file.package}.")
        return f"[{short}](#{short.lower()})" if ours else f"`{name.lstrip('.')}`"


def _plain(field: FieldDescriptorProto) -> str:
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def lines() -> Iterator[str]:
        yield f"| {' | '.join(head)} |"
        yield f"|{'---|' * len(head)}"
        for row in rows:
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"

    return "\n".join(lines())


def main() -> None:
    page = Reference(parsed()).page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            sys.exit("docs/grpc.md is not what protos/ says; run `make docs`")
        return
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
