// The live page: what comes in goes to its parts, what the operator does becomes a request.

import { NAMES, colours, words } from "./colours.js";
import { listen } from "./keys.js";
import { Live } from "./live.js";
import { Recording } from "./record.js";
import { Readout } from "./readout.js";
import { Side, scaleBar } from "./side.js";
import { png, save } from "./snapshot.js";
import { Viewport } from "./stage.js";
import { digits, element, fixed, lengthText, setText } from "./text.js";
import { Timeline } from "./timeline.js";

const SIDES = ["raw", "denoised"];
const REACH_M = 1e-10; // spacings down to here are in a Fourier transform when it is opened
const MOST_HALVINGS = 6;
const MESSAGE_MS = 4000;

const readout = new Readout();
const stages = SIDES.map((name) => element(`${name}-stage`));
const byHand = {}; // contrast of a side, [low, high], where it is not by percentiles
let percentiles = [0.5, 99.5];
let average = 1;
let spectra = false;
let halvings = null; // of the Fourier transform's reach; null until the pixel size is known
let wiped = null; // where the line is, from 0 to 1; null is side by side
let pointed = null; // side whose Fourier transform the pointer is in
let colourName = "grey";
let live = null;
let answered = -1; // request that the picture on the screen answers

const viewport = new Viewport(stages, () => { draw(); ask(); });
const timeline = new Timeline(() => ask());
const recording = new Recording((word) => live.say(word), say);
const sides = SIDES.map((name) => new Side(name, viewport, setContrast));
const { latest } = readout;

// -- in ------------------------------------------------------------------------------

function take(header) {
  if (header.pictures) {
    viewport.setFrame(header.frame_shape);
    const pictures = Object.fromEntries(header.pictures.map((picture) => [picture.name, picture]));
    for (const side of sides) {
      side.show(pictures[side.name], header.frame);
      side.showSpectrum(spectra ? pictures[`${side.name}-spectrum`] : undefined);
    }
  }
  readout.take(header);
  timeline.take(header);
  recording.take(header);
  if (!header.pictures) return;
  drawBars();
  sides.forEach(nameEdge);
  settled(header.asked);
}

function draw() {
  for (const side of sides) side.draw();
  drawBars();
  setText("zoom", viewport.fitted ? "fit" : `${digits(100 * viewport.zoom)} %`);
}

function bar() {
  return scaleBar(viewport.zoom, latest.pixel_size_m, 0.24 * viewport.screen[1]);
}

function drawBars() {
  if (latest.frame === undefined) return;
  const { width, text } = bar();
  for (const each of document.querySelectorAll(".scalebar")) {
    each.hidden = false;
    each.style.width = `${width / devicePixelRatio}px`;
    each.dataset.text = text;
    setText(each.firstElementChild, text);
  }
}

// Says on the body whether what is on the screen is what was asked for last.
function settled(request) {
  answered = request;
  document.body.toggleAttribute("data-settled", answered === live?.asked);
}

// -- out -----------------------------------------------------------------------------

function ask() {
  const contrast = (name) => (byHand[name] ? ["values", ...byHand[name]] : ["percentiles", ...percentiles]);
  live?.ask({
    ...viewport.wanted,
    raw: contrast("raw"),
    denoised: contrast("denoised"),
    average,
    spectra: spectra ? SIDES : [],
    halvings: spectra ? reach() : 0,
    at: timeline.at,
  });
  if (live) settled(answered);
}

function reach() {
  if (halvings === null && latest.frame !== undefined) {
    const most = latest.pixel_size_m ? Math.floor(Math.log2(REACH_M / (2 * latest.pixel_size_m))) : 0;
    halvings = Math.min(Math.max(0, most), MOST_HALVINGS);
  }
  return halvings ?? 0;
}

function setContrast(name, low, high) {
  if (low === undefined) delete byHand[name];
  else byHand[name] = [low, high];
  element("contrast").value = Object.keys(byHand).length ? "hand" : String(percentiles[0]);
  ask();
}

