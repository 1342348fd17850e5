/** The tab of features: a list, and everything that is known of one. */

import { getJson, notify } from "/static/app.js";
import { arrowPlot, BoardPaths, heatCanvas, laneOf, lineChart, rampOf, ticksOf } from "/static/charts.js";
import { chance, el, newestOnly, number, percent, query } from "/static/dom.js";
import { FeatureList } from "/static/feature_list.js";
import { NoteStore, noteFields } from "/static/notes.js";

const WIDE = window.matchMedia("(min-width: 821px)");
const CALM = window.matchMedia("(prefers-reduced-motion: reduce)");

/** What the address says: a feature, or none. */
function latentInHash() {
  const match = /^#features\/(\d+)/.exec(location.hash);
  return match ? Number(match[1]) : null;
}

/** Fill the tab. @param {HTMLElement} element */
export async function mount(element) {
  const waiting = el("p", { class: "muted", text: "Loading features …" });
  element.append(waiting);
  const listing = await getJson("/api/features");
  const store = new NoteStore(listing.notes, listing.autoencoder);
  const page = new FeaturePage(listing, store);
  waiting.replaceWith(page.element);
  page.follow();
}

class FeaturePage {
  constructor(listing, store) {
    this.listing = listing;
    this.store = store;
    this.list = new FeatureList(listing, store, (latent) => this.open(latent));
    this.list.element.append(this.exchange());
    this.detail = el("section", { class: "feature-detail", "aria-label": "Feature" });
    this.element = el("div", { class: "features", "data-view": "list" }, this.list.element, this.detail);
    this.shown = null;
    this.camera = listing.cameras[0] ?? null;
    window.addEventListener("hashchange", () => this.follow());
    WIDE.addEventListener("change", () => this.follow());
  }

  /** Export and import of notes. */
  exchange() {
    const file = el("input", { type: "file", accept: ".json,application/json", class: "visually-hidden", tabindex: -1, "aria-label": "File with notes" });
    const status = el("span", { class: "small muted", role: "status" });
    file.addEventListener("change", async () => {
      const [chosen] = file.files;
      file.value = "";
      if (!chosen) return;
      try {
        const n = await this.store.importFile(chosen);
        status.textContent = `${n} ${n === 1 ? "feature" : "features"} taken in`;
        this.reload();
      } catch (error) {
        notify(error.message);
      }
    });
    return el(
      "div",
      { class: "line small" },
      el("a", { href: "/api/features/notes/export", download: "", text: "Export notes" }),
      el("button", { type: "button", text: "Import notes …", onclick: () => file.click() }),
      file,
      status,
    );
  }

  open(latent) {
    location.hash = `#features/${latent}`;
  }

  reload() {
    const latent = this.shown;
    this.shown = null;
    if (latent !== null) this.show(latent);
  }

  follow() {
    if (location.hash && !location.hash.startsWith("#features")) return;
    const named = latentInHash();
    this.element.dataset.view = named === null ? "list" : "detail";
    const latent = named ?? (WIDE.matches ? (this.shown ?? this.list.neighbour(0)) : null);
    if (latent !== null && latent !== this.shown) this.show(latent);
  }

  async show(latent) {
    this.shown = latent;
    this.list.select(latent);
    this.view?.stop();
    try {
      const detail = await getJson(`/api/features/${latent}`);
      if (this.shown !== latent) return;
      this.view = new FeatureView(detail, this);
      this.detail.replaceChildren(...this.view.parts);
      if (!WIDE.matches) window.scrollTo(0, 0);
    } catch (error) {
      if (this.shown !== latent) return;
      this.detail.replaceChildren(el("p", { class: "panel", text: error.message }));
      notify(error.message);
    }
  }
}

/** Whether a feature fires more in pictures than elsewhere: else a map over them is but a shade. */
function isInPictures(tokens) {
  if (!tokens) return false;
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const inCells = sum(Object.values(tokens.cameras).flat(2));
  return inCells > sum(tokens.others.map(({ value }) => value));
}

/** What to know of seconds where the data state none. */
const guessOf = ({ fps, fps_is_known: isKnown }) => (isKnown ? "" : ` The data state no frame rate: seconds are a guess, of ${number(fps, 0)} frames each.`);

