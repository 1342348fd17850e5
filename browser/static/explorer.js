/** The landscape tab: put agent and T anywhere, and see what policies answer there. */

import { getJson, notify, postJson } from "/static/app.js";

const SVG = "http://www.w3.org/2000/svg";
const DEGREES = 180 / Math.PI;
const STEP_PX = 4;
const FINE_STEP_PX = 1;
const TURN_DEGREES = 5;
const PLAY_MS = 100;
const HASH_MS = 300;
const LONGEST_FIRST_LOOK = 32;
const TURN_HANDLE_PX = [0, 104];
const POSE_FIELDS = [
  { owner: "of-agent", label: "Agent x", unit: "px", perUnit: 1 },
  { owner: "of-agent", label: "Agent y", unit: "px", perUnit: 1 },
  { owner: "of-block", label: "T x", unit: "px", perUnit: 1 },
  { owner: "of-block", label: "T y", unit: "px", perUnit: 1 },
  { owner: "of-block", label: "T angle", unit: "°", perUnit: 1 / DEGREES },
];
const OBJECTS = { agent: "the agent", block: "the T" };

/** Make an element. @param {string} tag @param {object} properties @param {...(Node|string)} children */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  const { attributes = {}, ...rest } = properties;
  Object.assign(element, rest);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function shape(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function field(label, control, className = "") {
  // Without it the options of a list would be part of its name.
  control.ariaLabel = label;
  return make("label", { className: `chooser ${className}` }, make("span", { textContent: label }), control);
}

const titled = (name) => `${name[0].toUpperCase()}${name.slice(1).replaceAll("_", " ")}`;
const line = (points) => points.map(([x, y]) => `${x},${y}`).join(" ");
const fixed = (value, digits = 1) => value.toFixed(digits);
const percent = (share) => `${fixed(100 * share, share < 0.1 ? 1 : 0)} %`;

/** Wait until pictures can be shown without a gap. @param {string[]} urls */
async function decoded(urls) {
  await Promise.all(
    urls.map((url) => {
      const picture = new Image();
      picture.src = url;
      return picture.decode();
    }),
  );
}

function picturesOf(answer) {
  const urls = [answer.scene];
  for (const each of answer.answers) {
    urls.push(each.landscape?.heat);
    for (const camera of each.attention?.cameras ?? []) urls.push(camera.picture);
  }
  return urls.filter(Boolean);
}

/** A square picture of the whole board, with marks, and with agent and T to be taken hold of. */
class Board {
  /** @param {object} scene what the session says of the board @param {string} label @param {?(pose: number[], isLast: boolean) => void} onMove */
  constructor(scene, label, onMove) {
    this.scene = scene;
    this.onMove = onMove;
    this.pose = null;
    const size = scene.board_px;
    this.picture = shape("image", { width: size, height: size, preserveAspectRatio: "none" });
    this.marks = shape("g", { class: "marks" });
    this.handles = shape("g", { class: "handles" });
    this.element = shape(
      "svg",
      { class: "board", viewBox: `0 0 ${size} ${size}`, role: "group", "aria-label": label },
      this.picture,
      this.handles,
      this.marks,
    );
    if (scene.t_outline_px) this.addHandles();
  }

  addHandles() {
    const hint = "arrow keys move it by 4 px, with Shift by 1";
    const outline = line(this.scene.t_outline_px);
    const [x, y] = TURN_HANDLE_PX;
    this.block = shape(
      "g",
      { class: "handle", tabindex: 0, role: "application", "aria-label": `The T: ${hint}, Q and E turn it` },
      shape("polygon", { points: outline, class: "casing" }),
      shape("polygon", { points: outline, class: "grip" }),
    );
    this.turn = shape(
      "g",
      { class: "handle turn" },
      shape("circle", { cx: x, cy: y, r: 22, class: "reach" }),
      shape("circle", { cx: x, cy: y, r: 9, class: "casing" }),
      shape("circle", { cx: x, cy: y, r: 9, class: "grip" }),
    );
    this.turn.append(shape("title", {}, "Turn the T"));
    this.block.append(this.turn);
    const radius = this.scene.agent_radius_px;
    this.agent = shape(
      "g",
      { class: "handle", tabindex: 0, role: "application", "aria-label": `The agent: ${hint}` },
      shape("circle", { r: 26, class: "reach" }),
      shape("circle", { r: radius, class: "casing" }),
      shape("circle", { r: radius, class: "grip" }),
    );
    this.handles.append(this.block, this.agent);
    this.drag(this.agent, (pose, [dx, dy]) => move(pose, 0, dx, dy));
    this.drag(this.block, (pose, [dx, dy]) => move(pose, 2, dx, dy));
    this.drag(this.turn, (pose, _, [toX, toY]) => turnTo(pose, toX, toY));
    this.block.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.agent.addEventListener("keydown", (event) => this.key(event, 0));
    this.block.addEventListener("keydown", (event) => this.key(event, 2));
  }

  /** Where on the board a pointer is, px. */
  at(event) {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.element.getScreenCTM().inverse());
    return [point.x, point.y];
  }

  /** @param {SVGElement} handle @param {(pose: number[], way: number[], at: number[]) => number[]} moved */
  drag(handle, moved) {
    let start = null;
    handle.addEventListener("pointerdown", (event) => {
      if (!this.pose || event.button !== 0) return;
      event.preventDefault();
      event.stopPropagation();
      handle.closest("[tabindex]").focus({ preventScroll: true });
      handle.setPointerCapture(event.pointerId);
      start = { at: this.at(event), pose: this.pose };
    });
    const follow = (event, isLast) => {
      if (!start) return;
      event.stopPropagation();
      const at = this.at(event);
      const way = [at[0] - start.at[0], at[1] - start.at[1]];
      // A click moves nothing.
      if (start.hasMoved || Math.hypot(...way) > 1) {
        start.hasMoved = true;
        this.onMove(moved(start.pose, way, at), isLast);
      }
      if (isLast) start = null;
    };
    handle.addEventListener("pointermove", (event) => follow(event, false));
    handle.addEventListener("pointerup", (event) => follow(event, true));
    handle.addEventListener("pointercancel", (event) => follow(event, true));
  }

  wheel(event) {
    if (!this.pose || event.ctrlKey) return;
    event.preventDefault();
    const step = (event.shiftKey ? 1 : TURN_DEGREES) / DEGREES;
    this.onMove(turned(this.pose, Math.sign(event.deltaY || event.deltaX) * step), true);
  }

  key(event, index) {
    if (!this.pose || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = event.shiftKey ? FINE_STEP_PX : STEP_PX;
    const turn = (event.shiftKey ? 1 : TURN_DEGREES) / DEGREES;
    const ways = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    const turns = index === 2 ? { q: -turn, e: turn } : {};
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (ways[key]) this.onMove(move(this.pose, index, ...ways[key]), true);
    else if (turns[key]) this.onMove(turned(this.pose, turns[key]), true);
    else return;
    event.preventDefault();
  }

  setPose(pose) {
    this.pose = pose;
    this.handles.toggleAttribute("hidden", !pose);
    if (!pose || !this.agent) return;
    const [agentX, agentY, x, y, angle] = pose;
    this.agent.setAttribute("transform", `translate(${agentX} ${agentY})`);
    this.block.setAttribute("transform", `translate(${x} ${y}) rotate(${angle * DEGREES})`);
  }

  setPicture(url) {
    if (url) this.picture.setAttribute("href", url);
    this.picture.toggleAttribute("hidden", !url);
  }

  /** @param {object} landscape of an answer @param {{samples: boolean, regions: boolean}} wanted */
  setMarks(landscape, wanted) {
    this.marks.replaceChildren();
    if (!landscape) return;
    if (wanted.regions) for (const region of landscape.regions ?? []) this.addRegion(region);
    if (wanted.samples) for (const path of landscape.samples) this.addSample(path);
    if (landscape.demonstrated) {
      this.addPath(landscape.demonstrated_path, "demonstrated");
      this.addCross(landscape.demonstrated);
    }
    this.addPath(landscape.path, "predicted");
    this.addStar(landscape.prediction);
  }

  addRegion({ level, lines }) {
    for (const points of lines) {
      const attributes = { points: line(points) };
      this.marks.append(
        shape("polyline", { ...attributes, class: "casing thin" }),
        shape("polyline", { ...attributes, class: `region region-${Math.round(100 * level)}` }),
      );
    }
  }

  addSample(path) {
    const [x, y] = path.at(-1);
    this.marks.append(
      shape("polyline", { points: line(path), class: "sample" }),
      shape("circle", { cx: x, cy: y, r: 2.5, class: "sample-end" }),
    );
  }

  addPath(path, className) {
    this.marks.append(
      shape("polyline", { points: line(path), class: "casing" }),
      shape("polyline", { points: line(path), class: className }),
    );
  }

  addCross([x, y]) {
    const d = `M${x - 10} ${y}h20M${x} ${y - 10}v20`;
    this.marks.append(shape("path", { d, class: "casing wide" }), shape("path", { d, class: "demonstrated cross" }));
  }

  addStar([x, y]) {
    this.marks.append(shape("polygon", { points: line(starAround(x, y, 12)), class: "star" }));
  }
}

function starAround(x, y, radius) {
  return Array.from({ length: 10 }, (_, corner) => {
    const angle = Math.PI * (corner / 5 - 0.5);
    const reach = radius * (corner % 2 ? 0.42 : 1);
    return [x + reach * Math.cos(angle), y + reach * Math.sin(angle)];
  });
}

function move(pose, index, dx, dy) {
  const moved = [...pose];
  moved[index] += dx;
  moved[index + 1] += dy;
  return moved;
}

function turned(pose, angle) {
  const full = 2 * Math.PI;
  return [...pose.slice(0, 4), (((pose[4] + angle) % full) + full) % full];
}

/** Turn the T about the origin of its frame, so that its stem points to a place. */
function turnTo(pose, x, y) {
  return turned(pose, Math.atan2(y - pose[3], x - pose[2]) - Math.PI / 2 - pose[4]);
}

/** One policy's landscape and attention. */
class PolicyView {
  constructor(tab) {
    this.tab = tab;
    this.board = new Board(tab.session, "Landscape", (pose, isLast) => tab.movedTo(pose, isLast));
    this.title = make("h2");
    this.reason = make("p", { className: "warn reason" });
    this.bar = make("div", { className: "colour-bar" });
    this.numbers = make("dl", { className: "answer-facts" });
    this.trust = make("p", { className: "muted trust" });
    this.cameras = make("div", { className: "cameras" });
    this.attentionTitle = make("h2");
    this.attentionReason = make("p", { className: "warn reason" });
    this.explain = make("button", { type: "button", textContent: "Explain this pose", hidden: true });
    this.explain.addEventListener("click", () => tab.explain());
    this.shares = make("ul", { className: "shares" });
    this.attentionNote = make("p", { className: "muted trust" });
    this.element = make(
      "div",
      { className: "policy" },
      make("section", { className: "panel" }, this.title, this.reason, this.board.element, this.bar, legend(), this.numbers, this.trust),
      make(
        "section",
        { className: "panel" },
        this.attentionTitle,
        this.attentionReason,
        this.cameras,
        this.explain,
        this.shares,
        this.attentionNote,
      ),
    );
  }

  /** @param {object} answer of this policy @param {object} described by the session @param {object} whole the whole answer */
  show(answer, described, whole) {
    const { state } = this.tab;
    const name = this.tab.isComparing ? `${answer.name} · ` : "";
    const step = this.tab.isComparing ? `k = ${state.horizon}` : stepName(state.horizon);
    this.title.textContent = `${name}${titled(state.method)}, ${step}`;
    const landscape = answer.landscape;
    this.board.element.setAttribute("aria-label", `Landscape of ${answer.name}`);
    this.board.setPicture(landscape?.heat);
    this.board.setMarks(landscape, state);
    this.board.setPose(whole.pose);
    this.setReason(this.reason, answer.reason ?? landscape?.reason);
    this.setBar(landscape);
    this.setNumbers(landscape);
    this.setTrust(answer, described);
    this.setAttention(answer, described, name);
  }

  setReason(element, text) {
    element.textContent = text ?? "";
    element.hidden = !text;
  }

  setBar(landscape) {
    this.bar.hidden = !landscape?.heat;
    if (!landscape?.heat) return;
    const [low, high] = landscape.range;
    const ramp = make("img", { src: this.tab.session.colours, alt: "" });
    const labels = make(
      "div",
      { className: "colour-labels" },
      make("span", { textContent: low }),
      make("span", { textContent: landscape.unit }),
      make("span", { textContent: high }),
    );
    this.bar.replaceChildren(ramp, labels);
  }

  setNumbers(landscape) {
    const numbers = landscape?.numbers;
    this.numbers.hidden = !numbers;
    if (!numbers) return;
    const board = this.tab.session.board_px ** 2;
    const gain = numbers.nll_nats === null ? 0 : numbers.uniform_nats - numbers.nll_nats;
    facts(this.numbers, [
      [
        "Demonstrated action",
        numbers.nll_nats === null
          ? "none for this pose"
          : `−log p = ${fixed(numbers.nll_nats, 2)} nats (${fixed(Math.abs(gain), 2)} ${gain < 0 ? "worse" : "better"} than uniform)`,
      ],
      ["90 % region", `${Math.round(numbers.area90_px2)} px², ${percent(numbers.area90_px2 / board)} of the board`],
      ["Entropy", `${fixed(numbers.entropy_nats, 2)} nats (uniform: ${fixed(numbers.uniform_nats, 2)})`],
      ["Separate modes", `${numbers.modes}`],
      ["Mass off the board", percent(Math.max(numbers.out_of_board, 0))],
    ]);
  }

  setTrust(answer, described) {
    const parts = [];
    const calibration = answer.landscape?.calibration;
    if (calibration) parts.push(calibrationText(calibration));
    if (answer.redrawn_levels > 0) {
      const levels = fixed(answer.redrawn_levels, 2);
      parts.push(`The simulator draws the recorded frame ${levels} of 255 grey levels off what was recorded.`);
    }
    if (described.is_historic && answer.redrawn_levels !== null && answer.landscape) {
      parts.push("The policy sees a history: at a moved pose it is the same instant again and again.");
    }
    const took = answer.elapsed_ms;
    if (took) {
      const ms = (value) => `${Math.round(value)}`;
      parts.push(`Policy ${ms(took.policy)}, landscape ${ms(took.landscape)}, attention ${ms(took.attention)} ms.`);
    }
    this.trust.textContent = parts.join(" ");
  }

  setAttention(answer, described, name) {
    const { attention } = answer;
    const method = described.attention.find((each) => each.name === this.tab.state.attention);
    this.attentionTitle.textContent = `${name}${method ? titled(method.title) : "What the policy sees"}`;
    this.setReason(this.attentionReason, attention?.reason ?? (method?.reason || undefined));
    this.cameras.replaceChildren(...(attention?.cameras ?? []).map(cameraFigure));
    this.explain.hidden = !method || method.is_live || Boolean(method.reason) || Boolean(attention?.shares);
    this.shares.replaceChildren(...(attention?.shares ?? []).map(shareItem));
    this.attentionNote.textContent = attentionText(attention, method, described);
  }
}

function stepName(horizon) {
  return horizon === 0 ? "action now (k = 0)" : `${horizon} steps ahead (k = ${horizon})`;
}

function calibrationText(calibration) {
  const scale = calibration.scale_px.map((value) => fixed(value)).join(" × ");
  if (!calibration.is_fitted) {
    return `Kernels ${scale} px: a bandwidth that this answer's own samples choose, not calibrated on demonstrations.`;
  }
  const kind = calibration.is_held_out ? "held-out episodes" : "episodes";
  const parts = [`Kernels ${scale} px, fitted on ${calibration.n_frames} frames of ${kind} ${calibration.episodes.join(", ")}.`];
  if (calibration.note) parts.push(sentence(calibration.note));
  if (calibration.is_shown) parts.push("This episode is one of them, so its likelihood looks a little too good.");
  return parts.join(" ");
}

function attentionText(attention, method, described) {
  if (!method || !attention || attention.concentration === undefined) return "";
  const parts = [];
  if (attention.is_uniform) parts.push("The map prefers nothing.");
  else if (attention.concentration !== null) {
    parts.push(`Concentration ${fixed(attention.concentration, 2)} over ${attention.n_cells} cells (0: prefers nothing, 1: one cell); colours from the smallest to the largest value of this pose.`);
  }
  if (attention.completeness_error !== null) parts.push(`Completeness error ${percent(attention.completeness_error)}.`);
  if (method.is_live && described.resolution_note) parts.push(sentence(described.resolution_note));
  return parts.join(" ");
}

const sentence = (text) => `${titled(text)}.`;

function cameraFigure(camera) {
  const alt = `Camera ${camera.name}`;
  return make(
    "figure",
    {},
    make("img", { src: camera.picture, alt, className: "camera" }),
    make("figcaption", { className: "muted", textContent: camera.name }),
  );
}

function shareItem({ name, share, colour }) {
  const bar = make("span", { className: "share-bar" });
  const filled = make("span", { className: "share-filled" });
  filled.style.width = `${100 * share}%`;
  filled.style.background = colour;
  bar.append(filled);
  return make("li", {}, make("span", { textContent: name.replaceAll("_", " ") }), bar, make("span", { className: "number", textContent: percent(share) }));
}

function facts(list, rows) {
  list.replaceChildren(...rows.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
}

function legend() {
  const entries = [
    ["predicted", "predicted", shape("polygon", { points: line(starAround(13, 8, 8)), class: "star" })],
    ["demonstrated", "demonstrated", shape("path", { d: "M13 1v14M6 8h14", class: "demonstrated cross" })],
    ["sample", "sampled chunks", shape("polyline", { points: "1,13 9,8 24,4", class: "sample" })],
    ["region", "50 %", shape("polyline", { points: "1,8 25,8", class: "region region-50" })],
    ["region", "80 %", shape("polyline", { points: "1,8 25,8", class: "region region-80" })],
    ["region", "95 % of the mass", shape("polyline", { points: "1,8 25,8", class: "region region-95" })],
  ];
  const items = entries.map(([, text, mark]) => {
    const swatch = shape("svg", { class: "swatch", viewBox: "0 0 26 16", "aria-hidden": "true" });
    swatch.append(mark);
    return make("li", {}, swatch, make("span", { textContent: text }));
  });
  return make("ul", { className: "legend" }, ...items);
}

/** The tab: what is chosen, what is asked, and what is shown. */
class Tab {
  /** @param {HTMLElement} element @param {object} session @param {boolean} isFirst whether an address that names no tab is this one's */
  constructor(element, session, isFirst) {
    this.element = element;
    this.session = session;
    this.isFirst = isFirst;
    this.isAsked = false;
    this.isAsking = false;
    this.isExplaining = false;
    this.isDragging = false;
    this.hasNotified = false;
    this.playing = null;
    this.views = [];
    this.state = this.firstState();
  }

  firstState() {
    const [episode, length] = this.firstEpisode();
    return {
      policy: 0,
      other: null,
      episode,
      frame: Math.floor(length / 3),
      horizon: Math.floor(Math.min(this.session.policies[0].chunk_size, LONGEST_FIRST_LOOK) / 2),
      method: "likelihood",
      attention: "rollout",
      pose: null,
      samples: true,
      regions: true,
    };
  }

  /** A held-out episode where one is known. */
  firstEpisode() {
    const held = new Set(this.session.policies[0].val ?? []);
    return this.session.episodes.find(([number]) => held.has(number)) ?? this.session.episodes[0];
  }

  get policy() {
    return this.session.policies[this.state.policy];
  }

  get isComparing() {
    return this.state.other !== null;
  }

  get chosen() {
    return this.isComparing ? [this.state.policy, this.state.other] : [this.state.policy];
  }

  get length() {
    return new Map(this.session.episodes).get(this.state.episode);
  }

  get chunkSize() {
    return Math.min(...this.chosen.map((place) => this.session.policies[place].chunk_size));
  }

  start() {
    this.build();
    this.readHash();
    this.sync();
    this.ask();
    window.addEventListener("hashchange", () => this.hashChanged());
  }

  // What can be chosen

  build() {
    const select = (options, change) => {
      const made = make("select", {}, ...options);
      made.addEventListener("change", () => change(made.value));
      return made;
    };
    const option = (value, text) => make("option", { value, textContent: text });
    const names = this.session.policies.map((policy, place) => option(place, policy.name));
    this.policySelect = select(names, (value) => this.set({ policy: Number(value), other: this.otherThan(Number(value)) }));
    const others = [option("", "nothing"), ...this.session.policies.map((policy, place) => option(place, policy.name))];
    this.otherSelect = select(others, (value) => this.set({ other: value === "" ? null : Number(value) }));
    this.episodeSelect = select(
      this.session.episodes.map(([number]) => option(number, number)),
      (value) => this.set({ episode: Number(value), frame: 0, pose: null }),
    );
    this.methodSelect = select([], (value) => this.set({ method: value }));
    this.attentionSelect = select([], (value) => this.set({ attention: value || null }));
    this.frameSlider = make("input", { type: "range", min: 0, step: 1 });
    this.frameSlider.addEventListener("input", () => this.set({ frame: Number(this.frameSlider.value), pose: null }));
    this.frameOutput = make("output", { className: "number" });
    this.horizonSlider = make("input", { type: "range", min: 0, step: 1 });
    this.horizonSlider.addEventListener("input", () => this.set({ horizon: Number(this.horizonSlider.value) }));
    this.horizonOutput = make("output", { className: "number" });
    this.playButton = this.button("Play", () => this.togglePlay());
    const policies = [field("Policy", this.policySelect)];
    if (this.session.policies.length > 1) policies.push(field("Compare with", this.otherSelect));
    this.why = make("div", { className: "why muted" });
    const controls = make(
      "section",
      { className: "panel choices", ariaLabel: "What to look at" },
      ...policies,
      field("Episode", this.episodeSelect),
      make(
        "div",
        { className: "chooser wide" },
        make("span", { className: "with-output" }, make("span", { textContent: "Frame" }), this.frameOutput),
        make(
          "div",
          { className: "frame-row" },
          this.button("‹", () => this.step(-1), "Previous frame"),
          this.frameSlider,
          this.button("›", () => this.step(1), "Next frame"),
          this.playButton,
        ),
      ),
      make(
        "div",
        { className: "chooser" },
        make("span", { className: "with-output" }, make("span", { textContent: "Horizon" }), this.horizonOutput),
        this.horizonSlider,
      ),
      field("Landscape", this.methodSelect),
      field("Attention", this.attentionSelect),
      make("div", { className: "checks" }, this.toggle("samples", "Sampled chunks"), this.toggle("regions", "Regions")),
      this.why,
    );
    this.frameSlider.ariaLabel = "Frame";
    this.horizonSlider.ariaLabel = "Horizon, chunk steps ahead";
    this.boards = make("div", { className: "boards" }, this.buildScene());
    this.element.replaceChildren(make("div", { className: "explorer" }, controls, this.boards));
  }

  button(text, click, label = text) {
    const made = make("button", { type: "button", textContent: text, ariaLabel: label, title: label });
    made.addEventListener("click", click);
    return made;
  }

  toggle(key, text) {
    const box = make("input", { type: "checkbox" });
    box.addEventListener("change", () => this.set({ [key]: box.checked }));
    this[`${key}Box`] = box;
    return make("label", { className: "check" }, box, text);
  }

  buildScene() {
    this.board = new Board(this.session, "Scene", (pose, isLast) => this.movedTo(pose, isLast));
    this.sceneTitle = make("h2");
    this.poseInputs = POSE_FIELDS.map(({ perUnit }, index) => {
      const input = make("input", { type: "number", step: 1 });
      input.addEventListener("change", () => {
        if (!this.board.pose || !Number.isFinite(input.valueAsNumber)) return;
        this.movedTo(this.board.pose.with(index, input.valueAsNumber * perUnit), true);
      });
      return input;
    });
    const inputs = POSE_FIELDS.map(({ label, unit, owner }, index) => field(`${label}, ${unit}`, this.poseInputs[index], owner));
    this.resetButton = this.button("Reset to recorded frame", () => this.set({ pose: null }));
    this.poseFields = make("div", { className: "pose" }, ...inputs, this.resetButton);
    this.poseNotes = make("ul", { className: "pose-notes", ariaLive: "polite" });
    this.howTo = make("p", {
      className: "muted",
      textContent: "Drag the agent or the T; turn the T by its ring, with the wheel, or Q and E. Arrow keys move what is focused.",
    });
    this.timing = make("p", { className: "muted timing" });
    return make(
      "section",
      { className: "panel scene" },
      this.sceneTitle,
      this.board.element,
      this.howTo,
      this.poseFields,
      this.poseNotes,
      this.timing,
    );
  }

  otherThan(policy) {
    return this.state.other === policy ? null : this.state.other;
  }

  episodeName(number) {
    const { train, val } = this.policy;
    const kind = !val ? "" : val.includes(number) ? " · held out" : train.includes(number) ? " · trained on" : "";
    return `${number}${kind}`;
  }

  // What changes

  set(changes) {
    const before = JSON.stringify(this.question());
    Object.assign(this.state, changes);
    // What is only drawn otherwise stays explained.
    if (JSON.stringify(this.question()) !== before) this.isExplaining = false;
    if ("episode" in changes) this.stop();
    this.sync();
    this.ask();
  }

  movedTo(pose, isLast) {
    this.stop();
    this.isDragging = !isLast;
    this.state.pose = pose;
    this.isExplaining = false;
    for (const board of this.allBoards()) board.setPose(pose);
    this.writePose(pose);
    this.resetButton.disabled = false;
    this.ask();
  }

  explain() {
    this.isExplaining = true;
    this.ask();
  }

  step(by) {
    const frame = Math.min(Math.max(this.state.frame + by, 0), this.length - 1);
    if (frame !== this.state.frame || this.state.pose) this.set({ frame, pose: null });
    return frame < this.length - 1;
  }

  togglePlay() {
    if (this.playing !== null) return this.stop();
    if (this.state.frame === this.length - 1) this.set({ frame: 0, pose: null });
    // No frame is left out: the next one waits for the answer.
    this.playing = setInterval(() => {
      if (!this.isAsking && !this.step(1)) this.stop();
    }, PLAY_MS);
    this.playButton.textContent = "Pause";
  }

  stop() {
    clearInterval(this.playing);
    this.playing = null;
    this.playButton.textContent = "Play";
  }

  allBoards() {
    return [this.board, ...this.views.map((view) => view.board)];
  }

  // Controls follow the state

  sync() {
    const { state } = this;
    state.horizon = Math.min(state.horizon, this.chunkSize - 1);
    this.policySelect.value = state.policy;
    this.otherSelect.value = state.other ?? "";
    for (const each of this.otherSelect.options) each.disabled = each.value === String(state.policy);
    this.session.episodes.forEach(([number], place) => {
      this.episodeSelect.options[place].textContent = this.episodeName(number);
    });
    this.episodeSelect.value = state.episode;
    this.frameSlider.max = this.length - 1;
    this.frameSlider.value = state.frame;
    this.frameOutput.textContent = `${state.frame} of ${this.length - 1}`;
    this.horizonSlider.max = this.chunkSize - 1;
    this.horizonSlider.value = state.horizon;
    this.horizonOutput.textContent = `k = ${state.horizon} of ${this.chunkSize - 1}`;
    this.samplesBox.checked = state.samples;
    this.regionsBox.checked = state.regions;
    this.sceneTitle.textContent = `Scene, episode ${state.episode}, frame ${state.frame}`;
    this.syncMethods();
    this.syncViews();
    this.writeHash();
  }

  syncMethods() {
    const reasons = [];
    const fill = (select, kind, first, value, title) => {
      const described = this.chosen.map((place) => this.session.policies[place][kind]);
      const options = described[0].map((method, row) => {
        const refusals = described.map((methods) => methods[row].reason);
        const isOff = refusals.every(Boolean);
        if (isOff) reasons.push(refusals[0]);
        return make("option", { value: method.name, disabled: isOff, textContent: isOff ? `${title(method)} (not here)` : title(method) });
      });
      select.replaceChildren(...first, ...options);
      select.value = value;
    };
    fill(this.methodSelect, "methods", [], this.state.method, (method) => method.name);
    const none = make("option", { value: "", textContent: "none" });
    fill(this.attentionSelect, "attention", [none], this.state.attention ?? "", (method) => (method.is_live ? method.title : `${method.title} (on request)`));
    const fixedText = this.chosen.map((place) => this.session.policies[place].why_fixed).find(Boolean);
    if (fixedText) reasons.unshift(`Nothing can be moved: ${fixedText}`);
    this.why.replaceChildren();
    if (!reasons.length) return;
    const summary = make("summary", { textContent: fixedText ? "Why nothing can be moved, and what else is not available" : "Why some methods are not available" });
    const list = make("ul", {}, ...reasons.map((text) => make("li", { textContent: text })));
    this.why.append(make("details", { open: Boolean(fixedText) }, summary, list));
  }

  syncViews() {
    const wanted = this.chosen.length;
    while (this.views.length > wanted) this.views.pop().element.remove();
    while (this.views.length < wanted) {
      const view = new PolicyView(this);
      this.views.push(view);
      this.boards.append(view.element);
    }
    this.boards.classList.toggle("comparing", this.isComparing);
  }

  // Questions: one at a time, the latest wins

  question() {
    const { episode, frame, horizon, method, pose } = this.state;
    const described = this.policy.attention.find((each) => each.name === this.state.attention);
    const attention = described && (described.is_live || this.isExplaining) ? described.name : null;
    return { policies: this.chosen, episode, frame, horizon, method, attention, pose };
  }

  ask() {
    this.isAsked = true;
    if (!this.isAsking) this.askAll();
  }

  async askAll() {
    this.isAsking = true;
    // Only what is slow is worth a word.
    const busy = setTimeout(() => this.element.classList.add("busy"), 300);
    while (this.isAsked) {
      this.isAsked = false;
      await this.askOnce(this.question());
    }
    this.isAsking = false;
    clearTimeout(busy);
    this.element.classList.remove("busy");
  }

  async askOnce(question) {
    const began = performance.now();
    try {
      const answer = await postJson("/api/explorer/answer", question);
      await decoded(picturesOf(answer));
      // A pose on the way is worth showing; an answer to another question is not.
      const now = { ...this.question(), pose: question.pose };
      if (JSON.stringify(now) !== JSON.stringify(question)) return;
      this.show(answer, question, performance.now() - began);
      if (this.hasNotified) notify("");
      this.hasNotified = false;
    } catch (error) {
      notify(error.message);
      this.hasNotified = true;
      this.stop();
    }
  }

  show(answer, question, elapsedMs) {
    const isNewest = JSON.stringify(question.pose) === JSON.stringify(this.state.pose);
    const pose = isNewest && !this.isDragging ? answer.pose : this.state.pose ?? answer.pose;
    if (isNewest && !this.isDragging) {
      this.state.pose = answer.is_moved ? answer.pose : null;
      this.writePose(answer.pose);
      this.writeHash();
    }
    this.board.setPicture(answer.scene);
    this.board.setPose(pose);
    this.board.setMarks(answer.answers[0].landscape && { ...answer.answers[0].landscape, regions: [] }, this.state);
    answer.answers.forEach((each, place) => {
      this.views[place].show(each, this.session.policies[question.policies[place]], { ...answer, pose });
    });
    this.resetButton.disabled = !answer.is_moved && isNewest;
    this.writeNotes(answer);
    this.timing.textContent = `Answer after ${Math.round(elapsedMs)} ms, ${Math.round(answer.elapsed_ms)} ms of them on the server.`;
  }

  writePose(pose) {
    for (const element of [this.poseFields, this.howTo]) element.hidden = !pose;
    if (!pose) return;
    this.poseInputs.forEach((input, index) => {
      const value = pose[index] / POSE_FIELDS[index].perUnit;
      // Not under the hands of somebody who types.
      if (document.activeElement !== input) input.value = String(Number(value.toFixed(1)));
    });
  }

  writeNotes(answer) {
    const notes = [];
    if (!answer.pose) notes.push(["This frame is shown as it was recorded; nothing can be moved."]);
    else if (answer.is_moved) notes.push(["Moved: nothing was demonstrated for this pose."]);
    else notes.push(["As recorded."]);
    for (const name of answer.clipped ?? []) notes.push([`Brought ${OBJECTS[name]} back to what the simulator allows.`, "warn"]);
    if (answer.is_moved && answer.overlap_px > 0) {
      notes.push([`Agent and T overlap by ${fixed(answer.overlap_px)} px: drawn as it is, though physics would part them.`, "warn"]);
    }
    if (answer.familiar) notes.push(...familiarNotes(answer.familiar));
    this.poseNotes.replaceChildren(...notes.map(([text, kind = ""]) => make("li", { textContent: text, className: kind })));
  }

  // The address says all of it

  writeHash() {
    clearTimeout(this.hashTimer);
    // Browsers refuse addresses that change many times a second.
    this.hashTimer = setTimeout(() => {
      if (this.isMine(location.hash)) history.replaceState(null, "", this.hash());
    }, HASH_MS);
  }

  isMine(hash) {
    return hash === "" ? this.isFirst : hash.slice(1).split(/[/?&]/)[0] === "landscape";
  }

  hash() {
    const { state } = this;
    const entries = {
      policy: this.policy.name,
      ...(this.isComparing ? { with: this.session.policies[state.other].name } : {}),
      episode: state.episode,
      frame: state.frame,
      horizon: state.horizon,
      method: state.method,
      attention: state.attention ?? "none",
      samples: Number(state.samples),
      regions: Number(state.regions),
      ...(state.pose ? { pose: state.pose.map((value) => Number(value.toFixed(4))).join(",") } : {}),
    };
    return `#landscape?${new URLSearchParams(entries)}`;
  }

  hashChanged() {
    if (!this.isMine(location.hash)) return this.stop();
    if (location.hash === this.hash()) return;
    if (!location.hash.includes("?")) return this.writeHash();
    this.readHash();
    this.sync();
    this.ask();
  }

  readHash() {
    if (!this.isMine(location.hash)) return;
    const given = new URLSearchParams(location.hash.split("?")[1] ?? "");
    const place = (name) => this.session.policies.findIndex((policy) => policy.name === name);
    const whole = (name) => (/^\d+$/.test(given.get(name) ?? "") ? Number(given.get(name)) : null);
    const { state } = this;
    if (place(given.get("policy")) >= 0) state.policy = place(given.get("policy"));
    const other = place(given.get("with"));
    state.other = other >= 0 && other !== state.policy ? other : null;
    if (this.session.episodes.some(([number]) => number === whole("episode"))) state.episode = whole("episode");
    state.frame = Math.min(whole("frame") ?? state.frame, this.length - 1);
    state.horizon = whole("horizon") ?? state.horizon;
    const isKnown = (kind, name) => this.policy[kind].some((each) => each.name === name);
    if (isKnown("methods", given.get("method"))) state.method = given.get("method");
    if (given.get("attention") === "none") state.attention = null;
    else if (isKnown("attention", given.get("attention"))) state.attention = given.get("attention");
    for (const key of ["samples", "regions"]) if (given.has(key)) state[key] = given.get(key) === "1";
    const pose = (given.get("pose") ?? "").split(",").map(Number);
    state.pose = given.has("pose") && pose.length === 5 && pose.every(Number.isFinite) ? pose : null;
  }
}

function familiarNotes({ nearest_px, median_px, q95_px, n_poses, n_episodes }) {
  const from = `${fixed(nearest_px)} px from the nearest of ${n_poses} poses in ${n_episodes} demonstrations.`;
  if (median_px === null || q95_px === null) return [[from]];
  const usual = `Recorded frames lie ${fixed(median_px)} px (median) to ${fixed(q95_px)} px (95 %) from other episodes.`;
  if (nearest_px > q95_px) return [[`${from} Unfamiliar: the answer may mean little. ${usual}`, "warn"]];
  return [[`${from} ${usual}`]];
}

/** Fill the tab. @param {HTMLElement} element @param {object} page what the whole page shows */
export async function mount(element, page) {
  const session = await getJson("/api/explorer/session");
  new Tab(element, session, !page.features).start();
}
