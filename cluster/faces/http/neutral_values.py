"""Fields of other completion APIs that have no effect at the values listed here. These values are accepted, others
refused.

The table of docs/api.md is generated from this list. `null` always counts as not given. A dotted name is a field of a
field.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Neutral:
    """The values at which a field has no effect, and the API that has the field. Without values any
    value is refused.
    """

    values: tuple[object, ...]
    source: str

    def takes(self, value: object) -> bool:
        """Whether `value` is one of them. Python finds True == 1; JSON does not."""
        return any(value == ours and isinstance(value, bool) is isinstance(ours, bool) for ours in self.values)

    @property
    def wanted(self) -> str:
        """The values in JSON's words."""
        return " or ".join([*map(json.dumps, self.values), "null"])


_OPENAI = "OpenAI"
_VLLM, _SGLANG, _LLAMA, _TGI = "vLLM", "SGLang", "llama.cpp", "TGI"
_OFF = (False,)
_NO_TEXT: tuple[object, ...] = ("",)
_NO_LIST: tuple[object, ...] = ([],)
_NO_OBJECT: tuple[object, ...] = ({},)
_EITHER = (True, False)

NEUTRAL: Mapping[str, Neutral] = {
    # OpenAI's completions; LiteLLM and LangChain send these, AIPerf and vLLM's benchmark some of them
    "suffix": Neutral(_NO_TEXT, _OPENAI),
    "stream_options.include_obfuscation": Neutral(_OFF, _OPENAI),
    "store": Neutral(_OFF, _OPENAI),
    "service_tier": Neutral(("auto", "default"), _OPENAI),
    "metadata": Neutral(_NO_OBJECT, "LiteLLM"),
    # sampling of vLLM and SGLang
    "length_penalty": Neutral((1,), _VLLM),
    "use_beam_search": Neutral(_OFF, _VLLM),
    "early_stopping": Neutral(_OFF, _VLLM),
    "bad_words": Neutral(_NO_LIST, _VLLM),
    "allowed_token_ids": Neutral((), _VLLM),
    "logits_processors": Neutral(_NO_LIST, _VLLM),
    "skip_special_tokens": Neutral((True,), f"{_VLLM}, {_SGLANG}"),
    "spaces_between_special_tokens": Neutral((True,), f"{_VLLM}, {_SGLANG}"),
    "detokenize": Neutral((True,), _VLLM),
    "truncate_prompt_tokens": Neutral((), _VLLM),
    "prompt_logprobs": Neutral((), _VLLM),
    "cache_salt": Neutral(_NO_TEXT, _VLLM),
    "kv_transfer_params": Neutral(_NO_OBJECT, _VLLM),
    "vllm_xargs": Neutral(_NO_OBJECT, _VLLM),
    "no_stop_trim": Neutral(_OFF, _SGLANG),
    "stop_regex": Neutral((*_NO_TEXT, *_NO_LIST), _SGLANG),
    "regex": Neutral((), _SGLANG),
    "ebnf": Neutral((), _SGLANG),
    "json_schema": Neutral((), f"{_SGLANG}, {_LLAMA}"),
    "lora_path": Neutral((), _SGLANG),
    "session_params": Neutral((), _SGLANG),
    "return_hidden_states": Neutral(_OFF, _SGLANG),
    "custom_params": Neutral((), _SGLANG),
    "custom_logit_processor": Neutral((), _SGLANG),
    # TGI
    "details": Neutral(_OFF, _TGI),
    "decoder_input_details": Neutral(_OFF, _TGI),
    "return_full_text": Neutral(_OFF, _TGI),
    "watermark": Neutral(_OFF, _TGI),
    "top_n_tokens": Neutral((0,), _TGI),
    "truncate": Neutral((), _TGI),
    "adapter_id": Neutral((), _TGI),
    "typical_p": Neutral((1,), f"{_TGI}, {_LLAMA}"),
    "grammar": Neutral(_NO_TEXT, f"{_TGI}, {_LLAMA}"),
    # llama.cpp's server
    "repeat_penalty": Neutral((1,), _LLAMA),
    "dynatemp_range": Neutral((0,), _LLAMA),
    "top_n_sigma": Neutral((-1,), _LLAMA),
    "xtc_probability": Neutral((0,), _LLAMA),
    "dry_multiplier": Neutral((0,), _LLAMA),
    "mirostat": Neutral((0,), _LLAMA),
    "n_probs": Neutral((0,), _LLAMA),
    "min_keep": Neutral((0,), _LLAMA),
    "n_indent": Neutral((0,), _LLAMA),
    "id_slot": Neutral((-1,), _LLAMA),
    "cache_prompt": Neutral(_EITHER, _LLAMA),
    "return_tokens": Neutral(_OFF, _LLAMA),
    "timings_per_token": Neutral(_OFF, _LLAMA),
    "return_progress": Neutral(_OFF, _LLAMA),
    "post_sampling_probs": Neutral(_OFF, _LLAMA),
    "lora": Neutral(_NO_LIST, _LLAMA),
    "response_fields": Neutral(_NO_LIST, _LLAMA),
}

_ONLY_OF_COMPLETIONS = ("suffix",)
# Fields of chats beside those of completions, from OpenAI's and vLLM's chats.
CHAT_NEUTRAL: Mapping[str, Neutral] = {
    "tools": Neutral(_NO_LIST, _OPENAI),
    "tool_choice": Neutral(("none", "auto"), _OPENAI),
    "parallel_tool_calls": Neutral(_EITHER, _OPENAI),
    "functions": Neutral(_NO_LIST, _OPENAI),
    "function_call": Neutral(("none", "auto"), _OPENAI),
    "modalities": Neutral((["text"],), _OPENAI),
    "audio": Neutral((), _OPENAI),
    "prediction": Neutral((), _OPENAI),
    "reasoning_effort": Neutral(("none",), _OPENAI),
    "verbosity": Neutral((), _OPENAI),
    "web_search_options": Neutral((), _OPENAI),
    "prompt_cache_retention": Neutral((), _OPENAI),
    "echo": Neutral(_OFF, _VLLM),
    "add_generation_prompt": Neutral((True,), _VLLM),
    "continue_final_message": Neutral(_OFF, _VLLM),
    "chat_template": Neutral((), _VLLM),
    "chat_template_kwargs": Neutral(_NO_OBJECT, _VLLM),
    "documents": Neutral(_NO_LIST, _VLLM),
    "mm_processor_kwargs": Neutral(_NO_OBJECT, _VLLM),
    "include_reasoning": Neutral(_EITHER, _VLLM),
}
NEUTRAL_IN_CHATS: Mapping[str, Neutral] = {
    **{name: field for name, field in NEUTRAL.items() if name not in _ONLY_OF_COMPLETIONS},
    **CHAT_NEUTRAL,
}
