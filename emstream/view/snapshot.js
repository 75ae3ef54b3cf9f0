// What is on the screen as a PNG that can go into a talk: both sides, scales, and every header field inside.

const GAP = 12;
const TEXT = "#dde4ea";
const DIM = "#8592a0";
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';

// Draws at once; returns what makes the file, given the header that goes into it as JSON.
export function png(sides, { titles, line, bar, wiped }) {
  const [height, width] = sides[0].viewport.screen;
  const unit = Math.max(1, Math.round(Math.min(width, height) / 340));
  const [top, bottom] = [20 * unit, 22 * unit];
  const canvas = document.createElement("canvas");
  canvas.width = wiped === null ? 2 * width + GAP * unit : width;
  canvas.height = top + height + bottom;
  const context = canvas.getContext("2d", { alpha: false });
  context.fillStyle = "#0a0d10";
  context.fillRect(0, 0, canvas.width, canvas.height);
  sides.forEach((side, i) => {
    const from = wiped === null ? i * (width + GAP * unit) : 0;
    const begin = wiped !== null && i === 1 ? Math.round(wiped * width) : 0;
    context.save();
    context.beginPath();
    context.rect(from + begin, top, width - begin, height);
    context.clip();
    context.fillStyle = "#050708";
    context.fill();
    side.paint(context, from, top);
    if (wiped === null || i === 0) paintBar(context, bar, from, top + height, unit);
    if (!side.spectrumBox.hidden) paintSpectrum(context, side, from, top, unit);
    context.restore();
    const right = wiped !== null && i === 1;
    write(context, titles[i], right ? canvas.width - 4 * unit : from + 4 * unit, 14 * unit, 11 * unit, TEXT, right);
  });
  write(context, line, 4 * unit, top + height + 15 * unit, 9.5 * unit, DIM, false, canvas.width - 8 * unit);
  return async (header) => {
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    const bytes = new Uint8Array(await blob.arrayBuffer());
    return new Blob([withText(bytes, JSON.stringify(header))], { type: "image/png" });
  };
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function paintSpectrum(context, side, left, top, unit) {
  const stage = side.canvas.getBoundingClientRect();
  const box = side.spectrumCanvas.getBoundingClientRect();
  const [x, y, width, height] = [box.left - stage.left, box.top - stage.top, box.width, box.height]
    .map((length) => length * devicePixelRatio);
  context.imageSmoothingEnabled = true;
  context.drawImage(side.spectrumCanvas, left + x, top + y, width, height);
  context.strokeStyle = DIM;
  context.strokeRect(left + x, top + y, width, height);
  write(context, side.spectrumBox.textContent.trim(), left + x + 4 * unit, top + y + 10 * unit, 8 * unit, TEXT);
}

function paintBar(context, { width, text }, left, foot, unit) {
  const [x, y] = [left + 10 * unit, foot - 12 * unit];
  context.fillStyle = "#000a";
  context.fillRect(x - 4 * unit, y - 16 * unit, width + 8 * unit, 23 * unit);
  context.fillStyle = "#fff";
  context.fillRect(x, y, width, 3 * unit);
  context.textAlign = "center";
  context.font = `600 ${11 * unit}px ${FONT}`;
  context.fillText(text, x + width / 2, y - 4 * unit);
}

function write(context, text, x, y, size, colour, right, most) {
  context.font = `${size}px ${FONT}`;
  context.fillStyle = colour;
  context.textAlign = right ? "right" : "left";
  context.fillText(text, x, y, most);
}

// -- the header inside the file: an iTXt chunk before the pixels ------------------------

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

function withText(file, text) {
  const encoder = new TextEncoder();
  const content = encoder.encode(`iTXtemstream\0\0\0\0\0${text}`); // keyword, not compressed, no language
  const chunk = new Uint8Array(content.length + 8);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, content.length - 4);
  chunk.set(content, 4);
  view.setUint32(content.length + 4, crc32(content));
  const start = 33; // after the signature and IHDR
  const whole = new Uint8Array(file.length + chunk.length);
  whole.set(file.subarray(0, start));
  whole.set(chunk, start);
  whole.set(file.subarray(start), start + chunk.length);
  return whole;
}
