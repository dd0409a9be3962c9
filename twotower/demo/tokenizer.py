"""The demo's byte-level BPE tokenizer: trained here, saved as the files transformers reads.

Ids 0..3 are pad, bos, eos and mask; every digit is one token. Knows nothing about tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from twotower.demo.corpus import stream
from twotower.errors import CheckpointError

PAD_ID, BOS_ID, EOS_ID, MASK_ID = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<mask>")


def train_tokenizer(vocab_size: int = 512, num_instances: int = 20_000, seed: int = 0) -> Tokenizer:
    """Train on the training side of the corpus. Prompts and answers are apart, as at inference."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _texts(num_instances, seed),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = SPECIAL_TOKENS[BOS_ID]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS_ID)]
    )
    return tokenizer


# A conversation as a prompt of the corpus: one line that ends with a line break.
CHAT_TEMPLATE = """{#- The demo knows no turns: the prompt is the user's last message. -#}
{{- bos_token }}{{ (messages | selectattr("role", "equalto", "user") | list | last).content.removesuffix("\\n") }}
{{ "" -}}
"""


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json (class PreTrainedTokenizerFast) and chat_template.jinja."""
    tokenizer.save(str(directory / "tokenizer.json"))
    pad, bos, eos, mask = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "mask_token": mask,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read tokenizer.json of `directory`. Raises CheckpointError."""
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(f"{directory}: no tokenizer.json is there")
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt, bos first."""
    ids: list[int] = tokenizer.encode(prompt).ids
    return ids


def encode_answer(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Ids of an answer, eos last."""
    ids: list[int] = tokenizer.encode(answer, add_special_tokens=False).ids
    return [*ids, EOS_ID]


def decode_answer(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Text of generated ids up to the first eos."""
    kept: list[int] = []
    for token in ids:
        if token == EOS_ID:
            break
        kept.append(token)
    text: str = tokenizer.decode(kept)
    return text


def _texts(count: int, seed: int) -> Iterable[str]:
    for instance in islice(stream("train", seed), count):
        yield instance.prompt
        yield instance.answer
