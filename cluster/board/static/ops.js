// The page: takes snapshots off the stream and shows them. A reader who scrolls, hovers or tabs is not disturbed.
const SPANS = [["10 min", 600, "fine"], ["1 h", 3600, "coarse"], ["3 h", 10800, "coarse"]];
const STALE_S = 4;
const SHORT_ROWS = 10;
const state = { snapshot: null, heardAt: 0, rows: { fine: new Map(), coarse: new Map() }, events: new Map(), place: {}, span: 0, cursor: null, tries: 0 };

const TILES = [
  ["tokens/s", "tokens/s", (now) => number(now.tokens), "tokens/s"],
  ["tokens per step", "tokens per step", (now) => number(now.tokens_per_step), "tokens"],
  ["first token, half", "first token", (now) => seconds(now.first_token_p50)],
  ["first token, 95 %", "first token", (now) => seconds(now.first_token_p95)],
  ["running, of all slots", "running", (now, told) => number(sum(told.cells, "running")), (told) => `of ${number(sum(told.cells, "slots"))}`],
  ["waiting", "waiting", (now, told) => number(sum(told.routers, "waiting") + sum(told.cells, "waiting")), (told) => longest(told)],
  ["failed, refused", "failed", (now, told) => `${lately(told, "failed")}, ${lately(told, "refused")}`, "last minute", (told) => lately(told, "failed") > 0],
  ["exchange", "exchange", (now) => `${bytes(now.exchange)}/s`],
  ["exposed time", "exposed", (now) => percent(now.exposed)],
];

function sum(items, name) { return items.reduce((total, item) => total + item[name], 0); }

function longest(told) {
  const most = Math.max(0, ...told.routers.map((router) => router.longest_wait_s));
  return most > 0 ? `first for ${seconds(most)}` : "requests";
}

function lately(told, kind) {
  return [...state.events.values()].filter((event) => event.kind === kind && event.t > told.at - 60).reduce((total, event) => total + event.count, 0);
}

// The last ten seconds as one, so that a number can be read before it changes; first tokens: the last that came.
function recent() {
  const rows = [...state.rows.fine.values()].filter((row) => row[0] > state.snapshot.at - 14);
  const mean = (column) => { const values = rows.map((row) => row[state.place[column]]).filter((value) => value !== null); return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null; };
  const last = (column) => [...state.rows.fine.values()].filter((row) => row[0] > state.snapshot.at - 60 && row[state.place[column]] !== null).sort((a, b) => a[0] - b[0]).at(-1)?.[state.place[column]] ?? null;
  const now = Object.fromEntries(Object.keys(state.place).map((column) => [column, mean(column)]));
  return { ...now, first_token_p50: last("first_token_p50"), first_token_p95: last("first_token_p95") };
}

function hear(snapshot) {
  state.snapshot = snapshot;
  state.heardAt = performance.now();
  state.tries = 0;
  state.place = Object.fromEntries(snapshot.columns.map((column, place) => [column, place]));
  for (const [name, most] of [["fine", 600], ["coarse", 1080]]) {
    const rows = state.rows[name];
    for (const row of snapshot[name]) rows.set(row[0], row);
    for (const t of [...rows.keys()].sort((a, b) => a - b).slice(0, Math.max(0, rows.size - most))) rows.delete(t);
  }
  for (const event of snapshot.events) state.events.set(`${event.t} ${event.kind} ${event.text}`, event);
  for (const [key, event] of state.events) if (event.t < snapshot.at - 10800) state.events.delete(key);
  show();
}

function show() {
  const told = state.snapshot;
  if (!told) return;
  showHeader(told);
  showVerdict(told);
  showTiles(told);
  showCells(told);
  showRequests(told);
  showRouters(told);
  showEvents(told);
  showPlots();
  showTrade(told);
  showServed(told);
}

function showHeader(told) {
  const deployed = told.routers.find((router) => router.name === told.by)?.deployed ?? told.routers[0].deployed;
  say(byId("model"), `· ${deployed.model}`);
  say(byId("deployed"), `version ${deployed.version} · settings ${deployed.settings} · checkpoint ${deployed.fingerprint.slice(0, 8)}`);
  set(byId("deployed"), { title: "settings: a digest of the configuration; routers of one deployment have the same" });
}

