"""`python -m twotower`: what it prints, what it writes, how it ends."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import twotower
from tests.decoding.tokenizers_for_tests import metaspace, save
from tests.goldens import GOLDEN_DIR, golden
from tests.model.checkpoints import base_tensors, config_of, tensors_of, write
from twotower.commands import main
from twotower.core import BlockEvent, FinishReason, Mode, Request
from twotower.errors import NumericalError, TwoTowerError, Unavailable

IDS_ONLY = str(GOLDEN_DIR / "tt_moe")
RESULT = ["token_ids", "text", "finish_reason", "num_steps", "num_blocks", "mode", "seconds", "seed"]


@pytest.fixture(scope="session")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with a tokenizer."""
    directory = write(tmp_path_factory.mktemp("text"), tensors_of("tt_moe"), config_of("tt_moe"))
    save(metaspace(), directory)
    return str(directory)


class Run:
    """How one command ended."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        try:
            self.code: Any = main(["generate", *arguments])
        except SystemExit as exit_:
            self.code = exit_.code
        self.out, self.err = capsys.readouterr()

    @property
    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = _strict(self.out)
        return result


def _strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    return lambda *arguments: Run(capsys, *arguments)


def _lines(path: Path, *lines: str | bytes | dict[str, Any]) -> str:
    """A JSON lines file."""
    as_bytes = [line if isinstance(line, bytes) else _text(line).encode() for line in lines]
    path.write_bytes(b"\n".join(as_bytes) + b"\n")
    return str(path)


def _text(line: str | dict[str, Any]) -> str:
    return line if isinstance(line, str) else json.dumps(line)


# One prompt.


@pytest.mark.parametrize("mode", list(Mode))
def test_golden_tokens_as_json(mode: Mode, run: Callable[..., Run]) -> None:
    prompt = golden("tt_moe").prompts[0]
    ids = ",".join(map(str, prompt["tokens"]))
    common = ["--checkpoint", IDS_ONLY, "--prompt-token-ids", ids, "--json", "--ignore-eos", "--seed", "5"]
    if mode is Mode.DIFFUSION:
        case = next(case for case in prompt["cases"] if case["eos_token_id"] is None)
        flags = ["--block-size", case["block_size"], "--steps-per-block", case["steps_per_block"]]
        flags += ["--confidence-threshold", case["confidence_threshold"], "--max-new-tokens", len(case["output"])]
        wanted, steps = case["output"], case["nfe"]
    else:
        wanted = prompt[str(mode)]["tokens"]
        flags, steps = ["--max-new-tokens", len(wanted)], None
    done = run(*common, "--mode", mode, *map(str, flags))
    assert done.code == 0 and done.err == ""
    result = done.result
    assert list(result) == RESULT
    assert result["token_ids"] == wanted and result["text"] is None
    assert steps is None or result["num_steps"] == steps
    assert (result["mode"], result["finish_reason"], result["seed"]) == (mode, "length", 5)
    assert result["seconds"] > 0


def test_text_is_streamed_and_summed_up(with_text: str, run: Callable[..., Run]) -> None:
    common = ["--checkpoint", with_text, "--prompt", "the quick", "--max-new-tokens", "40", "--ignore-eos"]
    result = run(*common, "--json").result
    assert result["text"] and result["text"] == metaspace().decode(result["token_ids"])
    shown = run(*common)
    assert shown.out == result["text"] + "\n"
    assert shown.err.count("\n") == 1 and "40 tokens" in shown.err and "finished by length" in shown.err


def test_text_is_shown_as_blocks_are_committed(with_text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text="", **_: pieces.append(text))
    main(["generate", "--checkpoint", with_text, "--prompt", "the", "--max-new-tokens", "48", "--ignore-eos"])
    assert len([piece for piece in pieces[:-2] if piece]) == 3, "three blocks, three pieces"


def test_token_ids_are_shown_where_there_is_no_tokenizer(run: Callable[..., Run]) -> None:
    common = ["--checkpoint", IDS_ONLY, "--prompt-token-ids", "5,9", "--max-new-tokens", "20", "--ignore-eos"]
    wanted = run(*common, "--json").result["token_ids"]
    assert [int(token) for token in run(*common).out.split()] == wanted


def test_stop_strings_and_stop_tokens(with_text: str, run: Callable[..., Run]) -> None:
    common = ["--checkpoint", with_text, "--prompt", "the quick", "--max-new-tokens", "40", "--ignore-eos", "--json"]
    whole = run(*common).result
    stop = whole["text"][9:12]
    result = run(*common, "--stop", stop, "--stop", "never said").result
    assert result["text"] == whole["text"][: whole["text"].index(stop)]
    assert result["finish_reason"] == "stop"
    kept = result["token_ids"]
    assert kept == whole["token_ids"][: len(kept)]
    assert stop in metaspace().decode(kept) and stop not in metaspace().decode(kept[:-1])
    token = whole["token_ids"][20]
    cut = run(*common, "--stop-token-ids", f"{token},127").result
    assert cut["token_ids"] == whole["token_ids"][: whole["token_ids"].index(token) + 1]


def test_the_seed_is_drawn_reported_and_decides(run: Callable[..., Run]) -> None:
    common = ["--checkpoint", IDS_ONLY, "--prompt-token-ids", "5", "--temperature", "1", "--json"]
    common += ["--max-new-tokens", "24", "--ignore-eos"]
    first, other = run(*common).result, run(*common).result
    assert first["seed"] != other["seed"] and first["token_ids"] != other["token_ids"]
    assert run(*common, "--seed", str(first["seed"])).result["token_ids"] == first["token_ids"]


def test_bf16(run: Callable[..., Run]) -> None:
    done = run(
        "--checkpoint", IDS_ONLY, "--prompt-token-ids", "5", "--dtype", "bfloat16", "--max-new-tokens", "16", "--json"
    )
    assert done.code == 0 and done.result["token_ids"]


def test_a_base_checkpoint_decodes_ar_unasked(tmp_path: Path, run: Callable[..., Run]) -> None:
    base = str(write(tmp_path, base_tensors(tensors_of("tt_moe")), config_of("tt_moe")))
    common = ["--prompt-token-ids", "5,6", "--max-new-tokens", "9", "--json", "--ignore-eos"]
    done = run("--checkpoint", base, *common)
    assert done.result["mode"] == "ar"
    assert done.result["token_ids"] == run("--checkpoint", IDS_ONLY, "--mode", "ar", *common).result["token_ids"]
    refused = run("--checkpoint", base, *common, "--mode", "diffusion")
    assert refused.code == 2 and "wanted a mode this checkpoint can serve (ar)" in refused.err


# Bad input.

GOOD = ["--checkpoint", IDS_ONLY, "--prompt-token-ids", "5,6"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--checkpoint"]),
        (["--checkpoint", IDS_ONLY], ["--prompt", "--input"]),
        ([*GOOD, "--prompt", "x"], ["--prompt", "not allowed with"]),
        ([*GOOD, "--no-such-flag"], ["--no-such-flag"]),
        ([*GOOD, "--max-new-token", "5"], ["--max-new-token"]),
        ([*GOOD, "--seed"], ["--seed", "expected one argument"]),
        ([*GOOD, "--output", "x"], ["--input", "--output"]),
        (["--checkpoint", IDS_ONLY, "--input", "x"], ["--input", "--output"]),
        ([*GOOD, "--strict"], ["--strict", "--input"]),
        (["--checkpoint", IDS_ONLY, "--input", "x", "--output", "y", "--json"], ["--json", "--output"]),
        (["--checkpoint", "no/such/place", "--prompt", "x"], ["no/such/place", "no such directory"]),
        (["--checkpoint", str(GOLDEN_DIR), "--prompt", "x"], ["config.json", "no such file"]),
        (["--checkpoint", IDS_ONLY, "--prompt", "x"], ["prompt", "no tokenizer", "token ids"]),
        ([*GOOD, "--stop", "x"], ["stop", "no tokenizer"]),
        (["--checkpoint", IDS_ONLY, "--prompt-token-ids", ""], ["prompt", "empty"]),
        (["--checkpoint", IDS_ONLY, "--prompt-token-ids", "5,128"], ["prompt_token_ids[1]", "128", "from 0 to 127"]),
        (["--checkpoint", IDS_ONLY, "--prompt-token-ids", "5,x"], ["prompt_token_ids[1]", "'x'"]),
        (["--checkpoint", IDS_ONLY, "--prompt-token-ids", "5,,6"], ["prompt_token_ids[1]", "''"]),
        ([*GOOD, "--mode", "fast"], ["mode", "'fast'", "diffusion, mock_ar, ar"]),
        ([*GOOD, "--mode", "7"], ["mode", "7", "diffusion, mock_ar, ar"]),
        ([*GOOD, "--max-new-tokens", "0"], ["max_new_tokens", "0", "at least 1"]),
        ([*GOOD, "--max-new-tokens", "many"], ["max_new_tokens", "'many'", "an integer"]),
        ([*GOOD, "--max-new-tokens", "5.5"], ["max_new_tokens", "5.5", "an integer"]),
        ([*GOOD, "--max-new-tokens", "9" * 5000], ["max_new_tokens", "an integer"]),
        ([*GOOD, "--max-new-tokens", "4096"], ["max_new_tokens", "4098", "at most 4096"]),
        ([*GOOD, "--block-size", "0"], ["block_size", "0", "from 1 to"]),
        ([*GOOD, "--steps-per-block", "-1"], ["steps_per_block", "-1", "from 1 to"]),
        ([*GOOD, "--confidence-threshold", "1.1"], ["confidence_threshold", "1.1", "[0, 1]"]),
        ([*GOOD, "--temperature", "nan"], ["temperature", "nan", "[0, 1000]"]),
        ([*GOOD, "--temperature", "inf"], ["temperature", "inf", "[0, 1000]"]),
        ([*GOOD, "--top-k", "5"], ["top_k", "5", "diffusion"]),
        ([*GOOD, "--mode", "ar", "--top-p", "0"], ["top_p", "0", "(0, 1]"]),
        ([*GOOD, "--mode", "ar", "--block-size", "8"], ["block_size", "no meaning in ar"]),
        ([*GOOD, "--seed", "-1"], ["seed", "-1"]),
        ([*GOOD, "--stop-token-ids", "999"], ["stop_token_ids[0]", "999", "from 0 to 127"]),
        ([*GOOD, "--dtype", "float16"], ["dtype", "'float16'", "float32, bfloat16"]),
        ([*GOOD, "--device", "gpu"], ["device", "'gpu'", "cpu"]),
        ([*GOOD, "--device", "meta"], ["device", "'meta'", "cpu"]),
        ([*GOOD, "--device", "cuda:99999"], ["device", "cuda:99999", "CUDA devices"]),
    ],
)
def test_bad_input(arguments: list[str], words: list[str], run: Callable[..., Run]) -> None:
    done = run(*arguments)
    assert done.code == 2 and done.out == ""
    assert done.err.count("\n") == 1 and all(word in done.err for word in words), done.err
    assert "error: " in done.err


@pytest.mark.parametrize("prompt", ["", "caf\udce9"])
def test_bad_text(prompt: str, with_text: str, run: Callable[..., Run]) -> None:
    done = run("--checkpoint", with_text, "--prompt", prompt)
    assert done.code == 2 and done.err.count("\n") == 1 and "error: prompt: got" in done.err


def test_a_damaged_checkpoint(tmp_path: Path, run: Callable[..., Run]) -> None:
    tensors = tensors_of("tt_moe")
    del tensors["context_tower.norm_f.weight"]
    done = run("--checkpoint", str(write(tmp_path, tensors, config_of("tt_moe"))), "--prompt-token-ids", "5")
    assert done.code == 2 and done.err.count("\n") == 1 and "context_tower.norm_f.weight" in done.err


@pytest.mark.parametrize("error", [NumericalError("a NaN"), Unavailable("gone"), RuntimeError("line\nbreak")])
def test_a_failing_run(error: Exception, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]) -> None:
    _fake(monkeypatch, lambda request: error)
    done = run(*GOOD)
    assert done.code == 1 and done.err.count("\n") == 1 and "error: " in done.err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]) -> None:
    _fake(monkeypatch, lambda request: KeyboardInterrupt())
    done = run(*GOOD)
    assert (done.code, done.err) == (130, "python -m twotower: error: interrupted\n")


def test_a_reader_that_has_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert main(["generate", *GOOD]) == 1
        print("what the interpreter still flushes at its end", flush=True)


# Many prompts.


def _results(path: Path) -> list[dict[str, Any]]:
    return [_strict(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_of_prompts(with_text: str, tmp_path: Path, run: Callable[..., Run]) -> None:
    lines = [
        {"id": "first", "prompt": "the quick", "max_new_tokens": 40, "seed": 1},
        {"prompt_token_ids": [5, 6], "mode": "ar", "max_new_tokens": 3, "top_k": 4, "temperature": 0.5, "seed": 2},
        {"id": 7, "prompt": "dog", "mode": "mock_ar", "max_new_tokens": 9, "stop": ["x", "y"], "stop_token_ids": [9]},
        {"id": "日本", "prompt": "fox", "block_size": 4, "steps_per_block": 2, "confidence_threshold": 1},
    ]
    file, out = _lines(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    done = run("--checkpoint", with_text, "--input", file, "--output", str(out), "--max-new-tokens", "12")
    assert (done.code, done.out) == (0, "") and "4 of 4 requests done" in done.err
    results = _results(out)
    assert [result.get("id") for result in results] == ["first", None, 7, "日本"]
    assert [list(result) for result in results] == [["id", *RESULT], RESULT, ["id", *RESULT], ["id", *RESULT]]
    assert [result["mode"] for result in results] == ["diffusion", "ar", "mock_ar", "diffusion"]
    assert len(results[1]["token_ids"]) <= 3 and len(results[3]["token_ids"]) <= 12
    alone = run("--checkpoint", with_text, "--prompt", "the quick", "--max-new-tokens", "40", "--json").result
    assert results[0]["token_ids"] == alone["token_ids"] and results[0]["text"] == alone["text"]
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_flags_fill_in_what_a_line_leaves_out(tmp_path: Path, run: Callable[..., Run]) -> None:
    ids = {"prompt_token_ids": [5]}
    file, out = _lines(tmp_path / "in", ids, ids | {"seed": 4, "mode": "diffusion"}), tmp_path / "out"
    flags = ["--mode", "ar", "--temperature", "1", "--seed", "3", "--max-new-tokens", "9", "--ignore-eos"]
    assert run("--checkpoint", IDS_ONLY, "--input", file, "--output", str(out), *flags).code == 0
    first, second = _results(out)
    assert (first["mode"], first["seed"], len(first["token_ids"])) == ("ar", 3, 9)
    assert (second["mode"], second["seed"], len(second["token_ids"])) == ("diffusion", 4, 9)


BAD_LINES: list[tuple[str | bytes, str]] = [
    ('{"prompt_token_ids": [5]', "broken JSON"),
    ("[1]", "got a JSON list, wanted a JSON object"),
    (b'{"prompt_token_ids": [5], "id": "\xff"}', "broken UTF-8 at byte 34"),
    ("[" * 100_000, "unreadable JSON"),
    ('{"seed": ' + "9" * 5000 + "}", "unreadable JSON"),
    ("{}", "prompt: got neither"),
    ('{"prompt": "x", "prompt_token_ids": [5]}', "prompt: got both"),
    ('{"prompt": "x"}', "prompt: got text, but this checkpoint has no tokenizer"),
    ('{"prompt_token_ids": [5], "max_tokens": 5}', "max_tokens: unknown field"),
    ('{"prompt_token_ids": [5], "id": [1]}', "id: got a list"),
    ('{"prompt_token_ids": [5], "id": "\\ud800"}', "id: got text with half a surrogate pair"),
    ('{"prompt_token_ids": 5}', "prompt_token_ids: got 5, wanted a list"),
    ('{"prompt_token_ids": []}', "prompt: got an empty prompt"),
    ('{"prompt_token_ids": [5, 128]}', "prompt_token_ids[1]: got 128, wanted a token id from 0 to 127"),
    ('{"prompt_token_ids": [5], "temperature": NaN}', "temperature: got nan"),
    ('{"prompt_token_ids": [5], "seed": null}', "seed: got None, wanted an integer"),
    ('{"prompt_token_ids": [5], "max_new_tokens": "5"}', "max_new_tokens: got '5'"),
    ('{"prompt_token_ids": [5], "max_new_tokens": 4096}', "wanted at most 4096"),
    ('{"prompt_token_ids": [5], "stop": 3}', "stop: got 3"),
    ('{"prompt_token_ids": [5], "priority": true}', "priority: got True, wanted an integer from -2147483648"),
    ('{"prompt_token_ids": [5], "priority": "1"}', "priority: got '1'"),
]


def test_bad_lines_are_told_by_number_and_skipped(tmp_path: Path, run: Callable[..., Run]) -> None:
    good = {"prompt_token_ids": [5], "max_new_tokens": 2, "id": "good", "priority": -3}
    file = _lines(tmp_path / "in", "", *[line for line, _ in BAD_LINES], "  ", good)
    out = tmp_path / "out"
    done = run("--checkpoint", IDS_ONLY, "--input", file, "--output", str(out))
    assert done.code == 0 and [result["id"] for result in _results(out)] == ["good"]
    told = done.err.splitlines()
    for number, (_, words) in enumerate(BAD_LINES, 2):
        [line] = [line for line in told if line.startswith(f"{file}:{number}: ")]
        assert words in line and len(line) < 500, line
    assert told[len(BAD_LINES) :] == [f"{file}: {len(BAD_LINES)} bad lines of {len(BAD_LINES) + 1} skipped", told[-1]]


def test_strict_refuses_all_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]) -> None:
    _fake(monkeypatch, lambda request: AssertionError("a tower was touched"))
    file = _lines(tmp_path / "in", {"prompt_token_ids": [5]}, "{", {"prompt_token_ids": [6]})
    done = run("--checkpoint", IDS_ONLY, "--input", file, "--output", str(tmp_path / "out"), "--strict")
    assert done.code == 2 and f"{file}:2: " in done.err and "1 bad lines of 3" in done.err
    assert not (tmp_path / "out").exists()


def test_no_good_line_at_all_and_none_at_all(tmp_path: Path, run: Callable[..., Run]) -> None:
    out = tmp_path / "out"
    done = run("--checkpoint", IDS_ONLY, "--input", _lines(tmp_path / "in", "{"), "--output", str(out))
    assert done.code == 2 and not out.exists()
    done = run("--checkpoint", IDS_ONLY, "--input", _lines(tmp_path / "in", ""), "--output", str(out))
    assert done.code == 0 and out.read_bytes() == b""


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("missing", "out", "No such file"),
        (".", "out", "directory"),
        ("in", "no/such/folder/out", "No such file"),
        ("in", ".", "not a regular file"),
        ("in", "in", "is the --input file"),
    ],
)
def test_files_that_cannot_be(source: str, target: str, words: str, tmp_path: Path, run: Callable[..., Run]) -> None:
    _lines(tmp_path / "in", {"prompt_token_ids": [5]})
    done = run("--checkpoint", IDS_ONLY, "--input", str(tmp_path / source), "--output", str(tmp_path / target))
    assert done.code == 2 and done.err.count("\n") == 1 and words in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


class FakePair:
    """Decodes as `behave` says: an error, or tokens."""

    def __init__(self, behave: Callable[[Request], object]) -> None:
        self._behave = behave

    async def generate(self, request: Request) -> AsyncGenerator[BlockEvent, None]:
        what = self._behave(request)
        if asyncio.iscoroutine(what):
            what = await what
        if isinstance(what, BaseException):
            raise what
        yield BlockEvent(request.id, 0, (7,), 1, 1, FinishReason.STOP)


def _fake(monkeypatch: pytest.MonkeyPatch, behave: Callable[[Request], object]) -> list[Any]:
    """Put a fake pair in the place of the real one. Returns the settings it was opened with."""
    opened: list[Any] = []

    @asynccontextmanager
    async def open_pair(directory: Path, settings: Any, *_: object, **__: object) -> AsyncIterator[FakePair]:
        opened.append(settings)
        yield FakePair(behave)

    monkeypatch.setattr("twotower.commands.generate.open_pair", open_pair)
    return opened


def _numbered(tmp_path: Path, count: int) -> tuple[list[str], Path]:
    lines = [{"id": n, "prompt_token_ids": [5], "mode": "ar", "max_new_tokens": 16 * (n + 1)} for n in range(count)]
    out = tmp_path / "out"
    return ["--checkpoint", IDS_ONLY, "--input", _lines(tmp_path / "in", *lines), "--output", str(out)], out


def test_lines_are_decoded_together_and_written_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]
) -> None:
    arguments, out = _numbered(tmp_path, 40)
    gate = asyncio.Barrier(40)

    async def behave(request: Request) -> None:
        await gate.wait()  # nobody passes before all are there
        await asyncio.sleep(0.02 / int(request.id))

    opened = _fake(monkeypatch, behave)
    assert run(*arguments).code == 0
    assert [result["id"] for result in _results(out)] == list(range(40))
    [settings] = opened
    assert settings.max_sequences == 32
    assert settings.pages == sum(n + 1 for n in range(8, 40)), "room for the 32 longest, and not more"


def test_more_lines_than_the_pair_can_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]
) -> None:
    monkeypatch.setattr("twotower.commands.generate._IN_FLIGHT", 6)
    monkeypatch.setattr("twotower.commands.generate._MAX_SEQUENCES", 3)
    lines = [{"id": n, "prompt_token_ids": [5], "mode": "mock_ar", "max_new_tokens": 1} for n in range(120)]
    file, out = _lines(tmp_path / "in", *lines), tmp_path / "out"
    done = run("--checkpoint", IDS_ONLY, "--input", file, "--output", str(out))
    assert done.code == 0 and done.err.startswith("120 of 120 requests done")
    assert [result["id"] for result in _results(out)] == list(range(120))


def test_one_that_fails_is_told_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]
) -> None:
    arguments, out = _numbered(tmp_path, 5)
    _fake(monkeypatch, lambda request: NumericalError("a NaN") if request.id == "3" else None)
    done = run(*arguments)
    assert done.code == 1 and f"{tmp_path / 'in'}:3: a NaN" in done.err and "4 of 5 requests done" in done.err
    assert [result["id"] for result in _results(out)] == [0, 1, 3, 4]


@pytest.mark.parametrize(("error", "flags"), [(Unavailable("gone"), []), (NumericalError("a NaN"), ["--strict"])])
def test_a_run_that_breaks_leaves_the_old_file(
    error: TwoTowerError,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Run],
) -> None:
    arguments, out = _numbered(tmp_path, 5)
    out.write_text("old")
    _fake(monkeypatch, lambda request: error if request.id == "4" else None)
    done = run(*arguments, *flags)
    assert done.code == 1 and done.err.count("\n") == 1 and str(error) in done.err
    assert out.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


# As a process.


def _process(*arguments: str, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "twotower", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def test_version_and_help_in_a_process() -> None:
    out, err = _process("--version").communicate(timeout=60)
    assert (out, err) == (f"twotower {twotower.__version__}\n", "")
    out, _ = _process("generate", "--help").communicate(timeout=60)
    assert out.count("python -m twotower generate --checkpoint demo") == 2


def test_ctrl_c_in_a_process() -> None:
    """After the first tokens, in the middle of decoding."""
    process = _process("generate", *GOOD, "--mode", "ar", "--max-new-tokens", "4000", "--ignore-eos", bufsize=1)
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "python -m twotower: error: interrupted\n")
