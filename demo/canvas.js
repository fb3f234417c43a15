// A canvas of 28 x 28 pixels, each open (-1) or a gray level 0 to 255. props.value holds them, separated by commas.
const SIZE = 28, CELL = 12;
const canvas = element.querySelector("canvas");
const status = element.querySelector(".pad-status");
const context = canvas.getContext("2d");
let pixels = new Array(SIZE * SIZE).fill(-1);
let cursor = null; // [column, row] of the keyboard
let penDown = false;
let last = null; // where the pointer was

function paint() {
  for (let row = 0; row < SIZE; row++) {
    for (let column = 0; column < SIZE; column++) {
      const level = pixels[row * SIZE + column];
      const open = (row + column) % 2 ? "#46586f" : "#50647d";
      context.fillStyle = level < 0 ? open : `rgb(${level}, ${level}, ${level})`;
      context.fillRect(column * CELL, row * CELL, CELL, CELL);
    }
  }
  if (cursor) {
    context.lineWidth = 3;
    context.strokeStyle = penDown ? "#f59e0b" : "#38bdf8";
    context.strokeRect(cursor[0] * CELL - 1, cursor[1] * CELL - 1, CELL + 2, CELL + 2);
  }
}

// One dab of the tool. Ink has soft edges, as MNIST's has.
function dab(x, y) {
  const tool = element.querySelector("input:checked").value;
  const radius = tool === "ink" ? 1.7 : 2.2;
  for (let row = Math.max(0, Math.floor(y - 3)); row < Math.min(SIZE, y + 3); row++) {
    for (let column = Math.max(0, Math.floor(x - 3)); column < Math.min(SIZE, x + 3); column++) {
      const inside = radius - Math.hypot(column + 0.5 - x, row + 0.5 - y);
      const i = row * SIZE + column;
      if (inside <= 0.1) continue;
      if (tool === "ink") pixels[i] = Math.max(pixels[i], Math.min(255, Math.round(inside * 280)));
      else pixels[i] = tool === "paper" ? 0 : -1;
    }
  }
}

function line([x0, y0], [x1, y1]) {
  const dabs = Math.ceil(Math.hypot(x1 - x0, y1 - y0) * 2) || 1;
  for (let i = 1; i <= dabs; i++) dab(x0 + ((x1 - x0) * i) / dabs, y0 + ((y1 - y0) * i) / dabs);
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * SIZE, ((event.clientY - box.top) / box.height) * SIZE];
}

function finish() {
  paint();
  props.value = pixels.join(",");
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  cursor = null;
  last = place(event);
  dab(...last);
  paint();
});
canvas.addEventListener("pointermove", (event) => {
  if (!last) return;
  const next = place(event);
  line(last, next);
  last = next;
  paint();
});
for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, () => {
    if (last) finish();
    last = null;
  });
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
canvas.addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  if (!move && event.key !== " ") return;
  event.preventDefault(); // the page doesn't scroll
  cursor ??= [SIZE / 2, SIZE / 2];
  if (move) cursor = cursor.map((c, axis) => Math.min(SIZE - 1, Math.max(0, c + move[axis])));
  else penDown = !penDown;
  if (penDown) dab(cursor[0] + 0.5, cursor[1] + 0.5);
  status.textContent = `Column ${cursor[0] + 1}, row ${cursor[1] + 1}, pen ${penDown ? "down" : "up"}.`;
  finish();
});
canvas.addEventListener("blur", () => {
  cursor = null;
  penDown = false;
  status.textContent = "";
  paint();
});

element.querySelector(".pad-clear").addEventListener("click", () => {
  pixels.fill(-1);
  finish();
});

function read() {
  const given = (props.value || "").split(",").map(Number);
  if (given.length === SIZE * SIZE && given.join() !== pixels.join()) pixels = given;
  paint();
}
watch("value", read); // from the server
read();
