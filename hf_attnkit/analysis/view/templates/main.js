// The frame: tabs, what is chosen, and drawing again.
const TABS = { model: ["Model", modelView], lines: ["Tokens", linesView], head: ["One head", headView],
  attribution: ["Attribution", attributionView], ...(compared ? { change: ["Change", changeView] } : {}) };

function open(tab) {
  state.tab = tab;
  render(`#tab-${tab}`);
}
function controls() {
  const box = document.getElementById("controls");
  box.replaceChildren();
  const first = (each) => unitNames(each.sequences[0]).slice(0, 8).join(" ").slice(0, 60);
  if (data.examples.length > 1) {
    box.append(choose("example", data.examples.map((each, number) => `${number}: ${first(each)}`), state.example,
      (value) => { Object.assign(state, { example: value, token: null, pair: 0 }); render(); }));
  }
  if (compared && state.tab !== "change" && state.tab !== "attribution") {
    box.append(choose("show", data.names, state.side, (value) => { Object.assign(state, { side: value, heads: null }); render(); }));
  }
  if (state.tab === "lines" || state.tab === "head") {
    box.append(choose("layer", maps(0).map((each) => each.name), state.map,
      (value) => { Object.assign(state, { map: value, head: Math.max(0, Math.min(state.head, places(value) - 1)), heads: null }); render(); }));
  }
  if (state.tab === "head" && places(state.map)) {
    box.append(choose("head", Array.from({ length: places(state.map) }, (_, head) => `${head}${headIn(state.side, state.map, head) === null ? " (removed)" : ""}`),
      state.head, (value) => { Object.assign(state, { head: value, heads: null }); render(); }));
  }
}
function render(focused) {
  redraws = [];
  hideTip();
  say("");
  document.getElementById("facts").textContent = describe();
  controls();
  for (const button of document.querySelectorAll("[role=tab]")) {
    const chosen = button.id === `tab-${state.tab}`;
    button.setAttribute("aria-selected", chosen);
    button.tabIndex = chosen ? 0 : -1;
  }
  const panel = document.getElementById("panel");
  panel.setAttribute("aria-labelledby", `tab-${state.tab}`);
  panel.replaceChildren();
  TABS[state.tab][1](panel);
  const target = typeof focused === "string" && document.querySelector(focused);
  if (target) target.focus();
}

function describe() {
  const sizes = example().sequences.map((each) => `${each.labels.length} tokens of ${each.name}`);
  const pooled = example().sequences.filter((each) => each.block > 1);
  return [
    `${maps(0).length} attentions, ${maps(0).reduce((sum, each) => sum + each.heads, 0)} heads; ${sizes.join(", ")}.`,
    pooled.length
      ? `Pooled: a row is the mean of up to ${Math.max(...pooled.map((each) => each.block))} queries, a column the sum of as many keys, with the strongest keys of single queries next to it.`
      : "Exact: every weight of every query, in 254 steps.",
    ...data.notes,
  ].join(" ");
}
document.getElementById("title").textContent = data.title;
if (compared) { // begin where it differs most
  let most = -1;
  example().differences.forEach((each, number) => each.total.forEach((total, head) => {
    if (total !== null && total > most) [most, state.map, state.head] = [total, number, head];
  }));
}
const tabs = document.getElementById("tabs");
for (const [tab, [text]] of Object.entries(TABS)) {
  tabs.append(make("button", { role: "tab", id: `tab-${tab}`, "aria-controls": "panel", text, onclick: () => open(tab) }));
}
tabs.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  const names = Object.keys(TABS);
  open(names[(names.indexOf(state.tab) + step + names.length) % names.length]);
});
function recolour() {
  readColours();
  for (const draw of redraws) draw();
}
for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", recolour);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  for (const draw of redraws) draw();
});
readColours();
render();
document.documentElement.dataset.ready = "yes";
