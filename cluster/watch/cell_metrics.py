"""The metrics of a cell and its towers, each declared once. All have the label `cell`."""

from cluster.watch.metric import Kind, Metric

RUNNING = Metric("num_requests_running", Kind.GAUGE, "requests", "that have a place in a cell", ("cell",))
MENDING = Metric(
    "cell_mending_seconds",
    Kind.GAUGE,
    "seconds",
    "how long a cell has been mending itself; 0 while it is whole",
    ("cell",),
)
MENDED = Metric("cell_mends_total", Kind.COUNTER, "mends", "a lost tower was replaced and tested", ("cell",))
CACHE_USED = Metric(
    "kv_cache_usage_perc",
    Kind.GAUGE,
    "share, 0 to 1",
    "of a tower's pages that are taken; vLLM's name, and like vLLM's no percentage",
    ("cell", "tower"),
)
PAGES = Metric(
    "cache_pages", Kind.GAUGE, "pages", "that a tower has, of 16 positions each, on CUDA of 256", ("cell", "tower")
)
SLOTS_USED = Metric("slots_used", Kind.GAUGE, "slots", "that hold a sequence", ("cell", "tower"))
SLOTS = Metric("slots", Kind.GAUGE, "slots", "that a tower has", ("cell", "tower"))
FREE_MEMORY = Metric(
    "tower_free_memory_bytes",
    Kind.GAUGE,
    "bytes",
    "that a tower's process can still allocate on its device",
    ("cell", "tower"),
)
BUSY = Metric(
    "tower_busy_seconds_total",
    Kind.COUNTER,
    "seconds",
    "in which a tower's thread had work; its rate is the busy share. Towers of one process (`colocated`) share it",
    ("cell", "tower"),
)
TICKS = Metric("tower_ticks_total", Kind.COUNTER, "ticks", "of a tower's engine that had work", ("cell", "tower"))
ROWS = Metric(
    "tower_rows_total",
    Kind.COUNTER,
    "rows",
    "of all forwards; divided by ticks: the mean batch",
    ("cell", "tower"),
)
NEAR_TIES = Metric(
    "near_ties_total",
    Kind.COUNTER,
    "decisions",
    "so close that fp32 rounding might have made them another way",
    ("cell", "tower"),
)
OUT_OF_MEMORY = Metric(
    "out_of_memory_total",
    Kind.COUNTER,
    "passes",
    "that found no memory on a tower's device; their rows were tried in halves or failed",
    ("cell", "tower"),
)
EXPOSED = Metric(
    "exchange_exposed_seconds_total",
    Kind.COUNTER,
    "seconds",
    "in which a denoiser had sequences but stepped none: all of them waited for their commits' deltas (`commit`), or "
    "for prompts too (`prompt`)",
    ("cell", "tower", "reason"),
)
EXCHANGED = Metric(
    "exchange_bytes_total", Kind.COUNTER, "bytes", "of cache deltas that a denoiser received", ("cell", "tower")
)
EXCHANGE_TIME = Metric(
    "exchange_seconds_total",
    Kind.COUNTER,
    "seconds",
    "of receiving cache deltas, beside what the denoiser computes",
    ("cell", "tower"),
)
PAYLOADS = Metric(
    "exchange_payloads_total", Kind.COUNTER, "payloads", "of cache deltas that a denoiser received", ("cell", "tower")
)
PREFIX_LOOKUPS = Metric(
    "prefix_cache_lookups_total",
    Kind.COUNTER,
    "prompts",
    "long enough to begin with a prefix that may be kept (`prefill_chunk_tokens` and a token more)",
    ("cell", "tower"),
)
PREFIX_HITS = Metric(
    "prefix_cache_hits_total", Kind.COUNTER, "prompts", "that began with a kept prefix", ("cell", "tower")
)
PREFIX_TOKENS = Metric(
    "prefix_cache_saved_tokens_total",
    Kind.COUNTER,
    "tokens",
    "of prompts that were not read, because they were kept",
    ("cell", "tower"),
)
PREFIX_EVICTIONS = Metric(
    "prefix_cache_evictions_total",
    Kind.COUNTER,
    "prefixes",
    "that gave way to others, or to sequences that needed their pages",
    ("cell", "tower"),
)
PREFIX_BYTES = Metric(
    "prefix_cache_bytes",
    Kind.GAUGE,
    "bytes",
    "of kept states, and of pages that are kept, whether a sequence holds them or not",
    ("cell", "tower"),
)
