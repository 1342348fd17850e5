// The run report: one slider over checkpoints moves pictures, tables, numbers and curves together.
import { colourClass, lineChart, pointAt, shortNumber, sparkline, wantsLog } from "./chart.js";

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const isComparison = runs.length > 1;
const steps = [...new Set(runs.flatMap((run) => run.checkpoints))].sort((a, b) => a - b);
const lastStep = Math.max(1, ...runs.map((run) => run.lastStep));
const NEAR = { rootMargin: "500px" };
const PLAY_MS = 1200;
const MAX_ROWS = 500;
const MAX_BESIDE = 4;

const byId = (id) => document.getElementById(id);
const stepText = (step) => step.toLocaleString("en-US");
let position = Math.max(0, steps.length - 1);
let playing = null;
/** Called with the step whenever the slider moves. */
const followers = [];

/** Show a checkpoint now, and every one that the slider moves to. */
function follow(show) {
  followers.push(show);
  show(steps[position]);
}

/** Make an element; text is always written as text. */
function make(name, className = "", text = "", parent = null) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== "") node.textContent = text;
  parent?.append(node);
  return node;
}

// ---- numbers ----------------------------------------------------------------------------------

const pointsOf = new Map();
/** All points of a number as [step, value]; null where nothing was logged. */
function points(run, metric) {
  const logged = run.metrics[metric];
  if (!logged) return null;
  if (!pointsOf.has(logged)) {
    pointsOf.set(logged, run.axes[logged.axis].map((step, i) => [step, logged.values[i]]));
  }
  return pointsOf.get(logged);
}

/** Newest checkpoint of a run at or below a step; undefined before the first. */
const checkpointAt = (run, step) => run.checkpoints.findLast((each) => each <= step);

/** The last value since the checkpoint before; undefined when it was not measured at this one. */
function measured(run, metric, step) {
  const found = points(run, metric);
  const checkpoint = checkpointAt(run, step);
  if (!found || checkpoint === undefined) return undefined;
  const before = run.checkpoints.findLast((each) => each < checkpoint) ?? -1;
  const [at, value] = pointAt(found, checkpoint);
  return at > before && at <= checkpoint ? value : undefined;
}

const isNumber = (value) => typeof value === "number";
const valueText = (value) =>
  value === undefined ? "–" : value === null ? "not finite" : shortNumber(value);

/** Both ends of a number's interval at a checkpoint, or null. */
function interval(run, metric, step) {
  const ends = [measured(run, `${metric}_low`, step), measured(run, `${metric}_high`, step)];
  return ends.every((end) => typeof end === "number") ? ends : null;
}

const intervalText = (ends) => (ends ? `[${shortNumber(ends[0])}, ${shortNumber(ends[1])}]` : "");

/** A coloured dot that says which run is meant. */
function runName(number, parent) {
  const name = make("span", "run-name", "", parent);
  make("i", `run-dot ${colourClass(number)}`, "", name);
  make("span", "", runs[number].name, name);
  return name;
}

// ---- head -------------------------------------------------------------------------------------

function showRuns() {
  runs.forEach((run, number) => {
    const line = make("p", "facts muted", "", byId("runs"));
    if (isComparison) runName(number, line);
    const [status, ...rest] = run.facts;
    make("span", `status${status.startsWith("finished") ? "" : " warn"}`, status, line);
    make("span", "", ` · ${rest.join(" · ")}`, line);
  });
}

/** The last value of a number, with its interval. */
function last(run, metric) {
  const found = points(run, metric);
  if (!found) return null;
  const ends = ["low", "high"].map((end) => points(run, `${metric}_${end}`)?.at(-1)[1] ?? null);
  return { step: found.at(-1)[0], value: found.at(-1)[1], ends: ends.includes(null) ? null : ends };
}

