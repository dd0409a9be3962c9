// What another γ would cost: the checkpoint's own curve of quality and throughput, read once for each deployment.
const TRADE = { height: 300, left: 64, right: 70, top: 18, bottom: 44 };
const TRADE_X = [
  ["throughput", "times_ar", "throughput, as a multiple of ar's", (value) => `${+value.toFixed(2)} ×`],
  ["tokens per step", "tokens_per_step", "tokens per denoiser step", (value) => String(+value.toFixed(2))],
];
const TRADE_COLUMNS = [
  ["decoded with", "γ: diffusion with this confidence threshold. ar: the context tower alone. verified: ar's own answers, from the denoiser's drafts."],
  ["quality", "Share of ar's quality that is kept: exactly right answers if the right ones are known, else answers equal to ar's.", true],
  ["95 % interval", "The 95 % confidence interval of the quality over all such prompts.", true],
  ["tokens per step", "Tokens of answers divided by the denoiser's steps for them. It does not depend on the hardware. In verified the context tower's reads of drafts come on top.", true],
  ["throughput", "Tokens per second as a multiple of ar's in the same measurement. It depends on hardware and load.", true],
  ["quality, against now", "Change against the way that is served by default, in points of ar's quality.", true],
  ["throughput, against now", "Change against the throughput of the way that is served by default.", true],
];
const trade = { told: null, of: "", x: 0, chosen: 0, pointed: null, live: "" };

// Called with each snapshot: reads the record where the deployment is another one.
function showTrade(told) {
  const deployed = told.routers.find((router) => router.name === told.by)?.deployed ?? told.routers[0].deployed;
  const of = `${deployed.fingerprint} ${deployed.settings}`;
  if (of !== trade.of) { trade.of = of; readTrade(); }
  showLive();
}

async function readTrade() {
  try {
    const answer = await fetch(ours("ops/trade"));
    if (!answer.ok) throw new Error(`${answer.status}`);
    trade.told = withVerified(await answer.json());
  } catch {
    trade.of = ""; // the next snapshot tries again
    return;
  }
  makeTrade();
}

// `verified` as one more of the record's ways; older records have none.
function withVerified(told) {
  if (told.record?.verified) told.record.ways.push({ ...told.record.verified, mode: "verified" });
  return told;
}

function modeOf(way) { return way.mode ?? (way.threshold === null ? "ar" : "diffusion"); }
function wayName(way) { return way.threshold === null ? modeOf(way) : `γ ${way.threshold}`; }
function shareText(value) { return `${(100 * value).toFixed(1)}${SPACE}%`; }
function intervalText(way) { return `${(100 * way.low).toFixed(1)}–${shareText(way.high)}`; }
function signedText(value, digits, unit) { return `${value < 0 ? "−" : value > 0 ? "+" : "±"}${Math.abs(value).toFixed(digits)}${unit}`; }

// The measured way that is served to a request that says nothing; undefined where that was not measured.
function servedWay() {
  const { mode, threshold, record } = trade.told;
  return record.ways.find((way) => modeOf(way) === mode && (mode !== "diffusion" || way.threshold === threshold));
}

function servedName() { return trade.told.mode === "diffusion" ? `γ ${trade.told.threshold}` : trade.told.mode; }

function makeTrade() {
  const parent = byId("trade"), { record } = trade.told;
  const title = element("h2", { id: "trade-title" }, "Quality and throughput");
  if (!record) {
    parent.replaceChildren(element("div", { class: "bar" }, title), withoutRecord());
    return;
  }
  trade.chosen = Math.max(0, record.ways.indexOf(servedWay()));
  trade.pointed = null;
  parent.replaceChildren(element("div", { class: "bar" }, title, tradeAxisChoice()), element("p", { class: "quiet" }, aboutRecord(record)), element("div", { class: "trade" }, tradeChart(), anotherWay(record)));
  drawTrade();
}

function withoutRecord() {
  const again = element("button", { type: "button" }, "Look again");
  again.addEventListener("click", readTrade);
  return element("div", { class: "none" },
    element("p", {}, `Nothing is known of what γ costs here: ${trade.told.why}. Served by default: ${servedName()}.`),
    element("p", {}, "To measure it with your own prompts, while this service runs (CHECKPOINT: the directory of ", element("code", {}, "model.checkpoint"), " where the routers run):"),
    element("pre", { tabindex: "0" }, element("code", {}, "python -m cluster tune --input prompts.jsonl --output CHECKPOINT/tuned")), again);
}

