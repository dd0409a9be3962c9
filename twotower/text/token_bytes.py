"""How much text one token can stand for, from a tokenizer's own description: a bound on prompts before they are
tokenized.

A token of the vocabulary stands for as many bytes as it has. If the tokenizer drops nothing of the text, n tokens stand
for at most n times the longest token's bytes. Steps that shorten the text loosen the bound:

- Unicode's normal forms and lower case leave a quarter at least. None of their characters comes from more than four
  times its bytes ("𝐀" to "A").
- For all else there is no bound: runs of spaces that become one, unknown words that become one token. Sixteen times
  the longest token is taken there, and a prompt that shrinks by more is refused.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

NORMAL_FORMS, UNKNOWN = 4, 16
_KEEPS_ALL = {"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "FixedLength"}
_FORMS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}


def bytes_per_token(tokenizer: Any) -> int:
    """Text of more than n times so many UTF-8 bytes has more than n tokens. `tokenizer`: one of transformers' own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return UNKNOWN * max(len(token.encode()) for token in tokenizer.get_vocab())
    return bytes_of(json.loads(backend.to_str()))


def bytes_of(spec: Mapping[str, Any]) -> int:
    """The same of a tokenizer.json."""
    longest = max((_size(token, _is_byte_level(spec)) for token in _vocabulary(spec)), default=0)
    added = max((len(token["content"].encode()) for token in spec.get("added_tokens") or ()), default=0)
    return max(longest, added, 1) * _shrinkage(spec)


def _shrinkage(spec: Mapping[str, Any]) -> int:
    """The most bytes of text that become one byte of what the model is given."""
    normalizers = list(_parts(spec.get("normalizer"), "normalizers"))
    forms = [part for part in normalizers if part["type"] in _FORMS]
    safe = (
        all(_keeps(part) for part in _parts(spec.get("pre_tokenizer"), "pretokenizers"))
        and all(_grows(part) for part in normalizers if part not in forms)
        and len(forms) <= 1
        and not any(token.get("lstrip") or token.get("rstrip") for token in spec.get("added_tokens") or ())
        and _knows_every_byte(spec)
    )
    if not safe:
        return UNKNOWN
    return NORMAL_FORMS if forms else 1


def _keeps(pre_tokenizer: Mapping[str, Any]) -> bool:
    return pre_tokenizer["type"] in _KEEPS_ALL and pre_tokenizer.get("behavior") != "Removed"


def _grows(normalizer: Mapping[str, Any]) -> bool:
    """Whether what it gives is never shorter than what it was given."""
    if normalizer["type"] == "Replace":
        replaced = normalizer["pattern"].get("String")
        return replaced is not None and len(normalizer["content"].encode()) >= len(replaced.encode())
    return normalizer["type"] in ("Prepend", "ByteLevel")


def _knows_every_byte(spec: Mapping[str, Any]) -> bool:
    """Whether no part of the text is left out, or taken together with others as unknown."""
    model, known = spec["model"], set(_vocabulary(spec))
    if model.get("type") == "BPE" and _is_byte_level(spec):
        return sum(len(token) == 1 for token in known) >= 256
    if model.get("type") in ("BPE", "Unigram") and model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in known for byte in range(256))
    return False


def _is_byte_level(spec: Mapping[str, Any]) -> bool:
    """Whether a character of the vocabulary is a byte of text."""
    parts = [*_parts(spec.get("pre_tokenizer"), "pretokenizers"), *_parts(spec.get("normalizer"), "normalizers")]
    return any(part["type"] == "ByteLevel" for part in parts)


def _size(token: str, byte_level: bool) -> int:
    return len(token) if byte_level else len(token.encode())


def _vocabulary(spec: Mapping[str, Any]) -> Iterator[str]:
    vocabulary = spec["model"]["vocab"]
    return iter(vocabulary) if isinstance(vocabulary, dict) else (token for token, _ in vocabulary)


def _parts(part: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer, or all of a sequence of them."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for one in part[inner]:
            yield from _parts(one, inner)
    else:
        yield part
