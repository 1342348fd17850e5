/** Drawings of numbers: curves, arrows, colour scales. Colours come from the style sheet. */

import { el, number, svg } from "/static/dom.js";

const WIDE = 1000;

/** Points of a curve that fills a box; gaps where there is no value. */
function segments(values, low, high, height) {
  const parts = [];
  let part = [];
  const step = WIDE / Math.max(values.length - 1, 1);
  values.forEach((value, place) => {
    if (value === null) {
      if (part.length) parts.push(part);
      part = [];
      return;
    }
    const y = height - ((value - low) / (high - low || 1)) * height;
    part.push([place * step, y]);
  });
  if (part.length) parts.push(part);
  return parts;
}

const points = (part) => part.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");

/**
 * One lane above the shared time axis.
 * @param {{title: string, values: number[], low: number, high: number, colour: string,
 *   isArea: boolean, height: number}} lane
 */
export function laneOf({ title, values, low, high, colour, isArea, height }) {
  const drawing = svg("svg", {
    viewBox: `0 0 ${WIDE} ${height}`,
    preserveAspectRatio: "none",
    height,
    "aria-hidden": "true",
  });
  for (const part of segments(values, low, high, height)) {
    if (isArea) {
      const area = [[part[0][0], height], ...part, [part.at(-1)[0], height]];
      drawing.append(svg("polygon", { points: points(area), fill: colour, opacity: 0.22 }));
    }
    drawing.append(
      svg("polyline", {
        points: points(part),
        fill: "none",
        stroke: colour,
        "stroke-width": 1.6,
        "vector-effect": "non-scaling-stroke",
      }),
    );
  }
  const cursor = svg("line", {
    y1: 0,
    y2: height,
    stroke: "var(--text)",
    "stroke-width": 1.5,
    "vector-effect": "non-scaling-stroke",
    class: "cursor",
  });
  drawing.append(cursor);
  const element = el(
    "div",
    { class: "lane" },
    el("span", { class: "axis high", text: number(high) }),
    el("span", { class: "axis low", text: number(low) }),
    drawing,
    el("span", { class: "lane-title", text: title }),
  );
  const move = (share) => {
    cursor.setAttribute("x1", share * WIDE);
    cursor.setAttribute("x2", share * WIDE);
  };
  return { element, move };
}

/** Times below the lanes. */
export function ticksOf(nFrames, fps) {
  const last = (nFrames - 1) / fps;
  const nice = [0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300].find((step) => last / step <= 8) ?? 600;
  const ticks = el("div", { class: "ticks", "aria-hidden": "true" });
  const times = [];
  for (let time = 0; time <= last + 1e-6; time += nice) times.push(time);
  times.forEach((time, place) => {
    const isLast = place === times.length - 1;
    const tick = el("span", { text: `${Number(time.toFixed(1))}${isLast ? " s" : ""}` });
    tick.style.left = `${(100 * time) / (last || 1)}%`;
    ticks.append(tick);
  });
  return ticks;
}