function showTile(headline) {
  const tile = make("article", "tile panel", "", byId("headlines"));
  make("h3", "", headline.label, tile);
  /** Baselines in words, and the runs that share them. */
  const compared = new Map();
  const areApart = new Set(runs.map((run) => last(run, headline.metric)?.step).filter(isNumber)).size > 1;
  runs.forEach((run, number) => {
    const now = last(run, headline.metric);
    if (!now) return;
    const line = make("div", "tile-line", "", tile);
    if (isComparison) make("i", `run-dot ${colourClass(number)}`, "", line);
    make("b", "tile-value", valueText(now.value), line);
    make("span", "muted", intervalText(now.ends), line);
    const baselines = headline.baselines
      .map(([label, metric]) => [label, last(run, metric)])
      .filter(([, baseline]) => baseline)
      .map(([label, baseline]) => `${label} ${valueText(baseline.value)} ${intervalText(baseline.ends)}`.trim());
    const text = baselines.join(", ");
    if (text) compared.set(text, [...(compared.get(text) ?? []), number]);
    if (areApart || now.step !== run.lastStep) make(isComparison ? "span" : "p", "muted small", `at step ${stepText(now.step)}`, isComparison ? line : tile);
  });
  for (const [text, numbers] of compared) {
    const line = make("p", "muted small", "", tile);
    if (compared.size > 1) for (const number of numbers) make("i", `run-dot ${colourClass(number)}`, "", line);
    line.append(text);
  }
  const lines = runs
    .map((run, number) => ({ points: points(run, headline.metric) ?? [], colour: number }))
    .filter((line) => line.points.length > 1);
  if (lines.length) sparkline(tile, lines, `${headline.label} over checkpoints`);
  const note = make("p", "muted small", headline.reading, tile);
  note.title = headline.metric;
}

// ---- files in the page ------------------------------------------------------------------------

/** The bytes of a block of base64. */
function bytesOf(block) {
  const letters = atob(block.textContent);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i += 1) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

const urls = new Map();
/** Address of an embedded file; its bytes are read when it is first shown. */
function urlOf(id) {
  if (!urls.has(id)) {
    const block = byId(id);
    urls.set(id, URL.createObjectURL(new Blob([bytesOf(block)], { type: block.type })));
  }
  return urls.get(id);
}

/** An embedded JSON file. */
function jsonOf(id) {
  return JSON.parse(new TextDecoder().decode(bytesOf(byId(id))));
}

/** The file of a run under a key at its newest checkpoint. */
function fileAt(run, kind, key, step) {
  const checkpoint = checkpointAt(run, step);
  const file = run.media[checkpoint]?.[kind]?.[key];
  return { checkpoint, file };
}

/** Address of a file beside the page; # and ? are letters of its name. */
const addressOf = (path) => path.split("/").map(encodeURIComponent).join("/");

/** Say why a file is not shown, and where it lies. */
function explainAbsence(place, file, checkpoint) {
  place.replaceChildren();
  place.hidden = Boolean(file?.id);
  if (place.hidden) return;
  if (checkpoint === undefined) place.append("This run has no checkpoint yet at this step.");
  else if (!file) place.append(`Not drawn at step ${stepText(checkpoint)}.`);
  else if (file.mib === null) place.append(`The file is gone: ${file.path}`);
  else {
    place.append(`Left out to keep this page small (${file.mib} MiB): `);
    make("a", "", file.path, place).href = addressOf(file.path);
  }
}

// ---- pictures at the checkpoint ---------------------------------------------------------------

/** Watch an element; call when it comes near the window for the first time, or is printed. */
function whenNear(element, callback) {
  let isDone = false;
  const go = () => {
    if (isDone) return;
    isDone = true;
    observer.disconnect();
    callback();
  };
  const observer = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) go();
  }, NEAR);
  observer.observe(element);
  window.addEventListener("beforeprint", go);
}

