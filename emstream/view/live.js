// One socket, one message at a time: show it, acknowledge it, get the newest.
// The layout of a message is described in server.py.

const RECONNECT_MS = 1000;
const SILENCE_MS = 5000; // the server says something every half second

function decode(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let offset = 4 + length;
  for (const picture of header.pictures ?? []) {
    picture.pixels = new Uint8Array(buffer, offset, picture.shape[0] * picture.shape[1]);
    offset += picture.pixels.length;
  }
  return header;
}

export class Live {
  #socket = null;
  #request = "{}";
  asked = 0; // requests that this connection has sent

  constructor(onMessage, onLost) {
    this.onMessage = onMessage;
    this.onLost = onLost;
    this.#connect();
  }

  // What is wanted from now on; see request.py.
  ask(request) {
    const text = JSON.stringify(request);
    if (text === this.#request) return;
    this.#request = text;
    if (this.#socket.readyState === WebSocket.OPEN) this.#send();
  }

  // A word at once; false when nobody is there to hear it.
  say(word) {
    const open = this.#socket.readyState === WebSocket.OPEN;
    if (open) this.#socket.send(word);
    return open;
  }

  #send() {
    this.asked += 1;
    this.#socket.send(this.#request);
  }

  #connect() {
    const url = new URL("live", location.href);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(url);
    this.#socket = socket;
    socket.binaryType = "arraybuffer";
    let silence;
    const lose = () => {
      clearTimeout(silence);
      socket.onmessage = socket.onclose = null;
      socket.close();
      this.onLost();
      setTimeout(() => this.#connect(), RECONNECT_MS);
    };
    silence = setTimeout(lose, SILENCE_MS);
    socket.onopen = () => {
      this.asked = 0;
      this.#send();
    };
    socket.onclose = lose;
    socket.onmessage = ({ data }) => {
      clearTimeout(silence);
      // A page in the background draws nothing, so it acknowledges nothing and is sent nothing.
      requestAnimationFrame(() => {
        if (socket.readyState !== WebSocket.OPEN) return;
        this.onMessage(decode(data));
        socket.send("shown");
        silence = setTimeout(lose, SILENCE_MS);
      });
    };
  }
}
