"use strict";
// Sorts and filters the tables and shows the images of a cell. Without the script the page shows everything else.
const cells = JSON.parse(document.getElementById("cells").textContent);
const drill = document.getElementById("drill");
let opener = null;

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function show(button) {
  const [truth, predicted] = button.dataset.cell.split(",").map(Number);
  const rows = cells.cells[button.dataset.cell] || [];
  const right = truth === predicted;
  const heading = element("h3", "", right ? `${cells.classes[truth]}, right` : `${cells.classes[truth]} classified as ${cells.classes[predicted]}`);
  const close = element("button", "link close", "close");
  close.type = "button";
  close.addEventListener("click", shut);
  const list = element("ul", "gallery");
  for (const { path, sure, picture, small } of rows.map((row) => cells.images[row])) {
    const item = element("li");
    if (picture) {
      const image = element("img", small ? "pixels" : "");
      image.src = picture;
      image.alt = path;
      item.append(element("span", "mat"));
      item.firstChild.append(image);
    }
    const caption = element("span", "caption");
    caption.append(element("span", right ? "right" : "wrong", `${Math.round(100 * sure)} %`), element("br"), element("span", "path soft", path));
    item.append(caption);
    list.append(item);
  }
  const order = right ? "least confident first" : "most confident first";
  const note = rows.length ? `${rows.length === 1 ? "1 image" : `${rows.length} images`} shown, ${order}.` : "There is no room on this page for its images; predictions.csv lists them.";
  drill.replaceChildren(close, heading, element("p", "soft small", note), list);
  drill.hidden = false;
  opener = button;
  drill.focus();
  drill.scrollIntoView({ block: "nearest" });
}

function shut() {
  drill.hidden = true;
  drill.replaceChildren();
  if (opener) opener.focus();
}

function step(event) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const move = moves[event.key];
  if (!move || !event.target.dataset.place) return;
  event.preventDefault();
  const [row, column] = event.target.dataset.place.split(",").map(Number);
  const matrix = document.getElementById("matrix");
  const size = matrix.tBodies[0].rows.length;
  for (let far = 1; far < size; far += 1) { // skip cells without images
    const next = matrix.querySelector(`[data-place="${row + far * move[0]},${column + far * move[1]}"]`);
    if (next) {
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      return;
    }
  }
}

function sortable(table) {
  for (const head of table.tHead.rows[0].cells) {
    if (!head.dataset.sort) continue;
    const button = element("button", "sort", head.textContent);
    button.type = "button";
    button.addEventListener("click", () => sort(table, head));
    head.replaceChildren(button);
  }
}

function value(row, column, numeric) {
  const cell = row.cells[column];
  if (!cell) return numeric ? -1 : "";
  const text = (cell.dataset.value || cell.textContent).replace(/[\s%]/g, "");
  return numeric ? (Number.isNaN(parseFloat(text)) ? -1 : parseFloat(text)) : cell.textContent.toLowerCase();
}

function sort(table, head) {
  const column = head.cellIndex;
  const numeric = head.dataset.sort === "number";
  const before = head.getAttribute("aria-sort");
  const up = before ? before === "descending" : !numeric; // largest numbers first
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => [value(row, column, numeric), row]);
  keyed.sort(([first], [second]) => (first < second ? -1 : first > second ? 1 : 0) * (up ? 1 : -1));
  body.append(...keyed.map(([, row]) => row));
}

function filterable(name) {
  const input = document.getElementById(`${name}-filter`);
  const table = document.getElementById(`${name}-table`);
  if (!input) return;
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of table.tBodies[0].rows) {
      row.hidden = !words.every((word) => row.dataset.name.includes(word));
      count += row.hidden ? 0 : 1;
    }
    document.getElementById(`${name}-status`).textContent = words.length ? `${count} of ${table.tBodies[0].rows.length} shown` : "";
  };
  input.addEventListener("input", filter);
  filter(); // the browser keeps the text when going back
}

for (const control of document.querySelectorAll(".controls")) control.hidden = false;
for (const table of [document.getElementById("class-table"), document.getElementById("pair-table")]) if (table) sortable(table);
for (const name of ["class", "pair"]) filterable(name);
const first = document.querySelector("#matrix [data-place]");
if (first) first.tabIndex = 0;
document.getElementById("matrix").addEventListener("keydown", step);
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-cell]");
  if (button) show(button);
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !drill.hidden) shut(); });