function verdictOf(told) {
  const acts = told.alerts.filter((alert) => alert.level === "act").length;
  if (acts) return ["act", `✕ Act on ${acts === 1 ? "this" : `these ${acts}`}:`];
  if (told.alerts.length) return ["watch", `◐ Nothing to act on; to know:`];
  const modes = [...new Set(told.cells.flatMap((cell) => cell.modes))];
  return ["well", told.cells.length ? `✓ All is well: ${count(told.cells.length, "cell")} ${told.cells.length === 1 ? "serves" : "serve"} ${modes.join(", ")}` : "◐ Starting: no cell has reported yet"];
}

function showVerdict(told) {
  const [level, text] = verdictOf(told);
  set(byId("verdict"), { class: level });
  say(byId("verdict"), text);
  const make = () => element("li", {}, element("span", { class: "level" }), element("span", { class: "what" }), element("span", { class: "since" }), element("span", { class: "hint" }));
  keep(byId("alerts"), told.alerts, (alert) => alert.text, make, (node, alert) => {
    set(node, { class: alert.level });
    const since = alert.since_s === null ? "" : `since ${seconds(alert.since_s)}`;
    [alert.level === "act" ? "✕ act" : "◐ know", alert.text, since, alert.hint].forEach((part, place) => say(node.children[place], part));
  });
  document.title = `${told.alerts.length ? `${level === "act" ? "✕" : "◐"} ${told.alerts[0].text} – ` : "✓ "}TwoTower Serve`;
  const tone = { act: "%23d0342c", watch: "%23d99a00", well: "%231a8a4f" }[level];
  set(byId("icon"), { href: `data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><path fill='${tone}' d='M2 3h5v12H2zM9 1h5v14H9z'/></svg>` });
}

function showTiles(told) {
  const now = recent();
  keep(byId("tiles"), TILES, ([name]) => name, ([name, meaning]) => element("div", { title: MEANINGS[meaning] }, element("dt", {}, name), element("dd", {}, element("span"), " ", element("small"))), (node, [, , value, unit, isBad]) => {
    const [number_, small] = node.querySelectorAll("dd span, dd small");
    say(number_, value(now, told));
    say(small, typeof unit === "function" ? unit(told) : unit ?? "");
    node.classList.toggle("bad", Boolean(isBad?.(told)));
  });
}

const COLUMNS_OF_ROUTERS = [["router", "Its id, as the log has it."], ["node", "Where it runs."], ["state", "Whether it would say on /ready that a cell answers."], ["under way", MEANINGS["under way"], true], ["waiting", MEANINGS.waiting, true], ["first waits for", MEANINGS.waiting, true], ["up for", "Time since it was started.", true], ["settings", "A digest of the configuration; routers of one deployment have the same."]];

function showRouters(told) {
  const make = (router) => element("tr", {}, element("th", { scope: "row", class: "id" }, shortName(router.name)), ...COLUMNS_OF_ROUTERS.slice(1).map(([, , isNumber]) => element("td", { class: isNumber ? "number" : null })));
  keep(byId("routers").tBodies[0], told.routers, (router) => router.name, make, (row, router) => {
    const asked = router.name === told.by ? ", shows this page" : "";
    const texts = [router.node, (router.drains ? "◐ is to end" : router.ready ? "✓ ready" : "✕ not ready") + asked, `${number(router.open)} of ${number(router.capacity)}`, number(router.waiting), router.waiting ? seconds(router.longest_wait_s) : NONE, seconds(router.up_s), router.deployed.settings];
    texts.forEach((text, place) => say(row.children[place + 1], text));
  });
}

function showEvents(told) {
  const events = [...state.events.values()].sort((a, b) => b.t - a.t);
  byId("no-events").hidden = events.length > 0;
  keep(byId("events").tBodies[0], events, (event) => `${event.t} ${event.kind} ${event.text}`, (event) => element("tr", {}, element("td", {}, element("time", { datetime: new Date(1000 * event.t).toISOString(), title: new Date(1000 * event.t).toLocaleString() }, clock(event.t))), element("td", {}, element("span", { class: `key kind-${event.kind}` }, KINDS[event.kind] ?? event.kind)), element("td")), (row, event) => say(row.lastChild, `${event.count > 1 ? `${number(event.count)} × ` : ""}${event.text}`));
  showMore("events", events.length);
}

