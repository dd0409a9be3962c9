// Numbers as words with their units, and what each number means. Knows nothing of the page.
const MEANINGS = {
  "tokens/s": "Tokens of answers that clients got in a second, over all routers.",
  "tokens per step": "Tokens of diffusion answers divided by the denoiser's steps for them. 1 would be a token a step.",
  "first token": "Time from a request's start to its first tokens: half of the requests (p50) and 95 % of them (p95) had theirs within this time. Estimated from buckets, each half as wide as its lower bound.",
  "running": "Requests that have a place in a cell, and the slots of all cells.",
  "waiting": "Requests that wait in a router for a turn, or in a cell for room. Also how long the first request in a router has waited.",
  "failed": "Requests that ended with an error in the last minute, and refused calls. A client that leaves is not a failure.",
  "exchange": "Bytes of cache deltas that denoisers received from context towers in a second.",
  "exposed": "Share of time in which denoisers had sequences but stepped none, because all waited for a commit's delta or a prompt. Mean over denoisers.",
  "busy": "Share of the last second in which the tower's thread had work. Towers of one process share a thread.",
  "waits for": "What a tower did with the rest of that second: waiting for commits (the deltas of committed blocks), for prompts to be read, for the denoiser's next commits, or for work.",
  "memory": "Memory that the device has left for this process. What the process allocates is in the tooltip of its row.",
  "cache": "Pages that are taken, of all pages of the tower. A page holds 16 positions on a CPU, 256 on CUDA.",
  "strip": "A bar for each block of the answer. Filled: committed; its height is its steps, relative to the most it may take. Blinking: the block in progress. In long answers a bar stands for several blocks.",
  "block": "Committed blocks, of those the answer may have. In ar and mock_ar a token is a block.",
  "steps": "Denoiser steps of the committed blocks; in brackets: of the last block.",
  "quiet": "Time since the request's last progress: its last block, or its start on the cell.",
  "moves": "How often it moved to another cell, because its own was lost or is being removed.",
  "under way": "Requests in this router, of the most it takes: they wait, run, or their answer is being written.",
};
const KINDS = {
  deploy: "deployed", cell: "cell came or left", lost: "cell lost", mend: "cell mends", moved: "request moved",
  failed: "request failed", late: "request not done in time", refused: "call refused", key: "call refused for its key",
};
const NONE = "–";
const SPACE = "\u00a0"; // between a number and its unit no line ends

function number(value) {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  const digits = size >= 100 || Number.isInteger(value) ? 0 : size >= 10 ? 1 : 2;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (value >= 1000 && place < units.length - 1) { value /= 1000; place += 1; }
  return `${number(place ? value : Math.round(value))}${SPACE}${units[place]}`;
}

function percent(share) { return share === null || share === undefined ? NONE : `${Math.round(100 * share)}${SPACE}%`; }

function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value < 1) return `${Math.round(1000 * value)}${SPACE}ms`;
  if (value < 10) return `${value.toFixed(1)}${SPACE}s`;
  if (value < 100) return `${Math.round(value)}${SPACE}s`;
  if (value < 3600) return `${Math.floor(value / 60)}${SPACE}min ${Math.round(value % 60)}${SPACE}s`;
  if (value < 172800) return `${Math.floor(value / 3600)}${SPACE}h ${Math.round((value % 3600) / 60)}${SPACE}min`;
  return `${Math.floor(value / 86400)}${SPACE}days`;
}

function clock(t, withSeconds = true) {
  return new Date(1000 * t).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: withSeconds ? "2-digit" : undefined, hour12: false });
}

function count(amount, one, many = `${one}s`) { return `${number(amount)} ${amount === 1 ? one : many}`; }
