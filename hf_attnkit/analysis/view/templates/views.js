// The views: what is chosen, and what each tab shows of it.
const state = { tab: "model", example: 0, side: 0, map: 0, head: 0, heads: null, edge: true, threshold: 0.1,
  method: "rollout", pair: 0, token: null };
const compared = data.names.length > 1;
const example = () => data.examples[state.example];
const maps = (side = state.side) => example().maps[side];
const map = (side = state.side) => maps(side)[state.map];
const difference = (number = state.map) => (example().differences || [])[number];
const importance = (layer, head, side) => (data.importance && !side ? data.importance[layer][head] : undefined);

// How many places for heads a layer has: those before, where two models are compared.
const places = (number) => maps(0)[number].heads;
// The number of a head before, in the model that is shown; `null` where it is gone.
function headIn(side, number, head) {
  if (!side || !maps(0)[number].heads) return head;
  return maps(1)[number].heads ? difference(number).matched[head] : null;
}
const REMOVED = "no head is left";
function lost(number) {
  const why = maps(1)[number].missing;
  return why && why !== REMOVED ? why : "removed";
}
function groupOf(found, head) {
  const size = found.groups ? found.heads / found.groups : 1;
  return size > 1 ? { number: Math.floor(head / size), size } : null;
}

function facts(number, head, side) {
  const found = maps(side)[number], own = headIn(side, number, head);
  const lines = [`layer ${found.layer}, head ${head}${found.cross ? ", cross-attention" : ""}`];
  if (own === null) return [...lines, `${lost(number)}, ${data.names[1]}`];
  if (own !== head) lines.push(`head ${own} ${data.names[side]}`);
  lines.push(`entropy ${written(found.entropy[own])} nats`, `reach ${written(found.distance[own], 1)} tokens on average`,
    `largest weight ${written(found.confidence[own])} on average`);
  const score = importance(found.layer, head, side);
  if (score !== undefined) lines.push(`importance ${score === null ? "–" : score}`);
  if (found.streaming.includes(own)) lines.push("streaming: sees the first tokens and a window");
  const group = groupOf(found, own);
  if (group) lines.push(`shares its key/value head ${group.number} with ${group.size - 1} other${group.size > 2 ? "s" : ""}`);
  if (compared && difference(number).total[head] !== null) {
    lines.push(`differs by ${written(difference(number).total[head])} (total variation)`);
  }
  return lines;
}

// A table, layer by head; `cell` makes what a place holds.
function headTable(cell) {
  const widest = Math.max(...maps(0).map((_, number) => places(number)), 1);
  const table = make("table", { class: "heads" });
  table.append(make("thead", {}, make("tr", {}, make("th", { text: "layer" }),
    ...Array.from({ length: widest }, (_, head) => make("th", { scope: "col", text: head })))));
  const body = make("tbody");
  maps(0).forEach((found, number) => {
    const shown = maps(state.tab === "change" ? 1 : state.side)[number];
    const row = make("tr", {}, make("th", { scope: "row", text: found.layer + (found.cross ? " cross" : ""), title: `${found.name}: ${shown.kind}` }));
    for (let head = 0; head < places(number); head++) row.append(make("td", {}, cell(number, head)));
    const why = shown.missing || found.missing;
    if (why && !places(number)) row.append(make("td", { class: "nothing", colspan: widest, text: why }));
    body.append(row);
  });
  table.append(body);
  table.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const from = event.target.closest("button");
    if (!step || !from) return;
    event.preventDefault();
    const to = table.querySelector(`[data-map="${Number(from.dataset.map) + step[0]}"][data-head="${Number(from.dataset.head) + step[1]}"]`);
    if (to) to.focus();
  });
  return make("div", { class: "scroll" }, table);
}
function headButton(number, head, side, type, then) {
  const chosen = state.map === number && state.head === head;
  const button = make("button", { class: `cell ${type}${chosen ? " chosen" : ""}`, "data-map": number, "data-head": head,
    tabindex: chosen || (number === 0 && head === 0) ? 0 : -1, "aria-label": facts(number, head, side).join(", "),
    onclick: () => { hideTip(); Object.assign(state, { map: number, head, heads: null }); then(); } });
  const show = () => showTip(button, facts(number, head, side).join("\n"));
  button.addEventListener("mouseenter", show);
  button.addEventListener("focus", show);
  button.addEventListener("mouseleave", hideTip);
  button.addEventListener("blur", hideTip);
  return button;
}

