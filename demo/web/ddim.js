// DDIM (Song et al., arXiv 2010.02502) with eta = 0, as in MNISTDDIMScheduler of the Python package.
//
// `model` is an entry of models.json, which Python wrote: alphas_cumprod, final_alpha_cumprod, prediction_type, clip.
// Symbols are DDPM's: alpha_bar_t is DDIM's alpha_t. a = sqrt(alpha_bar_t), s = sqrt(1 - alpha_bar_t).

const PREDICTED_X0 = {
  epsilon: (x, eps, a, s) => (x - s * eps) / a, // DDPM, equation 15
  sample: (x, x0) => x0,
  v_prediction: (x, v, a, s) => a * x - s * v, // Salimans and Ho, arXiv 2202.00512
};

const PREDICTED_EPS = {
  epsilon: (x, eps) => eps,
  sample: (x, x0, a, s) => (x - a * x0) / s,
  v_prediction: (x, v, a, s) => s * x + a * v,
};

// Go from noise x_T to images. Yields {t, x_t, x0_hat} for each timestep, and at the end the images with t = -1.
// predict(x_t, t) gives what the U-Net predicts.
export async function* ddim(model, timesteps, x_T, predict) {
  const clip = model.clip ?? Infinity; // clip_sample_range, null without clip_sample
  const predictX0 = PREDICTED_X0[model.prediction_type];
  const predictEps = PREDICTED_EPS[model.prediction_type];
  let x_t = x_T;
  for (const [i, t] of timesteps.entries()) {
    const alpha_bar_t = model.alphas_cumprod[t];
    const alpha_bar_prev = model.alphas_cumprod[timesteps[i + 1]] ?? model.final_alpha_cumprod;
    const [a, s] = [Math.sqrt(alpha_bar_t), Math.sqrt(1 - alpha_bar_t)];
    const [a_prev, s_prev] = [Math.sqrt(alpha_bar_prev), Math.sqrt(1 - alpha_bar_prev)];

    const output = await predict(x_t, t);
    const x0_hat = x_t.map((x, j) => Math.min(clip, Math.max(-clip, predictX0(x, output[j], a, s))));
    yield { t, x_t, x0_hat };
    x_t = x_t.map((x, j) => a_prev * x0_hat[j] + s_prev * predictEps(x, output[j], a, s)); // equation 12
  }
  yield { t: -1, x_t, x0_hat: x_t };
}

// weak + scale (strong - weak), with labels and without in one batch: classifier-free guidance (arXiv 2207.12598).
export async function guided(predict, x_t, t, labels, noLabel, scale) {
  if (scale === 1) return predict(x_t, t, labels);
  const n = x_t.length;
  const twice = new Float32Array(2 * n);
  twice.set(x_t);
  twice.set(x_t, n);
  const output = await predict(twice, t, [...labels, ...labels.map(() => noLabel)]);
  return output.slice(0, n).map((strong, j) => output[n + j] + scale * (strong - output[n + j]));
}
