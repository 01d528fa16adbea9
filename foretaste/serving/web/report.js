// The model's report: each metric with its interval, on one scale.

import { make } from "./dom.js";

const NAMES = {
  hit_rate: "Hit rate", ndcg: "NDCG", mrr: "MRR", map: "MAP", recall: "Recall",
  precision: "Precision", coverage: "Coverage", novelty: "Novelty", popularity_share: "Popular share",
};
const SHARES = ["hit_rate", "recall", "ndcg", "mrr", "map", "precision"]; // drawn on one scale

const family = (name) => name.replace(/_at_\d+$/, "");
const label = (name) => NAMES[family(name)] ?? family(name).replaceAll("_", " ");

// Reports may be one, or several under names of their own.
function reportsIn(value, name = "", depth = 0) {
  if (value === null || typeof value !== "object" || depth > 3) return [];
  if (!Array.isArray(value) && value.metrics && typeof value.metrics === "object") {
    return [{ name: name || value.model || "", ...value }];
  }
  return Object.entries(value).flatMap(([key, inner]) =>
    reportsIn(inner, Array.isArray(value) ? "" : key, depth + 1));
}

function gauge(value, interval, most) {
  const percent = (share) => `${100 * Math.min(1, Math.max(0, share / most))}%`;
  const track = make("span", { cls: "gauge", "aria-hidden": "true" });
  const dot = make("span", { cls: "dot" });
  dot.style.setProperty("left", percent(value));
  const band = make("span", { cls: "band" });
  band.style.setProperty("left", percent(interval[0]));
  band.style.setProperty("width", percent(interval[1] - interval[0]));
  track.append(band);
  track.append(dot);
  return track;
}

function metricRow(name, value, interval, most) {
  const text = interval
    ? `${interval[0].toFixed(3)} – ${interval[1].toFixed(3)}` : "";
  return make("tr", {},
    make("th", { scope: "row", text: label(name) }),
    make("td", { cls: "value", text: Number(value).toFixed(3) }),
    make("td", { cls: "range" }, interval && most && gauge(value, interval, most), make("span", { text })));
}

function oneReport(report, several) {
  const k = report.k?.includes?.(10) ? 10 : report.k?.[0];
  const names = Object.keys(report.metrics)
    .filter((name) => typeof report.metrics[name] === "number")
    .filter((name) => k === undefined || name.endsWith(`_at_${k}`) || !/_at_\d+$/.test(name));
  const ends = names.filter((name) => SHARES.includes(family(name)))
    .map((name) => report.intervals?.[name]?.[1] ?? report.metrics[name]);
  const most = Math.max(1e-9, ...ends);
  const users = report.counts?.users;
  const caption = [several ? report.name : "", report.holdout && `on ${report.holdout}`,
    users && `${Number(users).toLocaleString("en")} users`, k && `lists of ${k}`,
  ].filter(Boolean).join(" · ");
  const table = make("table", { cls: "metrics" },
    make("caption", { text: caption }),
    make("thead", { cls: "unseen" }, make("tr", {},
      make("th", { scope: "col", text: "Metric" }), make("th", { scope: "col", text: "Mean" }),
      make("th", { scope: "col", text: "95 % interval" }))),
    make("tbody", {}, ...names.map((name) =>
      metricRow(name, report.metrics[name], report.intervals?.[name],
        SHARES.includes(family(name)) ? most : 0))));
  const notes = Array.isArray(report.notes) ? report.notes : [];
  return [table, notes.length > 0 && make("details", {},
    make("summary", { text: "What the numbers mean" }),
    make("ul", {}, ...notes.map((note) => make("li", { text: String(note) }))))];
}

export function reportView(model) {
  const found = reportsIn(model.report);
  const learned = make("p", { cls: "hint", text: `Learned from ${model.learned_from}.` });
  if (found.length === 0) {
    return [learned, make("p", { cls: "hint", text: "This bundle has no report: foretaste evaluate writes one." })];
  }
  return [learned, make("p", { cls: "hint", text: `Measured on ${model.measured_on}.` }),
    ...found.flatMap((one) => oneReport(one, found.length > 1)).filter(Boolean)];
}