function modelView(panel) {
  const marks = [];
  panel.append(headTable((number, head) => {
    const found = maps()[number], own = headIn(state.side, number, head);
    if (own === null) {
      const gone = headButton(number, head, state.side, "gone", () => { state.side = 0; open("head"); });
      marks.push("crossed: removed");
      return gone;
    }
    const group = groupOf(found, own), streams = found.streaming.includes(own);
    if (group) marks.push("coloured bar: heads that share a key/value head");
    if (streams) marks.push("dashed: streaming");
    const button = headButton(number, head, state.side, `${streams ? "streaming " : ""}${group ? "grouped" : ""}`, () => open("head"));
    if (group) button.style.setProperty("--group", `hsl(${(group.number * 137.5 + 30) % 360} 60% 55%)`);
    const canvas = make("canvas");
    const draw = () => drawMap(canvas, headMap(found, own), 46);
    redraws.push(draw);
    draw();
    button.append(canvas);
    return button;
  }));
  panel.append(make("p", { class: "soft", text: `Each picture is a head: queries down, keys across, darker (in dark: lighter) is more. ${[...new Set(marks)].join("; ")}` }));
}

const own = () => headIn(state.side, state.map, state.head);
function unavailable(panel) {
  const found = map();
  const why = found.missing || (own() === null ? `head ${state.head} of layer ${found.layer} in “${data.names[1]}”: ${lost(state.map)}` : "");
  if (why) panel.append(make("p", { text: `Nothing to show: ${why}.` }));
  return Boolean(why);
}
const title = (found) => `layer ${found.layer}${found.cross ? ", cross-attention" : ""}, ${found.name.replace(/^layer \d+ \((.*)\)/, "$1")}, ${found.kind}`;

function linesView(panel) {
  const found = map(), sequences = example().sequences;
  if (found.missing) return unavailable(panel);
  if (state.heads === null) state.heads = new Set([own() === null ? 0 : own()]);
  const chips = make("div", { class: "chips", role: "group", "aria-label": "heads" });
  for (let head = 0; head < found.heads; head++) {
    const chip = make("button", { class: "chip", text: head, "data-chip": head, "aria-pressed": state.heads.has(head),
      onclick: () => { if (!state.heads.delete(head)) state.heads.add(head); render(`[data-chip="${head}"]`); } });
    chip.style.setProperty("--line", colourOf(head));
    chips.append(chip);
  }
  chips.append(make("button", { class: "chip all", text: "all", onclick: () => {
    state.heads = new Set(Array.from({ length: found.heads }, (_, head) => head));
    render(".chip.all");
  } }));
  const levels = [0.02, 0.05, 0.1, 0.2, 0.5];
  const level = choose("lines from a weight of", levels.map(String), levels.indexOf(state.threshold),
    (value) => { state.threshold = levels[value]; render(); });
  level.className = "inline";
  const shown = [...state.heads].map((head) => ({ head, map: headMap(found, head) }));
  const widget = linesWidget(shown, unitNames(sequences[found.queries]), keyNames(sequences[found.keys], found), state.threshold);
  panel.append(make("p", { class: "soft", text: `${title(found)}. Point at a token, or reach it by Tab and the arrows, for its lines alone (means of the chosen heads); a click keeps them.` }),
    chips, level, widget.box);
  widget.draw();
  return true;
}

