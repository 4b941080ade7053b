// What several views are made of: a matrix, tokens with lines, an image with patches, a text in colours.
const LABEL_CELL = 10; // from this size of a cell, in pixels, tokens are written next to it
const ZOOMS = [1, 2, 3, 4, 6, 8, 12, 16, 20, 28];
let redraws = []; // of what is shown: when colours change

function shortened(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 1 && context.measureText(`${text.slice(0, end)}…`).width > width) end--;
  return `${text.slice(0, end)}…`;
}

// A canvas for sharp drawing, in CSS pixels.
function sized(canvas, width, height) {
  const sharp = Math.min(devicePixelRatio || 1, 8192 / Math.max(width, height));
  canvas.width = Math.max(1, Math.round(width * sharp));
  canvas.height = Math.max(1, Math.round(height * sharp));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(sharp, sharp);
  return context;
}

// A matrix with names, zoom, a cursor that arrows and the mouse move, and the edge of what is visible. Rows are at least
// `tall` pixels high.
function matrixWidget({ rows, columns, own }, rowNames, columnNames, { chosen, edge, name, tall = 0 }) {
  const label = Math.min(110, 8 + 7 * Math.max(3, ...[...rowNames, ...columnNames].map((text) => text.length)));
  const room = Math.max(200, Math.min(720, document.getElementById("panel").clientWidth - label - 24));
  const fitting = ZOOMS.filter((zoom) => zoom * columns <= room).pop() || 1;
  let zoom = Math.max(ZOOMS.indexOf(fitting), 0);
  const cursor = { row: 0, column: 0 };
  const field = make("canvas", { tabindex: 0, role: "img", "aria-label": name, class: "values" });
  const mark = make("div", { class: "cursor", hidden: true });
  const top = make("canvas"), left = make("canvas");
  const matrix = make("div", { class: "matrix" }, make("div", { class: "corner" }), make("div", { class: "top" }, top),
    make("div", { class: "left" }, left), make("div", { class: "field" }, field, mark));
  const frame = make("div", { class: "scroll frame" }, matrix);

  const cellSize = () => [ZOOMS[zoom], Math.max(ZOOMS[zoom], tall)];
  function draw() {
    const [cell, row] = cellSize(), wide = columns * cell, high = rows * row;
    const small = document.createElement("canvas");
    drawMap(small, { rows, columns, own }, Math.max(rows, columns));
    const context = sized(field, wide, high);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, wide, high);
    if (edge()) outline(context, cell, row);
    const [across, down] = [cell >= LABEL_CELL, row >= LABEL_CELL];
    names(top, wide, across ? label : 4, across && columnNames, cell, true);
    names(left, down ? label : 4, high, down && rowNames, row, false);
    place();
  }
  function outline(context, cell, tallness) {
    context.strokeStyle = `rgb(${getComputedStyle(document.documentElement).getPropertyValue("--edge")})`;
    context.lineWidth = cell >= 6 ? 1.5 : 1;
    context.beginPath();
    const hidden = (row, column) => own[row * columns + column] === 0;
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        if (column + 1 < columns && hidden(row, column) !== hidden(row, column + 1)) {
          context.moveTo((column + 1) * cell, row * tallness);
          context.lineTo((column + 1) * cell, (row + 1) * tallness);
        }
        if (row + 1 < rows && hidden(row, column) !== hidden(row + 1, column)) {
          context.moveTo(column * cell, (row + 1) * tallness);
          context.lineTo((column + 1) * cell, (row + 1) * tallness);
        }
      }
    }
    context.stroke();
  }
  function names(canvas, width, height, list, cell, across) {
    const context = sized(canvas, width, height);
    if (!list) return;
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--soft");
    context.font = `${Math.min(13, cell - 1)}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    list.forEach((text, number) => {
      const middle = (number + 0.5) * cell, short = shortened(context, text, (across ? height : width) - 8);
      context.save();
      if (across) {
        context.translate(middle, height - 4);
        context.rotate(-Math.PI / 2);
        context.textAlign = "left";
        context.fillText(short, 0, 0);
      } else {
        context.textAlign = "right";
        context.fillText(short, width - 4, middle);
      }
      context.restore();
    });
  }
  function place() {
    const [cell, row] = cellSize();
    Object.assign(mark.style, { left: `${cursor.column * cell - 2}px`, top: `${cursor.row * row - 2}px`,
      width: `${cell + 4}px`, height: `${row + 4}px` });
  }
  function move(row, column, quiet) {
    cursor.row = Math.max(0, Math.min(rows - 1, row));
    cursor.column = Math.max(0, Math.min(columns - 1, column));
    place();
    if (quiet) return;
    mark.hidden = false;
    const byte = own[cursor.row * columns + cursor.column];
    say(`${rowNames[cursor.row]} → ${columnNames[cursor.column]}: ${byte ? written(weight(byte)) : "not seen"}`);
    chosen(cursor.row, cursor.column);
  }
  const at = (event) => {
    const box = field.getBoundingClientRect();
    const [cell, row] = cellSize();
    return [Math.floor((event.clientY - box.top) / row), Math.floor((event.clientX - box.left) / cell)];
  };
  field.addEventListener("mousemove", (event) => move(...at(event)));
  field.addEventListener("click", (event) => { field.focus({ preventScroll: true }); move(...at(event)); });
  field.addEventListener("focus", () => move(cursor.row, cursor.column));
  field.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "+" || event.key === "-") zooming(event.key === "+" ? 1 : -1);
    else if (step) move(cursor.row + step[0], cursor.column + step[1]);
    else return;
    event.preventDefault();
  });
  function zooming(by) {
    zoom = Math.max(0, Math.min(ZOOMS.length - 1, zoom + by));
    draw();
  }
  const zooms = make("span", {}, make("button", { text: "−", "aria-label": "smaller", onclick: () => zooming(-1) }),
    make("button", { text: "+", "aria-label": "larger", onclick: () => zooming(1) }));
  redraws.push(draw);
  draw();
  return { frame, zooms, draw, move };
}

// Two columns of tokens with lines between them, of several heads.
const colourOf = (head) => `hsl(${(head * 137.5 + 205) % 360} 65% ${matchMedia("(prefers-color-scheme: dark)").matches ? 62 : 42}%)`;
function linesWidget(maps, queryNames, names, threshold) {
  const ROW = 22;
  const canvas = make("canvas", { role: "img", "aria-label": "lines from queries to keys" });
  const [rows, columns] = [queryNames.length, names.length];
  let active = null, pinned = null;
  const column = (side, list) => make("div", { class: `column ${side}`, role: "group", "aria-label": side },
    ...list.map((text, number) => make("button", {
      class: "token", text: text.trim() ? text : JSON.stringify(text), "data-side": side, "data-unit": number,
      tabindex: number ? -1 : 0, "aria-label": `${side === "queries" ? "query" : "key"} ${number}: ${text}`,
      onmouseenter: () => activate({ side, number }), onmouseleave: () => activate(pinned),
      onfocus: () => activate({ side, number }), onblur: () => activate(pinned),
      onclick: () => pin({ side, number }), onkeydown: keys,
    })));
  const left = column("queries", queryNames), right = column("keys", names);
  const box = make("div", { class: "links" }, make("h3", { class: "queries", text: "from" }), make("span"),
    make("h3", { text: "to" }), left, canvas, right);

  function keys(event) {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key], other = { ArrowLeft: left, ArrowRight: right }[event.key];
    if (step === undefined && !other) return;
    event.preventDefault();
    const siblings = [...event.target.parentElement.children], place = siblings.indexOf(event.target);
    const list = other ? [...other.children] : siblings;
    const next = list[Math.max(0, Math.min(list.length - 1, place + (step || 0)))];
    for (const each of list) each.tabIndex = each === next ? 0 : -1;
    next.focus();
  }
  function pin(unit) {
    const same = pinned && pinned.side === unit.side && pinned.number === unit.number;
    pinned = same ? null : unit;
    for (const each of box.querySelectorAll(".token")) {
      const is = pinned && each.dataset.side === pinned.side && Number(each.dataset.unit) === pinned.number;
      each.classList.toggle("pinned", Boolean(is));
      each.setAttribute("aria-pressed", Boolean(is));
    }
    activate(unit);
  }
  const byteAt = (map, row, key) => map.own[row * map.columns + key];
  function activate(unit) {
    active = unit;
    draw();
    if (!unit) return;
    const sums = means(unit);
    const [own, others] = unit.side === "queries" ? [queryNames, names] : [names, queryNames];
    say(`${own[unit.number]} ${unit.side === "queries" ? "→" : "←"} ` +
      strongest(sums, 5).map(([place, value]) => `${others[place]} ${written(value)}`).join(", "));
  }
  function means(unit) {
    const length = unit.side === "queries" ? columns : rows;
    const sums = new Array(length).fill(0);
    for (const { map } of maps) {
      for (let other = 0; other < length; other++) {
        sums[other] += weight(unit.side === "queries" ? byteAt(map, unit.number, other) : byteAt(map, other, unit.number));
      }
    }
    return sums.map((sum) => sum / Math.max(1, maps.length));
  }
  function draw() {
    const height = Math.max(rows, columns) * ROW, width = canvas.parentElement ? canvas.clientWidth || 200 : 200;
    const context = sized(canvas, width, height);
    canvas.style.width = "100%";
    for (const { map, head } of maps) {
      context.strokeStyle = colourOf(head);
      for (let row = 0; row < rows; row++) {
        if (active && active.side === "queries" && active.number !== row) continue;
        for (let key = 0; key < columns; key++) {
          if (active && active.side === "keys" && active.number !== key) continue;
          const value = weight(byteAt(map, row, key));
          if (value < (active ? 0.005 : threshold)) continue;
          context.globalAlpha = Math.min(1, active ? 0.1 + value : value);
          context.lineWidth = active ? 0.7 + 2 * value : 1;
          context.beginPath();
          context.moveTo(0, (row + 0.5) * ROW);
          context.lineTo(width, (key + 0.5) * ROW);
          context.stroke();
        }
      }
    }
    const shown = active ? means(active) : null;
    for (const [side, list] of [["queries", left], ["keys", right]]) {
      [...list.children].forEach((each, number) => {
        const value = shown && side !== active.side ? shown[number] : 0;
        each.style.background = value > 0.005 ? `rgba(${hot()}, ${Math.min(0.85, 0.05 + value)})` : "";
      });
    }
  }
  redraws.push(draw);
  return { box, draw };
}
const hot = () => getComputedStyle(document.documentElement).getPropertyValue("--hot");

// An image with its patches in colours; a click chooses one.
function pictureWidget(grid, chosen) {
  const canvas = make("canvas", { class: "picture", role: "img", "aria-label": "image with patches" });
  const image = document.createElement("canvas");
  [image.width, image.height] = [grid.width, grid.height];
  const pixels = new ImageData(grid.width, grid.height);
  for (let i = 0; i < grid.width * grid.height; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = bytes[grid.at + 3 * i + c];
    pixels.data[4 * i + 3] = 255;
  }
  image.getContext("2d").putImageData(pixels, 0, 0);
  const scale = Math.max(1, Math.round(384 / grid.width));
  [canvas.width, canvas.height] = [grid.width * scale, grid.height * scale];
  const [wide, high] = [canvas.width / grid.columns, canvas.height / grid.rows];
  function draw(values, marked) {
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    const patches = values.slice(grid.first, grid.first + grid.rows * grid.columns);
    const top = Math.max(...patches, 1e-9);
    patches.forEach((value, patch) => {
      const x = (patch % grid.columns) * wide, y = Math.floor(patch / grid.columns) * high;
      context.fillStyle = `rgba(10, 12, 20, ${0.75 * (1 - value / top)})`;
      context.fillRect(x, y, wide, high);
    });
    if (marked === undefined || marked < grid.first) return;
    const patch = marked - grid.first;
    context.strokeStyle = `rgb(${hot()})`;
    context.lineWidth = 3;
    context.strokeRect((patch % grid.columns) * wide + 1, Math.floor(patch / grid.columns) * high + 1, wide - 2, high - 2);
  }
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * grid.columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * grid.rows);
    chosen(grid.first + row * grid.columns + column);
  });
  return { canvas, draw };
}

// A text whose tokens are coloured by numbers, the largest most.
function strip(names, values) {
  const top = Math.max(...values.filter(Number.isFinite), 1e-9);
  const text = make("p", { class: "strip" });
  names.forEach((name, number) => {
    const span = make("span", { text: name, title: `${number}: ${name}  ${written(values[number])}` });
    span.style.background = `rgba(${hot()}, ${(0.75 * values[number]) / top})`;
    text.append(span, "\u200b"); // a line may break here
  });
  return text;
}
