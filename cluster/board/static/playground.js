// The playground: one prompt, decoded before one's eyes. It asks this service as any client does; what it shows is its own requests only.
const LANES = { diffusion: ["diffusion"], verified: ["verified"], ar: ["ar"], race: ["ar", "diffusion", "verified"] };
const MODE_MEANINGS = {
  diffusion: "the denoiser fills a block in several steps",
  verified: "the denoiser drafts, the context tower keeps ar's tokens",
  ar: "the context tower alone, one token a pass",
  race: "all three on one prompt: asked one after the other, shown side by side",
};
const PLAYED_MS = [2500, 9000]; // a replay takes between so long, whatever the answer took
const A_FRAME_MS = 120;
const EXAMPLE = "json: age=26 city=delhi pet=owl name=bob\n"; // what the demo checkpoint has learned
const play = { modes: [], replay: new Replay(), cursor: 0, asking: null, playing: null, call: "curl", drawing: false, ends: [], scores: [] };

function chosenMode() { return document.querySelector("input[name=mode]:checked").value; }

function asked() {
  return { prompt: byId("prompt").value, gamma: Number(byId("gamma").value), most: Number(byId("most").value) };
}

function showForm() {
  const mode = chosenMode();
  say(byId("gamma-text"), Number(byId("gamma").value).toFixed(2));
  byId("gamma").disabled = !LANES[mode].includes("diffusion");
  say(byId("mode-text"), MODE_MEANINGS[mode]);
  const base = new URL(".", location.href).href.replace(/\/$/, "");
  const number_ = byId("most").checkValidity();
  say(byId("call"), number_ ? LANES[mode].map((one) => CALLS[play.call](one, asked(), base)).join("\n\n") : "");
}

// What is served now may be asked for.
function showServed(told) {
  const served = new Set(told.cells.flatMap((cell) => cell.modes));
  for (const [mode, lanes] of Object.entries(LANES)) {
    const lacks = lanes.filter((lane) => !served.has(lane));
    byId(`mode-${mode}`).disabled = served.size > 0 && lacks.length > 0;
    set(document.querySelector(`label[for=mode-${mode}]`), { title: lacks.length && served.size ? `not served now: ${lacks.join(", ")}` : MODE_MEANINGS[mode] });
  }
  const prompt = byId("prompt");
  if (!prompt.touched && !prompt.value && told.routers[0].deployed.model === "demo") { prompt.value = EXAMPLE; showForm(); }
}

async function ask() {
  stopAsking();
  stopPlaying();
  const asking = play.asking = new AbortController();
  const given = asked();
  Object.assign(play, { modes: LANES[chosenMode()], replay: new Replay(), cursor: 0, ends: [], scores: [] });
  byId("lanes").kept?.forEach((node) => node.remove());
  byId("lanes").kept?.clear();
  showPlay();
  try {
    for (const [lane, mode] of play.modes.entries()) {
      announce(`${mode}: asked`);
      await readCompletion(bodyOf(mode, given), asking.signal, (told, at) => {
        play.replay.add(lane, told, at);
        play.cursor = play.replay.frames.length;
        drawSoon();
      });
    }
    const answers = play.replay.after(play.replay.frames.length);
    for (const [lane, answer] of answers.entries()) {
      if (answer.tokens.length) play.scores[lane] = await readScore(given.prompt, answer.tokens, asking.signal).catch((error) => {
        if (asking.signal.aborted) throw error;
        return { failed: error.message }; // the answer is whole all the same
      });
    }
    play.ends = answers.map((answer) => answer.committed);
    if (play.modes.length > 1) { play.replay.alignStarts(); play.cursor = play.replay.frames.length; }
    play.asking = null;
    draw();
    announce(play.modes.map((mode, lane) => `${mode} ${speedOf(play.replay.answers[lane])}`).join(", "));
    if (play.modes.length > 1 && !matchMedia("(prefers-reduced-motion: reduce)").matches) startPlaying();
  } catch (error) {
    if (play.asking !== asking) return; // another has been asked, or this one was stopped
    play.asking = null;
    announce(`✕ ${error.message}`);
  }
  showPlay();
}

function stopAsking() {
  play.asking?.abort();
  if (play.asking) announce("stopped");
  play.asking = null;
}

function announce(text) {
  say(byId("play-status"), text);
  byId("play-status").classList.toggle("bad", text.startsWith("✕"));
}

function drawSoon() {
  if (play.drawing) return;
  play.drawing = true;
  requestAnimationFrame(() => { play.drawing = false; draw(); });
}

function draw() {
  const answers = play.replay.after(play.cursor);
  const lanes = play.modes.map((mode, lane) => ({ mode, answer: answers[lane] ?? emptyAnswer(), end: play.ends[lane] ?? Number(byId("most").value), score: play.scores[lane] }));
  keep(byId("lanes"), lanes, (lane) => lane.mode, makeLane, updateLane);
  showPlay();
}

