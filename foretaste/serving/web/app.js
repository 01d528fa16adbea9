// The page: who it is for, what they are offered, and why.

import * as api from "./api.js";
import { byId, fill, make, walkable, whileTyping } from "./dom.js";
import { facts, score, shown, tile, year } from "./items.js";
import { reportView } from "./report.js";
import { rulesForm } from "./rules.js";

const LENGTH = 10;
const SOURCES = {
  model: ["model", "from the model, knowing this user"],
  "fold-in": ["fold-in", "from this history alone; training never saw this person"],
  features: ["features", "from features alone"],
  popular: ["popular", "what most people choose; nothing else is known yet"],
};

// What is tried on a user, and what a visitor watched, are kept here alone: the page stores nothing.
const state = { mode: "user", userId: "", tried: [], visitor: [], newest: 0 };
const withItem = (items, item) => [...items.filter((one) => one.item_id !== item.item_id), item];
const withoutItem = (items, item) => items.filter((one) => one.item_id !== item.item_id);

let rules = () => ({});

const say = (text) => { byId("status").textContent = text; };

function complain(error) {
  if (!(error instanceof api.ApiError)) throw error;
  byId("alert").textContent = error.message;
  byId("alert").hidden = false;
}

// Runs one thing a person asked for; what goes wrong is said, never swallowed.
async function attempt(act) {
  byId("alert").hidden = true;
  try {
    return await act();
  } catch (error) {
    return complain(error);
  }
}

// ---- the list ----------------------------------------------------------------------------

function badge(source) {
  const [name, meaning] = SOURCES[source] ?? [source, source];
  return make("span", { cls: `badge ${name}`, text: name, title: meaning });
}

function card(row, best, worst) {
  return make("li", { cls: "card", "data-item": row.item_id },
    tile(row),
    make("div", { cls: "body" },
      make("h3", { text: shown(row.title) }),
      facts(row),
      row.because && make("p", { cls: "because" },
        make("span", { text: "Because you watched " }), make("em", { text: shown(row.because.title) })),
      make("div", { cls: "scored" }, score(row, best, worst), badge(row.source)),
      make("div", { cls: "acts" },
        make("button", { type: "button", cls: "more", text: "More like this",
          "aria-label": `More like ${shown(row.title)}`, on: { click: () => showSimilar(row) } }),
        make("button", { type: "button", cls: "add", text: "Watched it",
          "aria-label": `Watched ${shown(row.title)}`,
          on: { click: () => watched(row, byId("answer-title")) } }))));
}

function title() {
  if (state.mode === "user" && state.userId) return `For user ${state.userId}`;
  if (state.mode === "visitor" && state.visitor.length) return "For a new user";
  return "What most people choose";
}

function showAnswer(answer) {
  const scores = answer.items.map((row) => row.score);
  const [best, worst] = [Math.max(...scores), Math.min(...scores)];
  byId("answer-title").textContent = title();
  const meaning = (SOURCES[answer.source] ?? ["", answer.source])[1];
  const live = answer.live_events
    ? `, with ${answer.live_events} live event${answer.live_events > 1 ? "s" : ""}` : "";
  const tried = state.mode === "user" && state.tried.length
    ? `, with ${state.tried.length} tried here and stored nowhere` : "";
  const few = answer.items.length < LENGTH && Object.keys(rules()).length
    ? `; no more than ${answer.items.length} may stand in this list` : "";
  fill(byId("answer-note"), badge(answer.source), make("span", { text: `${meaning}${live}${tried}${few}` }));
  fill(byId("cards"), ...answer.items.map((row) => card(row, best, worst)));
  byId("cards").dataset.source = answer.source;
  say(`${answer.items.length} recommendations. ${title()}: ${answer.items.slice(0, 3).map((r) => shown(r.title)).join(", ")} …`);
}

// ---- the past ----------------------------------------------------------------------------

