// The last seconds below the pictures: pause, step, and see where something went wrong.

import { element, setText } from "./text.js";

export class Timeline {
  #history = { first: 0, last: 0, seconds: 0, faults: [] };
  #shown = 0; // key of the pair on the screen
  #comes = false; // frames do
  at = null; // key to stay at; null follows the newest

  constructor(onChange) {
    this.onChange = onChange;
    this.track = element("track");
    element("pause").addEventListener("click", () => this.toggle());
    element("back").addEventListener("click", () => this.step(-1));
    element("forward").addEventListener("click", () => this.step(1));
    const seek = (event) => {
      const box = this.track.getBoundingClientRect();
      const place = Math.min(Math.max(0, (event.clientX - box.left) / box.width), 1);
      this.#go(this.#history.first + place * (this.#history.last - this.#history.first));
    };
    this.track.addEventListener("pointerdown", (event) => {
      this.track.setPointerCapture(event.pointerId);
      seek(event);
    });
    this.track.addEventListener("pointermove", (event) => { if (event.buttons) seek(event); });
    new ResizeObserver(() => this.draw()).observe(this.track);
  }

  take(header) {
    this.#history = header.history ?? this.#history;
    if (header.key) this.#shown = header.key;
    this.#comes = header.state === "live";
    this.draw();
  }

  toggle() {
    if (this.at === null) this.#go(this.#shown);
    else this.live();
  }

  step(frames) {
    this.#go((this.at ?? this.#shown) + frames);
  }

  oldest() {
    this.#go(this.#history.first);
  }

  live() {
    this.at = null;
    this.#changed();
  }

  #go(key) {
    if (!this.#shown) return;
    const { first, last } = this.#history;
    this.at = Math.min(Math.max(Math.round(key), first), last);
    this.#changed();
  }

  #changed() {
    document.body.classList.toggle("paused", this.at !== null);
    this.draw();
    this.onChange();
  }

  draw() {
    const { first, last, seconds, faults } = this.#history;
    const { track } = this;
    const [width, height] = [track.clientWidth, track.clientHeight].map((length) => length * devicePixelRatio);
    if (track.width !== width || track.height !== height) [track.width, track.height] = [width, height];
    const context = track.getContext("2d");
    context.clearRect(0, 0, width, height);
    const place = (key) => (last > first ? (key - first) / (last - first) : 1) * (width - 12 * devicePixelRatio) + 6 * devicePixelRatio;
    const line = Math.max(2, Math.round(2 * devicePixelRatio));
    context.fillStyle = "#212932";
    context.fillRect(0, (height - line) / 2, width, line);
    const key = this.at ?? last;
    const live = this.at === null && this.#comes;
    context.fillStyle = live ? "#2c7a6d" : "#8592a0";
    context.fillRect(0, (height - line) / 2, place(key), line);
    context.fillStyle = "#ff6159";
    for (const fault of faults) context.fillRect(place(fault) - line / 2, height * 0.2, line, height * 0.6);
    context.fillStyle = live ? "#46c7b0" : "#dde4ea";
    context.beginPath();
    context.arc(place(key), height / 2, 5 * devicePixelRatio, 0, 7);
    context.fill();
    const behind = last > first ? (seconds * (last - key)) / (last - first) : 0;
    const paused = `paused, ${behind ? "−" : ""}${behind.toFixed(1)} s`;
    setText("when", live ? "live" : this.at === null ? "no frames" : paused);
    track.dataset.faults = faults.length;
    track.dataset.frames = last - first + (last ? 1 : 0);
  }
}