function tradeAxisChoice() {
  const choice = element("fieldset", { class: "choice" }, element("legend", { class: "hidden" }, "Horizontal axis"));
  TRADE_X.forEach(([name], place) => {
    const input = element("input", { type: "radio", name: "trade-x", id: `trade-x-${place}`, checked: place === trade.x ? "" : null });
    input.addEventListener("change", () => { trade.x = place; drawTrade(); });
    choice.append(input, element("label", { for: `trade-x-${place}` }, name));
  });
  return choice;
}

function aboutRecord(record) {
  const what = record.quality === "answers" ? "Quality: exactly right answers, as a share of ar's" : "Quality: answers that are ar's, token for token";
  const where = [record.hardware, record.measured].filter(Boolean).join(", ");
  return `${what}, of ${count(record.prompts, "prompt")}; throughput with ${record.concurrency === 1 ? "one at a time" : `${record.concurrency} at once`}${where ? ` (${where})` : ""}.`;
}

function tradeChart() {
  const svg = drawn("svg", { class: "plot", role: "img" });
  svg.addEventListener("pointermove", (event) => pointTrade(nearestWay(svg, event)));
  svg.addEventListener("pointerleave", () => pointTrade(null));
  svg.addEventListener("click", (event) => chooseWay(nearestWay(svg, event)));
  trade.svg = svg;
  trade.live = element("p", { class: "quiet", title: "What clients ask for now may have another γ, and other prompts, than the record." });
  const caption = element("figcaption", { title: "Bars: 95 % intervals. The line joins neighbouring γ; between them nothing was measured." },
    element("b", {}, "What each γ keeps and gains "), element("span", { class: "key denoiser" }, "diffusion"), " ", element("span", { class: "key context" }, trade.told.record.verified ? "ar (square), verified (diamond)" : "ar"));
  return element("figure", {}, caption, svg, trade.live);
}

function anotherWay(record) {
  const slider = element("input", { type: "range", id: "trade-way", min: 0, max: record.ways.length - 1, step: 1, value: trade.chosen });
  slider.addEventListener("input", () => chooseWay(Number(slider.value)));
  const said = element("div", { id: "trade-said", role: "status", "aria-live": "polite" });
  Object.assign(trade, { slider, said });
  return element("div", { class: "else" },
    element("p", { class: "moment" }, element("label", { for: "trade-way" }, "Another γ"), slider, (trade.sliderName = element("output", { for: "trade-way" }))),
    said, element("div", { class: "scroll", role: "group", "aria-labelledby": "trade-title", tabindex: "0" }, wayTable(record)));
}

function wayTable(record) {
  const heads = TRADE_COLUMNS.map(([name, meaning, isNumber]) => element("th", { scope: "col", title: meaning, class: isNumber ? "number" : null }, name));
  trade.rows = record.ways.map((way, place) => {
    const row = element("tr", {}, element("th", { scope: "row" }, wayName(way)), ...wayCells(way).map((text) => element("td", { class: "number" }, text)));
    if (way === servedWay()) row.firstChild.append(element("small", {}, " now"));
    if (way.threshold !== null && way.threshold === record.recommendation) row.firstChild.append(element("small", { title: `Of the γ that keep ${shareText(record.quality_floor)} of ar's quality it has the most tokens per step.` }, " advised"));
    if (way.recommended) row.firstChild.append(element("small", { title: "All answers were ar's own, token for token, and at least as fast as with the γ that was advised." }, " advised"));
    row.addEventListener("pointerenter", () => pointTrade(place));
    row.addEventListener("pointerleave", () => pointTrade(null));
    row.addEventListener("click", () => chooseWay(place));
    return row;
  });
  return element("table", {}, element("caption", { class: "hidden" }, "What each γ keeps, gains and would change"), element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...trade.rows));
}

function wayCells(way) {
  const now = servedWay();
  const against = !now ? [NONE, NONE] : way === now ? ["", ""] : [signedText(100 * (way.quality - now.quality), 1, ""), signedText(100 * (way.times_ar / now.times_ar - 1), 0, `${SPACE}%`)];
  return [shareText(way.quality), intervalText(way), number(way.tokens_per_step), `${number(way.times_ar)}${SPACE}×`, ...against];
}

function chooseWay(place) {
  if (place === null) return;
  trade.chosen = place;
  trade.slider.value = place;
  drawTrade();
}