function makeLane({ mode }) {
  const id = `lane-${mode}`;
  const node = element("article", { class: `lane ${mode}`, "aria-labelledby": id });
  node.parts = { speed: element("b"), facts: element("p", { class: "quiet facts" }), bar: element("i"), tokens: element("div", { class: "tokens", "aria-hidden": "true" }), text: element("p", { class: "hidden" }) };
  node.append(
    element("header", {}, element("h3", { id }, mode), node.parts.speed),
    element("span", { class: "track" }, node.parts.bar), node.parts.facts, node.parts.tokens, node.parts.text,
  );
  return node;
}

function updateLane(node, { answer, end, score }) {
  const { speed, facts, bar, tokens, text } = node.parts;
  say(speed, answer.at && answer.committed ? speedOf(answer) : "");
  say(facts, answer.at ? factsOf(answer, score) : "waits");
  bar.style.width = `${Math.min(100, (100 * answer.committed) / Math.max(1, end))}%`;
  keep(tokens, chipsOf(answer, score), (chip) => chip.key, () => element("span"), updateChip);
  say(text, answer.text);
}

function factsOf(answer, score) {
  const steps = answer.usage?.num_steps ?? answer.steps;
  const facts = [`${count(answer.committed, "token")} in ${seconds(answer.at / 1000)}`];
  if (steps) facts.push(count(steps, "step"));
  if (steps && answer.committed) facts.push(`${number(answer.committed / steps)} tokens a step`);
  if (answer.drafted) facts.push(`${answer.accepted} of ${answer.drafted} drafted tokens stand`);
  if (answer.reason) facts.push(answer.reason === "stop" ? "it ended by itself" : "max tokens");
  if (score?.failed) facts.push(`no probabilities: ${score.failed}`);
  else if (score && answer.reason) facts.push(`${score.is_greedy.filter(Boolean).length} of ${score.is_greedy.length} are what ar would choose`);
  return facts.join(" · ");
}

function speedOf(answer) { return `${number((1000 * answer.committed) / Math.max(1, answer.at))} tokens/s`; }

function chipsOf(answer, score) {
  const chips = [];
  const end = Math.max(-1, ...answer.places.keys());
  for (let index = 0; index <= end; index += 1) {
    (answer.rejected.get(index) ?? []).forEach((place, n) => chips.push({ ...place, key: `rejected ${index} ${n}`, index: index + n }));
    const place = answer.places.get(index);
    const scored = score && !score.failed && place?.token === score.token_ids[index] && !(place.tokens > 1);
    const likely = scored ? { probability: Math.exp(score.log_probs[index]), chosen: score.is_greedy[index] } : {};
    if (place) chips.push({ ...place, ...likely, key: `${index}`, index, now: answer.fixed.has(index) });
  }
  return chips;
}

