// What the page holds: `data`, and the packed bytes that it points into.
const data = JSON.parse(document.getElementById("data").textContent);
const packed = Uint8Array.from(atob(document.getElementById("bytes").textContent), (c) => c.charCodeAt(0));
const bytes = new Uint8Array(
  await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer(),
);

const STEPS = 254;
const weight = (byte) => (byte ? ((byte - 1) / STEPS) ** 2 : 0);
const written = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));

// A head's map, `rows` x `columns`, and one column more for a learned sink.
function headMap(map, head) {
  const size = map.rows * map.columns;
  const own = bytes.subarray(map.at + head * size, map.at + (head + 1) * size);
  if (map.sink === undefined) return { rows: map.rows, columns: map.columns, own };
  const wide = map.columns + 1;
  const all = new Uint8Array(map.rows * wide);
  for (let row = 0; row < map.rows; row++) {
    all.set(own.subarray(row * map.columns, (row + 1) * map.columns), row * wide);
    all[row * wide + map.columns] = bytes[map.sink + head * map.rows + row];
  }
  return { rows: map.rows, columns: wide, own: all };
}

// Names of the units of a sequence: tokens, or blocks of them.
function unitNames(sequence) {
  if (sequence.block === 1) return sequence.labels;
  return Array.from({ length: sequence.units }, (_, unit) => {
    const first = unit * sequence.block;
    return `${first}–${Math.min(first + sequence.block, sequence.labels.length) - 1}`;
  });
}
const keyNames = (sequence, map) => (map.sink === undefined ? unitNames(sequence) : [...unitNames(sequence), "(sink)"]);

// The largest of a list of [number, value] pairs.
const strongest = (values, count) =>
  Array.from(values, (value, place) => [place, value]).sort((a, b) => b[1] - a[1]).slice(0, count);

// Colours: by byte, from the style's variables, which differ in light, in dark and on paper.
let colours = [];
function readColours() {
  const style = getComputedStyle(document.documentElement);
  const triple = (name) => style.getPropertyValue(name).split(",").map(Number);
  const [low, high, none] = ["--low", "--high", "--none"].map(triple);
  colours = Array.from({ length: 256 }, (_, byte) =>
    byte ? low.map((from, i) => Math.round(from + ((high[i] - from) * (byte - 1)) / STEPS)) : none,
  );
}

// Draw a map into a canvas of at most `size` pixels a side; a pixel is the largest of the weights that it covers.
function drawMap(canvas, { rows, columns, own }, size) {
  const scale = Math.max(1, Math.ceil(Math.max(rows, columns) / size));
  const high = Math.ceil(rows / scale), wide = Math.ceil(columns / scale);
  const largest = new Uint8Array(high * wide);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const place = Math.floor(row / scale) * wide + Math.floor(column / scale);
      const byte = own[row * columns + column];
      if (byte > largest[place]) largest[place] = byte;
    }
  }
  canvas.width = wide;
  canvas.height = high;
  const image = canvas.getContext("2d").createImageData(wide, high);
  largest.forEach((byte, place) => {
    const [r, g, b] = colours[byte];
    image.data.set([r, g, b, 255], 4 * place);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Elements: attributes by name, `text` as text, children after.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-")) element.setAttribute(name, String(value));
    else if (value !== false && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child));
  return element;
}
function choose(label, options, chosen, change) {
  const select = make("select", { onchange: () => change(Number(select.value)) });
  options.forEach((text, value) => select.append(make("option", { value, text, selected: value === chosen })));
  return make("label", { text: label }, select);
}
const say = (text) => { document.getElementById("say").textContent = text; };
const tip = document.getElementById("tip");
function showTip(element, text) {
  tip.textContent = text;
  tip.hidden = false;
  const at = element.getBoundingClientRect();
  const left = Math.min(at.left, innerWidth - tip.offsetWidth - 8);
  const below = at.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? at.bottom + 6 : at.top - tip.offsetHeight - 6}px`;
}
const hideTip = () => { tip.hidden = true; };