function pointTrade(place) {
  if (place === trade.pointed) return;
  trade.pointed = place;
  drawTrade();
}

// In words, what the way that is pointed at would change.
function sayTrade(way) {
  const now = servedWay(), { record } = trade.told;
  const parts = [];
  if (way === now) parts.push(`${wayName(way)} is what a request gets now that says nothing: ${shareText(way.quality)} of ar's quality (${intervalText(way)}), ${number(way.tokens_per_step)} tokens per step, ${number(way.times_ar)} times ar's throughput.`);
  else if (now) parts.push(`${wayName(way)} instead of ${wayName(now)}: ${changesOf(way, now)}`);
  else parts.push(`${wayName(way)}: ${shareText(way.quality)} of ar's quality, ${number(way.tokens_per_step)} tokens per step, ${number(way.times_ar)} times ar's throughput. What is served by default, ${servedName()}, was not measured.`);
  if (way.quality < record.quality_floor) parts.push(` That is below the ${shareText(record.quality_floor)} that the measurement was to keep.`);
  if (way.mode === "verified" && !way.same_as_ar) parts.push(" Not all of its answers were ar's, as they should be but for near-ties.");
  const setting = way.threshold === null ? `decode.mode=${modeOf(way)}` : `${now && now.threshold === null ? "decode.mode=diffusion decode." : "decode."}confidence_threshold=${way.threshold}`;
  trade.said.replaceChildren(element("p", {}, ...parts));
  if (way !== now) trade.said.append(element("p", { class: "quiet" }, "For all: ", element("code", {}, setting), "; one request may say so itself."));
}

function changesOf(way, now) {
  const points = 100 * (way.quality - now.quality), isChance = way.low <= now.high && now.low <= way.high;
  const quality = Math.abs(points) < 0.05 ? "the same quality" : `${Math.abs(points).toFixed(1)} points ${points < 0 ? "less" : "more"} of ar's quality${isChance ? " (the intervals overlap: it may be chance)" : ""}`;
  const speed = 100 * (way.times_ar / now.times_ar - 1);
  const times = Math.abs(speed) < 0.5 ? "the same throughput" : `${Math.abs(speed).toFixed(0)} % ${speed < 0 ? "less" : "more"} throughput`;
  return `${quality}, ${times}, ${number(way.tokens_per_step)} tokens per step instead of ${number(now.tokens_per_step)}.`;
}

// Ticks of about so many steps, at round values, that cover all of it.
function roundTicks(low, high, about) {
  const raw = (high - low) / about, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((one) => one * power).find((one) => one >= raw);
  const ticks = [];
  for (let place = Math.floor(low / step); place <= Math.ceil(high / step - 1e-9); place += 1) ticks.push(place * step);
  return ticks;
}

function tradeView() {
  const { ways, quality_floor: floor } = trade.told.record, width = trade.svg.clientWidth || 420;
  const [, column] = TRADE_X[trade.x];
  const across = roundTicks(0, Math.max(...ways.map((way) => way[column])), Math.max(3, Math.min(6, width / 90)));
  const up = roundTicks(100 * Math.min(floor, ...ways.map((way) => way.low)), 100 * Math.max(1, ...ways.map((way) => way.high)), 5);
  const x = (value) => TRADE.left + (value / across.at(-1)) * (width - TRADE.left - TRADE.right);
  const y = (value) => TRADE.height - TRADE.bottom - ((100 * value - up[0]) / (up.at(-1) - up[0])) * (TRADE.height - TRADE.top - TRADE.bottom);
  return { width, across, up, x, y, column };
}

function nearestWay(svg, event) {
  const box = svg.getBoundingClientRect(), view = tradeView();
  const far = trade.told.record.ways.map((way) => Math.hypot(view.x(way[view.column]) - (event.clientX - box.left), view.y(way.quality) - (event.clientY - box.top)));
  const best = far.indexOf(Math.min(...far));
  return far[best] < 70 ? best : null;
}

