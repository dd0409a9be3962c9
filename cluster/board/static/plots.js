// Series over time on one axis, with the events on it. Knows rows and columns; does not know where they come from.
const HEIGHT = 116, LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 18;
const PLOTS = [
  { title: "Tokens", unit: "tokens/s", meaning: MEANINGS["tokens/s"], lines: [["tokens", "answers", "denoiser"]] },
  { title: "Tokens per step", unit: "tokens", meaning: MEANINGS["tokens per step"], lines: [["tokens_per_step", "diffusion", "denoiser"]] },
  { title: "Time to first token", unit: "", format: seconds, meaning: MEANINGS["first token"], lines: [["first_token_p95", "95 % within", "commit"], ["first_token_p50", "half within", "second"]] },
  { title: "Requests", unit: "requests", meaning: `${MEANINGS.running} ${MEANINGS.waiting}`, lines: [["running", "running", "second"], ["waiting", "waiting", "commit"]], whole: true },
  { title: "Towers busy", unit: "", format: percent, most: 1, meaning: `${MEANINGS.busy} Mean over towers.`, lines: [["busy_context", "context", "context"], ["busy_denoiser", "denoiser", "denoiser"]] },
  { title: "Exchange", unit: "", axis: bytes, format: (value) => (value === null || value === undefined ? NONE : `${bytes(value)}/s`), meaning: MEANINGS.exchange, lines: [["exchange", "deltas received", "context"]] },
  { title: "Exposed time", unit: "", format: percent, most: 1, meaning: MEANINGS.exposed, lines: [["exposed", "of denoisers' time", "commit"]] },
  { title: "Failed, refused, resumed", unit: "/s", meaning: MEANINGS.failed, lines: [["failed", "failed", "kind-failed"], ["refused", "refused", "commit"], ["resumed", "resumed", "second"]] },
];

function makePlots(parent) {
  for (const plot of PLOTS) {
    plot.keys = plot.lines.map(([, name, tone]) => { const value = element("span"); return { value, node: element("span", { class: `key ${tone}` }, `${name} `, value) }; });
    plot.svg = drawn("svg", { class: "plot", role: "img" });
    plot.figure = element("figure", {}, element("figcaption", { title: plot.meaning }, element("b", {}, plot.title), ...plot.keys.map((key) => key.node)), plot.svg);
    plot.svg.addEventListener("pointermove", (event) => pointAt(plot.svg, event.clientX));
    plot.svg.addEventListener("pointerleave", () => moveTo(null));
    parent.append(plot.figure);
  }
}

function niceMost(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((most) => most >= value);
}

// `view`: { rows, place (of each column), from, until, step, events, cursor }
function drawPlot(plot, view) {
  const width = plot.svg.clientWidth || 330;
  const format = plot.format ?? ((value) => `${number(value)}${value === null || !plot.unit ? "" : ` ${plot.unit}`}`);
  const columns = plot.lines.map(([column]) => view.place[column]);
  const values = view.rows.flatMap((row) => columns.map((column) => row[column])).filter((value) => value !== null);
  let most = plot.most ?? niceMost(Math.max(0, ...values));
  if (plot.whole) most = Math.max(most, 2);
  const x = (t) => LEFT + ((t - view.from) / (view.until - view.from)) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value / most) * (HEIGHT - TOP - BOTTOM);
  const nodes = [...axes(width, most, x, y, view, plot)];
  for (const event of view.events) nodes.push(markLine(event, x(event.t)));
  plot.lines.forEach(([, , tone], place) => nodes.push(...lineOf(view, columns[place], x, y, tone, place === 0)));
  if (view.cursor) nodes.push(drawn("line", { class: "cursor", x1: x(view.cursor[0]), x2: x(view.cursor[0]), y1: TOP, y2: HEIGHT - BOTTOM }));
  set(plot.svg, { viewBox: `0 0 ${width} ${HEIGHT}` });
  plot.svg.replaceChildren(...nodes);
  const shown = view.cursor ?? view.rows.at(-1);
  plot.keys.forEach((key, place) => say(key.value, shown ? format(shown[columns[place]]) : NONE));
  set(plot.svg, { "aria-label": summary(plot, view, columns, format) });
}