function niceAbove(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

function arrowHead(x, y, dx, dy, size) {
  const length = Math.hypot(dx, dy) || 1;
  const [ux, uy] = [dx / length, dy / length];
  const [bx, by] = [x - size * ux, y - size * uy];
  const [nx, ny] = [-uy * size * 0.45, ux * size * 0.45];
  return `${x},${y} ${bx + nx},${by + ny} ${bx - nx},${by - ny}`;
}

/**
 * A change of the action, enlarged, with rings that say how far.
 * @param {number[]} change @param {string} colour
 * @param {{radius: number, dash?: string}[]} rings
 */
export function arrowPlot(change, colour, rings, unit) {
  const length = Math.hypot(...change);
  const reach = niceAbove(Math.max(length, ...rings.map((ring) => ring.radius)));
  const scale = 54 / reach;
  const plot = svg("svg", { viewBox: "-66 -66 132 132", role: "img" });
  const label = `${change.map((part) => number(part, 1)).join(", ")} ${unit}`;
  plot.append(
    svg("title", { text: label }),
    svg("circle", { r: 54, fill: "none", stroke: "var(--line)" }),
    svg("line", { x1: -54, x2: 54, y1: 0, y2: 0, stroke: "var(--line)" }),
    svg("line", { y1: -54, y2: 54, x1: 0, x2: 0, stroke: "var(--line)" }),
  );
  for (const ring of rings) {
    plot.append(
      svg("circle", {
        r: ring.radius * scale,
        fill: "none",
        stroke: "var(--series-3)",
        "stroke-width": 1.5,
        "stroke-dasharray": ring.dash,
      }),
    );
  }
  const [x, y] = change.map((part) => part * scale);
  if (Math.hypot(x, y) > 1) {
    plot.append(svg("line", { x1: 0, y1: 0, x2: x, y2: y, stroke: colour, "stroke-width": 2.5 }));
    plot.append(svg("polygon", { points: arrowHead(x, y, x, y, 9), fill: colour }));
  } else {
    plot.append(svg("circle", { r: 3, fill: colour }));
  }
  plot.append(svg("text", { x: 62, y: 62, "text-anchor": "end", text: `ring ${reach} ${unit}` }));
  return plot;
}

/** What part of the board to show: around the paths, a square, within the board if it can be. */
function closeUp(board, places) {
  const size = board.high.map((high, axis) => high - board.low[axis]);
  const low = [0, 1].map((axis) => Math.min(...places.map((place) => place[axis])));
  const high = [0, 1].map((axis) => Math.max(...places.map((place) => place[axis])));
  const side = Math.max(0.35 * size[0], 1.35 * Math.max(high[0] - low[0], high[1] - low[1]));
  if (side >= size[0]) return [...board.low, ...size];
  const corner = [0, 1].map((axis) => {
    const start = (low[axis] + high[axis]) / 2 - side / 2;
    return Math.min(Math.max(start, board.low[axis]), board.high[axis] - side);
  });
  return [...corner, side, side];
}

/** Paths of two chunks over what the policy sees, and where the chosen step goes. */
export class BoardPaths {
  /** @param {{low: number[], high: number[]}} board @param {HTMLElement} stage */
  constructor(board, stage) {
    this.board = board;
    const [x, y] = board.low;
    const [width, height] = [board.high[0] - x, board.high[1] - y];
    this.image = svg("image", { x, y, width, height, preserveAspectRatio: "none" });
    this.marks = svg("g");
    this.drawing = svg("svg", { role: "img", "aria-label": "Paths of the predicted actions" }, this.image, this.marks);
    stage.replaceChildren(this.drawing);
  }

  /** @param {{picture: string|null, before: number[][], after: number[][], step: number}} shown */
  draw({ picture, before, after, step, isClose }) {
    const { low, high } = this.board;
    const whole = [...low, high[0] - low[0], high[1] - low[1]];
    const part = isClose ? closeUp(this.board, [...before, ...after]) : whole;
    this.drawing.setAttribute("viewBox", part.join(" "));
    if (picture && this.image.getAttribute("href") !== picture) this.image.setAttribute("href", picture);
    const thin = part[2] / 170;
    this.marks.replaceChildren();
    for (const [chunk, colour] of [
      [before, "var(--series-1)"],
      [after, "var(--series-2)"],
    ]) {
      this.marks.append(...pathOf(chunk, colour, thin));
      const [cx, cy] = chunk[step];
      this.marks.append(svg("circle", { cx, cy, r: 2.4 * thin, fill: colour, stroke: "#000", "stroke-width": 0.5 * thin }));
    }
  }
}

function pathOf(chunk, colour, thin) {
  const line = { points: chunk.map((place) => place.join(",")).join(" "), fill: "none", "stroke-linejoin": "round" };
  return [
    svg("polyline", { ...line, stroke: "rgb(255 255 255 / 0.75)", "stroke-width": 2.4 * thin }),
    svg("polyline", { ...line, stroke: colour, "stroke-width": 1.2 * thin }),
    ...chunk.map(([cx, cy]) => svg("circle", { cx, cy, r: 1.1 * thin, fill: colour })),
  ];
}

/**
 * Curves over a shared x axis, with ticks; gaps where there is no value.
 * @param {{x: number[], y: (number|null)[], colour: string, dash?: string}[]} series
 */
export function lineChart(series, { x: xTitle, y: yTitle, mark }) {
  const [left, right, top, bottom, width, height] = [46, 8, 14, 34, 420, 200];
  const xs = series.flatMap((each) => each.x);
  const ys = series.flatMap((each) => each.y).filter((value) => value !== null);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys, ...(mark ? [0] : [])), Math.max(...ys, ...(mark ? [0] : []))];
  if (y1 - y0 < 1e-9) [y0, y1] = [y0 - 1, y1 + 1];
  const px = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (width - left - right);
  const py = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img" });
  chart.append(svg("title", { text: `${yTitle} by ${xTitle}` }));
  for (const value of [y0, (y0 + y1) / 2, y1]) {
    chart.append(
      svg("line", { x1: left, x2: width - right, y1: py(value), y2: py(value), stroke: "var(--line)" }),
      svg("text", { x: left - 6, y: py(value) + 4, "text-anchor": "end", text: number(value, 1) }),
    );
  }
  if (mark && y0 < 0 && y1 > 0) {
    chart.append(svg("line", { x1: left, x2: width - right, y1: py(0), y2: py(0), stroke: "var(--muted)" }));
  }
  const ends = [...new Set([x0, Math.round((x0 + x1) / 2), x1])];
  for (const value of ends) {
    chart.append(
      svg("text", { x: px(value), y: height - bottom + 15, "text-anchor": "middle", text: number(value, 0) }),
    );
  }
  chart.append(
    svg("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle", text: xTitle }),
    svg("text", { x: left, y: 10, text: yTitle }),
  );
  for (const { x, y, colour, dash } of series) {
    // Each known value goes on from the one before, or begins anew behind a gap.
    const path = x.map((value, place) => (y[place] === null ? "" : `${(y[place - 1] ?? null) === null ? "M" : "L"}${px(value)} ${py(y[place])}`)).join("");
    chart.append(
      svg("path", { d: path, fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": dash }),
    );
  }
  return chart;
}

/** A colour scale from 0. @param {string[]} colours */
export function rampOf(colours, high, unit = "") {
  const ramp = el("div", { class: "ramp" });
  const stops = colours.filter((_, place) => place % 15 === 0);
  ramp.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const ends = el(
    "div",
    { class: "ends" },
    el("span", { text: "0" }),
    el("span", { text: `${number(high)}${unit}` }),
  );
  return [ramp, ends];
}

/** Cells as colours; nothing where there is no value. @param {(number|null)[][]} rows */
export function heatCanvas(rows, high, colours, label) {
  const canvas = el("canvas", { width: rows[0].length, height: rows.length, role: "img", "aria-label": label });
  const context = canvas.getContext("2d");
  rows.forEach((row, y) =>
    row.forEach((value, x) => {
      if (value === null) return;
      const place = Math.min(255, Math.floor((value / (high || 1)) * 256));
      context.fillStyle = colours[place];
      context.fillRect(x, y, 1, 1);
    }),
  );
  return canvas;
}