function setPercentiles(low) {
  percentiles = [Number(low), 100 - Number(low)];
  for (const name of SIDES) delete byHand[name];
  element("contrast").value = String(low);
  ask();
}

function setAverage(frames) {
  average = Number(frames);
  element("average").value = String(average);
  ask();
}

function setSpectra(on) {
  spectra = on;
  element("spectra").setAttribute("aria-pressed", on);
  if (!on) for (const side of sides) side.showSpectrum();
  ask();
}

function setColours(name) {
  colourName = name;
  element("colours").value = name;
  const [table, asWords] = [colours(name), words(name)];
  for (const side of sides) side.setColours(asWords, table);
}

// -- the line that wipes ---------------------------------------------------------------

function setWipe(place) {
  wiped = place === null ? null : Math.min(Math.max(0, place), 1);
  const divider = element("divider");
  document.body.classList.toggle("wiped", wiped !== null);
  element("wipe").setAttribute("aria-pressed", wiped !== null);
  divider.hidden = wiped === null;
  document.querySelector("main").style.setProperty("--wiped", `${100 * (wiped ?? 0)}%`);
  divider.setAttribute("aria-valuenow", Math.round(100 * (wiped ?? 0)));
}

element("divider").addEventListener("pointerdown", (event) => event.target.setPointerCapture(event.pointerId));
element("divider").addEventListener("pointermove", (event) => {
  if (!event.buttons) return;
  const box = stages[0].getBoundingClientRect();
  setWipe((event.clientX - box.left) / box.width);
});

// -- Fourier transforms ----------------------------------------------------------------

for (const side of sides) {
  const { spectrumBox: box, spectrumCanvas: canvas } = side;
  const caption = box.querySelector("figcaption");
  box.addEventListener("pointerdown", (event) => event.stopPropagation());
  box.addEventListener("dblclick", (event) => event.stopPropagation());
  box.addEventListener("click", () => {
    for (const each of sides) each.spectrumBox.classList.toggle("large");
  });
  box.addEventListener("wheel", (event) => {
    event.preventDefault();
    event.stopPropagation();
    halvings = Math.min(Math.max(0, reach() - Math.sign(event.deltaY)), MOST_HALVINGS);
    ask();
  }, { passive: false });
  canvas.addEventListener("pointermove", (event) => {
    const place = canvas.getBoundingClientRect();
    const pixels = side.spacing((event.clientX - place.left) / place.width, (event.clientY - place.top) / place.height);
    pointed = side;
    setText(caption, spacingText(pixels));
  });
  canvas.addEventListener("pointerleave", () => {
    pointed = null;
    nameEdge(side);
  });
}

const spacingText = (pixels) =>
  (latest.pixel_size_m ? lengthText(pixels * latest.pixel_size_m) : `${digits(pixels)} px`);

// Says what spacing the edges of a Fourier transform stand for, as long as nobody points into it.
function nameEdge(side) {
  if (side.spectrumBox.hidden || pointed === side) return;
  setText(side.spectrumBox.querySelector("figcaption"), `edge ${spacingText(side.edgeSpacing)}`);
}

// -- files -----------------------------------------------------------------------------

async function savePng() {
  const { key, averaged, frame, series, dose, engine, source } = latest;
  if (!key) return say("There is no frame yet");
  const [titles, wipedAt, scale] = [
    [averaged > 1 ? `Average of ${averaged} raw frames` : "Raw", "Denoised"], wiped, bar()];
  const line = [
    `${source || "frame"} ${series} / ${frame}`,
    dose === null ? null : `${fixed(dose, 3)} electrons/px`,
    engine?.name ? `${engine.name} ${engine.sha256?.slice(0, 8) ?? ""}` : null,
    "emstream",
  ].filter(Boolean).join("   ");
  const view = {
    shown: viewport.shown, colours: colourName, average: averaged, wiped: wipedAt,
    contrast: Object.fromEntries(sides.map(({ name, canvas }) => [name, [Number(canvas.dataset.low), Number(canvas.dataset.high)]])),
  };
  // The frame on the screen moves on while its header is fetched: what is seen now is what is saved.
  const still = png(sides, { titles, line, bar: scale, wiped: wipedAt });
  const answer = await fetch(`header.json?key=${key}`);
  if (!answer.ok) return say(await answer.text());
  const header = await answer.json();
  save(await still({ ...header, view }), `${header.name}.png`);
  return say(`Saved ${header.name}.png`);
}