function axes(width, most, x, y, view, plot) {
  const short = plot.axis ?? plot.format ?? number;
  const nodes = [0, most / 2, most].flatMap((value) => {
    const label = drawn("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" });
    label.textContent = short === seconds && value === 0 ? "0" : short(value);
    return [drawn("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }), label];
  });
  const ticks = Math.max(2, Math.min(5, Math.floor(width / 95)));
  for (let tick = 0; tick < ticks; tick += 1) {
    const t = view.from + ((view.until - view.from) * tick) / (ticks - 1);
    const label = drawn("text", { x: x(t), y: HEIGHT - 4, "text-anchor": tick === 0 ? "start" : tick === ticks - 1 ? "end" : "middle" });
    label.textContent = clock(t, false);
    nodes.push(label);
  }
  return nodes;
}

function lineOf(view, column, x, y, tone, filled) {
  let path = "", area = "", before = null, start = 0;
  const close = () => { if (before !== null) area += `L${x(before).toFixed(1)} ${y(0)}L${start.toFixed(1)} ${y(0)}Z`; };
  for (const row of view.rows) {
    if (row[column] === null) continue;
    const isGap = before === null || row[0] - before > 3 * view.step;
    const point = `${x(row[0]).toFixed(1)} ${y(row[column]).toFixed(1)}`;
    if (isGap) { close(); start = x(row[0]); path += `M${point}`; area += `M${start.toFixed(1)} ${y(0)}L${point}`; }
    else { path += `L${point}`; area += `L${point}`; }
    before = row[0];
  }
  close();
  const line = drawn("path", { class: `line ${tone}`, d: path || "M0 0" });
  return filled ? [drawn("path", { class: `area ${tone}`, d: area || "M0 0" }), line] : [line];
}

function markLine(event, at) {
  const line = drawn("line", { class: `event kind-${event.kind}`, x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM });
  const title = drawn("title");
  title.textContent = eventText(event);
  line.append(title);
  return line;
}

function eventText(event) { return `${clock(event.t)} ${KINDS[event.kind] ?? event.kind}: ${event.count > 1 ? `${event.count} × ` : ""}${event.text}`; }

function summary(plot, view, columns, format) {
  const parts = plot.lines.map(([, name], place) => {
    const values = view.rows.map((row) => row[columns[place]]).filter((value) => value !== null);
    if (!values.length) return `${name}: nothing yet`;
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    return `${name}: last ${format(values.at(-1))}, mean ${format(mean)}, most ${format(Math.max(...values))}`;
  });
  return `${plot.title}, ${clock(view.from, false)} to ${clock(view.until, false)}. ${parts.join("; ")}`;
}

// The events alone, above all plots: as wide as each of them is not, so they have an axis of their own.
function drawLane(parent, view) {
  const svg = parent.svg ?? (parent.svg = parent.appendChild(drawn("svg", { class: "plot", role: "img" })));
  const width = svg.clientWidth || 700;
  const x = (t) => 6 + ((t - view.from) / (view.until - view.from)) * (width - 12);
  const shapes = { deploy: "M0-7L7 5H-7Z", cell: "M-5-5H5V5H-5Z", lost: "M-6-6L6 6M6-6L-6 6", mend: "M0-6L6 0L0 6L-6 0Z", moved: "M-6-5L5 0L-6 5Z", failed: "M-2-7H2L1 1H-1ZM-2 3H2V7H-2Z", late: "M-6-2H6V2H-6Z", refused: "M-6-2H6V2H-6Z", key: "M-6-1H6V1H-6Z" };
  const axis = drawn("line", { class: "grid", x1: 6, x2: width - 6, y1: 17, y2: 17 });
  const marks = view.events.map((event) => {
    const mark = drawn("path", { class: `mark kind-${event.kind}`, d: shapes[event.kind] ?? shapes.cell, transform: `translate(${x(event.t).toFixed(1)} 17)` });
    const title = drawn("title");
    title.textContent = eventText(event);
    mark.append(title);
    return mark;
  });
  if (view.cursor) marks.push(drawn("line", { class: "cursor", x1: x(view.cursor[0]), x2: x(view.cursor[0]), y1: 2, y2: 32 }));
  set(svg, { viewBox: `0 0 ${width} 34`, "aria-label": `${count(view.events.length, "event")} from ${clock(view.from, false)} to ${clock(view.until, false)}; the table below lists them` });
  svg.replaceChildren(axis, ...marks);
}
