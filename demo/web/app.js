// The page: reads the controls, runs DDIM, shows the trajectory.

import { ddim, guided } from "./ddim.js";
import { load, predict, readModels } from "./model.js";
import { gaussianNoise } from "./noise.js";

const $ = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");

let models = [];
let trajectory = { steps: [], shape: [] }; // {t, x_t, x0_hat} of each step, and the shape of an image
let latest = 0; // the run that may draw; a newer one or Stop ends the others

function say(message, isError = false) {
  $("status").textContent = message;
  $("status").classList.toggle("error", isError);
}

const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

// Images in [-1, 1] as gray levels, side by side in a square.
function paint(canvas, images) {
  const [, height, width] = trajectory.shape;
  const count = images.length / (height * width);
  const columns = Math.ceil(Math.sqrt(count));
  canvas.width = columns * width;
  canvas.height = Math.ceil(count / columns) * height;
  canvas.style.aspectRatio = `${canvas.width} / ${canvas.height}`;
  const context = canvas.getContext("2d");
  for (let i = 0; i < count; i++) {
    const tile = context.createImageData(width, height);
    for (let j = 0; j < height * width; j++) {
      const gray = (images[i * height * width + j] / 2 + 0.5) * 255; // the array rounds and clamps to 0 ... 255
      tile.data.set([gray, gray, gray, 255], 4 * j);
    }
    context.putImageData(tile, (i % columns) * width, Math.floor(i / columns) * height);
  }
}

// Show the step that the slider is at.
function show() {
  const step = Math.min($("step").value, trajectory.steps.length - 1); // a run that was stopped has no more
  const { t, x_t, x0_hat } = trajectory.steps[step];
  $("step").value = step;
  const where = t < 0 ? "the end" : `step ${step + 1} of ${$("step").max}, t = ${t}`;
  paint($("x_t"), x_t);
  paint($("x0_hat"), x0_hat);
  $("x_t").setAttribute("aria-label", `Sample, ${where}`);
  $("x0_hat").setAttribute("aria-label", `Predicted images, ${where}`);
  $("step").setAttribute("aria-valuetext", where);
  $("where").textContent = where;
}

// The model and the number of steps that are chosen.
function choice() {
  const [model, steps] = $("steps").value.split(":").map(Number);
  return { model: models[model], timesteps: models[model].timesteps[steps] };
}

const chosenClass = () => $("controls").elements.digit?.value ?? "";

// Run DDIM with what the controls say.
async function draw() {
  if (!$("controls").reportValidity()) return;
  const run = ++latest;
  const { model, timesteps } = choice();
  const [count, seed, scale] = ["count", "seed", "guidance_scale"].map((id) => Number($(id).value));
  const noLabel = model.classes.length;
  const digit = chosenClass();
  const labels = noLabel ? Array(count).fill(digit === "" ? noLabel : Number(digit)) : undefined;
  const network = (x_t, t, labels) => predict(model, x_t, t, labels);
  const guide = labels && digit !== "" ? scale : 1;

  $("stop").disabled = false;
  say("Drawing …");
  const start = performance.now();
  try {
    const noise = gaussianNoise(seed, count, model.shape.reduce((a, b) => a * b));
    const steps = [];
    for await (const step of ddim(model, timesteps, noise, (x_t, t) => guided(network, x_t, t, labels, noLabel, guide))) {
      if (run !== latest) return;
      steps.push(step);
      trajectory = { steps, shape: model.shape };
      Object.assign($("step"), { max: timesteps.length, value: steps.length - 1, disabled: false });
      if (!calm.matches || step.t < 0) show();
    }
    const seconds = ((performance.now() - start) / 1000).toFixed(2);
    say(`${plural(count, "image")} in ${plural(timesteps.length, "step")}, ${seconds} s.`);
  } catch (error) {
    if (run === latest) say(`This did not work: ${error.message}`, true);
  }
  if (run === latest) $("stop").disabled = true;
}

function stop() {
  latest++;
  $("stop").disabled = true;
  say("Stopped. The slider goes back through the steps so far.");
  if (trajectory.steps.length) show();
}

// Show the controls that the models have.
function adapt() {
  $("digits").hidden = $("guidance").hidden = models.at(-1).classes.length === 0;
  $("guidance_scale").disabled = chosenClass() === "";
  $("scale").textContent = Number($("guidance_scale").value).toFixed(1);
}

function fillControls() {
  for (const [i, model] of models.entries()) {
    const name = i < models.length - 1 ? " (few-step model)" : ""; // it stands first
    for (const n of Object.keys(model.timesteps)) $("steps").append(new Option(n + name, `${i}:${n}`));
  }
  const isFew = models.length > 1;
  [$("steps").value, $("count").value] = isFew ? ["0:1", "9"] : ["0:5", "4"]; // what is there in a second
  const { classes } = models.at(-1);
  for (const [value, name] of [["", "any"], ...classes.entries()]) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "digit", value });
    input.checked = value === "";
    label.append(input, Object.assign(document.createElement("span"), { textContent: name }));
    $("choices").append(label);
  }
  adapt();
}

$("step").addEventListener("input", show);
$("guidance_scale").addEventListener("input", adapt);
$("stop").addEventListener("click", stop);
$("new_seed").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 10000;
  draw();
});
$("controls").addEventListener("change", ({ target }) => {
  if (models.at(-1).classes.length && choice().model.classes.length === 0) { // the few-step model knows no digits
    if (target.name === "digit") $("steps").value = `${models.length - 1}:10`;
    else $("controls").elements.digit.value = "";
  }
  adapt();
  draw();
});
$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});

try {
  models = await readModels();
  fillControls();
  await draw(); // the few-step model, if there is one
  await Promise.all(models.map(load));
} catch (error) {
  say(`This did not work: ${error.message}`, true);
}
