// What the list may hold: one filter, one cap, and how much variety.

import { byId, fill, make } from "./dom.js";

const isId = (column) => /(^|_)id$/i.test(column.name);
const isNumeric = (column) => column.values.every((value) => Number.isFinite(Number(value)));

// Of columns that name nearly every item for itself, a person chooses none.
const chosenByValue = (column, items) => !column.ordered
  && column.distinct > 1 && column.distinct <= column.values.length && column.distinct < 0.9 * items;

const option = (value, text = value) => make("option", { value, text });
const labelled = (text, ...fields) => make("label", {}, make("span", { text }), ...fields);

function select(id, label, first, names) {
  return make("select", { id, "aria-label": label }, option("", first), ...names.map((name) => option(name)));
}

// Puts the controls into the page; `changed` runs when a person has changed one.
export function rulesForm({ columns, vectors }, items, changed) {
  const named = columns.filter((column) => chosenByValue(column, items));
  const ordered = columns.filter((column) => column.ordered && column.distinct > 1 && !isId(column));
  const usable = new Map([...named, ...ordered].map((column) => [column.name, column]));
  const form = byId("rules");
  form.hidden = usable.size === 0 && !vectors;
  if (form.hidden) return () => ({});

  const only = select("only", "Only titles whose …", "anything", [...usable.keys()]);
  const value = make("select", { id: "only-value", "aria-label": "is", hidden: "" });
  const from = make("input", { id: "only-from", "aria-label": "from", placeholder: "from", hidden: "" });
  const to = make("input", { id: "only-to", "aria-label": "to", placeholder: "to", hidden: "" });
  const most = make("input", { id: "most", type: "number", min: 1, max: 10, value: 2, "aria-label": "At most so many" });
  const per = select("per", "of the same …", "no limit", named.map((column) => column.name));
  const variety = make("input", { id: "variety", type: "range", min: 0, max: 90, step: 10, value: 0 });
  const by = vectors ? "vectors" : named.map((column) => column.name);

  only.addEventListener("change", () => {
    const column = usable.get(only.value);
    value.hidden = !column || column.ordered;
    from.hidden = to.hidden = !column?.ordered;
    from.value = to.value = "";
    from.type = to.type = column && isNumeric(column) ? "number" : "date";
    from.step = to.step = "any";
    fill(value, ...(value.hidden ? [] : [option("", "…"), ...[...column.values].sort().map((one) => option(one))]));
  });
  fill(form,
    usable.size && labelled("Only", only, value, from, to),
    named.length && labelled("At most", most, make("span", { text: "of the same" }), per),
    by.length && labelled("Variety", variety));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", changed);

  function bound(input) {
    if (!input.value) return null;
    return input.type === "number" ? Number(input.value) : input.value;
  }

  function condition(column) {
    if (!column.ordered) return value.value ? { one_of: [value.value] } : null;
    const [low, high] = [bound(from), bound(to)];
    return low === null && high === null ? null : { at_least: low, at_most: high };
  }

  return () => {
    const rules = {};
    const column = usable.get(only.value);
    const asked = column && condition(column);
    if (asked) rules.where = { [column.name]: asked };
    if (per.value && Number(most.value) >= 1) rules.caps = { [per.value]: Math.floor(Number(most.value)) };
    if (Number(variety.value)) rules.diversity = { relevance: 1 - Number(variety.value) / 100, by };
    return rules;
  };
}
