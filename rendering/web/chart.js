// Line charts for pages that load nothing: SVG, sized by their box, coloured by base.css.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT_PX = 170;
const MARGIN = { top: 8, right: 12, bottom: 22, left: 50 };
const MAX_DOTS = 40;

/**
 * @typedef {Object} Series
 * @property {string} name
 * @property {[number, ?number][]} points x and y, x rising; a null y breaks the line.
 * @property {[number, ?number][]=} low Lower end of an interval, drawn as a band with `high`.
 * @property {[number, ?number][]=} high
 * @property {boolean=} dashed A baseline; with a single point, a level across the chart.
 * @property {number=} colour Number of a colour, from 0; baselines are grey without one.
 */

/** At most `count` round numbers that divide a range; at least two where it has any width. */
export function niceTicks(low, high, count) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => span / s <= count);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

/** Powers of ten in a range, with 2 and 5 between them where there are few. */
export function logTicks(low, high) {
  const decades = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) decades.push(10 ** e);
  const every = Math.ceil(decades.length / 6);
  const factors = decades.length <= 3 ? [1, 2, 5] : [1];
  return decades
    .filter((_, i) => i % every === 0)
    .flatMap((d) => factors.map((f) => f * d))
    .filter((t) => t >= low * 0.999 && t <= high * 1.001);
}

/** A number in at most four digits, as short as it can be said. */
export function shortNumber(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return Number(value.toPrecision(4)).toLocaleString("en-US", { maximumFractionDigits: 6 });
}

/** A tick's label, with as many digits as tell it from its neighbours. */
function tickLabel(value, step) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  // One more than the step's first digit: a step may be 2.5.
  const digits = Math.floor(Math.log10(size)) - Math.floor(Math.log10(step || size)) + 2;
  const rounded = Number(value.toPrecision(Math.min(Math.max(digits, 1), 15)));
  const short = (unit) => String(Number((rounded / unit).toPrecision(15)));
  if (size >= 1e6) return `${short(1e6)}M`;
  if (size >= 1e4) return `${short(1e3)}k`;
  return size < 1e-3 ? rounded.toExponential() : String(rounded);
}

/** Pieces of an interval without gaps, as [x, low, high]; what ends below the axis is a gap. */
function bandPieces(lows, highs, bottom) {
  const pieces = [[]];
  const highAt = new Map(highs);
  for (const [x, low] of lows) {
    const high = highAt.get(x);
    // Long curves are thinned each at its own points.
    if (high === undefined) continue;
    if (low === null || high === null || high < bottom) pieces.push([]);
    else pieces.at(-1).push([x, Math.max(low, bottom), high]);
  }
  return pieces.filter((piece) => piece.length);
}

function svg(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent?.append(node);
  return node;
}

function html(name, className, text, parent) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text) node.textContent = text;
  parent?.append(node);
  return node;
}

/** Class that colours a series. */
export function colourClass(colour) {
  return colour === undefined ? "series-muted" : `series-${(colour % 6) + 1}`;
}

/** Smallest and largest of everything drawn, with a little air; never of zero height. */
function valueRange(series, isLog) {
  const drawn = series
    .flatMap((s) => [...s.points, ...(s.low ?? []), ...(s.high ?? [])])
    .map(([, y]) => y)
    .filter((y) => y !== null && (!isLog || y > 0));
  if (drawn.length === 0) return isLog ? [0.1, 1] : [0, 1];
  // Not Math.min(...drawn): there may be more points than a call takes arguments.
  const low = drawn.reduce((a, b) => Math.min(a, b));
  const high = drawn.reduce((a, b) => Math.max(a, b));
  if (isLog) return low === high ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
  const air = high > low ? 0.06 * (high - low) : Math.abs(high) * 0.1 || 0.5;
  return [low - air, high + air];
}

/** Whether a logarithmic axis would show what a linear one hides. */
export function wantsLog(series) {
  const drawn = series.filter((s) => !s.dashed).flatMap((s) => s.points.map(([, y]) => y));
  const finite = drawn.filter((y) => y !== null);
  if (finite.length < 3 || finite.some((y) => y <= 0)) return false;
  return finite.reduce((a, b) => Math.max(a, b)) / finite.reduce((a, b) => Math.min(a, b)) > 20;
}