/** A panel with a heading, tools beside it, and how to read it below. */
function panel(title, { tools = [], how = null }, ...content) {
  return el(
    "section",
    { class: "panel", "aria-label": title },
    el("div", { class: "panel-head" }, el("h3", { text: title }), el("div", { class: "tools" }, ...tools)),
    ...content,
    how ? el("p", { class: "how", text: how }) : null,
  );
}

class FeatureView {
  constructor(detail, page) {
    this.detail = detail;
    this.listing = page.listing;
    this.page = page;
    this.latent = detail.latent;
    this.camera = page.camera;
    this.hasCells = Object.hasOwn(detail.tokens?.cameras ?? {}, this.camera);
    this.hasMap = this.hasCells && isInPictures(detail.tokens);
    this.parts = [this.head()];
    if (!detail.is_live) return;
    const [strongest] = detail.clips;
    if (strongest) {
      this.timeline = new Timeline(this, strongest);
      this.parts.push(this.timeline.element);
      if (this.camera !== null) this.parts.push(this.clips());
      this.steering = new Steering(this);
      this.timeline.listeners.push((episode, frame) => this.steering.at(episode, frame));
      this.steering.at(strongest.episode, strongest.frame);
      this.parts.push(this.steering.element);
    }
    this.parts.push(el("div", { class: "columns" }, effectsPanel(this), wherePanel(this)), conceptsPanel(this));
  }

  stop() {
    this.timeline?.stop();
  }

  videoAddress(episode, frame, hasMap) {
    const asked = { episode, frame, camera: this.camera, map: hasMap ? 1 : 0 };
    return `/api/features/${this.latent}/clip.mp4?${query(asked)}`;
  }

  head() {
    const { latent, detail, listing } = this;
    const step = (by) => {
      const next = this.page.list.neighbour(by);
      if (next !== null) this.page.open(next);
    };
    const back = el("a", { class: "back", href: "#features", text: "← all features" });
    const head = el(
      "div",
      { class: "head" },
      back,
      el("h2", { text: `Feature ${latent}` }),
      el(
        "div",
        { class: "steps" },
        listing.cameras.length > 1 ? this.cameraChoice() : null,
        el("button", { type: "button", "aria-label": "Previous feature of the list", text: "↑", onclick: () => step(-1) }),
        el("button", { type: "button", "aria-label": "Next feature of the list", text: "↓", onclick: () => step(1) }),
      ),
    );
    const fields = noteFields(this.page.store, latent);
    if (!detail.is_live) {
      const { train, held_out: heldOut } = listing.n_episodes;
      const text = `It never fires: not in the ${train} training and ${heldOut} held-out episodes that were looked at.`;
      return el("section", { class: "panel", "aria-label": "Summary" }, head, fields, el("p", { text }));
    }
    return el("section", { class: "panel", "aria-label": "Summary" }, head, this.facts(), fields);
  }

  cameraChoice() {
    const choice = el("select", { "aria-label": "Camera" });
    for (const name of this.listing.cameras) choice.append(el("option", { value: name, text: name, selected: name === this.camera }));
    choice.addEventListener("change", () => {
      this.page.camera = choice.value;
      this.page.reload();
    });
    return choice;
  }

  facts() {
    const { numbers } = this.detail;
    const { n_episodes: episodes, general_rule: rule } = this.listing;
    const facts = [
      ["fires in", `${percent(numbers.frame_density_held_out)} of held-out frames`, `training: ${percent(numbers.frame_density)}`],
      ["episodes with it", `${percent(numbers.episode_share_held_out)} of ${episodes.held_out} held out`, `training: ${percent(numbers.episode_share)} of ${episodes.train}`],
      ["general or memorised", numbers.is_general ? "general" : "not general", rule],
      ["mostly at", `${numbers.main_token ?? "–"} (${percent(numbers.main_token_share)})`, "share of its firing that happens there, training frames"],
      ["activation where it fires", `${number(numbers.mean_activation)} (largest ${number(numbers.max_activation)})`, "training frames"],
    ];
    const list = el("dl", { class: "facts" });
    for (const [name, value, title] of facts) list.append(el("div", { title }, el("dt", { text: name }), el("dd", { text: value })));
    return list;
  }

