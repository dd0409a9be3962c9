"""The metrics of a cell and its towers, each declared once. All have the label `cell`."""

from cluster.watch.metric import Kind, Metric

RUNNING = Metric("num_requests_running", Kind.GAUGE, "requests", "requests that have a place in a cell", ("cell",))
MENDING = Metric(
    "cell_mending_seconds",
    Kind.GAUGE,
    "seconds",
    "how long a cell has been replacing a lost tower; 0 while it is whole",
    ("cell",),
)
MENDED = Metric("cell_mends_total", Kind.COUNTER, "mends", "lost towers that were replaced and tested", ("cell",))
CACHE_USED = Metric(
    "kv_cache_usage_perc",
    Kind.GAUGE,
    "share, 0 to 1",
    "share of a tower's pages that are taken; named as in vLLM, and like vLLM's from 0 to 1",
    ("cell", "tower"),
)
PAGES = Metric(
    "cache_pages", Kind.GAUGE, "pages", "pages of a tower, of 16 positions each, on CUDA of 256", ("cell", "tower")
)
SLOTS_USED = Metric("slots_used", Kind.GAUGE, "slots", "slots that hold a sequence", ("cell", "tower"))
SLOTS = Metric("slots", Kind.GAUGE, "slots", "slots of a tower", ("cell", "tower"))
FREE_MEMORY = Metric(
    "tower_free_memory_bytes",
    Kind.GAUGE,
    "bytes",
    "bytes that a tower's process can still allocate on its device",
    ("cell", "tower"),
)
BUSY = Metric(
    "tower_busy_seconds_total",
    Kind.COUNTER,
    "seconds",
    "time in which a tower's thread had work; its rate is the busy share. Towers of one process (`colocated`) share it",
    ("cell", "tower"),
)
TICKS = Metric("tower_ticks_total", Kind.COUNTER, "ticks", "ticks of a tower's engine that had work", ("cell", "tower"))
ROWS = Metric(
    "tower_rows_total",
    Kind.COUNTER,
    "rows",
    "rows of all forwards; divided by ticks: the mean batch",
    ("cell", "tower"),
)
NEAR_TIES = Metric(
    "near_ties_total",
    Kind.COUNTER,
    "decisions",
    "decisions so close that fp32 rounding might have changed them",
    ("cell", "tower"),
)
OUT_OF_MEMORY = Metric(
    "out_of_memory_total",
    Kind.COUNTER,
    "passes",
    "passes that found no memory on a tower's device; their rows were tried in halves or failed",
    ("cell", "tower"),
)
EXPOSED = Metric(
    "exchange_exposed_seconds_total",
    Kind.COUNTER,
    "seconds",
    "time in which a denoiser had sequences but stepped none, because all of them waited for their commits' deltas "
    "(`commit`) or for prompts too (`prompt`)",
    ("cell", "tower", "reason"),
)
EXCHANGED = Metric(
    "exchange_bytes_total", Kind.COUNTER, "bytes", "bytes of cache deltas that a denoiser received", ("cell", "tower")
)
EXCHANGE_TIME = Metric(
    "exchange_seconds_total",
    Kind.COUNTER,
    "seconds",
    "time spent on receiving cache deltas, in parallel to the denoiser's passes",
    ("cell", "tower"),
)
PAYLOADS = Metric(
    "exchange_payloads_total",
    Kind.COUNTER,
    "payloads",
    "payloads of cache deltas that a denoiser received",
    ("cell", "tower"),
)
PREFIX_LOOKUPS = Metric(
    "prefix_cache_lookups_total",
    Kind.COUNTER,
    "prompts",
    "prompts that are long enough to begin with a kept prefix (longer than `prefill_chunk_tokens`; on CUDA than its "
    "least common multiple with 256)",
    ("cell", "tower"),
)
PREFIX_HITS = Metric(
    "prefix_cache_hits_total", Kind.COUNTER, "prompts", "prompts that began with a kept prefix", ("cell", "tower")
)
PREFIX_TOKENS = Metric(
    "prefix_cache_saved_tokens_total",
    Kind.COUNTER,
    "tokens",
    "tokens of prompts that came from kept prefixes instead of being read",
    ("cell", "tower"),
)
PREFIX_EVICTIONS = Metric(
    "prefix_cache_evictions_total",
    Kind.COUNTER,
    "prefixes",
    "prefixes that were evicted for other prefixes, or for sequences that needed their pages",
    ("cell", "tower"),
)
PREFIX_BYTES = Metric(
    "prefix_cache_bytes",
    Kind.GAUGE,
    "bytes",
    "bytes of kept states and kept pages, whether a sequence holds the pages or not",
    ("cell", "tower"),
)
