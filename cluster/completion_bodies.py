"""OpenAI's text-completion responses, with token ids and the denoiser's steps added."""

from collections.abc import Sequence

from cluster.completions import CompletionCall
from cluster.error_codes import Failure
from cluster.runs.answer import Chunk, Usage
from cluster.runs.run import Generating


def whole_body(call: CompletionCall, model: str, created: int, runs: Sequence[Generating]) -> dict[str, object]:
    """The response of a call that does not stream."""
    choices = [_choice(index, run, run.text, run.token_ids, run.finish_reason) for index, run in enumerate(runs)]
    return _envelope(call, model, created, choices) | {"usage": usage_body([run.usage for run in runs])}


def chunk_body(
    call: CompletionCall, model: str, created: int, index: int, run: Generating, chunk: Chunk
) -> dict[str, object]:
    """One event of a stream."""
    return _envelope(call, model, created, [_choice(index, run, chunk.text, chunk.token_ids, chunk.finish_reason)])


def usage_event(call: CompletionCall, model: str, created: int, usages: Sequence[Usage]) -> dict[str, object]:
    """The event before [DONE] where stream_options.include_usage asks for it."""
    return _envelope(call, model, created, []) | {"usage": usage_body(usages)}


def usage_body(usages: Sequence[Usage]) -> dict[str, int]:
    prompt, completion = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "num_steps": sum(u.num_steps for u in usages),
        "num_blocks": sum(u.num_blocks for u in usages),
    }


def error_body(failure: Failure) -> dict[str, object]:
    """OpenAI's error shape; `param` is the first field at fault."""
    param = failure.problems[0].field if failure.problems else None
    return {"error": {"message": failure.message, "type": failure.code.type, "param": param, "code": failure.code.code}}


def _envelope(call: CompletionCall, model: str, created: int, choices: Sequence[object]) -> dict[str, object]:
    return {
        "id": call.id,
        "request_id": call.label or call.id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": list(choices),
    }


def _choice(
    index: int, run: Generating, text: str, token_ids: Sequence[int], finish_reason: str | None
) -> dict[str, object]:
    return {
        "index": index,
        "text": text,
        "token_ids": list(token_ids),
        "logprobs": None,
        "finish_reason": finish_reason,
        "seed": run.request.params.seed,
    }