  clips() {
    const grid = el("div", { class: "clips" });
    const map = el("input", { type: "checkbox", name: "clip-map" });
    map.checked = this.hasMap;
    const moves = el("input", { type: "checkbox", name: "clip-play" });
    moves.checked = !CALM.matches;
    const makers = this.detail.clips.map((moment) => this.clip(moment, moves.checked));
    grid.append(...makers.map(({ element }) => element));
    map.addEventListener("change", () => makers.forEach(({ load }) => load(map.checked)));
    moves.addEventListener("change", () => makers.forEach(({ move }) => move(moves.checked)));
    return panel(
      "Strongest moments",
      {
        tools: [this.hasCells ? el("label", { class: "small" }, map, "show where it fires") : null, el("label", { class: "small" }, moves, "play")],
        how: `Held-out frames where the feature is strongest, at least a second apart and from as many episodes as possible, 1.5 s before and after.${this.hasCells ? " Colours: its activation in each cell, from none (dark) to its largest." : ""} Click one to see its episode.${guessOf(this.listing)}`,
      },
      grid,
    );
  }

  clip(moment, isMoving) {
    const video = el("video", { muted: true, loop: true, autoplay: isMoving, playsinline: true, preload: "metadata", tabindex: -1, "aria-hidden": "true" });
    video.muted = true;
    const load = (hasMap) => {
      video.src = this.videoAddress(moment.episode, moment.frame, hasMap);
    };
    load(this.hasMap);
    const lines = [`${number(moment.value)} · ${moment.token}`, `ep. ${moment.episode}, frame ${moment.frame}`];
    const label = el("span", {}, ...lines.map((text) => el("span", { text, title: text })));
    for (const line of label.children) line.style.display = "block";
    const element = el("button", { type: "button", class: "clip", onclick: () => this.timeline.go(moment.episode, moment.frame) }, video, label);
    const move = (isOn) => {
      video.autoplay = isOn;
      if (isOn) start(video);
      else video.pause();
    };
    return { element, load, move };
  }
}

/** Play; whoever pauses, or leaves, while it loads breaks the promise, which is no error. */
function start(video) {
  video.play().catch(() => {});
}

/** A whole episode: the video beside what the feature did in each frame. */
class Timeline {
  constructor(view, { episode, frame }) {
    this.view = view;
    this.fps = view.listing.fps;
    this.listeners = [];
    this.frame = frame;
    this.values = [];
    this.lanes = [];
    /** What the server says of the episode; null until it does. */
    this.found = null;
    this.element = this.build();
    this.load(episode, frame);
  }

  build() {
    const { listing, detail, camera } = this.view;
    const own = new Map();
    for (const each of detail.clips) if (!own.has(each.episode)) own.set(each.episode, each.value);
    this.choice = el("select", { "aria-label": "Episode" });
    for (const [number_, length] of Object.entries(listing.episodes)) {
      const peak = own.get(Number(number_));
      const text = `Episode ${number_} (${number(length / this.fps, 0)} s${peak === undefined ? "" : `, up to ${number(peak)}`})`;
      this.choice.append(el("option", { value: number_, text }));
    }
    this.choice.addEventListener("change", () => this.load(Number(this.choice.value), 0));
    this.map = el("input", { type: "checkbox", name: "timeline-map" });
    this.map.checked = this.view.hasMap;
    this.map.addEventListener("change", () => this.loadVideo());
    this.play = el("button", { type: "button", text: "Play", onclick: () => this.toggle() });
    this.video = el("video", { muted: true, playsinline: true, loop: true, preload: "auto", "aria-label": "Episode" });
    this.video.muted = true;
    this.video.addEventListener("loadedmetadata", () => this.seek(this.frame));
    for (const event of ["play", "pause"]) {
      this.video.addEventListener(event, () => {
        this.play.textContent = this.video.paused ? "Play" : "Pause";
        if (this.video.paused) this.tell();
        else this.watch();
      });
    }
    this.curve = el("div", { class: "curve", role: "slider", tabindex: 0, "aria-label": "Frame of the episode", "aria-valuemin": 0 });
    this.curve.addEventListener("pointerdown", (event) => this.grab(event));
    this.curve.addEventListener("pointermove", (event) => event.buttons && this.drag(event));
    this.curve.addEventListener("keydown", (event) => this.moveByKey(event));
    this.readout = el("p", { class: "readout" });
    const video = camera === null ? el("p", { class: "muted", text: "The policy sees no picture." }) : this.video;
    return panel(
      "In an episode",
      {
        tools: [this.choice, this.view.hasCells ? el("label", { class: "small" }, this.map, "show where it fires") : null, camera === null ? null : this.play],
        how: `The feature’s strongest token in each frame; below, the concepts that training episodes say it goes with. Click or drag on the curve, or use the arrow keys, to go to a frame; what is steered below is that frame.${guessOf(listing)}`,
      },
      el("div", { class: "timeline" }, video, el("div", {}, this.curve, this.readout)),
    );
  }

