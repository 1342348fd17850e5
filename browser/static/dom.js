/** Elements and numbers. Everything that comes from data becomes text, never markup. */

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Make an element. @param {string} tag @param {object} [attributes] `text`, `onclick`, any other */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for drawings. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** A number with as many digits as it is worth; a dash for none. */
export function number(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && Math.abs(value) < 0.5 * 10 ** -digits) return value.toExponential(1);
  return value.toFixed(digits).replace("-", "−");
}

export function signed(value, digits = 1) {
  return (value > 0 ? "+" : "") + number(value, digits);
}

export function percent(share) {
  if (share === null || share === undefined) return "–";
  const value = 100 * share;
  return `${value >= 10 ? value.toFixed(0) : Number(value.toPrecision(2))} %`;
}

/** Probabilities by chance: never shown as 0. */
export function chance(p) {
  if (p === null || p === undefined) return "–";
  return p < 0.001 ? "< 0.001" : p.toFixed(p < 0.01 ? 4 : 3);
}

export function query(values) {
  const present = Object.entries(values).filter(([, value]) => value !== null && value !== undefined);
  return new URLSearchParams(present).toString();
}

/**
 * Ask for the newest wish only: at most one request at a time, wishes in between are dropped.
 * @param {(wish) => Promise} ask @param {(answer, wish) => void} show
 */
export function newestOnly(ask, show, fail) {
  let isBusy = false;
  let next = null;
  return async function wish(value) {
    next = { value };
    if (isBusy) return;
    isBusy = true;
    while (next) {
      const { value: now } = next;
      next = null;
      try {
        const answer = await ask(now);
        if (!next) show(answer, now);
      } catch (error) {
        if (!next) fail(error);
      }
    }
    isBusy = false;
  };
}