async function saveTiff() {
  if (!latest.key) return say("There is no frame yet");
  const answer = await fetch(`snapshot.tif?key=${latest.key}`);
  if (!answer.ok) return say(await answer.text());
  const name = answer.headers.get("Content-Disposition").match(/filename="(.*)"/)[1];
  save(await answer.blob(), name);
  return say(`Saved ${name}`);
}

let messageTimer;
function say(text) {
  setText("message", text);
  element("message").hidden = false;
  clearTimeout(messageTimer);
  messageTimer = setTimeout(() => { element("message").hidden = true; }, MESSAGE_MS);
}

// -- hands -----------------------------------------------------------------------------

function next(select) {
  const values = [...select.options].filter((option) => !option.hidden).map((option) => option.value);
  return values[(values.indexOf(select.value) + 1) % values.length];
}

const STEP = 120;
const actions = {
  wipe: () => setWipe(wiped === null ? 0.5 : null),
  spectra: () => setSpectra(!spectra),
  in: () => viewport.zoomBy(Math.SQRT2),
  out: () => viewport.zoomBy(Math.SQRT1_2),
  fit: () => viewport.fit(),
  png: () => savePng(),
  tiff: () => saveTiff(),
  record: () => recording.press(),
  help: () => (element("keys").open ? element("keys").close() : element("keys").showModal()),
};
for (const [name, action] of Object.entries(actions)) element(name).addEventListener("click", action);
element("average").addEventListener("change", (event) => setAverage(event.target.value));
element("contrast").addEventListener("change", (event) => setPercentiles(event.target.value));
element("colours").append(...NAMES.map((name) => new Option(name)));
element("colours").addEventListener("change", (event) => setColours(event.target.value));

listen([
  ["space", "pause, go on", () => timeline.toggle()],
  ["ArrowLeft ArrowRight", "one frame back, one on; with shift ten", (event) =>
    timeline.step((event.key === "ArrowLeft" ? -1 : 1) * (event.shiftKey ? 10 : 1))],
  ["Home", "the oldest frame kept", () => timeline.oldest()],
  ["l End", "live", () => timeline.live()],
  ["r", "record, with the last seconds; twice: end", actions.record],
  ["w", "wipe, or side by side", actions.wipe],
  ["[ ]", "move the wipe's line", (event) => {
    if (wiped !== null) setWipe(wiped + (event.key === "[" ? -0.05 : 0.05));
  }],
  ["f", "Fourier transforms", actions.spectra],
  ["a", "average of raw frames: off, 2, 4 ... 64", () => setAverage(next(element("average")))],
  ["p", "contrast: percentiles cut off", () => setPercentiles(next(element("contrast")))],
  ["c", "colour map", () => setColours(next(element("colours")))],
  ["+ - =", "zoom in, zoom out", (event) => actions[event.key === "-" ? "out" : "in"]()],
  ["0", "all of the picture", actions.fit],
  ["1", "one pixel of the frame on one of the screen", () => viewport.zoomTo(1)],
  ["ArrowUp ArrowDown", "move up, down", (event) => viewport.move(0, event.key === "ArrowUp" ? STEP : -STEP)],
  ["s", "save what you see: PNG", actions.png],
  ["t", "save every pixel: TIFF", actions.tiff],
  ["?", "this list", actions.help],
]);

setColours("grey");
live = new Live(take, () => {
  readout.take({ state: "offline" });
  timeline.take({ state: "offline" });
  recording.take({ state: "offline" });
});
ask();