// Of a long table the first rows are shown, and a button shows the others.
function showMore(id, rows) {
  const button = document.querySelector(`button[data-of=${id}]`);
  const isShort = byId(id).classList.contains("short");
  button.hidden = rows <= SHORT_ROWS;
  set(button, { "aria-expanded": String(!isShort), "aria-controls": id });
  say(button, isShort ? `Show all ${rows} ${id}` : `Show ${SHORT_ROWS} ${id}`);
  button.onclick = () => { byId(id).classList.toggle("short"); showMore(id, rows); };
}

function viewOf() {
  const [, length, name] = SPANS[state.span];
  const until = Math.floor(state.snapshot.at), from = until - length;
  const rows = [...state.rows[name].values()].filter((row) => row[0] >= from).sort((a, b) => a[0] - b[0]);
  const step = name === "fine" ? 1 : 10;
  const cursor = state.cursor === null || !rows.length ? null : rows.reduce((best, row) => (Math.abs(row[0] - state.cursor) < Math.abs(best[0] - state.cursor) ? row : best));
  return { rows, place: state.place, from, until, step, cursor, events: [...state.events.values()].filter((event) => event.t >= from) };
}

function showPlots() {
  if (byId("service-view").hidden) return; // what has no width cannot be drawn
  const view = viewOf();
  drawLane(byId("lane"), view);
  for (const plot of PLOTS) drawPlot(plot, view);
  const slider = byId("moment");
  set(slider, { min: view.from, max: view.until, step: view.step });
  if (!view.cursor) slider.value = view.until;
  else if (document.activeElement !== slider) slider.value = view.cursor[0];
  const text = view.cursor ? clock(view.cursor[0]) : "now";
  say(byId("moment-text"), text);
  const told = view.cursor ? PLOTS.map((plot) => `${plot.title} ${plot.keys.map((key) => key.node.textContent).join(", ")}`).join("; ") : "";
  set(slider, { "aria-valuetext": `${text}. ${told}` });
}

function moveTo(t) { state.cursor = t; if (state.snapshot) showPlots(); }

function pointAt(svg, clientX) {
  const box = svg.getBoundingClientRect();
  const { from, until } = viewOf();
  const share = (clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
  moveTo(share < 0 || share > 1 ? null : from + share * (until - from));
}

function showLink() {
  const age = (performance.now() - state.heardAt) / 1000;
  const isLive = state.snapshot && age < STALE_S;
  byId("link").className = isLive ? "live" : state.snapshot ? "stale" : "";
  say(byId("link-text"), isLive ? "live, once a second" : state.snapshot ? `no answer for ${seconds(Math.floor(age))}: connecting again` : "connecting");
}

function connect() {
  const source = new EventSource(ours("ops/stream"));
  source.onmessage = (message) => {
    const told = JSON.parse(message.data);
    if (told.columns) hear(told); // else the proxy says that the router of this stream is gone
  };
  source.onerror = () => {
    if (source.readyState !== EventSource.CLOSED) return; // it tries again by itself
    state.tries += 1;
    setTimeout(connect, Math.min(15000, 1000 * 2 ** state.tries));
  };
}

function heads(id, columns) {
  byId(id).append(...columns.map(([name, meaning, isNumber]) => element("th", { scope: "col", title: meaning, class: isNumber ? "number" : null }, name)));
}

function begin() {
  heads("requests-head", COLUMNS_OF_REQUESTS);
  heads("routers-head", COLUMNS_OF_ROUTERS);
  SPANS.forEach(([name], place) => {
    const input = element("input", { type: "radio", name: "span", id: `span-${place}`, checked: place === state.span ? "" : null });
    input.addEventListener("change", () => { state.span = place; moveTo(null); });
    byId("spans").append(input, element("label", { for: `span-${place}` }, name));
  });
  byId("kinds").append(...Object.entries(KINDS).map(([kind, name]) => element("span", { class: `key kind-${kind}` }, name)));
  byId("meanings").append(...Object.entries(MEANINGS).flatMap(([name, meaning]) => [element("dt", {}, name), element("dd", {}, meaning)]));
  makePlots(byId("plots"));
  const slider = byId("moment");
  slider.addEventListener("input", () => moveTo(Number(slider.value)));
  slider.addEventListener("keydown", (event) => { if (event.key === "Escape") moveTo(null); });
  slider.addEventListener("blur", () => moveTo(null));
  addEventListener("resize", () => state.snapshot && showPlots());
  beginPlayground();
  setInterval(showLink, 500);
  connect();
}

begin();
