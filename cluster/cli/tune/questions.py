"""The prompts to sweep, read from JSON lines; nothing is sent before every line is right."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from twotower.errors import InvalidRequest
from twotower.showing import show
from twotower.strict_json import parse_line, read_lines

_FIELDS = {"id", "prompt", "prompt_token_ids", "answer"}


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, as text or token ids, and its right answer if known. `line` begins at 1."""

    line: int
    prompt: str | tuple[int, ...]
    answer: str | None = None


def read_questions(path: Path, answers: Path | None) -> list[Question]:
    """All lines of `path` without blank ones; answers come from a line's own field or from `answers`, matched by id.

    Either every question has an answer or none has. Raises InvalidRequest that names file and line.
    """
    known = {} if answers is None else _answers(answers)
    questions = []
    for line, values in _lines(path):
        answer = values.get("answer")
        if answers is not None:
            if answer is not None:
                raise _mistake(path, line, f"got an answer of its own, wanted it in {answers} alone")
            answer = known.get(_id(path, line, values))
            if answer is None:
                raise _mistake(path, line, f"got no answer for id {show(values.get('id'))} in {answers}")
        questions.append(Question(line, _prompt(path, line, values), _text(path, line, "answer", answer)))
    if not questions:
        raise InvalidRequest.of("--input", f"{path}: got no prompt at all")
    with_answer = [question.answer is not None for question in questions]
    if any(with_answer) and not all(with_answer):
        line = questions[with_answer.index(False)].line
        raise _mistake(path, line, "got no answer, but other lines have one; wanted all or none")
    return questions


def _answers(path: Path) -> dict[str | int, object]:
    found: dict[str | int, object] = {}
    for line, values in _lines(path):
        name = _id(path, line, values)
        if name in found:
            raise _mistake(path, line, f"got id {show(name)} a second time")
        if "answer" not in values:
            raise _mistake(path, line, "got no answer")
        found[name] = values["answer"]
    return found


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in read_lines(path):
        try:
            values = parse_line(line)
        except InvalidRequest as error:
            raise _mistake(path, number, error.problems[0].message) from None
        unknown = sorted(values.keys() - _FIELDS)
        if unknown:
            raise _mistake(path, number, f"got the field {show(unknown[0])}, wanted some of {sorted(_FIELDS)}")
        yield number, values


def _prompt(path: Path, line: int, values: Mapping[str, object]) -> str | tuple[int, ...]:
    if ("prompt" in values) == ("prompt_token_ids" in values):
        got = "both" if "prompt" in values else "neither"
        raise _mistake(path, line, f"got {got}, wanted either prompt (text) or prompt_token_ids")
    if "prompt" in values:
        prompt = _text(path, line, "prompt", values["prompt"])
        if not prompt:
            raise _mistake(path, line, "got an empty prompt")
        return prompt
    ids = values["prompt_token_ids"]
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise _mistake(path, line, f"prompt_token_ids: got {show(ids)}, wanted a list of token ids")
    return tuple(ids)


def _text(path: Path, line: int, field: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _mistake(path, line, f"{field}: got {show(value)}, wanted a string")
    return value


def _id(path: Path, line: int, values: Mapping[str, object]) -> str | int:
    name = values.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise _mistake(path, line, f"id: got {show(name)}, wanted a string or an integer to match answers by")
    return name


def _mistake(path: Path, line: int, message: str) -> InvalidRequest:
    return InvalidRequest.of("--input", f"{path}, line {line}: {message}")