  async load(episode, frame) {
    this.episode = episode;
    this.frame = frame;
    this.found = null;
    this.choice.value = String(episode);
    try {
      const found = await getJson(`/api/features/${this.view.latent}/timeline?${query({ episode })}`);
      if (this.episode !== episode) return;
      this.found = found;
      this.values = found.values;
      this.drawLanes(found);
      this.frame = this.inside(this.frame);
      this.moveCursor(this.frame);
      this.loadVideo();
      this.tell();
    } catch (error) {
      notify(error.message);
    }
  }

  loadVideo() {
    if (this.view.camera === null) return;
    const isPlaying = !this.video.paused;
    this.video.src = this.view.videoAddress(this.episode, null, this.map.checked);
    if (isPlaying) start(this.video);
  }

  drawLanes(found) {
    const top = found.top || 1;
    const own = { title: "activation", values: found.values, low: 0, high: top, colour: "var(--series-1)", isArea: true, height: 150 };
    const others = found.concepts.map((concept) => {
      const known = concept.values.filter((value) => value !== null);
      const range = concept.is_binary || !known.length ? [0, 1] : [Math.min(...known), Math.max(...known)];
      const isSaid = concept.unit === "1" || concept.name.endsWith(`_${concept.unit}`);
      const unit = isSaid ? "" : `, ${concept.unit}`;
      return { title: concept.name + unit, values: concept.values, low: range[0], high: range[1], colour: concept.is_binary ? "var(--series-3)" : "var(--series-2)", isArea: concept.is_binary, height: concept.is_binary ? 26 : 60 };
    });
    this.lanes = [own, ...others].map(laneOf);
    this.curve.replaceChildren(...this.lanes.map(({ element }) => element), ticksOf(found.values.length, this.fps));
    this.curve.setAttribute("aria-valuemax", found.values.length - 1);
  }

