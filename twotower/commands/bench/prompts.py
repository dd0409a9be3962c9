"""Which prompts are sent: those of a file, or of the demo's held-out set."""

from itertools import islice
from pathlib import Path
from random import Random

import twotower
from twotower.demo.corpus import families_of, held_out, stream
from twotower.errors import InvalidRequest
from twotower.parameters import check_text
from twotower.strict_json import parse_line, read_lines

Prompt = str | tuple[int, ...]
MAX_PROMPTS = 100_000
DEMO_PROMPTS = 500


def demo_prompts(family: str | None, seed: int) -> list[Prompt]:
    """Prompts held out of the shipped demo's training: of one family that it knows, or of all families as often as
    training draws them.
    """
    known = families_of(Path(twotower.__file__).parent / "demo" / "checkpoint")
    if family is None:
        return [instance.prompt for instance in islice(stream("test", seed, known=known), DEMO_PROMPTS)]
    if family not in known:
        raise InvalidRequest.of("--family", f"got {family!r}, wanted one of {', '.join(known)}")
    return [instance.prompt for instance in held_out(family, 100)]


def file_prompts(path: Path, seed: int) -> list[Prompt]:
    """Prompts of a file, in an order drawn with this seed. A file named .jsonl has JSON lines with `prompt` or
    `prompt_token_ids`; any other file has a prompt a line. Raises InvalidRequest, which names the line.
    """
    if not path.is_file():
        raise InvalidRequest.of("--prompts", f"{path}: no such file")
    prompts: list[Prompt] = []
    for number, line in read_lines(path):
        if len(prompts) == MAX_PROMPTS:
            raise InvalidRequest.of("--prompts", f"{path}: got more than {MAX_PROMPTS} prompts")
        try:
            prompts.append(_of_json(line) if path.suffix == ".jsonl" else _of_text(line))
        except InvalidRequest as error:
            raise InvalidRequest.of("--prompts", f"{path}, line {number}: {error}") from None
    if not prompts:
        raise InvalidRequest.of("--prompts", f"{path}: got no prompt")
    Random(f"prompts/{seed}").shuffle(prompts)
    return prompts


def _of_json(line: bytes) -> Prompt:
    told = parse_line(line)
    if ("prompt" in told) == ("prompt_token_ids" in told):
        raise InvalidRequest.of("prompt", "wanted either prompt (text) or prompt_token_ids")
    if "prompt" in told:
        return check_text("prompt", told["prompt"])
    ids = told["prompt_token_ids"]
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**32 for token in ids):
        raise InvalidRequest.of("prompt_token_ids", "wanted a list of token ids")
    return tuple(ids)


def _of_text(line: bytes) -> str:
    try:
        return line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest.of("prompt", f"got bytes that are not UTF-8 at position {error.start}") from None