function shownText(chip) {
  if (chip.kind === "masked") return "·";
  if (!chip.text) return chip.tokens > 1 ? "…" : `⟨${chip.token}⟩`;
  return chip.text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

const KIND_WORDS = { masked: "not fixed yet", fixed: "fixed", accepted: "drafted, and stands", written: "written by the context tower", rejected: "drafted, and rejected", behind: "behind the answer's end" };

function updateChip(node, chip) {
  set(node, { class: ["chip", chip.kind, chip.begins && "begins", chip.chosen === false && "unchosen", chip.now && "now"].filter(Boolean).join(" ") });
  const sure = `${Math.round(100 * (chip.confidence ?? 1) ** 2)}%`; // squared: most are near 1, and differ there
  if (node.sure !== sure) { node.sure = sure; node.style.setProperty("--sure", sure); }
  say(node, shownText(chip));
  const told = [`position ${chip.index}: ${KIND_WORDS[chip.kind]}`];
  if (chip.confidence !== undefined) told.push(`confidence ${chip.confidence.toFixed(3)}, step ${chip.step} of its block`);
  if (chip.probability !== undefined) told.push(`probability under ar ${chip.probability.toFixed(3)}${chip.chosen ? "" : ", which would choose another"}`);
  if (chip.token !== undefined) told.push(chip.tokens > 1 ? `${chip.tokens} tokens` : `token ${chip.token}`);
  set(node, { title: told.join("; ") });
}

// What the frame that is shown last did, in words.
function frameWords() {
  const frame = play.replay.frames[play.cursor - 1];
  if (!frame) return "the beginning";
  const who = play.modes.length > 1 ? `${play.modes[frame.lane]}, ` : "";
  const at = seconds(frame.at / 1000);
  const { step, round, usage, choices } = frame.told;
  const shown = (texts, ids) => (texts.length ? texts.map((text) => JSON.stringify(text)) : ids).join(" ");
  if (step) return `${who}${at}: step ${step.step} of the block at ${step.start} fixes ${count(step.positions.length, "position")}: ${shown(step.texts, step.token_ids)}`;
  if (round) return `${who}${at}: ${round.num_accepted} of ${round.draft.length} drafted stand, then ${JSON.stringify(round.text)}`;
  if (usage) return `${who}${at}: done`;
  return `${who}${at}: ${count(choices[0].token_ids.length, "token")} committed`;
}

function showPlay() {
  const frames = play.replay.frames.length;
  byId("player").hidden = !play.modes.length;
  byId("stop").disabled = !play.asking;
  const slider = byId("frame");
  set(slider, { max: frames });
  slider.value = play.cursor;
  const words = frameWords();
  set(slider, { "aria-valuetext": `${play.cursor} of ${frames}: ${words}` });
  say(byId("frame-text"), `${play.cursor} of ${frames} · ${words}`);
  say(byId("play"), play.playing ? "Pause" : "Play");
  byId("first").disabled = byId("back").disabled = play.cursor === 0;
  byId("forth").disabled = byId("last").disabled = play.cursor === frames;
}

function moveFrame(cursor) {
  play.cursor = Math.max(0, Math.min(play.replay.frames.length, cursor));
  draw();
}

// In the proportions of what happened, slow or fast enough to be seen.
function startPlaying() {
  const { frames } = play.replay;
  const took = Math.max(1, frames.at(-1)?.at ?? 1);
  const slowed = Math.max(PLAYED_MS[0], Math.min(PLAYED_MS[1], A_FRAME_MS * frames.length)) / took;
  if (play.cursor >= frames.length) play.cursor = 0;
  const from = performance.now() - slowed * (frames[play.cursor - 1]?.at ?? 0);
  const tick = () => {
    const now = (performance.now() - from) / slowed;
    let cursor = play.cursor;
    while (cursor < frames.length && frames[cursor].at <= now) cursor += 1;
    if (cursor >= frames.length) play.playing = null;
    else play.playing = requestAnimationFrame(tick);
    if (cursor !== play.cursor || !play.playing) moveFrame(cursor);
  };
  play.playing = requestAnimationFrame(tick);
  say(byId("tempo"), `${slowed > 1 ? `slowed ${number(Math.round(slowed))} times` : `${number(Math.round(1 / slowed))} times as fast`}`);
  draw();
}

function stopPlaying() {
  if (play.playing) cancelAnimationFrame(play.playing);
  play.playing = null;
}

async function copyCall() {
  const button = byId("copy");
  try {
    await navigator.clipboard.writeText(byId("call").textContent);
    say(button, "Copied");
  } catch { // a page that is not from this machine and not over TLS may not
    getSelection().selectAllChildren(byId("call"));
    say(button, "Selected: Ctrl+C");
  }
  setTimeout(() => say(button, "Copy"), 2000);
}

function choice(parent, name, values, checked, change) {
  values.forEach((value) => {
    const input = element("input", { type: "radio", name, id: `${name}-${value}`, value, checked: value === checked ? "" : null });
    input.addEventListener("change", () => change(value));
    parent.append(input, element("label", { for: `${name}-${value}` }, value));
  });
}

function showView() {
  const isPlayground = location.hash === "#playground";
  byId("service-view").hidden = isPlayground;
  byId("playground-view").hidden = !isPlayground;
  byId("numbers").hidden = isPlayground;
  set(byId("to-service"), { "aria-current": isPlayground ? null : "page" });
  set(byId("to-playground"), { "aria-current": isPlayground ? "page" : null });
  set(document.querySelector(".skip"), { href: isPlayground ? "#playground" : "#status" });
  say(document.querySelector(".skip"), isPlayground ? "To the playground" : "To the state of the service");
  if (!isPlayground) show();
}

function beginPlayground() {
  choice(byId("modes"), "mode", Object.keys(LANES), "diffusion", showForm);
  choice(byId("calls"), "call", Object.keys(CALLS), play.call, (value) => { play.call = value; showForm(); });
  const form = byId("ask");
  form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  form.addEventListener("input", showForm);
  byId("prompt").addEventListener("input", () => { byId("prompt").touched = true; });
  byId("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); } });
  byId("stop").addEventListener("click", () => { stopAsking(); showPlay(); });
  byId("copy").addEventListener("click", copyCall);
  const moves = { first: () => 0, back: () => play.cursor - 1, forth: () => play.cursor + 1, last: () => play.replay.frames.length };
  for (const [id, to] of Object.entries(moves)) byId(id).addEventListener("click", () => { stopPlaying(); moveFrame(to()); });
  byId("frame").addEventListener("input", () => { stopPlaying(); moveFrame(Number(byId("frame").value)); });
  byId("play").addEventListener("click", () => { if (play.playing) { stopPlaying(); draw(); } else startPlaying(); });
  addEventListener("hashchange", showView);
  showView();
  showForm();
}
