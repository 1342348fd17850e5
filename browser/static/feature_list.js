/** The list of features: sorted, filtered, and only as many rows drawn as are seen. */

import { chance, el, number, percent } from "/static/dom.js";

const ROW_PX = 52;

/** Sorting keys: larger is first, unless `isRising`. A feature without a value comes last. */
const ORDERS = {
  ablated: { title: "Effect when ablated", key: (each) => each.ablated },
  doubled: { title: "Effect when doubled", key: (each) => each.doubled },
  concept: { title: "Concept told best", key: (each) => each.score?.size ?? null },
  auroc: { title: "AUROC of a concept", key: (each) => (each.binary ? each.binary.size : null) },
  correlation: { title: "Correlation with a concept", key: (each) => (each.continuous ? each.continuous.size : null) },
  density: { title: "Density", key: (each) => each.density },
  strength: { title: "Strongest activation", key: (each) => each.strength },
  name: { title: "Name", key: (each) => each.name.toLowerCase() || null, isRising: true },
  number: { title: "Number", key: (each) => each.latent, isRising: true },
};

function scoreOf(columns, place, kind, measure) {
  const concept = columns[`best_${kind}`][place];
  const value = columns[`best_${kind}_${measure}`][place];
  if (concept === null || value === null) return null;
  const size = measure === "auroc" ? Math.abs(2 * value - 1) : Math.abs(value);
  const chosen = columns[`best_${kind}_${measure}_train`][place];
  const chosenSize = measure === "auroc" ? Math.abs(2 * chosen - 1) : Math.abs(chosen);
  const p = columns[`best_${kind}_p`][place];
  // A large number that chance reaches as well should not look like a finding.
  const caveat = p !== null && p > 0.05 ? `, p ${chance(p)}` : "";
  const text = `${concept} ${measure === "auroc" ? "AUROC" : "r"} ${number(value)}${caveat}`;
  return { concept, value, size, chosenSize, p, text };
}

/** Columns of the server to one entry for each feature. */
function entriesOf(columns) {
  return columns.latent.map((latent, place) => {
    const binary = scoreOf(columns, place, "binary", "auroc");
    const continuous = scoreOf(columns, place, "continuous", "r");
    // Which of the two is shown was decided on training episodes, as either was chosen there.
    const both = [binary, continuous].filter(Boolean);
    both.sort((one, other) => other.chosenSize - one.chosenSize);
    return {
      latent,
      binary,
      continuous,
      score: both[0] ?? null,
      density: columns.frame_density_held_out[place],
      ablated: columns.ablated_px?.[place] ?? null,
      doubled: columns.doubled_px?.[place] ?? null,
      strength: columns.max_activation[place],
      isGeneral: columns.is_general[place],
      name: "",
      note: "",
    };
  });
}

function compare(order, isReversed) {
  const sign = (order.isRising ? 1 : -1) * (isReversed ? -1 : 1);
  return (one, other) => {
    const [a, b] = [order.key(one), order.key(other)];
    if (a === null || b === null) return (a === null) - (b === null) || one.latent - other.latent;
    return sign * (a < b ? -1 : a > b ? 1 : 0) || one.latent - other.latent;
  };
}

function field(title, attributes) {
  const input = el("input", { type: "number", min: 0, step: "any", placeholder: "any", ...attributes });
  return { input, label: el("label", {}, title, input) };
}

export class FeatureList {
  /** @param {object} listing what `/api/features` gave @param {NoteStore} store */
  constructor(listing, store, onOpen) {
    this.entries = entriesOf(listing.columns);
    this.store = store;
    this.unit = listing.unit;
    this.onOpen = onOpen;
    this.shown = [];
    this.selected = null;
    this.element = this.build(listing);
    store.listeners.push(() => this.takeNotes());
    new ResizeObserver(() => this.draw()).observe(this.rows);
    this.takeNotes();
  }

  build(listing) {
    const again = () => this.update();
    this.search = el("input", { type: "search", placeholder: "Name, note, concept or number", "aria-label": "Search features", oninput: again });
    this.order = el("select", { "aria-label": "Sort by", onchange: again });
    for (const [value, { title }] of Object.entries(ORDERS)) {
      if (["ablated", "doubled"].includes(value) && !listing.queries) continue;
      this.order.append(el("option", { value, text: title }));
    }
    this.reverse = el("button", { type: "button", "aria-pressed": "false", title: "Turn the order round", "aria-label": "Turn the order round", text: "⇅" });
    this.reverse.addEventListener("click", () => {
      this.reverse.setAttribute("aria-pressed", String(this.reverse.getAttribute("aria-pressed") !== "true"));
      this.update();
    });
    this.onlyNamed = el("input", { type: "checkbox", onchange: again });
    this.onlyLive = el("input", { type: "checkbox", checked: true, onchange: again });
    this.limits = {
      denserThan: field("Density from, %", { max: 100, oninput: again }),
      rarerThan: field("to, %", { max: 100, oninput: again }),
      effect: field(`Effect from, ${this.unit}`, { oninput: again }),
      score: field("|r|, |2 AUROC − 1| from", { max: 1, oninput: again }),
      p: field("p of its concept to", { max: 1, oninput: again }),
    };
    this.count = el("p", { class: "small muted", role: "status" });
    this.space = el("div", { class: "rows-space" });
    this.rows = el("div", { class: "rows", role: "listbox", tabindex: 0, "aria-label": "Features", onscroll: () => this.draw(), onkeydown: (event) => this.moveByKey(event) }, this.space);
    const filters = el("details", {}, el("summary", { class: "small", text: "More filters" }), el("div", { class: "filters" }, ...Object.values(this.limits).map(({ label }) => label)));
    return el(
      "aside",
      { class: "panel feature-list", "aria-label": "List of features" },
      this.search,
      el("div", { class: "line" }, el("div", { class: "grow" }, this.order), this.reverse),
      el("div", { class: "line small" }, el("label", {}, this.onlyLive, "only live"), el("label", {}, this.onlyNamed, "only named")),
      filters,
      this.count,
      this.rows,
    );
  }

