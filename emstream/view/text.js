// Numbers and words on the page.

const grouped = new Intl.NumberFormat("en");

export const element = (id) => document.getElementById(id);

export function setText(id, text) {
  const target = typeof id === "string" ? element(id) : id;
  if (target.textContent !== String(text)) target.textContent = text;
}

export const whole = (number) => (number === undefined ? "–" : grouped.format(number));

export const fixed = (number, places) =>
  (number === null || number === undefined ? "–" : number.toFixed(places));

// About three digits that mean something: 0.17, 4.21, 49.3, 136.
export const digits = (number) => fixed(number, number < 10 ? 2 : number < 100 ? 1 : 0);

// The ends of a contrast, of any size, in a few characters.
export function level(number) {
  const size = Math.abs(number);
  return size !== 0 && (size < 0.01 || size >= 1e5) ? number.toExponential(1) : fixed(number, size < 100 ? 2 : 0);
}

// The smallest length [m] for which a unit is used, the unit [m] and its name.
const LENGTHS = [[1e-3, 1e-3, "mm"], [1e-6, 1e-6, "µm"], [1e-10, 1e-9, "nm"], [0, 1e-12, "pm"]];

// A length [m] in the unit that makes it readable: 2 nm, 0.5 nm, 50 pm.
export function lengthText(metres, significant = 3) {
  const [, unit, name] = LENGTHS.find(([least]) => metres >= least * 0.9999999);
  return `${Number((metres / unit).toPrecision(significant))} ${name}`;
}