/** A player in a slot, and everything to hide when there is no film. */
function player(slot) {
  const media = make("video", "", "", slot);
  Object.assign(media, { muted: true, playsInline: true, controls: true, loop: true, preload: "auto" });
  const label = make("label", "loop muted small", "", slot);
  const box = make("input", "", "", label);
  Object.assign(box, { type: "checkbox", checked: true });
  label.append(" loop");
  box.addEventListener("change", () => { media.loop = box.checked; });
  return { media, parts: [media, label] };
}

/** An image in a slot that calls back on a click. */
function clickable(slot, onClick) {
  const button = make("button", "enlarge", "", slot);
  button.type = "button";
  button.addEventListener("click", onClick);
  return { media: make("img", "", "", button), parts: [button] };
}

/** Keep what lies below from jumping when the next checkpoint's picture is less tall. */
function keepHeight(slot, media) {
  let tallest = 0;
  const hold = () => {
    tallest = Math.max(tallest, media.offsetHeight);
    slot.style.minHeight = `${tallest}px`;
  };
  media.addEventListener("load", hold);
  media.addEventListener("loadedmetadata", hold);
  window.addEventListener("resize", () => { tallest = 0; slot.style.minHeight = ""; });
}

/** Give a player or an image another file; a film that was playing plays on. */
function setSource(media, id) {
  if (!id) { media.removeAttribute("src"); return; }
  const url = urlOf(id);
  if (media.src === url) return;
  const wasPlaying = media.paused === false && media.readyState > 0;
  media.src = url;
  if (wasPlaying) media.play().catch(() => {});
}

/** One run's picture or film under one key. */
function pictureSlot(parent, number, kind, key) {
  const slot = make("div", "slot", "", parent);
  const head = make("div", "slot-head", "", slot);
  if (isComparison) runName(number, head);
  const at = make("span", "muted small", "", head);
  const isVideo = kind === "videos";
  const { media, parts } = isVideo ? player(slot) : clickable(slot, () => enlarge(number, key));
  const absence = make("p", "absence muted", "", slot);
  keepHeight(slot, media);

  function show(step) {
    const { checkpoint, file } = fileAt(runs[number], kind, key, step);
    const where = checkpoint === undefined ? "" : `step ${stepText(checkpoint)}`;
    explainAbsence(absence, file, checkpoint);
    for (const part of parts) part.hidden = !file?.id;
    if (isComparison) at.textContent = where;
    const label = `${data.pictures[key].title}, ${where}`;
    media.setAttribute(isVideo ? "aria-label" : "alt", isVideo ? label : `${label}; enlarge`);
    media.dataset.step = checkpoint ?? "";
    setSource(media, file?.id);
  }
  whenNear(slot, () => follow(show));
}

function showFigure(parent, kind, key) {
  const { title, reading } = data.pictures[key];
  const figure = make("figure", "figure", "", parent);
  const caption = make("figcaption", "", "", figure);
  const head = make("div", "figure-head", "", caption);
  make("h3", "", title, head);
  if (title !== key) make("code", "muted small", key, head);
  if (reading) make("p", "muted", reading, caption);
  const slots = make("div", isComparison ? "slots compared" : "slots", "", figure);
  runs.forEach((_, number) => pictureSlot(slots, number, kind, key));
}

/** Whether a number keeps to the rule of its column; null when there is nothing to hold it to. */
function keepsRule(column, value, ends) {
  if (typeof value !== "number") return null;
  if (column.above !== null) return value > column.above;
  if (column.within !== null && ends) return ends[0] <= column.within && column.within <= ends[1];
  return null;
}