  /** Go to a frame of an episode, wherever the view is. */
  go(episode, frame) {
    this.video.pause();
    if (episode === this.episode) this.seek(frame, true);
    else this.load(episode, frame);
    this.element.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  inside(frame) {
    return Math.max(0, Math.min(this.values.length - 1, frame));
  }

  seek(frame, isChosen = false) {
    // How long the episode is, and what to show, comes with the answer.
    this.frame = this.found ? this.inside(frame) : frame;
    if (!this.found) return;
    // The middle of a frame: its border may round to the one before.
    this.video.currentTime = (this.frame + 0.5) / this.fps;
    this.moveCursor(this.frame);
    if (isChosen && this.video.paused) this.tell();
  }

  tell() {
    if (!this.found) return;
    for (const listener of this.listeners) listener(this.episode, this.frame);
  }

  moveCursor(frame) {
    const n = this.values.length;
    for (const { move } of this.lanes) move(frame / Math.max(n - 1, 1));
    const value = this.values[frame];
    const token = this.found.tokens[frame];
    const parts = [`frame ${frame} of ${n - 1}`, `${number(frame / this.fps, 1)} s`];
    parts.push(token === null ? "silent" : `activation ${number(value)} at ${token}`);
    for (const { name, unit, values, is_binary: isBinary } of this.found.concepts) {
      const known = values[frame];
      if (known === null) continue;
      parts.push(isBinary ? `${name}: ${known ? "yes" : "no"}` : `${name} ${number(known)}${unit === "1" ? "" : ` ${unit}`}`);
    }
    this.readout.textContent = parts.join(" · ");
    this.curve.setAttribute("aria-valuenow", frame);
    this.curve.setAttribute("aria-valuetext", parts.join(", "));
  }

  /** Let the cursor follow the video. */
  watch() {
    const step = (_, shown) => {
      if (this.video.paused || !this.found) return;
      const time = shown?.mediaTime ?? this.video.currentTime;
      this.frame = Math.min(this.values.length - 1, Math.round(time * this.fps));
      this.moveCursor(this.frame);
      this.video.requestVideoFrameCallback(step);
    };
    this.video.requestVideoFrameCallback(step);
  }

  toggle() {
    if (this.video.paused) start(this.video);
    else this.video.pause();
  }

  grab(event) {
    this.video.pause();
    this.curve.setPointerCapture(event.pointerId);
    this.drag(event);
  }

  drag(event) {
    if (!this.found) return;
    const box = this.curve.querySelector("svg").getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    this.seek(Math.round(share * (this.values.length - 1)), true);
  }

  moveByKey(event) {
    if (!this.found) return;
    const last = this.values.length - 1;
    const second = Math.round(this.fps);
    const goal = {
      ArrowLeft: this.frame - 1,
      ArrowRight: this.frame + 1,
      PageDown: this.frame - second,
      PageUp: this.frame + second,
      Home: 0,
      End: last,
    }[event.key];
    if (event.key === " ") this.toggle();
    else if (goal === undefined) return;
    else {
      this.video.pause();
      this.seek(goal, true);
    }
    event.preventDefault();
  }

  stop() {
    this.video.pause();
    this.video.removeAttribute("src");
    this.video.load();
  }
}

/** Turn the feature in one frame and see what the policy would do. */
class Steering {
  constructor(view) {
    this.view = view;
    const { listing, detail } = view;
    /** Whether what is shown is the board: paths belong on no other picture. */
    this.isOnBoard = view.camera === null || view.camera === listing.board?.camera;
    this.board = this.isOnBoard ? listing.board : null;
    this.unit = listing.unit;
    this.wish = newestOnly(
      (asked) => this.ask(asked),
      (answer) => this.show(answer),
      (error) => notify(error.message),
    );
    this.element = listing.obstacle ? this.refusal(listing.obstacle) : this.build(listing, detail);
  }

  refusal(reason) {
    return panel("Steer", {}, el("p", { class: "muted", text: `Cannot be steered: ${reason}` }));
  }

  build(listing, detail) {
    this.mode = { scale: el("input", { type: "radio", name: "mode", value: "scale" }), clamp: el("input", { type: "radio", name: "mode", value: "clamp" }) };
    this.mode.scale.checked = true;
    for (const input of Object.values(this.mode)) input.addEventListener("change", () => this.update());
    const most = detail.top;
    this.scale = this.slider("Times its own activation", { min: -4, max: 4, step: 0.1, value: 0 }, (value) => `× ${number(value, 1)}`, "scale");
    this.clamp = this.slider("Held at, on all tokens", { min: 0, max: (2 * most).toPrecision(3), step: (most / 50).toPrecision(2), value: most.toPrecision(2) }, (value) => number(value), "clamp");
    this.step = this.slider("Chunk step", { min: 0, max: listing.chunk_size - 1, step: 1, value: 0 }, (value) => (value ? `${value} (${number(value / listing.fps, 1)} s ahead)` : "0 (now)"), "step", () => this.draw());
    this.stage = el("div", { class: `stage${this.board ? "" : " curves"}` });
    this.isClose = el("input", { type: "checkbox", name: "close-up", onchange: () => this.draw() });
    this.isClose.checked = true;
    this.inset = el("div");
    this.title = el("span", { class: "small muted" });
    this.text = el("p", { class: "answer", "aria-live": "polite" });
    const key = el(
      "div",
      { class: "key" },
      el("span", {}, el("i", { class: "s1" }), "as it is"),
      el("span", {}, el("i", { class: "s2" }), "turned"),
      el("span", {}, el("i", { class: "s3" }), "random directions, 50 % and 95 %"),
    );
    return panel(
      "Steer",
      {
        tools: [this.title, this.board ? el("label", { class: "small" }, this.isClose, "close-up") : null],
        how: `The policy predicts with the feature’s activation scaled or held; all else stays. Yardstick: every token is moved as far, along random directions. p is the share of them that move the action at least as much. Most random directions miss what the policy reads, so exceeding them is the least a feature should do.${this.isOnBoard || !listing.board ? "" : ` Camera ${this.view.camera} is not known to show the board, so actions are drawn as curves and not as paths on its picture.`}`,
      },
      el(
        "div",
        { class: "steering" },
        el("div", { class: "stack" }, this.stage, key),
        el(
          "div",
          { class: "controls" },
          el("fieldset", { class: "choice", "aria-label": "What to do" }, el("label", {}, this.mode.scale, "scale"), el("label", {}, this.mode.clamp, "clamp")),
          this.scale.element,
          this.clamp.element,
          this.step.element,
          el("div", { class: "line" }, this.inset, el("div", { class: "grow" }, this.text)),
        ),
      ),
    );
  }

