"""Whoever reads the .proto alone finds a comment at every message, enum, field and value, and at every method."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

PROTOS = Path(__file__).parents[1] / "protos"
# Numbers of fields in descriptor.proto, of which the path to a declaration is made.
MESSAGES, ENUMS, SERVICES, WITHIN = 4, 5, 6, 2


def test_each_declaration_has_one(tmp_path: Path) -> None:
    [proto] = PROTOS.rglob("*.proto")
    output = tmp_path / "set"
    options = [f"-I{PROTOS}", "--include_source_info", f"--descriptor_set_out={output}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *options, proto], check=True)
    [file] = FileDescriptorSet.FromString(output.read_bytes()).file
    told = {tuple(one.path) for one in file.source_code_info.location if one.leading_comments or one.trailing_comments}
    wanted = dict(declared(file))
    assert len(wanted) > 150 and [name for path, name in wanted.items() if path not in told] == []


def declared(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """Path and name. Entries of maps are protobuf's own."""
    parts: tuple[tuple[int, Any], ...] = (
        (MESSAGES, file.message_type),
        (ENUMS, file.enum_type),
        (SERVICES, file.service),
    )
    for kind, declarations in parts:
        for place, one in enumerate(declarations):
            yield (kind, place), one.name
            fields = one.field if kind == MESSAGES else one.value if kind == ENUMS else one.method
            for within, field in enumerate(fields):
                if not (kind == MESSAGES and is_entry(one)):
                    yield (kind, place, WITHIN, within), f"{one.name}.{field.name}"


def is_entry(message: DescriptorProto) -> bool:
    """Of a map."""
    return message.options.map_entry
