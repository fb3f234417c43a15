// Noise from a seed: image i is a function of the seed and of i alone.

// Uniform numbers in [0, 1): the generator sfc32 of PractRand.
function uniform(seed, index) {
  let [a, b, c, count] = [seed, index, 0x9e3779b9, 1];
  const next = () => {
    const sum = (a + b + count++) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + sum) | 0;
    return (sum >>> 0) / 2 ** 32;
  };
  for (let i = 0; i < 20; i++) next(); // until each bit of the seed has reached all others
  return next;
}

// N(0, I) of `size` numbers for each of `count` images (Box and Muller).
export function gaussianNoise(seed, count, size) {
  const noise = new Float32Array(count * size);
  for (let i = 0; i < count; i++) {
    const next = uniform(seed, i);
    for (let j = 0; j < size; j += 2) {
      const radius = Math.sqrt(-2 * Math.log(1 - next()));
      const angle = 2 * Math.PI * next();
      noise[i * size + j] = radius * Math.cos(angle);
      if (j + 1 < size) noise[i * size + j + 1] = radius * Math.sin(angle);
    }
  }
  return noise;
}
