// Requests that are under way: what each is at, as a strip that fills.
const STRIP_BARS = 32;
const COLUMNS_OF_REQUESTS = [
  ["request", "Our own id of it, as the log has it. What a client calls it is not shown."],
  ["mode", "How it is decoded."], ["cell", "The cell that has it."], ["progress", MEANINGS.strip],
  ["block", MEANINGS.block, true], ["steps", MEANINGS.steps, true], ["tokens", "Tokens so far, of those it may have at most.", true],
  ["age", "Time since it began.", true], ["quiet for", MEANINGS.quiet, true], ["moves", MEANINGS.moves, true],
];

function showRequests(snapshot) {
  const runs = Object.entries(snapshot.requests).flatMap(([router, rows]) => rows.map((run) => ({ ...run, router })));
  runs.sort((a, b) => b.age_s - a.age_s);
  const note = snapshot.more_requests ? `the oldest ${runs.length} of ${number(runs.length + snapshot.more_requests)}` : "";
  say(byId("requests-note"), note);
  byId("no-requests").hidden = runs.length > 0;
  showMore("requests", runs.length);
  keep(byId("requests").tBodies[0], runs, (run) => run.id, makeRequest, updateRequest);
}

function makeRequest(run) {
  const row = element("tr");
  const id = element("th", { scope: "row", class: "id", title: run.id }, run.id.replace(/^(req|cmpl)-/, "").slice(0, 8));
  row.append(id, ...COLUMNS_OF_REQUESTS.slice(1).map(([, , isNumber]) => element("td", { class: isNumber ? "number" : null })));
  row.strip = drawn("svg", { class: "strip", role: "img", viewBox: `0 0 ${8 * STRIP_BARS} 22`, preserveAspectRatio: "none" });
  row.children[3].append(row.strip);
  return row;
}

function stateOfRun(run) {
  if (!run.cell) return "waits";
  return run.blocks || run.mode === "score" ? shortName(run.cell) : `${shortName(run.cell)}, reads prompt`;
}

function updateRequest(row, run) {
  const cells = row.children;
  const last = run.steps_of.at(-1);
  say(cells[1], run.mode);
  say(cells[2], stateOfRun(run));
  set(cells[2], { title: `cell ${run.cell || "none yet"}; prompt of ${count(run.prompt_tokens, "token")}; router ${run.router}` });
  say(cells[4], run.most_blocks ? `${run.blocks} of ${run.most_blocks}` : NONE);
  say(cells[5], run.mode === "diffusion" && last !== undefined ? `${number(run.steps)} (${last})` : run.steps ? number(run.steps) : NONE);
  say(cells[6], run.most_tokens ? `${number(run.tokens)} of ${number(run.most_tokens)}` : NONE);
  say(cells[7], seconds(run.age_s));
  say(cells[8], seconds(run.quiet_s));
  say(cells[9], run.moves ? String(run.moves) : NONE);
  drawStrip(row.strip, run);
}

// Bars of `each` blocks: those committed are full, the one that is worked on blinks.
function drawStrip(strip, run) {
  const bars = Math.max(1, Math.min(STRIP_BARS, run.most_blocks || 1));
  const each = Math.max(1, run.most_blocks / bars);
  const single = each === 1 && run.mode === "diffusion" && run.most_steps;
  const width = (8 * STRIP_BARS) / bars;
  const first = run.blocks - run.steps_of.length;
  while (strip.childNodes.length > 2 * bars) strip.lastChild.remove();
  while (strip.childNodes.length < 2 * bars) strip.append(drawn("rect"));
  for (let bar = 0; bar < bars; bar += 1) {
    const done = Math.min(1, Math.max(0, run.blocks / each - bar));
    const works = run.cell && done < 1 && run.blocks / each >= bar;
    const steps = single && bar >= first ? run.steps_of[bar - first] : undefined;
    const height = done === 1 && steps !== undefined ? Math.max(3, (22 * steps) / run.most_steps) : 22;
    const box = { x: bar * width + 0.6, width: Math.max(1, width - 1.2) };
    set(strip.childNodes[2 * bar], { ...box, y: 0, height: 22, class: works ? "now" : null });
    const full = each > 1 && done < 1 ? { ...box, width: box.width * done } : box;
    const tone = run.mode === "ar" || run.mode === "score" ? "full ar" : "full";
    set(strip.childNodes[2 * bar + 1], { ...full, y: 22 - height, height: done > 0 && (done === 1 || each > 1) ? height : 0, class: tone });
  }
  const last = run.steps_of.length ? `, the last in ${count(run.steps_of.at(-1), "step")}` : "";
  set(strip, { "aria-label": `${count(run.blocks, "block")} of ${run.most_blocks}${last}` });
}
