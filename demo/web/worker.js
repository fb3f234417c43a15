// The U-Net, in a thread of its own: the page stays responsive. onnxruntime-web runs on one thread of WebAssembly.

import * as ort from "./ort/ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1; // more would need cross-origin isolation, which plain hosts don't give
ort.env.wasm.wasmPaths = { wasm: new URL("ort/ort-wasm-simd-threaded.wasm", import.meta.url).href };

const sessions = {};

function load(file) {
  return (sessions[file] ??= ort.InferenceSession.create(new URL(file, import.meta.url).href));
}

async function answer({ model, x_t, t, labels }) {
  const session = await load(model.file);
  if (!x_t) return null; // to load was all that was asked for
  const [channels, height, width] = model.shape;
  const count = x_t.length / (channels * height * width);
  const inputs = {
    sample: new ort.Tensor("float32", x_t, [count, channels, height, width]),
    timestep: new ort.Tensor("float32", new Float32Array(count).fill(t), [count]),
  };
  if (labels) inputs.class_labels = new ort.Tensor("int64", BigInt64Array.from(labels, BigInt), [count]);
  const { out_sample } = await session.run(inputs);
  return out_sample.data;
}

let last = Promise.resolve(); // a session runs one request at a time
self.onmessage = ({ data: { id, ...request } }) => {
  last = last
    .then(() => answer(request))
    .then((output) => self.postMessage({ id, output }))
    .catch((error) => self.postMessage({ id, error: String(error.message ?? error) }));
};
