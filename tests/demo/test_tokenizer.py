"""Special ids lie where the released model has them, text survives, transformers reads the files."""

from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer as BpeTokenizer

from twotower.demo.corpus import stream
from twotower.demo.tokenizer import (
    BOS_ID,
    EOS_ID,
    MASK_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    decode_answer,
    encode_answer,
    encode_prompt,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)


def test_special_ids(tokenizer: BpeTokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [PAD_ID, BOS_ID, EOS_ID, MASK_ID]


def test_text_survives_the_round_trip(tokenizer: BpeTokenizer) -> None:
    for instance in islice(stream("test", 0), 200):
        assert decode_answer(tokenizer, encode_answer(tokenizer, instance.answer)) == instance.answer
        assert tokenizer.decode(encode_prompt(tokenizer, instance.prompt)) == instance.prompt


@pytest.mark.parametrize("text", ["naïve ☃", "  two  spaces\n", "tab\t"])
def test_any_text_can_be_encoded(tokenizer: BpeTokenizer, text: str) -> None:
    assert tokenizer.decode(encode_prompt(tokenizer, text)) == text


def test_prompts_begin_and_answers_end(tokenizer: BpeTokenizer) -> None:
    assert encode_prompt(tokenizer, "words: 7\n")[0] == BOS_ID
    assert encode_answer(tokenizer, "seven")[-1] == EOS_ID
    assert decode_answer(tokenizer, [*encode_answer(tokenizer, "seven"), EOS_ID, EOS_ID]) == "seven"


def test_every_digit_is_one_token(tokenizer: BpeTokenizer) -> None:
    assert len(encode_answer(tokenizer, "1999")) == 4 + 1


def test_training_is_deterministic(tokenizer: BpeTokenizer) -> None:
    assert train_tokenizer(vocab_size=320, num_instances=2000).to_str() == tokenizer.to_str()


def test_transformers_reads_the_saved_files(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer  # two seconds, which only this test needs

    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("words: 345\n")["input_ids"] == encode_prompt(tokenizer, "words: 345\n")
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.mask_token_id) == (0, 1, 2, 3)
    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()