/** The last measured point at or before x; the first one when there is none. */
export function pointAt(points, x) {
  let low = 0;
  let high = points.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (points[middle][0] <= x) low = middle;
    else high = middle - 1;
  }
  return points[low];
}

/**
 * Draw lines in a box and keep them in its size.
 * @param {HTMLElement} element
 * @param {{series: Series[], xDomain: [number, number], label: string, isLog?: boolean,
 *   onHover?: (x: ?number) => void, onPick?: (x: number) => void}} options
 */
export function lineChart(element, options) {
  const { series, xDomain } = options;
  let isLog = options.isLog ?? false;
  let mark = null;
  let crosshair = null;
  let scales = null;

  const legend = html("div", "chart-legend", "", element);
  const values = series.map((s) => {
    const item = html("span", "chart-key", "", legend);
    html("i", `chart-swatch ${colourClass(s.colour)}${s.dashed ? " dashed" : ""}`, "", item);
    html("span", "chart-name", s.name, item);
    return html("b", "chart-value", "", item);
  });
  const drawing = svg("svg", { role: "img", "aria-label": options.label, class: "chart", height: HEIGHT_PX }, element);
  const clipId = `clip-${(lineChart.count = (lineChart.count ?? 0) + 1)}`;

  function makeScales(width) {
    const [x0, x1] = xDomain[0] === xDomain[1] ? [xDomain[0] - 1, xDomain[1] + 1] : xDomain;
    const [y0, y1] = valueRange(series, isLog);
    const along = width - MARGIN.left - MARGIN.right;
    const up = HEIGHT_PX - MARGIN.top - MARGIN.bottom;
    const share = isLog
      ? (y) => Math.log(y / y0) / Math.log(y1 / y0)
      : (y) => (y - y0) / (y1 - y0);
    return {
      width, along, up, x0, x1, y0, y1,
      x: (x) => MARGIN.left + ((x - x0) / (x1 - x0)) * along,
      y: (y) => MARGIN.top + (1 - share(y)) * up,
      invert: (px) => x0 + ((px - MARGIN.left) / along) * (x1 - x0),
    };
  }

  function path(points) {
    let text = "";
    let isOpen = false;
    for (const [x, y] of points) {
      const drawable = y !== null && (!isLog || y > 0);
      if (drawable) text += `${isOpen ? "L" : "M"}${scales.x(x).toFixed(1)},${scales.y(y).toFixed(1)}`;
      isOpen = drawable;
    }
    return text;
  }

  function drawAxes() {
    const yTicks = isLog ? logTicks(scales.y0, scales.y1) : niceTicks(scales.y0, scales.y1, 4);
    const yStep = yTicks.length > 1 ? Math.abs(yTicks[1] - yTicks[0]) : Math.abs(yTicks[0] ?? 1);
    for (const tick of yTicks) {
      const y = scales.y(tick);
      svg("line", { class: "grid", x1: MARGIN.left, x2: scales.width - MARGIN.right, y1: y, y2: y }, drawing);
      svg("text", { class: "tick", x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, drawing).textContent = tickLabel(tick, isLog ? tick : yStep);
    }
    const xTicks = niceTicks(scales.x0, scales.x1, Math.max(2, Math.floor(scales.along / 70)));
    const xStep = xTicks.length > 1 ? xTicks[1] - xTicks[0] : 1;
    for (const tick of xTicks) {
      const isAtEnd = scales.x(tick) > scales.width - MARGIN.right - 4;
      const at = { x: scales.x(tick) + (isAtEnd ? MARGIN.right : 0), "text-anchor": isAtEnd ? "end" : "middle" };
      svg("text", { class: "tick", y: HEIGHT_PX - 6, ...at }, drawing).textContent = tickLabel(tick, xStep);
    }
  }

  function drawSeries(s, into) {
    const colour = colourClass(s.colour);
    for (const piece of s.low && s.high ? bandPieces(s.low, s.high, scales.y0) : []) {
      const around = [...piece.map(([x, low]) => [x, low]), ...piece.map(([x, , high]) => [x, high]).reverse()];
      svg("path", { class: `${piece.length > 1 ? "band" : "whisker"} ${colour}`, d: `${path(around)}Z` }, into);
    }
    const level = s.dashed && s.points.length === 1;
    const points = level ? [scales.x0, scales.x1].map((x) => [x, s.points[0][1]]) : s.points;
    svg("path", { class: `line ${colour}${s.dashed ? " dashed" : ""}`, d: path(points) }, into);
    if (s.dashed || s.points.length > MAX_DOTS) return;
    for (const [x, y] of s.points) {
      if (y === null || (isLog && y <= 0)) continue;
      svg("circle", { class: `dot ${colour}`, cx: scales.x(x), cy: scales.y(y), r: 2.5 }, into);
    }
  }

  function drawLines() {
    for (const line of drawing.querySelectorAll(".mark, .crosshair")) line.remove();
    for (const [name, x] of [["mark", mark], ["crosshair", crosshair]]) {
      if (x === null || x < scales.x0 || x > scales.x1) continue;
      const px = scales.x(x);
      svg("line", { class: name, x1: px, x2: px, y1: MARGIN.top, y2: HEIGHT_PX - MARGIN.bottom }, drawing);
    }
  }

  function showValues() {
    const x = crosshair ?? mark;
    series.forEach((s, i) => {
      const point = x === null ? s.points.at(-1) : pointAt(s.points, x);
      const isMeasured = s.dashed || x === null || point[0] <= x;
      values[i].textContent = isMeasured ? shortNumber(point[1]) : "–";
    });
  }

  function draw() {
    const width = element.clientWidth;
    if (width < 80) return;
    scales = makeScales(width);
    drawing.replaceChildren();
    drawing.setAttribute("width", width);
    drawing.setAttribute("viewBox", `0 0 ${width} ${HEIGHT_PX}`);
    const clip = svg("clipPath", { id: clipId }, drawing);
    svg("rect", { x: MARGIN.left - 3, y: 0, width: scales.along + 6, height: HEIGHT_PX - MARGIN.bottom + 3 }, clip);
    drawAxes();
    const lines = svg("g", { "clip-path": `url(#${clipId})` }, drawing);
    for (const s of series) drawSeries(s, lines);
    drawLines();
    showValues();
  }

  /** Step under the pointer, held within the axis. */
  function stepAt(event) {
    const px = event.clientX - drawing.getBoundingClientRect().left;
    return Math.min(Math.max(scales.invert(px), scales.x0), scales.x1);
  }
  drawing.addEventListener("pointermove", (event) => options.onHover?.(stepAt(event)));
  drawing.addEventListener("pointerleave", () => options.onHover?.(null));
  drawing.addEventListener("click", (event) => options.onPick?.(stepAt(event)));
  // After the frame: a change of height within the callback would be reported as an error.
  new ResizeObserver(() => requestAnimationFrame(() => {
    if (element.clientWidth !== scales?.width) draw();
  })).observe(element);
  draw();

  return {
    setMark(x) { mark = x; if (scales) { drawLines(); showValues(); } },
    setCrosshair(x) { crosshair = x; if (scales) { drawLines(); showValues(); } },
    setLog(value) { isLog = value; draw(); },
  };
}

/** A line without axes, for a tile; a dot at its end. */
export function sparkline(element, series, label) {
  const [width, height] = [120, 28];
  const xs = series.flatMap((s) => s.points.map(([x]) => x));
  const [y0, y1] = valueRange(series, false);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const x = (v) => 4 + ((v - x0) / (x1 - x0 || 1)) * (width - 8);
  const y = (v) => 3 + (1 - (v - y0) / (y1 - y0)) * (height - 6);
  const drawing = svg("svg", { role: "img", "aria-label": label, class: "chart spark", width, height, viewBox: `0 0 ${width} ${height}` }, element);
  for (const s of series) {
    const points = s.points.filter(([, v]) => v !== null);
    if (points.length === 0) continue;
    const colour = colourClass(s.colour);
    svg("path", { class: `line ${colour}`, d: `M${points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("L")}` }, drawing);
    const [a, b] = points.at(-1);
    svg("circle", { class: `dot ${colour}`, cx: x(a), cy: y(b), r: 2.5 }, drawing);
  }
}
