// A stream of /v1/completions, and the answers that it shows as they grow: places fill, drafts stand or fall. Knows nothing of the page.

// Hands on each event's JSON and the milliseconds since it was asked. Throws what ended the answer.
async function readCompletion(body, signal, hearEvent) {
  const began = performance.now();
  const response = await fetch(ours("v1/completions"), { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error((await response.json().catch(() => null))?.error?.message ?? `the service answered ${response.status}`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let open = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the stream ended before the answer did");
    const parts = (open + value).split("\n\n");
    open = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: ")).slice(6);
      if (data === "[DONE]") return;
      const told = JSON.parse(data);
      if (told.error) throw new Error(told.error.message);
      hearEvent(told, performance.now() - began);
    }
  }
}

// How likely `ar` finds these tokens after the prompt. Throws what ended it.
async function readScore(prompt, tokens, signal) {
  const body = JSON.stringify({ prompt, continuation: tokens });
  const response = await fetch(ours("v1/score"), { method: "POST", headers: { "content-type": "application/json" }, body, signal });
  const told = await response.json();
  if (!response.ok) throw new Error(told.error?.message ?? `the service answered ${response.status}`);
  return told;
}

// `places`: by index among the new tokens. `rejected`: by the index that the first of the draft's rejected tokens had.
// `fixed`: the places of the last event.
function emptyAnswer() {
  return { places: new Map(), rejected: new Map(), fixed: new Set(), tokens: [], committed: 0, text: "", usage: null, drafted: 0, accepted: 0, steps: 0, reason: null, at: 0 };
}

// The answer after one more event.
function grow(answer, told, at) {
  answer.at = at;
  answer.fixed = new Set();
  if (told.step) growByStep(answer, told.step);
  else if (told.round) growByRound(answer, told.round);
  else if (told.usage) answer.usage = told.usage;
  else growByTokens(answer, told.choices[0]);
}

function growByStep(answer, step) {
  answer.steps += 1;
  if (step.step === 0) { // a block that is begun again leaves nothing of what was there
    for (const index of [...answer.places.keys()]) if (index >= step.start) answer.places.delete(index);
    for (let index = step.start; index < step.start + step.size; index += 1) answer.places.set(index, { kind: "masked", begins: index === step.start });
  }
  step.positions.forEach((index, n) => {
    const begins = answer.places.get(index)?.begins ?? false;
    answer.places.set(index, { kind: "fixed", begins, token: step.token_ids[n], text: step.texts[n], confidence: step.confidence[n], step: step.step });
    answer.fixed.add(index);
  });
}

function growByRound(answer, round) {
  const end = round.start + round.num_accepted;
  answer.drafted += round.draft.length;
  answer.accepted += round.num_accepted;
  const rejected = round.draft.slice(round.num_accepted).map((token, n) => ({ ...answer.places.get(end + n), kind: "rejected", token, text: round.draft_texts[round.num_accepted + n] }));
  if (rejected.length) answer.rejected.set(end, rejected);
  const begins = answer.places.get(end)?.begins ?? false;
  for (const index of [...answer.places.keys()]) {
    if (index >= end) answer.places.delete(index);
    else if (index >= round.start) { answer.places.get(index).kind = "accepted"; answer.fixed.add(index); }
  }
  answer.places.set(end, { kind: "written", begins, token: round.token_id, text: round.text });
  answer.fixed.add(end);
}

// Committed tokens. Without a trace their text is known together only: it stands at the first of them.
function growByTokens(answer, choice) {
  const start = answer.committed;
  answer.committed += choice.token_ids.length;
  answer.tokens.push(...choice.token_ids);
  answer.text += choice.text;
  answer.reason = choice.finish_reason;
  if (choice.token_ids.length && !answer.places.has(start)) {
    answer.places.set(start, { kind: "written", token: choice.token_ids[0], tokens: choice.token_ids.length, text: choice.text });
    answer.fixed.add(start);
  }
  choice.token_ids.forEach((token, n) => { // what stands is what is committed, whatever was shown
    const place = answer.places.get(start + n);
    if (place && place.token !== token) answer.places.set(start + n, { kind: "written", begins: place.begins, token });
  });
  if (!choice.finish_reason) return;
  for (const [index, place] of answer.places) {
    if (index >= answer.committed && place.kind === "masked") answer.places.delete(index);
    else if (index >= answer.committed) place.kind = "behind";
  }
}

// The answers of all lanes after the first `frames`; going on is cheap, going back begins again.
class Replay {
  constructor() { this.frames = []; this.lanes = 0; this.done = 0; this.answers = []; }

  add(lane, told, at) {
    this.lanes = Math.max(this.lanes, lane + 1);
    this.frames.push({ lane, told, at });
  }

  // As if all had begun at once.
  alignStarts() { this.frames.sort((a, b) => a.at - b.at || a.lane - b.lane); this.done = 0; this.answers = []; }

  after(frames) {
    if (frames < this.done) { this.done = 0; this.answers = []; }
    while (this.answers.length < this.lanes) this.answers.push(emptyAnswer());
    for (; this.done < frames; this.done += 1) {
      const { lane, told, at } = this.frames[this.done];
      grow(this.answers[lane], told, at);
    }
    return this.answers;
  }
}