function headView(panel) {
  if (unavailable(panel)) return;
  const found = map(), sequences = example().sequences, [from, to] = [sequences[found.queries], sequences[found.keys]];
  const values = headMap(found, own()), [rows, columns] = [unitNames(from), keyNames(to, found)];
  const more = make("div");
  const pictures = make("div");
  const grid = to.grid, picture = grid && pictureWidget(grid, (unit) => from.grid && widget.move(unit, unit));
  if (picture) {
    pictures.append(make("figure", {}, make("figcaption", { text: from.grid ? "what the row's patch attends to; a click chooses a patch" : "what the row attends to" }), picture.canvas));
  }
  const chosen = (row) => {
    if (picture) picture.draw(Array.from({ length: to.units }, (_, key) => weight(values.own[row * values.columns + key])), from.grid ? row : undefined);
    if (found.links) more.replaceChildren(linkTable(found, own(), row, from, to));
  };
  const widget = matrixWidget(values, rows, columns, { chosen, edge: () => state.edge, name: `attention of layer ${found.layer}, head ${state.head}` });
  const edge = make("label", { class: "inline" }, make("input", { type: "checkbox", id: "edge", checked: state.edge,
    onchange: (event) => { state.edge = event.target.checked; widget.draw(); } }), "edge of what a query sees");
  panel.append(make("p", { class: "soft", text: `${title(found)}. Rows are queries, columns keys; grey is not seen. Arrows move, + and − zoom.` }),
    make("p", { class: "numbers", text: facts(state.map, state.head, state.side).join(" · ") }),
    make("div", { class: "controls" }, make("label", { text: "size" }, widget.zooms), edge),
    make("div", { class: "side" }, pictures, widget.frame), more);
  if (picture) chosen(0);
  if (found.links) chosen(0);
}

// The strongest keys of the queries of a block.
function linkTable(found, head, row, from, to) {
  const { stride, queries, of_each: each } = found.links;
  const view = new DataView(bytes.buffer, found.links.keys);
  const links = [];
  for (let query = 0; query < queries; query++) {
    if (Math.floor((query * stride) / from.block) !== row) continue;
    for (let rank = 0; rank < each; rank++) {
      const place = (head * queries + query) * each + rank;
      links.push([query * stride, view.getInt32(4 * place, true), weight(bytes[found.links.weights + place])]);
    }
  }
  links.sort((a, b) => b[2] - a[2]);
  const table = make("table", { class: "list" }, make("tr", {}, ...["query", "key", "weight"].map((text) => make("th", { text }))));
  for (const [query, key, value] of links.slice(0, 16)) {
    table.append(make("tr", {}, make("td", { text: `${query}: ${from.labels[query]}` }), make("td", { text: `${key}: ${to.labels[key]}` }), make("td", { text: written(value) })));
  }
  const which = stride > 1 ? `every ${stride}th query` : "each query";
  return make("div", {}, make("h2", { text: `Strongest links of queries ${unitNames(from)[row]}` }),
    make("p", { class: "soft", text: `The ${each} strongest key${each > 1 ? "s" : ""} of ${which} are kept.` }), table);
}

function attributionView(panel) {
  const { rollout, flow, why, flow_why: flowWhy, answers } = example().attributions, sequences = example().sequences;
  const list = state.method === "rollout" ? rollout : flow;
  const note = [why, state.method === "flow" ? flowWhy : ""].filter(Boolean).join(" ");
  const controls = make("div", { class: "controls" }, choose("method", ["attention rollout", "attention flow"],
    state.method === "rollout" ? 0 : 1, (value) => { Object.assign(state, { method: value ? "flow" : "rollout", pair: 0 }); render(); }));
  panel.append(controls);
  if (note) panel.append(make("p", { text: note }));
  if (!list.length) return;
  state.pair = Math.min(state.pair, list.length - 1);
  const found = list[state.pair], [from, to] = [sequences[found.queries], sequences[found.keys]];
  const names = unitNames(from), columns = unitNames(to);
  if (list.length > 1) {
    controls.append(choose("of", list.map((each) => `${sequences[each.queries].name} → ${sequences[each.keys].name}`),
      state.pair, (value) => { state.pair = value; state.token = null; render(); }));
  }
  const last = state.token === null || state.token >= names.length ? answers[found.queries] : state.token;
  const token = state.method === "flow" ? found.token : last;
  if (state.method === "rollout") {
    controls.append(choose("token", names.map((name, number) => `${number}: ${name}`), token, (value) => { state.token = value; render(); }));
  }
  const steps = found.steps.length, own = new Uint8Array(steps * found.columns);
  for (let step = 0; step < steps; step++) {
    const start = state.method === "flow" ? found.at + step * found.columns : found.at + (step * found.rows + token) * found.columns;
    own.set(bytes.subarray(start, start + found.columns), step * found.columns);
  }
  const grid = to.grid, picture = grid && pictureWidget(grid, (unit) => { if (from.grid && state.method === "rollout") { state.token = unit; render(); } });
  const text = make("div");
  const chosen = (step) => {
    const values = Array.from({ length: found.columns }, (_, key) => weight(own[step * found.columns + key]));
    if (picture) picture.draw(values, from.grid ? token : undefined);
    text.replaceChildren(...[make("h2", { text: `After ${found.steps[step]}` }), picture ? null : strip(columns, values),
      make("p", { class: "soft", text: `most: ${strongest(values, 5).map(([unit, value]) => `${columns[unit]} ${written(value)}`).join(", ")}` })].filter(Boolean));
  };
  const widget = matrixWidget({ rows: steps, columns: found.columns, own }, found.steps.map((step) => step.split(" (")[0]), columns,
    { chosen, edge: () => false, name: `${state.method} of ${names[token]}`, tall: 18 });
  panel.append(make("p", { text: state.method === "rollout"
    ? `What “${names[token]}” has of each input token after each layer, if half of every layer is the residual (Abnar and Zuidema 2020).`
    : `How much can flow from “${names[token]}” after each layer to each input token: a maximum flow through the weights (Abnar and Zuidema 2020).` }),
    make("div", { class: "side" }, picture ? make("figure", {}, make("figcaption", { text: "after the chosen layer" }), picture.canvas) : null, widget.frame), text);
  chosen(steps - 1);
}

