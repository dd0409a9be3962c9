"""The metrics of a router, each declared once. Where vLLM has one of the same meaning, it has the same name."""

from cluster.watch.metric import Kind, Metric

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0)
# Ray sums a histogram up from the middles of its buckets: between these whole numbers are the middles.
_STEPS = (*(steps + 0.5 for steps in range(17)), 32.5, 64.5, 128.5, 1024.5)

SUCCESS = Metric(
    "request_success_total",
    Kind.COUNTER,
    "requests",
    "ended well; each prompt of a call is a request",
    ("mode", "finished_reason"),
)
FAILURE = Metric(
    "request_failure_total",
    Kind.COUNTER,
    "requests",
    "begun and ended by an error, which `code` names as gRPC does: CANCELLED where the client left, or its own "
    "deadline cut its call",
    ("mode", "code"),
)
REFUSED = Metric(
    "calls_refused_total",
    Kind.COUNTER,
    "calls",
    "ended before a request of theirs began: INVALID_ARGUMENT by a check, RESOURCE_EXHAUSTED for want of room, "
    "UNAUTHENTICATED without a key, UNAVAILABLE while the router ends; what cannot even be parsed is not counted, and "
    "what the limit of a key refuses has a counter of its own",
    ("code",),
)
KEY_LIMITS = Metric(
    "key_limits_reached_total",
    Kind.COUNTER,
    "calls",
    "refused because the key of this name allows no more now, and by which of its limits",
    ("key", "limit"),
)
OPEN = Metric(
    "router_requests", Kind.GAUGE, "requests", "under way in a router: they wait, run, or their answer is being written"
)
WAITING = Metric(
    "num_requests_waiting",
    Kind.GAUGE,
    "requests",
    "wait for a turn in a router (`cell`: `router`) or for room in a cell (`cell`: its id)",
    ("cell",),
)
LONGEST_WAIT = Metric(
    "queue_longest_wait_seconds", Kind.GAUGE, "seconds", "how long the first of those that wait in a router has waited"
)
CELLS = Metric(
    "cells_alive",
    Kind.GAUGE,
    "cells",
    "that a router hears of and that serve the mode; take the maximum over routers. How many are wanted is Serve's "
    "`ray_serve_autoscaling_target_replicas`",
    ("mode",),
)
READY = Metric("router_ready", Kind.GAUGE, "0 or 1", "whether a router would say on `/ready` that a cell answers")
FILE_FAULT = Metric(
    "file_not_taken",
    Kind.GAUGE,
    "0 or 1",
    "whether a changed file (`keys` or `certificates`) cannot be read or is wrong, so that what it said before stays",
    ("file",),
)
CERTIFICATE_LEFT = Metric(
    "certificate_left_seconds",
    Kind.GAUGE,
    "seconds",
    "until the certificate that a face shows now ends; below 0 it has. `grpc`: the first end in the router's chain; "
    "`http`: that of the certificate which its node's HTTP proxy showed in a handshake, within the last half minute",
    ("face",),
)
QUEUE_TIME = Metric(
    "request_queue_time_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "from a request's begin until a cell has taken it",
    ("mode",),
    _SECONDS,
)
FIRST_TOKEN = Metric(
    "time_to_first_token_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "from a request's begin to its first tokens: in `diffusion` the first block, of a score the whole answer",
    ("mode",),
    _SECONDS,
)
BETWEEN_BLOCKS = Metric(
    "inter_block_latency_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "from one event to the next: of a block in `diffusion`, of a round in `verified`, of either in `auto`, of a token "
    "or several joined in `ar` and `mock_ar`",
    ("mode",),
    _SHORT_S,
)
TOKEN_TIME = Metric(
    "request_time_per_output_token_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "of a request that ended well: the time after its first event for each token after it",
    ("mode",),
    _SHORT_S,
)
LATENCY = Metric(
    "e2e_request_latency_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "from a request's begin to its end, of those that ended well",
    ("mode",),
    _SECONDS,
)
PROMPT_TOKENS = Metric(
    "prompt_tokens_total", Kind.COUNTER, "tokens", "of prompts that were read, once for each request", ("mode",)
)
TOKENS = Metric(
    "generation_tokens_total", Kind.COUNTER, "tokens", "of answers, as clients see them in `usage`", ("mode",)
)
BLOCKS = Metric(
    "committed_blocks_total",
    Kind.COUNTER,
    "blocks",
    "of answers; in `ar` and `mock_ar` a token is a block, in `verified` a round, in `auto` what was chosen each time",
    ("mode",),
)
STEPS = Metric(
    "diffusion_num_denoising_steps_total",
    Kind.COUNTER,
    "steps",
    "denoiser steps of the blocks in answers of `diffusion`; tokens per step is `diffusion_num_committed_tokens_total` "
    "divided by this",
)
CANVAS = Metric(
    "diffusion_num_canvas_positions_total",
    Kind.COUNTER,
    "positions",
    "that these steps computed: `block_size` each, whether still masked or fixed before",
)
COMMITTED = Metric(
    "diffusion_num_committed_tokens_total",
    Kind.COUNTER,
    "tokens",
    "that these steps fixed, as clients see them in `usage`",
)
BLOCK_STEPS = Metric("steps_per_block", Kind.HISTOGRAM, "steps", "that a block of `diffusion` took", (), _STEPS)
AUTO_BLOCKS = Metric(
    "auto_blocks_total",
    Kind.COUNTER,
    "blocks",
    "of answers of `auto`, by the mode that was chosen for each: `ar`, `verified` or `diffusion`",
    ("chosen",),
)
DRAFTS = Metric(
    "spec_decode_num_drafts_total", Kind.COUNTER, "drafts", "rounds in answers of `verified`, with a draft or without"
)
DRAFTED = Metric(
    "spec_decode_num_draft_tokens_total",
    Kind.COUNTER,
    "tokens",
    "that the denoiser proposed in them; a round also gives one token that nobody proposed",
)
ACCEPTED = Metric(
    "spec_decode_num_accepted_tokens_total",
    Kind.COUNTER,
    "tokens",
    "of those: what `ar` would have written, and so stands",
)
DRAFT_STEPS = Metric("spec_decode_num_draft_steps_total", Kind.COUNTER, "steps", "denoiser steps of these drafts")
MOVES = Metric(
    "request_migrations_total",
    Kind.COUNTER,
    "moves",
    "of a begun request to another cell: its cell was lost (`cell_lost`), contradicted itself (`gap`), or is to go "
    "(`handed_over`)",
    ("mode", "reason"),
)
REPLAYED = Metric(
    "blocks_replayed_total", Kind.COUNTER, "blocks", "of answers, read again by another cell after a move", ("mode",)
)
PAUSE = Metric(
    "resume_pause_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "from the loss of a request's cell to its next event",
    ("mode",),
    _SECONDS,
)
