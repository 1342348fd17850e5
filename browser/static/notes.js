/** Names and notes of features: drafts until they are saved, and what happens in between. */

import { notify, postJson } from "/static/app.js";
import { el } from "/static/dom.js";

const NOTHING = { name: "", note: "", version: 0 };

/** What was written, as the server has it, and what was typed since. */
export class NoteStore {
  /** @param {Record<string, {name: string, note: string, version: number}>} notes */
  constructor(notes, autoencoder) {
    this.autoencoder = autoencoder;
    this.saved = new Map();
    this.drafts = new Map();
    /** Saves on their way, by feature. */
    this.sending = new Map();
    this.listeners = [];
    this.replaceAll(notes);
    window.addEventListener("beforeunload", (event) => {
      if (this.drafts.size) event.preventDefault();
    });
  }

  replaceAll(notes) {
    this.saved = new Map(Object.entries(notes).map(([key, note]) => [Number(key), note]));
    this.changed();
  }

  of(latent) {
    return this.saved.get(latent) ?? NOTHING;
  }

  draftOf(latent) {
    return this.drafts.get(latent) ?? this.of(latent);
  }

  type(latent, name, note) {
    const { version } = this.draftOf(latent);
    const there = this.of(latent);
    const isThere = name === there.name && note === there.note;
    // What is on its way will be there instead.
    if (isThere && !this.sending.has(latent)) this.drafts.delete(latent);
    else this.drafts.set(latent, { name, note, version });
  }

  changed() {
    for (const listener of this.listeners) listener();
  }

  /** Save; `true` when it is on disk. Asks which text stays where somebody else wrote. */
  save(latent) {
    const sending = this.send(latent).finally(() => this.sending.delete(latent));
    this.sending.set(latent, sending);
    return sending;
  }

  async send(latent) {
    const sent = this.draftOf(latent);
    try {
      const written = await postJson(`/api/features/${latent}/note`, sent);
      this.saved.set(latent, written);
      const typed = this.drafts.get(latent);
      const isNewer = typed && (typed.name !== sent.name || typed.note !== sent.note);
      if (isNewer) this.drafts.set(latent, { ...typed, version: written.version });
      else this.drafts.delete(latent);
      this.changed();
      return !isNewer;
    } catch (error) {
      if (error.status !== 409) throw error;
      return this.settle(latent, this.draftOf(latent), error.body.current);
    }
  }

  async settle(latent, mine, theirs) {
    const choice = await ask(
      `Feature ${latent} was changed elsewhere`,
      "Another tab or program saved it after this page had read it. Which text stays?",
      [{ mine, theirs, titles: ["Typed here", "Saved elsewhere"] }],
      [
        { value: "theirs", title: "Take the saved one" },
        { value: "mine", title: "Write mine over it" },
      ],
    );
    this.saved.set(latent, theirs);
    if (choice === "mine") {
      this.drafts.set(latent, { ...mine, version: theirs.version });
      this.changed();
      return this.send(latent);
    }
    if (choice === "theirs") this.drafts.delete(latent);
    else this.drafts.set(latent, { ...mine, version: theirs.version });
    this.changed();
    return choice === "theirs";
  }

  /** Take in an exported file. @param {File} file */
  async importFile(file) {
    let document;
    try {
      document = JSON.parse(await file.text());
    } catch {
      throw new Error(`${file.name}: is no JSON file; choose one that Export gave`);
    }
    if (document?.autoencoder !== this.autoencoder) {
      throw new Error(`${file.name}: holds no notes of this autoencoder's features`);
    }
    return this.take(document, null);
  }

  async take(document, rule) {
    const answer = await postJson("/api/features/notes/import", { document, rule });
    this.replaceAll(answer.notes);
    if (!answer.conflicts.length) return answer.n_written;
    const choice = await ask(
      `${answer.conflicts.length} features have another text here`,
      "Both: names joined by “ / ”, notes below each other. The others are taken in any case.",
      answer.conflicts.map(({ latent, mine, theirs }) => ({
        mine,
        theirs,
        titles: [`Feature ${latent}, here`, "In the file"],
      })),
      [
        { value: "mine", title: "Keep what is here" },
        { value: "theirs", title: "Take the file’s" },
        { value: "both", title: "Keep both" },
      ],
    );
    return choice ? this.take(document, choice) : 0;
  }
}

function textOf({ name, note }) {
  return el("div", { class: "text", text: [name, note].filter(Boolean).join("\n") || "(empty)" });
}

/** Show texts side by side and let somebody choose; null when the dialog is closed. */
function ask(title, text, pairs, choices) {
  const dialog = el("dialog", { "aria-label": title });
  const list = el("div", { class: "scroll-y" });
  for (const { mine, theirs, titles } of pairs) {
    list.append(
      el(
        "div",
        { class: "both" },
        el("div", {}, el("h3", { text: titles[0] }), textOf(mine)),
        el("div", {}, el("h3", { text: titles[1] }), textOf(theirs)),
      ),
    );
  }
  const menu = el("menu", {}, el("button", { type: "button", text: "Decide later", onclick: () => dialog.close("") }));
  for (const { value, title: label } of choices) {
    menu.append(
      el("button", { type: "button", class: "primary", "data-choice": value, text: label, onclick: () => dialog.close(value) }),
    );
  }
  dialog.append(el("h2", { text: title }), el("p", { class: "muted", text }), list, menu);
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue || null);
    });
  });
}

/** The fields for one feature. */
export function noteFields(store, latent) {
  const draft = store.draftOf(latent);
  const status = el("p", { class: "status small muted", role: "status" });
  const name = el("input", { type: "text", maxlength: 80, placeholder: "Name", "aria-label": `Name of feature ${latent}`, name: "name" });
  const note = el("textarea", { maxlength: 10000, rows: 1, placeholder: "Note", "aria-label": `Note on feature ${latent}`, name: "note" });
  const save = el("button", { type: "submit", text: "Save" });
  name.value = draft.name;
  note.value = draft.note;

  const refresh = (text) => {
    const isDirty = store.drafts.has(latent);
    save.disabled = !isDirty || store.sending.has(latent);
    status.textContent = text ?? (isDirty ? "not saved yet" : "");
  };
  const typed = () => {
    store.type(latent, name.value, note.value);
    refresh();
  };
  name.addEventListener("input", typed);
  note.addEventListener("input", typed);
  const form = el("form", { class: "notes" }, name, note, save, status);
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (store.sending.has(latent)) return;
    try {
      const saving = store.save(latent);
      refresh("saving …");
      const isSaved = await saving;
      const now = store.draftOf(latent);
      name.value = now.name;
      note.value = now.note;
      refresh(isSaved ? "saved" : undefined);
    } catch (error) {
      refresh("not saved");
      notify(error.message);
    }
  });
  refresh();
  // Begun in the form that was here before.
  store.sending.get(latent)?.then(() => refresh(), () => refresh());
  return form;
}
