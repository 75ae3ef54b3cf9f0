// The numbers below the pictures, the pill above them, and the red mark.

import { digits, element, fixed, setText, whole } from "./text.js";

const READOUTS_EVERY_MS = 200; // digits that change faster cannot be read
const FAULTS = ["missing", "dropped", "rejected", "failed"];
const COUNTERS = ["received", "published", "in_flight", ...FAULTS];
const SERIES_END = 5; // characters that are always seen: of two series they are what differs
const OUTSIDE = "dose outside the engine's range";

export class Readout {
  #readOutAt = -Infinity;
  #faults = "";
  #seen = "";
  #since = 0;
  latest = {}; // every key that has come so far, with its newest value

  constructor() {
    element("mark").addEventListener("click", () => {
      this.#seen = this.#faults;
      this.#readOut();
    });
  }

  take(header) {
    const { state: before, ledger: counted } = this.latest;
    Object.assign(this.latest, header);
    if (header.frame !== undefined) {
      document.body.dataset.picture = "";
      setText("frame", whole(header.frame));
      element("frame").dataset.value = header.frame;
    }
    const faults = this.#faultText();
    const urgent = header.state !== before || faults !== this.#faults;
    // What was wrong when the page was opened is older, and nobody here knows how old.
    if (faults !== this.#faults) this.#since = counted?.received !== undefined ? performance.now() : -Infinity;
    this.#faults = faults;
    if (urgent || performance.now() - this.#readOutAt >= READOUTS_EVERY_MS) this.#readOut();
  }

  // What is wrong, in words; empty when nothing is.
  #faultText() {
    const found = FAULTS.filter((name) => this.latest.ledger?.[name] > 0)
      .map((name) => `${whole(this.latest.ledger[name])} ${name}`);
    if (this.latest.in_domain === false) found.push(OUTSIDE);
    found.push(...this.latest.recording?.faults ?? [], ...this.latest.trust?.faults ?? []);
    return found.join(", ");
  }

  #readOut() {
    this.#readOutAt = performance.now();
    const { latest } = this;
    const { state, ledger, engine, latency_ms: latency } = latest;
    document.body.dataset.state = state;
    setText("input", latest.input ?? "");
    const [pill, title, text] = notice(latest);
    setText("state", pill);
    setText("notice-title", title);
    setText("notice-text", text);

    const mark = element("mark");
    mark.hidden = !this.#faults;
    mark.classList.toggle("seen", this.#faults === this.#seen);
    mark.title = `${this.#faults} (a click says "seen"; it stays in the ledger)`;
    setText(mark, this.#faults + ago(performance.now() - this.#since));

    setText("rate", digits(latest.frames_per_s));
    for (const name of COUNTERS) {
      const count = ledger?.[name];
      setText(name, whole(count));
      element(name).dataset.value = count ?? "";
      element(name).classList.toggle("alarm", FAULTS.includes(name) && count > 0);
    }
    setText("engine-name", engine?.name ?? "–");
    setText("engine-sha", engine?.sha256?.slice(0, 8) ?? "");
    element("engine-sha").title = engine?.sha256 ?? "";
    setText("engine-device", engine?.device ?? "");
    element("engine-device").title = engine?.device ?? "";
    const { psnr_db: quality, likelihood, state: known } = latest.trust ?? {};
    element("quality-section").title = QUALITY + (likelihood ? `; ${supports(likelihood)}` : "");
    setText("quality", digits(quality?.value));
    setText("quality-note", quality ? `${digits(quality.low)}–${digits(quality.high)}, estimated` : known ?? "not estimated");
    const { p99 } = latest.latency_so_far_ms ?? {};
    setText("latency-span", p99 === undefined ? "received → published" : `p99 ${digits(p99)}`);

    if (latest.frame === undefined) return;
    const series = String(latest.series);
    setText("series-begin", series.slice(0, -SERIES_END));
    setText("series-end", series.slice(-SERIES_END));
    setText("source", latest.source ? ` · ${latest.source}` : "");
    setText("dose", fixed(latest.dose, 3));
    setText("domain", { true: "in range", false: "out of range" }[latest.in_domain] ?? "");
    element("dose-section").classList.toggle("alarm", latest.in_domain === false);
    setText("shape", shape(latest));
    element("shape").title = element("shape").textContent;
    element("series-note").title = element("series-note").textContent;
    setText("latency", digits(latency.total));
    for (const [name, stage] of Object.entries(STAGES)) {
      setText(name, digits(latency[stage]));
      element(`stage-${name}`).style.flexGrow = latency[stage] ?? 0;
    }
    setText("raw-title", latest.averaged > 1 ? `Average of ${latest.averaged} raw frames` : "Raw");
    for (const scale of document.querySelectorAll(".scale")) scale.hidden = false;
    for (const units of document.querySelectorAll(".units")) {
      units.textContent = latest.units === "electrons" ? "e⁻/px" : latest.units;
    }
  }
}

const QUALITY = "Peak signal-to-noise ratio, peak 1 electron, estimated from each denoised frame and the raw one after it, over many frames";

// By how much the counts prefer the picture to an even grey, in thousandths of a nat per pixel.
function supports({ value, low, high }) {
  const [mean, from, to] = [value, low, high].map((nats) => (1000 * nats).toFixed(2));
  return `likelihood against an even grey ${mean} (${from} to ${to}) millinats per pixel`;
}

const STAGES = { wait: "received_to_batched", infer: "batched_to_inferred", send: "inferred_to_published" };

// What the pill says, and the notice over the images: its title, and what may be the cause.
function notice(latest) {
  switch (latest.state) {
    case "live":
      return ["live", "", ""];
    case "waiting":
      return ["waiting for frames", `Waiting for frames from ${latest.input}`, latest.serving
        ? whyQuiet(latest, "no frame has come from its camera yet")
        : "Nothing has been heard from there yet. Is emstream serve running?"];
    case "quiet":
      return ["no frames", `No frame for ${Math.floor(latest.quiet_s)} s from ${latest.input}`, latest.serving
        ? whyQuiet(latest, "its camera is silent")
        : "emstream serve is silent, too. Has it stopped?"];
    default:
      return ["disconnected", "The connection to emstream view is lost", "Trying again every second."];
  }
}

function whyQuiet({ ledger }, otherwise) {
  const why = ledger?.in_flight > 0 ? `${whole(ledger.in_flight)} frames are in its engine and do not come out` : otherwise;
  return `emstream serve is running there; ${why}.`;
}

function shape({ frame_shape: [height, width], exposure_s: exposure }) {
  return `${width} × ${height} px` + (exposure ? ` · ${digits(1000 * exposure)} ms` : "");
}

function ago(milliseconds) {
  const seconds = Math.floor(milliseconds / 1000);
  if (seconds < 2 || seconds === Infinity) return "";
  return seconds < 120 ? ` · ${seconds} s ago` : ` · ${Math.floor(seconds / 60)} min ago`;
}
