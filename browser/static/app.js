/** The page's shell: which tabs there are, which one is shown, and what went wrong. */

const TABS = {
  features: { title: "Features", module: "/static/features.js" },
  landscape: {
    title: "Landscape",
    module: "/static/explorer.js",
    style: "/static/explorer.css",
  },
};

/** An answer other than success; `body` is what came with it. */
export class RequestError extends Error {
  constructor(status, body) {
    super(body?.error ?? `the server answered ${status}`);
    this.status = status;
    this.body = body;
  }
}

async function answerOf(response) {
  const isJson = response.headers.get("content-type")?.startsWith("application/json");
  const body = isJson ? await response.json() : null;
  if (!response.ok) throw new RequestError(response.status, body);
  return body;
}

async function request(url, options) {
  try {
    return await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is `analyze.py browse` still running?");
  }
}

/** Ask for JSON. @param {string} url @param {AbortSignal} [signal] */
export async function getJson(url, signal) {
  return answerOf(await request(url, { signal }));
}

/** Send JSON and read the answer. @param {string} url @param {unknown} body */
export async function postJson(url, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return answerOf(await request(url, { method: "POST", headers, body: JSON.stringify(body), signal }));
}

/** Show what went wrong until it is closed; an empty text closes it. @param {string} text */
export function notify(text) {
  const notice = document.querySelector(".notice");
  notice.querySelector(".notice-text").textContent = text;
  notice.hidden = !text;
}

function addStyle(href) {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = href;
  document.head.append(link);
}

/** Name of the tab that the address names; the first one that there is if it names none. */
function tabInHash(names) {
  const [name] = location.hash.slice(1).split(/[/?&]/);
  return names.includes(name) ? name : names[0];
}

class Shell {
  constructor(session) {
    this.session = session;
    this.names = Object.keys(TABS).filter((name) =>
      name === "features" ? session.features : session.explorer,
    );
    this.panels = new Map();
    this.buttons = new Map();
    this.lastHash = new Map();
  }

  start() {
    const main = document.querySelector("main");
    main.replaceChildren();
    const list = document.querySelector(".tabs");
    for (const name of this.names) {
      list.append(this.makeButton(name));
      main.append(this.makePanel(name));
    }
    list.addEventListener("keydown", (event) => this.moveByKey(event));
    window.addEventListener("hashchange", (event) => {
      this.leave(new URL(event.oldURL).hash);
      this.show(tabInHash(this.names));
    });
    this.show(tabInHash(this.names));
  }

  makeButton(name) {
    const button = document.createElement("button");
    button.type = "button";
    button.id = `tab-${name}`;
    button.textContent = TABS[name].title;
    button.setAttribute("role", "tab");
    button.setAttribute("aria-controls", `panel-${name}`);
    button.addEventListener("click", () => this.open(name));
    this.buttons.set(name, button);
    return button;
  }

  makePanel(name) {
    const panel = document.createElement("div");
    panel.id = `panel-${name}`;
    panel.className = "tab-panel";
    panel.hidden = true;
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", `tab-${name}`);
    this.panels.set(name, { element: panel, isMounted: false });
    return panel;
  }

  /** Go where this tab was left. */
  open(name) {
    location.hash = this.lastHash.get(name) ?? `#${name}`;
  }

  /** Tabs replace their address while they are shown, which is no event. */
  leave(hash) {
    const name = this.names.find((each) => hash.slice(1).split(/[/?&]/)[0] === each);
    if (name) this.lastHash.set(name, hash);
  }

  show(name) {
    if (location.hash) this.lastHash.set(name, location.hash);
    for (const each of this.names) {
      const isShown = each === name;
      this.panels.get(each).element.hidden = !isShown;
      this.buttons.get(each).setAttribute("aria-selected", String(isShown));
      this.buttons.get(each).tabIndex = isShown ? 0 : -1;
    }
    document.title = `${TABS[name].title} · Policyscope`;
    this.mount(name);
  }

  async mount(name) {
    const panel = this.panels.get(name);
    if (panel.isMounted) return;
    panel.isMounted = true;
    try {
      if (TABS[name].style) addStyle(TABS[name].style);
      const module = await import(TABS[name].module);
      await module.mount(panel.element, this.session);
    } catch (error) {
      notify(`${TABS[name].title}: ${error.message}`);
    }
  }

  moveByKey(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const here = this.names.indexOf(tabInHash(this.names));
    const next = this.names[(here + step + this.names.length) % this.names.length];
    event.preventDefault();
    this.open(next);
    this.buttons.get(next).focus();
  }
}

function describeSession(session) {
  const policies = session.policies.map((policy) => policy.name).join(", ");
  const parts = [policies && `policy ${policies}`, session.data && `data ${session.data}`];
  document.querySelector(".session").textContent = parts.filter(Boolean).join(" · ");
}

async function start() {
  document.querySelector(".notice-close").addEventListener("click", () => notify(""));
  try {
    const session = await getJson("/api/session");
    describeSession(session);
    new Shell(session).start();
  } catch (error) {
    notify(error.message);
  }
}

start();
