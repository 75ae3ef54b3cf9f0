// One side of the page: its picture, its Fourier transform, its histogram with the ends of the contrast.

import { element, lengthText, level, setText } from "./text.js";
import { css } from "./colours.js";

const SMOOTH_BELOW = 2; // screen pixels per pixel; from here on every pixel is a square
const GRAB_PX = 24;

export class Side {
  #patch = document.createElement("canvas"); // pixels as they came
  #greys = null;
  #image = null;
  #picture = null;
  #words = null;
  #spectrum = null;
  #spectrumImage = null;
  #dragged = null;

  // onContrast(low, high): the ends were dragged; onContrast(): back to percentiles.
  constructor(name, viewport, onContrast) {
    this.name = name;
    this.viewport = viewport;
    this.canvas = element(name);
    this.histogram = element(`${name}-histogram`);
    this.spectrumBox = element(`${name}-spectrum-box`);
    this.spectrumCanvas = element(`${name}-spectrum`);
    this.#listenToHistogram(onContrast);
  }

  show(picture, frame) {
    const [height, width] = picture.shape;
    if (this.#image?.width !== width || this.#image.height !== height) {
      [this.#patch.width, this.#patch.height] = [width, height];
      this.#image = this.#patch.getContext("2d").createImageData(width, height);
    }
    this.#greys = picture.pixels;
    this.#picture = picture;
    this.#colour();
    Object.assign(this.canvas.dataset, { frame, low: picture.low, high: picture.high });
    this.draw();
    this.#drawHistogram();
  }

  showSpectrum(picture) {
    this.#spectrum = picture;
    this.spectrumBox.hidden = !picture;
    if (picture) this.#drawSpectrum();
  }

  // Colours of the 256 levels, as words of ImageData and as [red, green, blue].
  setColours(words, table) {
    this.#words = words;
    this.table = table;
    if (!this.#picture) return;
    this.#colour();
    this.draw();
    this.#drawHistogram();
    if (this.#spectrum) this.#drawSpectrum();
  }

  draw() {
    const [height, width] = this.viewport.screen;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      [this.canvas.width, this.canvas.height] = [width, height];
    }
    if (!this.#picture) return;
    const context = this.canvas.getContext("2d", { alpha: false });
    context.fillStyle = "#050708";
    context.fillRect(0, 0, width, height);
    this.paint(context, 0, 0);
    this.canvas.dataset.shown = JSON.stringify(this.viewport.shown);
  }

  // The picture as it stands, its stage's corner at (left, top) of a context.
  paint(context, left, top) {
    const zoom = this.viewport.zoom;
    const [y, x] = this.viewport.corner;
    const [firstRow, firstColumn, rows, columns] = this.#picture.region;
    const magnified = (columns * zoom) / this.#patch.width;
    context.imageSmoothingEnabled = magnified < SMOOTH_BELOW && magnified !== 1;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#patch, left + x + firstColumn * zoom, top + y + firstRow * zoom, columns * zoom, rows * zoom);
  }

  #colour() {
    const words = new Uint32Array(this.#image.data.buffer);
    for (let i = 0; i < this.#greys.length; i++) words[i] = this.#words[this.#greys[i]];
    this.#patch.getContext("2d").putImageData(this.#image, 0, 0);
  }

  #drawSpectrum() {
    const [height, width] = this.#spectrum.shape;
    const canvas = this.spectrumCanvas;
    if (canvas.width !== width || canvas.height !== height || !this.#spectrumImage) {
      [canvas.width, canvas.height] = [width, height];
      this.#spectrumImage = canvas.getContext("2d").createImageData(width, height);
    }
    const words = new Uint32Array(this.#spectrumImage.data.buffer);
    this.#spectrum.pixels.forEach((grey, i) => { words[i] = this.#words[grey]; });
    canvas.getContext("2d").putImageData(this.#spectrumImage, 0, 0);
    canvas.dataset.halvings = this.#spectrum.halvings;
  }

  // Spacing [px of the frame] at the edges of the Fourier transform.
  get edgeSpacing() {
    return 2 * 2 ** this.#spectrum.halvings;
  }

  // Spacing [px of the frame] that a place in the Fourier transform stands for, from 0 to 1 across and down.
  spacing(across, down) {
    const [height, width] = this.#spectrum.shape;
    const edge = 1 / this.edgeSpacing; // cycles per pixel
    const x = ((across * width - 0.5 - Math.floor(width / 2)) / (width / 2)) * edge;
    const y = ((down * height - 0.5 - Math.floor(height / 2)) / (height / 2)) * edge;
    return 1 / Math.hypot(x, y);
  }

  // -- histogram -----------------------------------------------------------------

  #drawHistogram() {
    const { low, high, histogram } = this.#picture;
    const canvas = this.histogram;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((length) => length * devicePixelRatio);
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    const bar = Math.round(5 * devicePixelRatio);
    const foot = height - bar - Math.round(2 * devicePixelRatio);
    context.clearRect(0, 0, width, height);

    const most = Math.max(1, ...histogram.counts);
    const step = width / histogram.counts.length;
    context.fillStyle = "#5d6b79";
    histogram.counts.forEach((count, i) => {
      const tall = Math.sqrt(count / most) * foot;
      context.fillRect(i * step, foot - tall, Math.max(1, step - (step > 4 ? 1 : 0)), tall);
    });

    const [from, to] = [low, high].map((value) => this.#place(value) * width);
    const colours = context.createLinearGradient(from, 0, Math.max(to, from + 1), 0);
    for (let i = 0; i <= 8; i++) colours.addColorStop(i / 8, css(this.table[Math.round((i * 255) / 8)]));
    context.fillStyle = colours;
    context.fillRect(0, height - bar, width, bar);
    context.fillStyle = "#46c7b0";
    for (const at of [from, to]) {
      context.fillRect(Math.min(Math.max(0, at - devicePixelRatio), width - 2 * devicePixelRatio), 0, 2 * devicePixelRatio, height);
    }
    setText(`${this.name}-low`, level(low));
    setText(`${this.name}-high`, level(high));
    canvas.dataset.counts = histogram.counts.reduce((sum, count) => sum + count, 0);
  }

  // Where a value lies in the histogram, from 0 to 1.
  #place(value) {
    const { from, to } = this.#picture.histogram;
    return Math.min(Math.max(0, (value - from) / (to - from)), 1);
  }

  #listenToHistogram(onContrast) {
    const valueAt = (event) => {
      const box = this.histogram.getBoundingClientRect();
      const { from, to } = this.#dragged.histogram;
      return from + Math.min(Math.max(0, (event.clientX - box.left) / box.width), 1) * (to - from);
    };
    this.histogram.addEventListener("pointerdown", (event) => {
      if (!this.#picture) return;
      this.histogram.setPointerCapture(event.pointerId);
      const { low, high, histogram } = this.#picture;
      const box = this.histogram.getBoundingClientRect();
      const away = [low, high].map((value) => Math.abs(event.clientX - box.left - this.#place(value) * box.width));
      if (Math.min(...away) > GRAB_PX) return;
      this.#dragged = { end: away[0] <= away[1] ? "low" : "high", low, high, histogram };
    });
    this.histogram.addEventListener("pointermove", (event) => {
      if (!this.#dragged) return;
      const { histogram } = this.#dragged;
      const least = (histogram.to - histogram.from) / 200;
      this.#dragged[this.#dragged.end] = valueAt(event);
      const { end } = this.#dragged;
      if (end === "low") this.#dragged.low = Math.min(this.#dragged.low, this.#dragged.high - least);
      else this.#dragged.high = Math.max(this.#dragged.high, this.#dragged.low + least);
      onContrast(this.name, this.#dragged.low, this.#dragged.high);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      this.histogram.addEventListener(end, () => { this.#dragged = null; });
    }
    this.histogram.addEventListener("dblclick", () => onContrast(this.name));
  }
}

// A bar of a round length, at most `most` [px of the screen] long: its width and its words.
export function scaleBar(zoom, pixelSize, most) {
  const unit = pixelSize ?? 1;
  const longest = (most / zoom) * unit;
  const power = 10 ** Math.floor(Math.log10(longest));
  const length = [5, 2, 1].map((digit) => digit * power).find((each) => each <= longest * 1.0000001);
  const text = pixelSize ? lengthText(length, 1) : `${Number(length.toPrecision(1))} px`;
  return { width: (length / unit) * zoom, text };
}