/** The table that says whether the pictures of a section may be believed. */
function showTrust(parent, trust) {
  const box = make("div", "trust", "", parent);
  make("h3", "", "Can it be believed?", box);
  const table = make("table", "", "", make("div", "scroll", "", box));
  const head = make("tr", "", "", make("thead", "", "", table));
  make("th", "", "", head);
  for (const column of trust.columns) {
    const cell = make("th", "number", column.label, head);
    make("span", "rule muted small", column.rule, cell);
  }
  const body = make("tbody", "", "", table);
  const note = make("p", "muted small", "", box);
  const rowsOf = (run) => trust.rows.filter((row) => row.metrics.some((metric) => metric in run.metrics));
  const filled = runs.flatMap((run, number) => rowsOf(run).map((row) => {
    const line = make("tr", "", "", body);
    const name = make("th", "", "", line);
    if (isComparison) make("i", `run-dot ${colourClass(number)}`, "", name);
    name.append(row.name.replaceAll("_", " ") || (isComparison ? run.name : "this checkpoint"));
    return { run, metrics: row.metrics, cells: trust.columns.map(() => make("td", "number", "", line)) };
  }));
  followers.push((step) => {
    let nBroken = 0;
    let nMeasured = 0;
    for (const { run, metrics, cells } of filled) {
      metrics.forEach((metric, i) => {
        const value = metric ? measured(run, metric, step) : undefined;
        const ends = metric ? interval(run, metric, step) : null;
        const isBroken = keepsRule(trust.columns[i], value, ends) === false;
        cells[i].textContent = valueText(value) + (isBroken ? " ✗" : "");
        cells[i].classList.toggle("warn", isBroken);
        cells[i].title = metric ?? "";
        if (ends) make("span", "muted small ends", intervalText(ends), cells[i]);
        nBroken += isBroken;
        nMeasured += value !== undefined;
      });
    }
    note.textContent = nMeasured === 0
      ? "Not measured at this checkpoint: take the pictures as illustrations."
      : nBroken ? "✗: against the rule under the head of its column." : "";
  });
}

/** Charts of what a section is trusted by, beside its pictures: the first two columns. */
function showTrustCurves(parent, trust) {
  const metrics = trust.columns.slice(0, 2).map((_, i) => trust.rows.flatMap((row) => row.metrics[i] ?? []));
  const found = data.charts.filter((chart) =>
    chart.series.some((line) => metrics.some((names) => names.includes(line.metric))));
  if (steps.length < 2 || found.length === 0 || found.length > MAX_BESIDE) return;
  const grid = make("div", "chart-grid narrow", "", parent);
  for (const chart of found) showChart(grid, chart);
}

function showPictures() {
  const kindOf = new Map();
  for (const kind of ["images", "videos"]) {
    for (const run of runs) {
      for (const found of Object.values(run.media)) {
        for (const key of Object.keys(found[kind])) kindOf.set(key, kind);
      }
    }
  }
  for (const { key: section, title } of data.sections) {
    const keys = [...kindOf.keys()]
      .filter((key) => data.pictures[key].section === section)
      .sort((a, b) => data.pictures[a].order - data.pictures[b].order);
    if (keys.length === 0) continue;
    const panel = make("section", "panel", "", byId("pictures"));
    panel.dataset.section = section;
    make("h2", "", title, panel);
    const columns = make("div", isComparison ? "columns wide" : "columns", "", panel);
    const [first, ...others] = keys.toSorted((a, b) => kindOf.get(a).localeCompare(kindOf.get(b)));
    const left = make("div", "column", "", columns);
    const right = make("div", "column", "", columns);
    showFigure(left, kindOf.get(first), first);
    const trusts = new Map(keys
      .map((key) => data.pictures[key].trust)
      .filter((trust) => trust.rows.length)
      .map((trust) => [JSON.stringify(trust), trust]));
    for (const trust of trusts.values()) {
      showTrust(right, trust);
      showTrustCurves(right, trust);
    }
    for (const key of others) showFigure(right, kindOf.get(key), key);
    if (!right.hasChildNodes()) right.remove();
  }
  if (!byId("pictures").hasChildNodes()) {
    const panel = make("div", "panel", "", byId("pictures"));
    make("p", "muted", steps.length
      ? "No pictures: this run has no diagnostic that draws."
      : "No checkpoint yet: curves appear below as soon as something is logged.", panel);
  }
}

