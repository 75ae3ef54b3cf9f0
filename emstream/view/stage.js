// What part of the frame both stages show, and the hands that move it.
//
// x, y: the frame's pixel in the middle of the stage. zoom: the screen's pixels per pixel of the frame.

const MOST_ZOOM = 64;
const MARGIN = 1 / 8; // more than is shown is asked for, so that a drag has something to uncover
const SCREEN_STEP = 64; // viewers with windows of about a size ask for the same picture

export class Viewport {
  #pointers = new Map();
  fitted = true;
  zoom = 1;
  x = 0;
  y = 0;

  // stages: the elements to move in. onChange: called after every move.
  constructor(stages, onChange) {
    this.stages = stages;
    this.onChange = onChange;
    this.frame = null; // [height, width]
    for (const stage of stages) this.#listen(stage);
    const resized = new ResizeObserver(() => {
      if (this.fitted) this.#fit();
      this.onChange();
    });
    for (const stage of stages) resized.observe(stage);
  }

  // Size of a stage on the screen [px of the screen].
  get screen() {
    const [stage] = this.stages;
    return [stage.clientHeight, stage.clientWidth].map((length) => Math.max(1, Math.round(length * devicePixelRatio)));
  }

  setFrame(shape) {
    if (this.frame && this.frame[0] === shape[0] && this.frame[1] === shape[1]) return;
    this.frame = shape;
    this.fit();
  }

  fit() {
    if (!this.frame) return;
    this.fitted = true;
    this.#fit();
    this.onChange();
  }

  get #fitZoom() {
    const [height, width] = this.screen;
    return Math.min(height / this.frame[0], width / this.frame[1]);
  }

  #fit() {
    if (!this.frame) return;
    this.zoom = this.#fitZoom;
    [this.y, this.x] = this.frame.map((length) => length / 2);
  }

  // Zoom to `zoom`, so that the frame's pixel under (across, down) [px of the screen, from the middle] stays.
  zoomTo(zoom, across = 0, down = 0) {
    if (!this.frame) return;
    const fit = this.#fitZoom;
    zoom = Math.min(Math.max(zoom, Math.min(fit, 1)), Math.max(MOST_ZOOM, fit));
    if (Math.abs(zoom - fit) < 1e-6 * fit) return this.fit();
    this.x += across / this.zoom - across / zoom;
    this.y += down / this.zoom - down / zoom;
    this.zoom = zoom;
    this.#moved();
  }

  zoomBy(factor, across = 0, down = 0) {
    this.zoomTo(this.zoom * factor, across, down);
  }

  move(across, down) {
    if (!this.frame || this.fitted) return;
    this.x -= across / this.zoom;
    this.y -= down / this.zoom;
    this.#moved();
  }

  #moved() {
    this.fitted = false;
    const [height, width] = this.screen;
    this.x = inside(this.x, this.frame[1], width / this.zoom);
    this.y = inside(this.y, this.frame[0], height / this.zoom);
    this.onChange();
  }

  // Where the frame's pixel (0, 0) begins on a canvas of the stage's size [px of the screen].
  get corner() {
    const [height, width] = this.screen;
    return [Math.round(height / 2 - this.y * this.zoom), Math.round(width / 2 - this.x * this.zoom)];
  }

  // Part of the frame that a stage shows: [top, left, height, width], and the same to ask the server for.
  get shown() {
    const [top, left] = this.corner;
    const [height, width] = this.screen;
    return [-top, -left, height, width].map((length) => length / this.zoom);
  }

  get wanted() {
    if (!this.frame) return {};
    const [top, left, height, width] = this.shown;
    const first = [top - MARGIN * height, left - MARGIN * width].map((at) => Math.max(0, Math.floor(at)));
    const last = [top + (1 + MARGIN) * height, left + (1 + MARGIN) * width]
      .map((at, axis) => Math.min(this.frame[axis], Math.ceil(at)));
    const size = last.map((end, axis) => Math.max(1, end - first[axis]));
    const all = size[0] === this.frame[0] && size[1] === this.frame[1];
    const screen = size.map((length) =>
      Math.min(4096, Math.max(1, Math.round((length * this.zoom) / SCREEN_STEP)) * SCREEN_STEP));
    return { region: all ? null : [...first, ...size], screen };
  }

  #listen(stage) {
    const fromMiddle = (event) => {
      const box = stage.getBoundingClientRect();
      return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2]
        .map((length) => length * devicePixelRatio);
    };
    stage.addEventListener("wheel", (event) => {
      event.preventDefault();
      const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1;
      this.zoomBy(Math.exp(-Math.max(-120, Math.min(120, event.deltaY * lines)) / 400), ...fromMiddle(event));
    }, { passive: false });
    stage.addEventListener("dblclick", () => this.fit());
    stage.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      stage.setPointerCapture(event.pointerId);
      this.#pointers.set(event.pointerId, fromMiddle(event));
    });
    stage.addEventListener("pointermove", (event) => {
      const before = this.#pointers.get(event.pointerId);
      if (!before) return;
      const [across, down] = fromMiddle(event);
      this.#pointers.set(event.pointerId, [across, down]);
      if (this.#pointers.size === 1) {
        this.move(across - before[0], down - before[1]);
      } else if (this.#pointers.size === 2) {
        const [other] = [...this.#pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
        const gap = (at) => Math.max(1, Math.hypot(at[0] - other[0], at[1] - other[1]));
        const middle = [(across + other[0]) / 2, (down + other[1]) / 2];
        this.zoomBy(gap([across, down]) / gap(before), ...middle);
        this.move((across - before[0]) / 2, (down - before[1]) / 2);
      }
    });
    for (const end of ["pointerup", "pointercancel"]) {
      stage.addEventListener(end, (event) => this.#pointers.delete(event.pointerId));
    }
  }
}

// The middle of a stage, kept so that no more is empty than has to be.
function inside(middle, frame, shown) {
  return shown >= frame ? frame / 2 : Math.min(Math.max(middle, shown / 2), frame - shown / 2);
}
