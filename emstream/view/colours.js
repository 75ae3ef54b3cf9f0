// Colour maps: 256 colours each, interpolated between a few. All grow lighter from end to end.

const ANCHORS = {
  grey: ["000000", "ffffff"],
  inverted: ["ffffff", "000000"],
  viridis: ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"],
  magma: ["000004", "180f3d", "440f76", "721f81", "9e2f7f", "cd4071", "f1605d", "fd9668", "feca8d", "fcfdbf"],
  inferno: ["000004", "1b0c41", "4a0c6b", "781c6d", "a52c60", "cf4446", "ed6925", "fb9b06", "f7d13d", "fcffa4"],
};

export const NAMES = Object.keys(ANCHORS);

const littleEndian = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;

// [red, green, blue] of each of the 256 levels.
export function colours(name) {
  const anchors = ANCHORS[name].map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, level) => {
    const place = (level / 255) * (anchors.length - 1);
    const before = Math.min(Math.floor(place), anchors.length - 2);
    return anchors[before].map((from, i) => Math.round(from + (place - before) * (anchors[before + 1][i] - from)));
  });
}

// The same as words of ImageData.
export function words(name) {
  return Uint32Array.from(colours(name), ([red, green, blue]) => (littleEndian
    ? (0xff << 24) | (blue << 16) | (green << 8) | red
    : (red << 24) | (green << 16) | (blue << 8) | 0xff));
}

export const css = ([red, green, blue]) => `rgb(${red}, ${green}, ${blue})`;

export const gradient = (name) =>
  Array.from({ length: 9 }, (_, i) => css(colours(name)[Math.round((i * 255) / 8)]));