// ---- the enlarged picture ---------------------------------------------------------------------

const dialog = byId("enlarged");
let enlarged = null;

function showEnlarged() {
  if (!dialog.open || !enlarged) return;
  const run = runs[enlarged.number];
  const { checkpoint, file } = fileAt(run, "images", enlarged.key, steps[position]);
  const name = isComparison ? `${run.name}: ` : "";
  byId("enlarged-title").textContent =
    `${name}${data.pictures[enlarged.key].title}, step ${stepText(checkpoint ?? 0)}` +
    (file?.id ? " · arrow keys change the checkpoint" : " · not in this page");
  if (file?.id) byId("enlarged-picture").src = urlOf(file.id);
  else byId("enlarged-picture").removeAttribute("src");
}

function enlarge(number, key) {
  enlarged = { number, key };
  dialog.showModal();
  showEnlarged();
}

// ---- tables -----------------------------------------------------------------------------------

/** Order of two cells: numbers by size, words by alphabet, nothing last. */
function compareCells(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return isNumber(a) && isNumber(b) ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

function showTable(parent, number, key) {
  const run = runs[number];
  const { title, reading } = data.pictures[key];
  const box = make("div", "table-box", "", parent);
  const head = make("div", "figure-head", "", box);
  make("h3", "", title, head);
  if (title !== key) make("code", "muted small", key, head);
  if (isComparison) runName(number, head);
  if (reading) make("p", "muted", reading, box);
  const absence = make("p", "absence muted", "", box);
  const scroll = make("div", "scroll tall", "", box);
  const note = make("p", "muted small", "", box);
  const sorting = { column: null, isDescending: false };
  let content = null;

  function draw() {
    scroll.replaceChildren();
    if (!content) { note.textContent = ""; return; }
    const table = make("table", "", "", scroll);
    const line = make("tr", "", "", make("thead", "", "", table));
    const numeric = content.columns.map((_, i) => content.rows.every((row) => row[i] === null || isNumber(row[i])));
    content.columns.forEach((column, i) => {
      const cell = make("th", numeric[i] ? "number" : "", "", line);
      const isSorted = sorting.column === column;
      if (isSorted) cell.setAttribute("aria-sort", sorting.isDescending ? "descending" : "ascending");
      const arrow = isSorted ? (sorting.isDescending ? " ↓" : " ↑") : "";
      const button = make("button", "sort", column + arrow, cell);
      button.type = "button";
      button.addEventListener("click", () => {
        sorting.isDescending = isSorted && !sorting.isDescending;
        sorting.column = column;
        draw();
        scroll.querySelectorAll("th button")[i].focus();
      });
    });
    const by = content.columns.indexOf(sorting.column);
    const direction = sorting.isDescending ? -1 : 1;
    const rows = by < 0 ? content.rows : content.rows.toSorted((a, b) =>
      a[by] === null || b[by] === null ? compareCells(a[by], b[by]) : direction * compareCells(a[by], b[by]));
    const body = make("tbody", "", "", table);
    for (const row of rows.slice(0, MAX_ROWS)) {
      const tr = make("tr", "", "", body);
      row.forEach((cell, i) => make("td", numeric[i] ? "number" : "", cell === null ? "–" : isNumber(cell) ? shortNumber(cell) : String(cell), tr));
    }
    note.textContent = rows.length > MAX_ROWS
      ? `The first ${MAX_ROWS} of ${stepText(rows.length)} rows in this order.`
      : `${stepText(rows.length)} rows.`;
  }

  whenNear(box, () => {
    const show = (step) => {
      const { checkpoint, file } = fileAt(run, "tables", key, step);
      explainAbsence(absence, file, checkpoint);
      content = file?.id ? jsonOf(file.id) : null;
      draw();
    };
    follow(show);
  });
}

function showTables() {
  const keys = new Set(runs.flatMap((run) => Object.values(run.media).flatMap((found) => Object.keys(found.tables))));
  byId("tables").hidden = keys.size === 0;
  for (const key of keys) runs.forEach((_, number) => showTable(byId("table-list"), number, key));
}

// ---- curves -----------------------------------------------------------------------------------

/** Charts that are drawn. */
const drawn = new Set();

function seriesOf(chart) {
  const main = chart.series.map(({ run, metric, label }, i) => ({
    name: chart.series.length > 1 || isComparison ? label : "value",
    points: points(runs[run], metric),
    low: points(runs[run], `${metric}_low`),
    high: points(runs[run], `${metric}_high`),
    colour: isComparison ? run : i,
  }));
  const levels = chart.references.flatMap((reference) => {
    if (reference.metric === undefined) {
      return [{ name: reference.label, points: [[0, reference.value]], dashed: true }];
    }
    return runs.map((run, number) => ({
      name: reference.label,
      points: points(run, reference.metric),
      dashed: true,
      colour: isComparison ? number : undefined,
    })).filter((line) => line.points);
  });
  return [...main, ...levels];
}

let wanted = null;
/** Read every drawn chart at a step, once a frame. */
function hover(x) {
  if (wanted === null) {
    requestAnimationFrame(() => {
      for (const chart of drawn) chart.setCrosshair(wanted.x);
      wanted = null;
    });
  }
  wanted = { x };
}

/** Move the slider to the checkpoint nearest to a step. */
function pick(x) {
  if (steps.length === 0) return;
  const nearest = steps.reduce((best, step, i) => (Math.abs(step - x) < Math.abs(steps[best] - x) ? i : best), 0);
  moveTo(nearest);
}

function fillCard(card, chart) {
  const series = seriesOf(chart);
  const thinned = chart.series
    .map(({ run, metric }) => runs[run].metrics[metric])
    .filter((logged) => logged.logged);
  const { head, box } = card;
  const handle = lineChart(box, {
    series, xDomain: [0, lastStep], label: `${chart.title} over steps`, onHover: hover, onPick: pick,
  });
  if (wantsLog(series)) {
    const toggle = make("button", "log small", "log", head);
    Object.assign(toggle, { type: "button", title: "logarithmic axis" });
    toggle.setAttribute("aria-pressed", "false");
    toggle.addEventListener("click", () => {
      const isOn = toggle.getAttribute("aria-pressed") !== "true";
      toggle.setAttribute("aria-pressed", String(isOn));
      handle.setLog(isOn);
    });
  }
  if (thinned.length) {
    const [first] = thinned;
    make("p", "muted small", `${stepText(first.values.length)} of ${stepText(first.logged)} points, extremes among them`, card.element);
  }
  drawn.add(handle);
  follow((step) => handle.setMark(step ?? null));
}

function showChart(grid, chart) {
  const element = make("article", "chart-card", "", grid);
  const head = make("div", "figure-head", "", element);
  make("h4", "", chart.title, head);
  make("p", "meaning muted small", chart.meaning, element);
  const box = make("div", "chart-box", "", element);
  whenNear(element, () => fillCard({ element, head, box }, chart));
  return { element, text: [chart.title, ...chart.series.map((s) => s.metric)].join(" ").toLowerCase() };
}

const countText = (count) => `${count} ${count === 1 ? "chart" : "charts"}`;

function showCurves() {
  const isNarrow = window.innerWidth < 700;
  const groups = data.sections.map(({ key, title, sentence }, i) => {
    const members = data.charts.filter((chart) => chart.section === key);
    if (members.length === 0) return null;
    const section = make("details", "panel", "", byId("chart-sections"));
    section.open = !isNarrow || i < 2;
    const summary = make("summary", "", "", section);
    make("h3", "", title, summary);
    const count = make("span", "muted small", "", summary);
    make("p", "muted", sentence, section);
    const grid = make("div", "chart-grid", "", section);
    return { section, count, cards: members.map((chart) => showChart(grid, chart)) };
  }).filter(Boolean);

  function filter() {
    const words = byId("chart-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let total = 0;
    for (const { section, count, cards } of groups) {
      let shown = 0;
      for (const { element, text } of cards) {
        element.hidden = !words.every((word) => text.includes(word));
        shown += !element.hidden;
      }
      if (words.length && shown) section.open = true;
      section.hidden = shown === 0;
      count.textContent = countText(shown);
      total += shown;
    }
    byId("chart-count").textContent = total ? countText(total) : "No number has such a name.";
  }
  byId("chart-search").addEventListener("input", filter);
  filter();
}

// ---- all numbers ------------------------------------------------------------------------------

function showNumbers() {
  const names = Object.keys(data.meanings).filter((name) => name !== "epoch").sort();
  const table = byId("number-table");
  const headRow = make("tr", "", "", table.tHead);
  make("th", "", "name", headRow);
  if (isComparison) runs.forEach((_, number) => runName(number, make("th", "number", "", headRow)));
  else for (const title of ["value", "95 % interval", "change"]) make("th", "number", title, headRow);
  const rows = names.map((name) => {
    const line = make("tr", "", "", table.tBodies[0]);
    const cell = make("td", "", "", line);
    make("code", "", name, cell);
    if (data.meanings[name]) make("span", "muted small meaning", data.meanings[name], cell);
    const cells = (isComparison ? runs : [0, 1, 2]).map(() => make("td", "number", "", line));
    return { name, line, cells };
  });
  const show = (step) => {
    const search = byId("number-search").value.toLowerCase().trim();
    const before = steps[position - 1];
    byId("numbers-note").textContent = step === undefined
      ? "No checkpoint yet."
      : `At step ${stepText(step)}` + (isComparison
        ? ": each run at its newest checkpoint at or below it."
        : before === undefined ? ", the first checkpoint." : `; change since step ${stepText(before)}. A number that was not measured since then shows –.`);
    for (const { name, line, cells } of rows) {
      line.hidden = !name.toLowerCase().includes(search);
      if (isComparison) {
        runs.forEach((run, i) => { cells[i].textContent = valueText(measured(run, name, step)); });
        continue;
      }
      const [run] = runs;
      const value = measured(run, name, step);
      const earlier = before === undefined ? undefined : measured(run, name, before);
      cells[0].textContent = valueText(value);
      cells[1].textContent = intervalText(interval(run, name, step));
      const change = isNumber(value) && isNumber(earlier) ? value - earlier : null;
      cells[2].textContent = change === null ? "" : `${change > 0 ? "+" : ""}${shortNumber(change)}`;
    }
  };
  whenNear(byId("numbers"), () => follow(show));
  byId("number-search").addEventListener("input", () => show(steps[position]));
}

// ---- configuration and environment ------------------------------------------------------------

function pairs(parent, rows) {
  const body = make("tbody", "", "", make("table", "pairs", "", make("div", "scroll", "", parent)));
  for (const [name, ...values] of rows) {
    const line = make("tr", "", "", body);
    make("th", "", name, line);
    for (const value of values) make("td", "", value, line);
  }
  return body;
}

function fold(title, sentence, number, isOpen = false) {
  const box = make("details", "panel", "", byId("setup"));
  box.open = isOpen;
  const summary = make("summary", "", "", box);
  make("h2", "", title, summary);
  if (isComparison && number !== null) runName(number, summary);
  make("p", "muted", sentence, box);
  return box;
}

function showSetup() {
  if (isComparison) {
    const box = fold("Differences", "Keys of the configurations that are not the same in all runs; – where a run has no such key.", null, true);
    if (data.differences.length) {
      const body = pairs(box, data.differences.map(({ key, values }) => [key, ...values.map((value) => value ?? "–")]));
      const line = make("tr", "", "", body.parentElement.createTHead());
      make("th", "", "key", line);
      runs.forEach((_, number) => runName(number, make("th", "", "", line)));
    } else make("p", "", "None: the configurations are the same.", box);
  }
  runs.forEach((run, number) => {
    if (run.config) {
      const box = fold("Config", "What was run, defaults filled in: train.py fit -c config.yaml runs it again.", number);
      make("pre", "scroll tall", run.config, box);
      if (run.earlier.length) make("p", "muted small", `Of earlier processes of this run, in its folder: ${run.earlier.join(", ")}.`, box);
    }
    if (run.environment.length) {
      const box = fold("Environment", "Code, machine and packages at the start of the run: another commit or version may give other numbers.", number);
      pairs(box, run.environment);
      const packages = make("details", "", "", box);
      make("summary", "", `${run.packages.length} packages`, packages);
      make("pre", "scroll tall", run.packages.map(([name, version]) => `${name}==${version}`).join("\n"), packages);
    }
  });
}

// ---- the slider -------------------------------------------------------------------------------

function moveTo(index) {
  position = Math.min(Math.max(index, 0), steps.length - 1);
  const step = steps[position];
  const isBest = !isComparison && runs[0].bestStep === step;
  const text = `step ${stepText(step)}`;
  const slider = byId("slider");
  slider.value = position;
  slider.setAttribute("aria-valuetext", `${text}, ${position + 1} of ${steps.length}${isBest ? ", best" : ""}`);
  const output = byId("step");
  output.replaceChildren();
  make("b", "", text, output);
  make("span", "muted", ` ${position + 1} of ${steps.length}`, output);
  if (isBest) make("span", "best", "best", output);
  byId("before").disabled = position === 0;
  byId("after").disabled = position === steps.length - 1;
  for (const show of followers) show(step);
  showEnlarged();
}

function stop() {
  clearInterval(playing);
  playing = null;
  byId("play").setAttribute("aria-pressed", "false");
  byId("play").textContent = "▶ play";
}

function play() {
  if (playing !== null) { stop(); return; }
  if (position === steps.length - 1) moveTo(0);
  byId("play").setAttribute("aria-pressed", "true");
  byId("play").textContent = "❚❚ pause";
  playing = setInterval(() => {
    moveTo(position + 1);
    if (position === steps.length - 1) stop();
  }, PLAY_MS);
}

function wireSlider() {
  if (steps.length === 0) return;
  byId("bar").hidden = false;
  byId("slider").max = steps.length - 1;
  byId("play").disabled = steps.length < 2;
  byId("slider").addEventListener("input", () => moveTo(Number(byId("slider").value)));
  byId("before").addEventListener("click", () => moveTo(position - 1));
  byId("after").addEventListener("click", () => moveTo(position + 1));
  byId("play").addEventListener("click", play);
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea, video, summary") || event.ctrlKey || event.metaKey || event.altKey) return;
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    moveTo(position + way);
  });
  moveTo(position);
}

// ---- colours ----------------------------------------------------------------------------------

const THEMES = { system: "◐ system", light: "○ light", dark: "● dark" };

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = THEMES[theme];
  byId("theme").setAttribute("aria-label", `Colours: ${theme}`);
}

function wireTheme() {
  const names = Object.keys(THEMES);
  let theme = "system";
  // A page opened as a file may have no memory.
  try { theme = localStorage.getItem("report-theme") ?? theme; } catch { theme = "system"; }
  showTheme(names.includes(theme) ? theme : "system");
  byId("theme").addEventListener("click", () => {
    theme = names[(names.indexOf(theme) + 1) % names.length];
    showTheme(theme);
    try { localStorage.setItem("report-theme", theme); } catch { /* Only for this visit, then. */ }
  });
}

function start() {
  wireTheme();
  showRuns();
  data.headlines.forEach(showTile);
  showPictures();
  showTables();
  showCurves();
  showNumbers();
  showSetup();
  byId("enlarged-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  wireSlider();
}

start();
