"""Small tokenizers made on the spot."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")
_TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "Ünïcödé 日本語 текст 🦊🦊",
    "12 + 30 = 42",
    "stop. Stop!\n\n",
] * 4


def byte_level(vocab_size: int = 300) -> Tokenizer:
    """Byte-level BPE: a character outside ASCII is often several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def metaspace(vocab_size: int = 120) -> Tokenizer:
    """SentencePiece's way: the decoder drops the space before the first token it is given."""
    tokenizer = Tokenizer(models.BPE(unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


class Plain:
    """A tokenizer as decoding knows it, that counts the ids it was asked to decode."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner
        self.decoded = 0

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text).ids)

    def encode_continuation(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        self.decoded += len(token_ids)
        return str(self._inner.decode(list(token_ids), skip_special_tokens=True))


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """The one file that a checkpoint's tokenizer needs."""
    tokenizer.save(str(directory / "tokenizer.json"))