function changeView(panel) {
  panel.append(make("p", { text: `How much each head's attention differs between “${data.names[0]}” and “${data.names[1]}”: total variation, 0 the same, 1 no key in common, a mean over queries.` }));
  panel.append(headTable((number, head) => {
    const total = difference(number) && difference(number).total[head];
    const gone = maps(1)[number].heads && difference(number).matched[head] === null;
    const button = headButton(number, head, 1, gone || total === null || total === undefined ? "gone" : "number", () => render(`[data-map="${number}"][data-head="${head}"]`));
    if (gone || total === null || total === undefined) return button;
    button.textContent = total.toFixed(2).replace("0.", ".");
    button.style.background = `rgba(${hot()}, ${0.85 * Math.sqrt(total)})`;
    return button;
  }));
  const one = maps(0)[state.map], other = maps(1)[state.map], matched = headIn(1, state.map, state.head);
  panel.append(make("h2", { text: `Layer ${one.layer}, head ${state.head}` }));
  if (one.missing || other.missing || matched === null) {
    panel.append(make("p", { text: `${one.missing || other.missing || lost(state.map)}: nothing to compare.` }));
    if (one.missing) return;
  }
  const pair = make("div", { class: "side" });
  const both = [[one, state.head], ...(matched === null || other.missing ? [] : [[other, matched]])];
  both.forEach(([found, head], side) => {
    const canvas = make("canvas", { class: "thumb", role: "img", "aria-label": `${data.names[side]}, head ${head}` });
    const draw = () => drawMap(canvas, headMap(found, head), 256);
    redraws.push(draw);
    draw();
    pair.append(make("figure", {}, make("figcaption", { text: `${data.names[side]}, head ${head}, ${found.kind}` }), canvas));
  });
  panel.append(pair);
  if (both.length < 2) return;
  const sequence = example().sequences[one.queries], names = unitNames(sequence), keys = keyNames(example().sequences[one.keys], one);
  const start = difference().rows + state.head * one.rows;
  const values = Array.from(bytes.subarray(start, start + one.rows), weight);
  panel.append(make("h2", { text: "Where it differs" }), strip(names, values));
  const table = make("table", { class: "list", id: "largest" }, make("tr", {}, ...["query", "differs by", ...data.names].map((text) => make("th", { text }))));
  const most = (found, head, row) => {
    const all = headMap(found, head);
    const list = found.sink === undefined ? keys.slice(0, found.columns) : [...keys.slice(0, found.columns), "(sink)"];
    return strongest(Array.from(all.own.subarray(row * all.columns, (row + 1) * all.columns), weight), 3)
      .map(([key, value]) => `${list[key]} ${written(value, 2)}`).join(", ");
  };
  for (const [row, value] of strongest(values, 8)) {
    table.append(make("tr", {}, make("td", { text: `${row}: ${names[row]}` }), make("td", { text: written(value) }),
      ...both.map(([found, head]) => make("td", { text: most(found, head, row) }))));
  }
  panel.append(table);
}
