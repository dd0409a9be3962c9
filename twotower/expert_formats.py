"""The formats in which routed experts' weights may be held: names, sizes, misfits. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from twotower.errors import CheckpointError, ConfigError

METHOD = "twotower_experts"
"""`quant_method` of a quantised checkpoint's `quantization_config`: no other loader knows the word, or may."""
QUANTISED_CLASS = "TwoTowerQuantisedExperts"
USUAL_GROUP = 32
GROUPS = (16, 32, 64, 128)


class ExpertWord(StrEnum):
    """The values of the setting."""

    STORED = "stored"
    INT8 = "int8"
    INT4 = "int4"


@dataclass(frozen=True, slots=True)
class ExpertFormat:
    """Weights of `bits` (8 or 4), symmetric around 0. Each `group` of them along the inputs shares a scale; `group` 0:
    all inputs of an output channel. Scales of whole channels are fp32, scales of groups bf16. Raises ConfigError.
    """

    bits: int
    group: int = 0

    def __post_init__(self) -> None:
        if (self.bits, self.group) != (8, 0) and (self.bits != 4 or self.group not in GROUPS):
            raise ConfigError(
                f"experts: got {self.bits} bits in groups of {self.group}, wanted 8 bits (int8, a scale an output "
                f"channel) or 4 bits (int4) in groups of {', '.join(map(str, GROUPS))}"
            )

    @classmethod
    def of(cls, word: str, group: int = 0) -> Self | None:
        """The format in the settings `experts` and `expert_group`; None for experts as the checkpoint stores them.
        Raises ConfigError.
        """
        if word not in tuple(ExpertWord):
            raise ConfigError(f"experts: got {word!r}, wanted one of {', '.join(ExpertWord)}")
        if word == ExpertWord.INT4:
            return cls(4, group or USUAL_GROUP)
        if group:
            raise ConfigError(f"expert_group: got {group} with experts {word}, wanted 0: only int4 has groups")
        return cls(8) if word == ExpertWord.INT8 else None

    @classmethod
    def of_config(cls, values: object) -> Self | None:
        """The format in a config.json's `quantization_config`; None if it has none. Raises CheckpointError."""
        if values is None:
            return None
        if not isinstance(values, Mapping):
            raise CheckpointError(f"quantization_config: got a {type(values).__name__}, wanted a JSON object")
        method, word, group = (values.get(name) for name in ("quant_method", "experts", "group_size"))
        if method != METHOD:
            raise CheckpointError(
                f"quantization_config: got quant_method {method!r}, wanted {METHOD!r}, the only one that this loader "
                "reads, or a checkpoint that is not quantised"
            )
        try:
            if word == ExpertWord.STORED or not isinstance(word, str) or not isinstance(group, int):
                raise ConfigError(f"got experts {word!r} with group_size {group!r}, wanted int8 with 0 or int4")
            return cls.of(word, group)
        except ConfigError as error:
            raise CheckpointError(f"quantization_config: {error}") from None

    def as_config(self) -> dict[str, object]:
        """As `quantization_config`."""
        return {"quant_method": METHOD, "experts": self.word, "group_size": self.group}

    @property
    def word(self) -> str:
        return f"int{self.bits}"

    def __str__(self) -> str:
        return f"{self.word}, {f'groups of {self.group}' if self.group else 'a scale an output channel'}"

    def groups(self, inputs: int) -> int:
        """Scales of one output channel."""
        return inputs // self.group if self.group else 1

    def misfit(self, inputs: int) -> str | None:
        """Why a matrix of so many inputs cannot be held; None if it can."""
        if self.group and inputs % self.group:
            return f"groups of {self.group} do not divide {inputs}"
        return None

    def packed(self, outputs: int, inputs: int) -> tuple[int, int, int]:
        """The shape of one matrix in bytes: output channels, groups, bytes of a group."""
        groups = self.groups(inputs)
        return outputs, groups, inputs // groups * self.bits // 8


def quantised_values(form: ExpertFormat) -> dict[str, object]:
    """The fields of a quantised checkpoint's config.json beside its architecture. They name neither the released code's
    class nor its model type: a loader that knows these would take bytes for weights.
    """
    return {"architectures": [QUANTISED_CLASS], "model_type": METHOD, "quantization_config": form.as_config()}
