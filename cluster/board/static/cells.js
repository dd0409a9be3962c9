// Cells as pairs of towers. A tower is as tall as a second: filled by what it did with it, empty where it was idle.
const MANY_CELLS = 12;

function showCells(snapshot) {
  const parent = byId("cells");
  parent.classList.toggle("many", snapshot.cells.length > MANY_CELLS);
  const weight = { act: 0, watch: 1, well: 2 };
  const cells = snapshot.cells.map((cell) => ({ ...cell, level: levelOf(cell) }));
  cells.sort((a, b) => weight[a.level] - weight[b.level] || (a.name < b.name ? -1 : 1));
  keep(parent, cells, (cell) => cell.name, makeCell, updateCell);
}

function levelOf(cell) {
  if (cell.lacks.length) return "act";
  if (cell.mending_s || cell.leaves || cell.towers.some((tower) => !tower.answers)) return "watch";
  return "well";
}

function stateOf(cell) {
  const serves = cell.modes.length ? `serves ${cell.modes.join(", ")}` : "serves nothing";
  if (cell.lacks.length) return `✕ ${serves} only`.replace("nothing only", "nothing");
  if (cell.mending_s) return `◐ mends since ${seconds(cell.mending_s)}`;
  if (cell.leaves) return "◐ leaves";
  if (cell.towers.some((tower) => !tower.answers)) return "◐ a tower is silent";
  return "✓ serves all modes";
}

function makeCell(cell) {
  const id = `cell-${cell.name}`;
  const node = element("article", { class: "cell", "aria-labelledby": id });
  node.parts = {
    state: element("span", { class: "state" }), where: element("span", { class: "where" }),
    pair: element("div", { class: "pair", "aria-hidden": "true" }),
    table: element("tbody"), slots: element("span", { class: "track" }, element("i")),
    held: element("span"),
  };
  const heads = [["tower"], ["busy", "busy"], ["waits for", "waits for"], ["free", "memory"], ["cache", "cache"]];
  const head = element("tr", {}, ...heads.map(([name, meaning]) => element("th", { scope: "col", title: meaning ? MEANINGS[meaning] : null }, name)));
  node.append(
    element("header", {}, element("h3", { id }, `Cell ${shortName(cell.name)}`), node.parts.state, node.parts.where),
    node.parts.pair,
    element("div", { class: "scroll" }, element("table", { "aria-label": `Towers of cell ${cell.name}` }, element("thead", {}, head), node.parts.table)),
    element("div", { class: "gauge", title: MEANINGS.running }, element("span", {}, "requests"), node.parts.slots, node.parts.held),
  );
  return node;
}

function shortName(name) { return name.length > 10 ? name.slice(0, 8) : name; }

function updateCell(node, cell) {
  const { state, where, pair, table, slots, held } = node.parts;
  set(node, { class: `cell ${cell.level}` });
  say(state, stateOf(cell));
  const mended = cell.mended ? ` · mended ${count(cell.mended, "time")}` : "";
  say(where, `node ${cell.node || "not told"} · ${cell.placement}${mended}`);
  set(where, { title: `cell ${cell.name}, checkpoint ${cell.fingerprint}, known to this router for ${seconds(cell.known_s)}` });
  showPair(pair, cell.towers);
  keep(table, cell.towers, (tower) => tower.name, makeTowerRow, updateTowerRow);
  slots.firstChild.style.width = `${cell.slots ? (100 * cell.running) / cell.slots : 0}%`;
  say(held, `${cell.running} of ${cell.slots} slots${cell.waiting ? `, ${cell.waiting} wait` : ""}`);
}

function toneOf(tower) { return tower.name === "context" ? "context" : "denoiser"; }

function showPair(pair, towers) {
  const [context, ...denoisers] = towers;
  const bytesIn = denoisers.reduce((sum, tower) => sum + tower.exchange_rate, 0);
  const items = context ? [context, ...(denoisers.length ? [{ name: "between", bytesIn }] : []), ...denoisers] : [];
  keep(pair, items, (item) => item.name, makePart, updatePart);
}

function makePart(item) {
  if (item.name === "between") {
    const arrows = drawn("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none" });
    arrows.append(drawn("path", { d: "M2 9H97M92 4l5 5-5 5" }), drawn("path", { d: "M98 22H3M8 17l-5 5 5 5" }));
    const rate = element("span", { class: "words" });
    const node = element("div", { class: "between", title: MEANINGS.exchange }, rate, arrows, element("span", { class: "words" }, "commits"));
    node.rate = rate;
    return node;
  }
  const fills = ["prompt", "commit", toneOf(item)].map((tone) => element("i", { class: tone }));
  const node = element("div", { class: `tower ${toneOf(item)}` }, element("div", { class: "shaft" }, ...fills), element("b"));
  node.fills = fills;
  return node;
}

function updatePart(node, item) {
  if (item.name === "between") return say(node.rate, `deltas ${bytes(item.bytesIn)}/s`);
  node.classList.toggle("silent", !item.answers);
  const shares = [item.prompt_wait, item.commit_wait, item.busy];
  const scale = 1 / Math.max(1, shares[0] + shares[1] + shares[2]);
  node.fills.forEach((fill, place) => { fill.style.height = `${100 * scale * shares[place]}%`; });
  set(node, { title: `${item.name}: ${describeTower(item)}. ${MEANINGS.busy}` });
  say(node.lastChild, item.name);
}

function describeTower(tower) {
  return tower.answers ? `busy ${percent(tower.busy)}, ${waitsFor(tower)}` : "does not answer";
}

function waitsFor(tower) {
  const idle = Math.max(0, 1 - tower.busy - tower.commit_wait - tower.prompt_wait);
  const waits = [];
  if (tower.commit_wait >= 0.005) waits.push(`commits ${percent(tower.commit_wait)}`);
  if (tower.prompt_wait >= 0.005) waits.push(`prompts ${percent(tower.prompt_wait)}`);
  if (idle >= 0.005) waits.push(`${tower.name === "context" && tower.sequences ? "denoiser" : "work"} ${percent(idle)}`);
  return waits.join(", ") || "nothing";
}

function makeTowerRow(tower) {
  const row = element("tr");
  row.device = element("small");
  row.append(element("th", { scope: "row", class: toneOf(tower) }, tower.name, " ", row.device), ...Array.from({ length: 4 }, () => element("td")));
  return row;
}

function updateTowerRow(row, tower) {
  const used = tower.pages - tower.free_pages;
  const told = tower.answers
    ? [percent(tower.busy), waitsFor(tower), bytes(tower.free_memory), percent(tower.pages ? used / tower.pages : 0)]
    : ["silent", NONE, NONE, NONE];
  told.forEach((text, place) => say(row.children[place + 1], text));
  say(row.device, tower.device);
  set(row, { title: `device ${tower.device}, process ${tower.process}; ${tower.sequences} sequences, ${used} of ${tower.pages} pages taken. ${tower.memory}` });
}
