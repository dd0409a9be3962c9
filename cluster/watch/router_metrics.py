"""The metrics of a router, each declared once. A metric that vLLM has, too, has vLLM's name."""

from cluster.watch.metric import Kind, Metric

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0)
# Ray estimates a histogram's sum from the middles of its buckets: the middles of these are whole numbers.
_STEPS = (*(steps + 0.5 for steps in range(17)), 32.5, 64.5, 128.5, 1024.5)

SUCCESS = Metric(
    "request_success_total",
    Kind.COUNTER,
    "requests",
    "requests that ended without an error; each prompt of a call is a request",
    ("mode", "finished_reason"),
)
FAILURE = Metric(
    "request_failure_total",
    Kind.COUNTER,
    "requests",
    "requests that began and ended with an error, by the error's gRPC code; CANCELLED: the client left, or its own "
    "deadline cut the call",
    ("mode", "code"),
)
REFUSED = Metric(
    "calls_refused_total",
    Kind.COUNTER,
    "calls",
    "calls refused before a request of theirs began: INVALID_ARGUMENT by a check, RESOURCE_EXHAUSTED for want of "
    "room, UNAUTHENTICATED without a key, UNAVAILABLE while the router ends. Calls that cannot be parsed are not "
    "counted; refusals by a key's limit have their own counter",
    ("code",),
)
KEY_LIMITS = Metric(
    "key_limits_reached_total",
    Kind.COUNTER,
    "calls",
    "calls refused because a limit of the key was reached, by the key's name and the limit",
    ("key", "limit"),
)
OPEN = Metric(
    "router_requests",
    Kind.GAUGE,
    "requests",
    "requests that a router holds: they wait, run, or their answer is being written",
)
WAITING = Metric(
    "num_requests_waiting",
    Kind.GAUGE,
    "requests",
    "requests that wait for a turn in a router (`cell`: `router`) or for room in a cell (`cell`: its id)",
    ("cell",),
)
LONGEST_WAIT = Metric(
    "queue_longest_wait_seconds", Kind.GAUGE, "seconds", "how long the first request in a router's queue has waited"
)
CELLS = Metric(
    "cells_alive",
    Kind.GAUGE,
    "cells",
    "cells that a router hears from and that serve the mode; take the maximum over routers. Serve's "
    "`ray_serve_autoscaling_target_replicas` is the wanted number",
    ("mode",),
)
READY = Metric("router_ready", Kind.GAUGE, "0 or 1", "whether this router answers 200 on `/ready`")
FILE_FAULT = Metric(
    "file_not_taken",
    Kind.GAUGE,
    "0 or 1",
    "whether a changed file (`keys` or `certificates`) cannot be read or is wrong, so that its old content still holds",
    ("file",),
)
CERTIFICATE_LEFT = Metric(
    "certificate_left_seconds",
    Kind.GAUGE,
    "seconds",
    "until the certificate that a face shows now ends; below 0 it has. `grpc`: the first end in the router's chain; "
    "`http`: that of the certificate which its node's HTTP proxy showed in a handshake, within the last two minutes",
    ("face",),
)
QUEUE_TIME = Metric(
    "request_queue_time_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "time from a request's begin until a cell has taken it",
    ("mode",),
    _SECONDS,
)
FIRST_TOKEN = Metric(
    "time_to_first_token_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "time from a request's begin to its first tokens: in `diffusion` to the first block, for a score to the whole "
    "answer",
    ("mode",),
    _SECONDS,
)
BETWEEN_BLOCKS = Metric(
    "inter_block_latency_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "time from one event to the next. An event is a block in `diffusion`, a round in `verified`, either in `auto`, "
    "one or several tokens in `ar` and `mock_ar`",
    ("mode",),
    _SHORT_S,
)
TOKEN_TIME = Metric(
    "request_time_per_output_token_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "time per token after a request's first event, of requests that ended without an error",
    ("mode",),
    _SHORT_S,
)
LATENCY = Metric(
    "e2e_request_latency_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "time from a request's begin to its end, of requests that ended without an error",
    ("mode",),
    _SECONDS,
)
PROMPT_TOKENS = Metric(
    "prompt_tokens_total", Kind.COUNTER, "tokens", "tokens of prompts, once for each request", ("mode",)
)
TOKENS = Metric(
    "generation_tokens_total", Kind.COUNTER, "tokens", "tokens of answers, as clients see them in `usage`", ("mode",)
)
BLOCKS = Metric(
    "committed_blocks_total",
    Kind.COUNTER,
    "blocks",
    "blocks of answers; a block is a token in `ar` and `mock_ar`, a round in `verified`, either of them or a block "
    "of `diffusion` in `auto`",
    ("mode",),
)
STEPS = Metric(
    "diffusion_num_denoising_steps_total",
    Kind.COUNTER,
    "steps",
    "denoiser steps of the blocks in answers of `diffusion`; tokens per step is "
    "`diffusion_num_committed_tokens_total` divided by this",
)
CANVAS = Metric(
    "diffusion_num_canvas_positions_total",
    Kind.COUNTER,
    "positions",
    "positions that these steps computed: `block_size` for each step, masked or fixed",
)
COMMITTED = Metric(
    "diffusion_num_committed_tokens_total",
    Kind.COUNTER,
    "tokens",
    "tokens that these steps fixed, as clients see them in `usage`",
)
BLOCK_STEPS = Metric("steps_per_block", Kind.HISTOGRAM, "steps", "steps that a block of `diffusion` took", (), _STEPS)
AUTO_BLOCKS = Metric(
    "auto_blocks_total",
    Kind.COUNTER,
    "blocks",
    "blocks of answers of `auto`, by the mode that was chosen for each: `ar`, `verified` or `diffusion`",
    ("chosen",),
)
DRAFTS = Metric(
    "spec_decode_num_drafts_total", Kind.COUNTER, "drafts", "rounds in answers of `verified`, with or without a draft"
)
DRAFTED = Metric(
    "spec_decode_num_draft_tokens_total",
    Kind.COUNTER,
    "tokens",
    "tokens that the denoiser proposed in these rounds; each round also gives one token without a proposal",
)
ACCEPTED = Metric(
    "spec_decode_num_accepted_tokens_total",
    Kind.COUNTER,
    "tokens",
    "proposed tokens that were accepted, because `ar` would have written them",
)
DRAFT_STEPS = Metric("spec_decode_num_draft_steps_total", Kind.COUNTER, "steps", "denoiser steps of these drafts")
MOVES = Metric(
    "request_migrations_total",
    Kind.COUNTER,
    "moves",
    "moves of a begun request to another cell: its cell was lost (`cell_lost`), its events did not follow each other "
    "(`gap`), or the cell is being removed (`handed_over`)",
    ("mode", "reason"),
)
REPLAYED = Metric(
    "blocks_replayed_total",
    Kind.COUNTER,
    "blocks",
    "blocks of answers that another cell read again after a move",
    ("mode",),
)
PAUSE = Metric(
    "resume_pause_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "time from the loss of a request's cell to the request's next event",
    ("mode",),
    _SECONDS,
)