  slider(title, attributes, say, name, onchange = () => this.update()) {
    const input = el("input", { type: "range", name, ...attributes, "aria-label": title });
    const output = el("output", { text: say(input.valueAsNumber) });
    input.addEventListener("input", () => {
      output.textContent = say(input.valueAsNumber);
      input.setAttribute("aria-valuetext", output.textContent);
      onchange();
    });
    return { input, element: el("div", { class: "slider" }, el("span", { class: "small muted", text: title }), output, input) };
  }

  at(episode, frame) {
    this.moment = { episode, frame };
    if (this.mode) this.update();
  }

  update() {
    const isScale = this.mode.scale.checked;
    this.scale.element.hidden = !isScale;
    this.clamp.element.hidden = isScale;
    const value = isScale ? { scale: this.scale.input.value } : { clamp: this.clamp.input.value };
    this.wish({ ...this.moment, ...value });
  }

  async ask(asked) {
    const answer = await getJson(`/api/features/${this.view.latent}/steer?${query(asked)}`);
    return { ...answer, asked };
  }

  show(answer) {
    this.answer = answer;
    const { episode, frame } = answer.asked;
    this.title.textContent = `episode ${episode}, frame ${frame} (the timeline chooses)`;
    const seen = { episode, frame, camera: this.view.camera };
    this.picture = this.view.camera === null ? null : `/api/features/frame.png?${query(seen)}`;
    this.draw();
  }

  draw() {
    if (!this.answer) return;
    const step = this.step.input.valueAsNumber;
    const { before, after } = this.answer;
    if (!this.board) this.stage.replaceChildren(...this.curves(before, after));
    else {
      this.paths ??= new BoardPaths(this.board, this.stage);
      this.paths.draw({ picture: this.picture, before, after, step, isClose: this.isClose.checked });
    }
    this.say(step);
    this.drawInset(step);
  }

  /** Actions that are no places: each dimension by chunk step. */
  curves(before, after) {
    const x = before.map((_, place) => place);
    return before[0].map((_, dimension) =>
      lineChart(
        [
          { x, y: before.map((each) => each[dimension]), colour: "var(--series-1)" },
          { x, y: after.map((each) => each[dimension]), colour: "var(--series-2)" },
        ],
        { x: "chunk step", y: `action ${dimension} (${this.unit})` },
      ),
    );
  }

  drawInset(step) {
    const { before, after, directions_px: quantiles } = this.answer;
    if (before[0].length !== 2) return;
    const change = after[step].map((value, axis) => value - before[step][axis]);
    const rings = quantiles ? [{ radius: quantiles[1][step] }, { radius: quantiles[2][step], dash: "4 3" }] : [];
    const plot = arrowPlot(change, "var(--series-2)", rings, this.unit);
    this.inset.replaceChildren(el("div", { class: "arrow" }, plot));
  }

