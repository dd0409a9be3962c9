"""Chat templates, rendered by the tokenizer library itself, with the demo's tokenizer."""

import sys
import time
from pathlib import Path

import pytest

import twotower
from twotower.errors import CheckpointError, InvalidRequest
from twotower.text import chat_template
from twotower.text.chat_template import ChatTemplate, Conversation, template_of
from twotower.text.tokenizer import PretrainedTokenizer

DEMO = Path(twotower.__file__).parent / "demo" / "checkpoint"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No line of output is needed for it to take for ever.
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PretrainedTokenizer:
    return PretrainedTokenizer(DEMO)


def chat(*contents: str) -> Conversation:
    """The user and the assistant, by turns."""
    roles = ("user", "assistant")
    return Conversation(tuple({"role": roles[place % 2], "content": text} for place, text in enumerate(contents)))


@pytest.mark.parametrize("content", ["words: 2009", "words: 2009\n"])
def test_the_demo_s_own_makes_the_prompt_that_it_was_trained_on(tokenizer: PretrainedTokenizer, content: str) -> None:
    template = template_of(tokenizer, DEMO, None)
    assert template is not None
    system = {"role": "system", "content": "Be short."}
    text = template.render(Conversation((system, *chat("words: 7", "seven", content).messages)))
    assert tokenizer.encode_continuation(text) == tokenizer.encode("words: 2009\n")
    with pytest.raises(InvalidRequest, match="messages: the chat template does not take them: No last item"):
        template.render(Conversation((system,)))


def test_one_that_is_given_goes_before_the_checkpoint_s_own(tokenizer: PretrainedTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML, encoding="utf-8")
    for given in (CHATML, str(file)):
        template = template_of(tokenizer, DEMO, given)
        assert template is not None
        made = template.render(chat("one", "two", "three"))
        turns = zip(("user", "assistant", "user"), ("one", "two", "three"), strict=True)
        whole = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
        assert made == whole + "<|im_start|>assistant\n"


def test_there_may_be_none(tokenizer: PretrainedTokenizer) -> None:
    class WithoutOne:
        chat_template = None

    assert template_of(WithoutOne(), DEMO, None) is None  # type: ignore[arg-type]
    assert template_of(None, DEMO, None) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{% if %}", "model.chat_template: broken chat template: "),
        ("{{ messages[0].content|nosuch }}", "model.chat_template: broken chat template: "),
        ("/no/such/file.jinja", "model.chat_template: /no/such/file.jinja: cannot be read: "),
    ],
)
def test_a_broken_one_ends_the_start(tokenizer: PretrainedTokenizer, given: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        template_of(tokenizer, DEMO, given)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        template_of(None, DEMO, given)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "does not take them: roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "does not take them: .*unsafe"),
        ("{{ messages[0].content.a.b }}", "does not take them: .*has no attribute"),
        ("{{ messages.append(1) }}", "does not take them: "),
    ],
)
def test_what_it_refuses_is_told(tokenizer: PretrainedTokenizer, source: str, words: str) -> None:
    template = ChatTemplate(tokenizer, source, "test")
    with pytest.raises(InvalidRequest, match=words) as caught:
        template.render(chat("a"))
    assert [problem.field for problem in caught.value.problems] == ["messages"]
    assert "\n" not in str(caught.value)


def test_one_that_takes_too_long_is_ended(tokenizer: PretrainedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDERED_S", 0.05)
    monkeypatch.setattr(chat_template, "_PROBED_S", 0.2)
    only_for_b = "{% if messages[0].content == 'b' %}" + ENDLESS + "{% endif %}"
    template = ChatTemplate(tokenizer, only_for_b, "test")
    assert template.render(chat("a")) == ""
    traced, began = sys.gettrace(), time.thread_time()
    with pytest.raises(InvalidRequest, match=r"takes more than 0\.05 s"):
        template.render(chat("b"))
    assert time.thread_time() - began < 5 and sys.gettrace() is traced
    with pytest.raises(CheckpointError, match=r"test: this chat template does not end within 0\.2 s"):
        ChatTemplate(tokenizer, ENDLESS, "test")


def test_what_the_tokenizer_tells_of_itself(tokenizer: PretrainedTokenizer) -> None:
    told = tokenizer.described
    assert (told["bos_token"], told["eos_token"]) == ("<s>", "</s>")
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    ids = tokenizer.encode("words: 7\n")
    assert tokenizer.decode(ids) == "words: 7\n" and tokenizer.decode(ids, with_special=True) == "<s>words: 7\n"
    assert tokenizer.tokens(ids)[:2] == ["<s>", "words"]