function pastRow(event, remove) {
  const kind = event.tried ? "tried" : event.live ? "live" : "";
  return make("li", { "data-item": event.item_id, cls: kind },
    tile(event),
    make("span", { cls: "name" }, make("span", { text: shown(event.title) }),
      make("span", { cls: "year", text: year(event) })),
    kind && make("span", { cls: "chip now", text: kind }),
    remove && make("button", { type: "button", cls: "quiet", text: "✕",
      "aria-label": `Remove ${shown(event.title)}`, on: { click: remove } }));
}

function showPast(past) {
  const visitor = state.mode === "visitor";
  const own = visitor ? state.visitor : state.tried;
  const total = own.length + past.total;
  byId("history-title").textContent = total ? `History · ${total.toLocaleString("en")}` : "History";
  byId("forget").hidden = visitor || !own.length;
  const rows = own.toReversed().map((item) => pastRow({ ...item, tried: !visitor }, () => {
    state.visitor = visitor ? withoutItem(own, item) : state.visitor;
    state.tried = visitor ? state.tried : withoutItem(own, item);
    refresh().then(() => byId("item").focus());
  })).concat(past.events.map((event) => pastRow(event)));
  const empty = visitor ? "Nothing yet: search a title above and click it."
    : state.userId ? "Nothing yet." : "Choose a user above.";
  fill(byId("history"), ...(rows.length ? rows : [make("li", { cls: "hint", text: empty })]));
}

async function refresh() {
  const mine = ++state.newest;
  const user = state.mode === "user" && state.userId;
  const asked = { k: LENGTH, explain: true, rules: rules() };
  if (user) asked.user_id = state.userId;
  const own = user ? state.tried : state.mode === "visitor" ? state.visitor : [];
  asked.history = own.map((item) => item.item_id);
  await attempt(async () => {
    const [answer, past] = await Promise.all([
      api.recommend(asked),
      user ? api.history(state.userId, 30) : { events: [], total: 0 },
    ]);
    if (mine !== state.newest) return;
    showAnswer(answer);
    showPast(past);
  });
}

// Titles can be added to the history of a chosen user or of a new one.
function allowAdding() {
  const nobody = state.mode === "user" && !state.userId;
  byId("item-form").classList.toggle("off", nobody);
  byId("item").disabled = nobody;
}

async function watched(item, focusOn) {
  await attempt(async () => {
    if (state.mode === "user" && state.userId) {
      state.tried = withItem(state.tried, item);
    } else {
      if (state.mode === "user") setMode("visitor");
      state.visitor = withItem(state.visitor, item);
    }
    await refresh();
    focusOn?.focus();
  });
}

// ---- similar items -----------------------------------------------------------------------

async function showSimilar(item) {
  await attempt(async () => {
    const found = await api.similar(item.item_id, 6);
    byId("similar-title").textContent = `Similar to ${shown(found.item.title)}`;
    byId("similar-hint").hidden = true;
    byId("back").hidden = false;
    fill(byId("similar"), ...found.items.map((row) => make("li", { "data-item": row.item_id },
      make("button", { type: "button", cls: "row", "aria-label": `More like ${shown(row.title)}`,
        on: { click: () => showSimilar(row) } },
        tile(row), make("span", { cls: "name" }, make("span", { text: shown(row.title) }),
          make("span", { cls: "year", text: year(row) }))),
      make("button", { type: "button", cls: "quiet", text: "+", "aria-label": `Watched ${shown(row.title)}`,
        title: "Watched it", on: { click: () => watched(row, byId("answer-title")) } }))));
    say(found.items.length ? `${found.items.length} items similar to ${shown(found.item.title)}`
      : found.notes.join(" "));
    byId("similar-title").focus({ preventScroll: true });
    byId("similar-title").scrollIntoView({ block: "nearest" });
    if (matchMedia("(max-width: 60rem)").matches) byId("similar-title").scrollIntoView();
  });
}

// ---- who ---------------------------------------------------------------------------------

function setMode(mode) {
  state.mode = mode;
  byId("as-user").setAttribute("aria-pressed", String(mode === "user"));
  byId("as-visitor").setAttribute("aria-pressed", String(mode === "visitor"));
  byId("user-form").hidden = mode !== "user";
  allowAdding();
  byId("item-label").textContent = mode === "user" ? "Try what they might watch next" : "Add what they watched";
}