function drawTrade() {
  const { record } = trade.told, view = tradeView(), shown = trade.pointed ?? trade.chosen;
  const swept = record.ways.filter((way) => modeOf(way) === "diffusion").sort((a, b) => a.threshold - b.threshold);
  const line = swept.map((way, place) => `${place ? "L" : "M"}${view.x(way[view.column]).toFixed(1)} ${view.y(way.quality).toFixed(1)}`).join("");
  const places = record.ways.map((_, place) => place).sort((a, b) => (a === shown) - (b === shown)); // what is shown lies on top
  trade.svg.replaceChildren(...tradeAxes(view), ...floorLine(view, record), drawn("path", { class: "line denoiser", d: line }), ...places.flatMap((place) => wayMark(view, record.ways[place], place === shown)));
  set(trade.svg, { viewBox: `0 0 ${view.width} ${TRADE.height}`, "aria-label": `Quality against ${TRADE_X[trade.x][0]}, ${count(record.ways.length, "way")} of decoding; the table beside lists them` });
  trade.rows.forEach((row, place) => set(row, { class: place === shown ? "shown" : null }));
  say(trade.sliderName, wayName(record.ways[trade.chosen]));
  sayTrade(record.ways[shown]);
  set(trade.slider, { "aria-valuetext": `${wayName(record.ways[trade.chosen])}. ${trade.said.firstChild.textContent}` });
}

function tradeText(text, attributes) {
  const made = drawn("text", attributes);
  made.textContent = text;
  return made;
}

function tradeAxes(view) {
  const foot = TRADE.height - TRADE.bottom, end = view.width - TRADE.right, [, , name, format] = TRADE_X[trade.x];
  return [
    ...view.up.flatMap((value) => [drawn("line", { class: "grid", x1: TRADE.left, x2: end, y1: view.y(value / 100), y2: view.y(value / 100) }), tradeText(`${+value.toFixed(2)} %`, { x: TRADE.left - 7, y: view.y(value / 100) + 4, "text-anchor": "end" })]),
    ...view.across.flatMap((value) => [drawn("line", { class: "grid", x1: view.x(value), x2: view.x(value), y1: TRADE.top, y2: foot }), tradeText(value ? format(value) : "0", { x: view.x(value), y: foot + 16, "text-anchor": "middle" })]),
    tradeText(name, { class: "axis", x: (TRADE.left + end) / 2, y: TRADE.height - 6, "text-anchor": "middle" }),
    tradeText("quality, % of ar's", { class: "axis", transform: `translate(13 ${(TRADE.top + foot) / 2}) rotate(-90)`, "text-anchor": "middle" }),
  ];
}

function floorLine(view, record) {
  const y = view.y(record.quality_floor);
  return [drawn("line", { class: "floor", x1: TRADE.left, x2: view.width - TRADE.right, y1: y, y2: y }), tradeText(`to keep: ${shareText(record.quality_floor)}`, { x: TRADE.left + 5, y: y - 5 })];
}

function wayMark(view, way, isShown) {
  const x = view.x(way[view.column]), y = view.y(way.quality), isCausal = way.threshold === null, isNow = way === servedWay();
  const tone = isCausal ? "context" : "denoiser", size = isShown ? 7 : 5;
  const turned = way.mode === "verified" ? `rotate(45 ${x} ${y})` : null; // a diamond
  const dot = isCausal ? drawn("rect", { class: `dot ${tone}`, x: x - size, y: y - size, width: 2 * size, height: 2 * size, transform: turned }) : drawn("circle", { class: `dot ${tone}`, cx: x, cy: y, r: size });
  const ring = isNow ? [drawn("circle", { class: "ring", cx: x, cy: y, r: size + 5 })] : [];
  const label = tradeText(isNow ? `${wayName(way)}, now` : wayName(way), { class: isShown ? "shown" : null, x: x + size + (isNow ? 9 : 5), y: y - 5 });
  return [drawn("line", { class: `interval ${tone}`, x1: x, x2: x, y1: view.y(way.low), y2: view.y(way.high) }), ...ring, dot, label];
}

// What clients get now, beside what the record has of the γ that is served.
function showLive() {
  if (!trade.told?.record || !trade.live) return;
  const column = state.place.tokens_per_step;
  const values = [...state.rows.fine.values()].map((row) => row[column]).filter((value) => value !== null);
  const now = servedWay(), known = now && now.threshold !== null ? `; the record has ${number(now.tokens_per_step)} at ${wayName(now)}` : "";
  say(trade.live, values.length ? `Clients, mean of the last ten minutes: ${number(values.reduce((a, b) => a + b, 0) / values.length)} tokens per step${known}.` : "No diffusion answers in the last ten minutes.");
}

addEventListener("resize", () => trade.told?.record && drawTrade());
