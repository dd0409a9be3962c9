"""Small tokenizers made on the spot."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from twotower.text.token_bytes import bytes_of

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


def sentencepiece(vocab_size: int = 340) -> Tokenizer:
    """SentencePiece's way with a token for every byte of what it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<pad>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS[:1], trainer)
    return _without_byte_specials(tokenizer)


def _without_byte_specials(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer makes the byte tokens special; in a real vocabulary they are said."""
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(spec))


class Plain:
    """A tokenizer as decoding knows it, that counts the ids it was asked to decode."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner
        self.bytes_per_token = bytes_of(json.loads(inner.to_str()))
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