function chooseUser(userId) {
  users.stop();
  state.userId = userId;
  state.tried = [];
  allowAdding();
  byId("user").value = userId;
  fill(byId("user-hits"));
  history.replaceState(null, "", userId ? `#user=${encodeURIComponent(userId)}` : "#");
  return refresh();
}

const users = whileTyping(byId("user"),
  (prefix) => attempt(() => api.findUsers(prefix.trim(), 8)),
  (found) => {
    const typed = byId("user").value.trim();
    const hits = (found?.users ?? []).map((userId) => make("li", {}, make("button", {
      type: "button", text: userId, "aria-label": `User ${userId}`,
      on: { click: () => chooseUser(userId).then(() => byId("user").focus()) },
    })));
    const none = make("li", { cls: "hint", text: `No known user begins with “${typed}”; “Show” treats it as a new one.` });
    fill(byId("user-hits"), ...(hits.length ? hits : [none]));
    say(`${hits.length} users found`);
  });

const items = whileTyping(byId("item"),
  (query) => (query.trim() ? attempt(() => api.findItems(query.trim(), 8)) : { items: [] }),
  (found) => {
    const typed = byId("item").value.trim();
    const hits = (found?.items ?? []).map((item) => make("li", {}, make("button", {
      type: "button", "aria-label": `Add ${shown(item.title)}`,
      on: { click: () => {
        items.stop();
        byId("item").value = "";
        fill(byId("item-hits"));
        return watched(item, byId("item"));
      } },
    }, make("span", { cls: "plus", text: "+", "aria-hidden": "true" }),
    make("span", { text: shown(item.title) }), make("span", { cls: "year", text: year(item) }))));
    const none = typed && make("li", { cls: "hint", text: `No title contains “${typed}”.` });
    fill(byId("item-hits"), ...(hits.length ? hits : [none]));
    if (typed) say(`${hits.length} items found`);
  });

walkable(byId("user"), byId("user-hits"));
walkable(byId("item"), byId("item-hits"));
byId("user-form").addEventListener("submit", (event) => {
  event.preventDefault();
  chooseUser(byId("user").value.trim()).then(() => byId("answer-title").focus());
});
byId("as-user").addEventListener("click", () => { setMode("user"); refresh(); });
byId("as-visitor").addEventListener("click", () => { setMode("visitor"); refresh(); });
byId("forget").addEventListener("click", () => {
  state.tried = [];
  refresh().then(() => byId("item").focus());
});
byId("back").addEventListener("click", () => {
  byId("answer-title").focus();
  byId("answer-title").scrollIntoView();
});

// ---- the token, the model, the start -----------------------------------------------------

api.onTokenWanted(() => new Promise((done) => {
  const dialog = byId("token-dialog");
  byId("token").value = "";
  dialog.showModal();
  dialog.addEventListener("close", () => done(byId("token").value), { once: true });
}));

function kindOf(manifest) {
  const named = manifest.model?.kind ?? manifest.config?.kind ?? manifest.settings?.model?.kind;
  return named ? String(named) : "model";
}

const KINDS = { sasrec: "SASRec", popularity: "Popularity", item_knn: "item-kNN", ease: "EASE", als: "ALS" };

async function start() {
  setMode("user");
  const model = await attempt(api.model);
  if (model) {
    const kind = kindOf(model.manifest);
    fill(byId("model"), make("strong", { text: KINDS[kind] ?? kind }),
      make("span", { text: ` ${model.users.toLocaleString("en")} users · ${model.items.toLocaleString("en")} items · version ${model.version}` }));
    fill(byId("report"), ...reportView(model));
    const columns = await attempt(api.columns);
    if (columns) rules = rulesForm(columns, model.items, refresh);
  }
  const asked = new URLSearchParams(location.hash.slice(1)).get("user");
  if (asked) await chooseUser(asked);
  else await Promise.all([refresh(), users.now()]);
  document.body.dataset.ready = "yes";
}

start();