  say(step) {
    const { change_px: px, directions_px: quantiles, p, n_directions: n, codes, asked } = this.answer;
    const active = codes.filter(({ code }) => code > 0).sort((one, other) => other.code - one.code);
    if (!active.length && asked.scale !== undefined) {
      this.text.textContent = "The feature is silent in this frame: there is nothing to scale. Choose a frame where it fires, or clamp it.";
      return;
    }
    const parts = [`The action of step ${step} moves by ${number(px[step])} ${this.unit}.`];
    if (quantiles) {
      const [low, middle, high] = quantiles.map((each) => number(each[step]));
      parts.push(`${n} random directions of the same size: ${middle} ${this.unit} (5–95 %: ${low}–${high}), p = ${chance(p[step])}.`);
    } else {
      parts.push("Nothing is moved.");
    }
    const at = active.slice(0, 3).map(({ token, code }) => `${token} ${number(code)}`);
    parts.push(active.length ? `It fires at ${at.join(", ")}${active.length > 3 ? ` and ${active.length - 3} more` : ""}.` : "It is silent here by itself.");
    this.text.textContent = parts.join(" ");
  }
}

/** What ablating and doubling do on average, and, when asked for, beside random directions. */
function effectsPanel(view) {
  const { numbers } = view.detail;
  const { queries, unit, obstacle } = view.listing;
  if (!queries || !numbers.n_effect_frames) {
    const reason = obstacle ?? (queries ? `it fired in none of the frames on which effects were measured, at chunk step ${queries[0]}` : "effects were not measured");
    return panel("Effect on the action", {}, el("p", { class: "muted", text: `No figure: ${reason}.` }));
  }
  const arrows = el("div", { class: "arrows" });
  for (const name of ["ablated", "doubled"]) {
    const arrow = numbers[`${name}_arrow_px`];
    arrows.append(
      el(
        "div",
        { class: "arrow" },
        el("strong", { text: name }),
        arrow?.length === 2 ? arrowPlot(arrow, "var(--series-2)", [], unit) : null,
        el("span", { text: `${number(numbers[`${name}_px`])} ${unit} per frame` }),
        el("span", { class: "muted", text: `consistency ${number(numbers[`${name}_consistency`])}` }),
      ),
    );
  }
  const more = el("div", { class: "stack" });
  const button = el("button", { type: "button", text: "Measure doses and random directions" });
  const measure = async () => {
    button.disabled = true;
    try {
      more.replaceChildren(...measuredParts(await getJson(`/api/features/${view.latent}/effects`), unit));
    } catch (error) {
      notify(error.message);
      button.disabled = false;
    }
  };
  button.addEventListener("click", measure);
  if (obstacle === null) more.append(button);
  // Our ACT goes on from the tap, which takes moments; other policies predict anew each time.
  if (obstacle === null && view.listing.can_foretell) measure();
  return panel(
    "Effect on the action",
    {
      how: `Mean over ${numbers.n_effect_frames} held-out frames where it fires, chunk step ${queries[0]}. Arrow: the mean change; length per frame: the mean of the changes’ lengths, which is larger where they disagree; consistency: 1 where all point one way, about ${number(0.9 / Math.sqrt(numbers.n_effect_frames))} by chance.`,
    },
    arrows,
    more,
  );
}

function measuredParts(found, unit) {
  const parts = [
    el("p", {
      text: `Ablated on ${found.n_frames} frames: ${number(found.ablated_px)} ${unit}. The same displacement along ${found.n_directions} random directions: ${number(found.median_px)} ${unit} in the median, ${number(found.high_px)} ${unit} at the 95 % quantile; p = ${chance(found.p)}.`,
    }),
  ];
  const { doses } = found;
  if (!doses) {
    parts.push(el("p", { class: "muted", text: "Doses are foretold only at the encoder and the decoder of our ACT." }));
    return parts;
  }
  parts.push(
    lineChart(
      [
        { x: doses.doses, y: doses.predicted_px, colour: "var(--series-1)", dash: "5 4" },
        { x: doses.doses, y: doses.measured_px, colour: "var(--series-2)" },
      ],
      { x: `dose, in its usual strength (${number(doses.unit)})`, y: `along the foretold arrow, ${unit}`, mark: true },
    ),
    el("div", { class: "key" }, el("span", {}, el("i", { class: "s2" }), "measured"), el("span", {}, el("i", { class: "s1" }), "foretold by the derivative (dashed)")),
    el("p", {
      class: "small muted",
      text: `${doses.n_frames} frames; measured over foretold ${number(doses.slope)}, cosine ${number(doses.cosine)}, rank correlation of dose and effect ${number(doses.spearman)}.`,
    }),
  );
  return parts;
}

/** Where in the picture, and where on the board. */
function wherePanel(view) {
  const { tokens, places } = view.detail;
  const { colours } = view.listing;
  const figures = el("div", { class: "where" });
  const cells = Object.entries(tokens.cameras);
  const largest = Math.max(...cells.flatMap(([, grid]) => grid.flat()), ...tokens.others.map(({ value }) => value), 0);
  for (const [camera, grid] of cells) {
    const top = Math.max(...grid.flat());
    figures.append(
      el(
        "figure",
        {},
        el("figcaption", { text: `mean by cell: ${camera}` }),
        el("img", { src: `/api/features/${view.latent}/map.png?${query({ camera })}`, alt: `Mean activation in each cell of ${camera}, largest ${number(top)}` }),
        ...rampOf(colours, largest),
        el("span", { class: "small muted", text: `largest cell ${number(top)}` }),
      ),
    );
  }
  if (tokens.others.length) figures.append(tokenBars(tokens.others, largest));
  for (const [name, place] of Object.entries(places)) {
    if (place.top === null) continue;
    const label = `Mean activation by where the ${name} is`;
    figures.append(
      el(
        "figure",
        {},
        el("figcaption", { text: `by place of the ${name}` }),
        heatCanvas(place.rates, place.top, colours, label),
        ...rampOf(colours, place.top),
        el("span", { class: "small muted", text: place.bits === null ? "" : `${number(place.bits)} bits, p = ${chance(place.p)}` }),
      ),
    );
  }
  return panel(
    "Where it fires",
    { how: "Cells and tokens: mean over training frames, silent ones included, all on one scale; the picture is the camera’s mean. Places: mean over the held-out frames with the object there (upper left of the board is upper left); empty where there are fewer than 3 frames. p is not corrected for the number of features." },
    figures,
  );
}

function tokenBars(others, largest) {
  const figure = el("figure", { class: "bars" }, el("figcaption", { text: "mean by other tokens" }));
  for (const { token, value } of [...others].sort((one, other) => other.value - one.value).slice(0, 12)) {
    const fill = el("i");
    fill.style.width = `${(100 * value) / (largest || 1)}%`;
    figure.append(el("div", { class: "bar" }, el("span", { text: token, title: token }), el("div", { class: "track" }, fill), el("span", { text: number(value) })));
  }
  return figure;
}

function conceptsPanel(view) {
  const { concepts } = view.detail;
  const body = el("tbody");
  for (const { name, measure, value, p, mean, unit } of concepts) {
    const size = value === null ? null : measure === "auroc" ? Math.abs(2 * value - 1) : Math.abs(value);
    const fill = el("i");
    fill.style.width = `${100 * (size ?? 0)}%`;
    const usual = mean === null ? "–" : measure === "auroc" ? percent(mean) : `${number(mean)}${unit === "1" ? "" : ` ${unit}`}`;
    body.append(
      el(
        "tr",
        {},
        el("td", { class: "name", text: name }),
        el("td", { text: measure === "auroc" ? "AUROC" : "r" }),
        el("td", { class: "number", text: number(value) }),
        el("td", {}, el("div", { class: "track" }, fill)),
        el("td", { class: "number", text: chance(p) }),
        el("td", { class: "number", text: usual }),
      ),
    );
  }
  const heads = ["concept", "measure", "held out", "from chance", "p", "usual"];
  const numeric = new Set(["held out", "p", "usual"]);
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((text) => el("th", { scope: "col", class: numeric.has(text) ? "number" : null, text })))), body);
  return panel(
    "What it tells",
    { how: "On held-out episodes. AUROC of a binary concept (0.5 is chance; below it, the feature stands for the opposite), r of a continuous one. p: chance pairings of episodes reach as much, with any feature. Usual: how often a binary concept holds, or the mean of a continuous one." },
    el("div", { class: "scroll scroll-y", tabindex: 0, role: "group", "aria-label": "Concepts" }, table),
  );
}
