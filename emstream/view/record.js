// The button that begins and ends a recording, and what the recorder says of itself.

import { element, setText, whole } from "./text.js";

const SURE_MS = 4000; // to press once more
const LOW_S = 300; // a disk that is full sooner is marked
const LABELS = { recording: "Recording", finishing: "Writing" };

export class Recording {
  #latest = {};
  #state = "";
  #sure = null;
  #past = 0; // s that were kept when last heard of

  // send(word) tells the server and returns whether it could; say(text) shows a text for a while.
  constructor(send, say) {
    this.send = send;
    this.say = say;
    this.#draw();
  }

  take(header) {
    this.#latest = header;
    const { state, look_back_s: past } = header.recording ?? {};
    if (this.#state === "recording" && state !== "recording") this.#forget();
    if (this.#state === "looking back" && state === "recording") {
      this.say(`Recording, with the last ${seconds(this.#past)} s`);
    }
    if (state === "looking back") this.#past = past;
    this.#state = state;
    this.#draw();
  }

  press() {
    const why = this.#obstacle();
    if (why) this.say(why);
    else if (this.#state !== "recording") this.#tell("begin recording");
    else if (this.#sure) {
      this.#forget();
      this.#tell("end recording");
    } else {
      this.#sure = setTimeout(() => { this.#forget(); this.#draw(); }, SURE_MS);
      this.say("Press once more to end the recording");
      this.#draw();
    }
  }

  #tell(word) {
    if (!this.send(word)) this.say("Not connected: nothing was changed");
  }

  #forget() {
    clearTimeout(this.#sure);
    this.#sure = null;
  }

  // Why the button does nothing; empty when it does.
  #obstacle() {
    const { state, recording, can_record: can, serving, input } = this.#latest;
    const program = `meanwhile, in a terminal: emstream record --input ${input} FILE.h5`;
    if (state === undefined || state === "offline") return "Not connected";
    if (!serving) return "emstream serve is silent; nothing can be recorded";
    if (!recording) return `No recorder: start emstream serve with --record FOLDER --look-back 10, or ${program}`;
    if (!can) return "This page cannot tell the recorder; that of emstream serve --view --record can";
    if (recording.state === "silent") return "The recorder is silent";
    if (recording.state === "restarting") return "The recorder died; another one starts";
    if (recording.state === "failed") {
      return `${recording.faults.at(-1)}; start emstream serve again, or ${program}`;
    }
    return "";
  }

  #draw() {
    const { recording } = this.#latest;
    const why = this.#obstacle();
    const button = element("record");
    button.setAttribute("aria-disabled", Boolean(why));
    button.setAttribute("aria-pressed", recording?.state === "recording");
    button.title = why || (recording?.state === "recording" ? "End the recording (R, twice)" : title(recording));
    button.dataset.state = recording?.state ?? "";
    setText("record-label", this.#sure ? "End?" : LABELS[recording?.state] ?? "Record");
    const line = element("recording");
    setText(line, recording ? text(recording) : "");
    line.title = recording?.path ?? "";
    line.dataset.frames = recording?.frames?.raw ?? "";
    line.classList.toggle("low", recording?.disk_s < LOW_S);
  }
}

const seconds = (number) => (number ?? 0).toFixed(0);

function title({ state, look_back_s: past, faults }) {
  if (state === "ended") return `${faults.at(-1)}; press to record again (R)`;
  return past && state === "looking back" ? `Record, with the last ${seconds(past)} s (R)` : "Record (R)";
}

function text({ state, frames, disk_s: left, look_back_s: past }) {
  const said = [];
  if (state === "looking back") said.push(`last ${seconds(past)} s kept`);
  if (["recording", "finishing"].includes(state) && frames.raw !== undefined) said.push(`${whole(frames.raw)} frames`);
  if (["recording", "looking back"].includes(state) && left !== undefined) said.push(`disk for ${duration(left)}`);
  return said.join(" · ");
}

function duration(length) {
  for (const [unit, name] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (length >= 2 * unit) return `${Math.round(length / unit)} ${name}`;
  }
  return `${length} s`;
}
