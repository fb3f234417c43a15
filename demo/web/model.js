// The page's side of worker.js.

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let requests = 0;

worker.onmessage = ({ data: { id, output, error } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error) reject(new Error(error));
  else resolve(output);
};
worker.onerror = ({ message }) => {
  for (const { reject } of waiting.values()) reject(new Error(message || "worker.js could not be loaded"));
};

function ask(request) {
  return new Promise((resolve, reject) => {
    waiting.set(++requests, { resolve, reject });
    worker.postMessage({ id: requests, ...request });
  });
}

// The models of the page, as Python exported them.
export async function readModels() {
  const response = await fetch(new URL("models.json", import.meta.url));
  if (!response.ok) throw new Error(`models.json: ${response.status} ${response.statusText}`);
  return response.json();
}

// Fetch a model's weights, so that the first prediction doesn't wait for them.
export const load = (model) => ask({ model });

// What the U-Net predicts from x_t, a Float32Array of all images, at timestep t. Labels: one number for each image.
export const predict = (model, x_t, t, labels) => ask({ model, x_t, t, labels });
