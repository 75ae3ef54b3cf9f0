// Keyboard shortcuts, and the list of them.

import { element } from "./text.js";

// keys: [[key, what it says on the list, what it does], ...]; several keys separated by blanks.
export function listen(keys) {
  const actions = new Map(keys.flatMap(([names, , action]) => names.split(" ").map((name) => [name, action])));
  const dialog = element("keys");
  element("key-list").append(...keys.map(([names, text]) => {
    const row = document.createElement("div");
    const words = document.createElement("span");
    words.textContent = text;
    row.append(...names.split(" ").slice(0, 2).map((name) => {
      const key = document.createElement("kbd");
      key.textContent = LABELS[name] ?? name.toUpperCase();
      return key;
    }), words);
    return row;
  }));
  element("close-keys").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (dialog.open && event.key !== "?") return;
    const name = event.key === " " ? "space" : event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const action = actions.get(name);
    if (!action) return;
    event.preventDefault();
    if (event.repeat && !HELD.has(name)) return; // a key that rests under an elbow would end a recording
    // A button or list that has the focus would hear the key, too.
    if (document.activeElement !== document.body) document.activeElement?.blur();
    action(event);
  });
}

// Keys that go on as long as they are held.
const HELD = new Set(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "[", "]", "+", "-", "="]);

const LABELS = {
  space: "space", ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Home: "Home", End: "End", "-": "−",
};