  takeNotes() {
    for (const entry of this.entries) {
      const { name, note } = this.store.of(entry.latent);
      Object.assign(entry, { name, note });
    }
    this.update();
  }

  isWanted(entry) {
    if (this.onlyLive.checked && !(entry.density > 0)) return false;
    if (this.onlyNamed.checked && !entry.name) return false;
    const limit = (name) => (this.limits[name].input.value === "" ? null : this.limits[name].input.valueAsNumber);
    const [least, most, effect, score, p] = ["denserThan", "rarerThan", "effect", "score", "p"].map(limit);
    if (least !== null && !(100 * entry.density >= least)) return false;
    if (most !== null && !(100 * entry.density <= most)) return false;
    if (effect !== null && !(Math.max(entry.ablated, entry.doubled) >= effect)) return false;
    if (score !== null && !((entry.score?.size ?? -1) >= score)) return false;
    if (p !== null && !((entry.score?.p ?? 1) <= p)) return false;
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = [entry.latent, entry.name, entry.note, entry.binary?.concept, entry.continuous?.concept].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  }

  update() {
    const isReversed = this.reverse.getAttribute("aria-pressed") === "true";
    this.shown = this.entries.filter((entry) => this.isWanted(entry));
    this.shown.sort(compare(ORDERS[this.order.value], isReversed));
    this.count.textContent = `${this.shown.length} of ${this.entries.length} features`;
    this.space.style.height = `${this.shown.length * ROW_PX}px`;
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.rows.scrollTop / ROW_PX) - 5);
    const last = Math.min(this.shown.length, first + Math.ceil(this.rows.clientHeight / ROW_PX) + 10);
    this.space.replaceChildren();
    for (let place = first; place < last; place += 1) this.space.append(this.rowOf(this.shown[place], place));
    this.rows.setAttribute("aria-activedescendant", `feature-row-${this.selected}`);
  }

  rowOf(entry, place) {
    const isDraft = this.store.drafts.has(entry.latent);
    const title = entry.name ? `${entry.latent} · ${entry.name}` : `Feature ${entry.latent}`;
    const effect = entry.ablated === null ? "" : `${number(entry.ablated, 1)} ${this.unit}`;
    const row = el(
      "a",
      {
        class: "row",
        id: `feature-row-${entry.latent}`,
        href: `#features/${entry.latent}`,
        role: "option",
        tabindex: -1,
        "aria-selected": String(entry.latent === this.selected),
        "aria-posinset": place + 1,
        "aria-setsize": this.shown.length,
        "data-latent": entry.latent,
      },
      el("span", { class: "title", text: title + (isDraft ? " •" : "") }),
      el("span", { class: "number", text: effect, title: "the action moves so far when the feature is ablated" }),
      el("span", { class: "muted", text: entry.density === null ? "never fires" : (entry.score?.text ?? "no concept") }),
      el("span", { class: "number muted", text: entry.density === null ? "" : percent(entry.density), title: "share of held-out frames in which it fires" }),
    );
    row.style.top = `${place * ROW_PX}px`;
    return row;
  }

  /** Mark a feature; bring it into sight only if it is out of it. */
  select(latent) {
    this.selected = latent;
    const place = this.shown.findIndex((entry) => entry.latent === latent);
    const [top, bottom] = [place * ROW_PX, (place + 1) * ROW_PX];
    if (place >= 0 && (top < this.rows.scrollTop || bottom > this.rows.scrollTop + this.rows.clientHeight)) {
      this.rows.scrollTop = top - this.rows.clientHeight / 3;
    }
    this.draw();
  }

  /** The feature so many rows further down; null where there is none. */
  neighbour(step) {
    const place = this.shown.findIndex((entry) => entry.latent === this.selected);
    return this.shown[place < 0 ? 0 : place + step]?.latent ?? null;
  }

  moveByKey(event) {
    const step = { ArrowUp: -1, ArrowDown: 1, PageUp: -8, PageDown: 8 }[event.key];
    if (!step) return;
    event.preventDefault();
    const latent = this.neighbour(step);
    if (latent !== null) this.onOpen(latent);
  }
}
