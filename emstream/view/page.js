// The live page. One socket, one message at a time: draw it, acknowledge it, get the newest.
// The layout of a message is described in server.py.

const RECONNECT_MS = 1000;
const SILENCE_MS = 5000; // the server says something every half second
const READOUTS_EVERY_MS = 200; // digits that change faster cannot be read
const COUNTERS = ["received", "published", "in_flight", "missing", "dropped", "rejected", "failed"];
const FAULTS = new Set(["missing", "dropped", "rejected", "failed"]);

const grouped = new Intl.NumberFormat("en");
const littleEndian = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;
const GREYS = Uint32Array.from({ length: 256 }, (_, v) =>
  littleEndian ? (0xff << 24) | (v << 16) | (v << 8) | v : (v << 24) | (v << 16) | (v << 8) | 0xff);

const element = (id) => document.getElementById(id);
const latest = {}; // every key that has come so far, with its newest value
const images = {}; // the canvases' pixels, used again for every frame
let readOutAt = -Infinity;

// -- messages --------------------------------------------------------------------

function decode(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  if (!header.shape) return { header };
  const pixels = header.shape[0] * header.shape[1];
  return {
    header,
    raw: new Uint8Array(buffer, 4 + length, pixels),
    denoised: new Uint8Array(buffer, 4 + length + pixels, pixels),
  };
}

function connect() {
  const url = new URL("live", location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  let silence = setTimeout(lose, SILENCE_MS);

  function lose() {
    clearTimeout(silence);
    socket.onmessage = socket.onclose = null;
    socket.close();
    latest.state = "offline";
    readOut();
    setTimeout(connect, RECONNECT_MS);
  }

  socket.onclose = lose;
  socket.onmessage = ({ data }) => {
    clearTimeout(silence);
    // A page in the background draws nothing, so it acknowledges nothing and is sent nothing.
    requestAnimationFrame(() => {
      if (socket.readyState !== WebSocket.OPEN) return;
      show(decode(data));
      socket.send("shown");
      silence = setTimeout(lose, SILENCE_MS);
    });
  };
}

// -- display ---------------------------------------------------------------------

function show({ header, raw, denoised }) {
  const urgent = header.state !== latest.state || (header.in_domain === false && latest.in_domain !== false);
  Object.assign(latest, header);
  if (raw) {
    draw("raw", raw, header);
    draw("denoised", denoised, header);
    document.body.dataset.picture = "";
    element("frame").textContent = grouped.format(header.frame);
    element("frame").dataset.value = header.frame;
  }
  if (urgent || performance.now() - readOutAt >= READOUTS_EVERY_MS) readOut();
}

function draw(name, greys, header) {
  const canvas = element(name);
  const context = canvas.getContext("2d", { alpha: false });
  const [height, width] = header.shape;
  if (images[name]?.width !== width || images[name].height !== height) {
    canvas.width = width;
    canvas.height = height;
    canvas.style.setProperty("--aspect", width / height);
    images[name] = context.createImageData(width, height);
  }
  const rgba = new Uint32Array(images[name].data.buffer);
  for (let i = 0; i < greys.length; i++) rgba[i] = GREYS[greys[i]];
  context.putImageData(images[name], 0, 0);
  canvas.dataset.frame = header.frame;
  canvas.dataset.low = header[name].low;
  canvas.dataset.high = header[name].high;
}

function readOut() {
  readOutAt = performance.now();
  const { state, ledger, engine, latency_ms: latency } = latest;
  document.body.dataset.state = state;
  element("input").textContent = latest.input ?? "";
  const [pill, title, text] = notice();
  setText("state", pill);
  setText("notice-title", title);
  setText("notice-text", text);

  setText("rate", digits(latest.frames_per_s));
  for (const name of COUNTERS) {
    const count = ledger?.[name];
    setText(name, count === undefined ? "–" : grouped.format(count));
    element(name).dataset.value = count ?? "";
    element(name).classList.toggle("alarm", FAULTS.has(name) && count > 0);
  }
  setText("engine-name", engine?.name ?? "–");
  setText("engine-sha", engine?.sha256?.slice(0, 8) ?? "");
  element("engine-sha").title = engine?.sha256 ?? "";
  setText("engine-device", engine?.device ?? "");
  element("engine-device").title = engine?.device ?? "";

  if (latest.frame === undefined) return;
  setText("series", latest.series);
  setText("source", latest.source ? ` · ${latest.source}` : "");
  setText("dose", fixed(latest.dose, 3));
  setText("domain", { true: "in the engine's range", false: "outside engine's range" }[latest.in_domain] ?? "");
  element("dose-section").classList.toggle("alarm", latest.in_domain === false);
  setText("shape", shape());
  setText("latency", digits(latency.total));
  setText("wait", digits(latency.received_to_batched));
  setText("infer", digits(latency.batched_to_inferred));
  setText("send", digits(latency.inferred_to_published));
  for (const name of ["raw", "denoised"]) {
    setText(`${name}-low`, fixed(latest[name].low, 2));
    setText(`${name}-high`, fixed(latest[name].high, 2));
  }
  for (const scale of document.querySelectorAll(".scale")) scale.hidden = false;
  for (const units of document.querySelectorAll(".units")) {
    units.textContent = latest.units === "electrons" ? "e⁻/px" : latest.units;
  }
}

// What the pill says, and the notice over the images: its title, and what may be the cause.
function notice() {
  switch (latest.state) {
    case "live":
      return ["live", "", ""];
    case "waiting":
      return ["waiting for frames", `Waiting for frames from ${latest.input}`, latest.serving
        ? "emstream serve is running there; no frame has come from its camera yet."
        : "Nothing has been heard from there yet. Is emstream serve running?"];
    case "quiet":
      return ["no frames", `No frame for ${Math.floor(latest.quiet_s)} s from ${latest.input}`, latest.serving
        ? "emstream serve is running there; its camera is silent."
        : "emstream serve is silent, too. Has it stopped?"];
    default:
      return ["disconnected", "The connection to emstream view is lost", "Trying again every second."];
  }
}

function shape() {
  const [height, width] = latest.frame_shape;
  const averaged = Math.floor(width / latest.shape[1]);
  return `${width} × ${height} px` + (averaged > 1 ? `, shown ${averaged}:1` : "");
}

const fixed = (number, places) => (number === null || number === undefined ? "–" : number.toFixed(places));

// About three digits that mean something: 0.17, 4.21, 49.3, 136.
const digits = (number) => fixed(number, number < 10 ? 2 : number < 100 ? 1 : 0);

function setText(id, text) {
  const target = element(id);
  if (target.textContent !== String(text)) target.textContent = text;
}

connect();
