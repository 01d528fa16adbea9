// How an item looks: a tile in place of a poster, its title, year and genres.

import { make } from "./dom.js";

const GENRES = ["genres", "genre", "categories", "category", "tags"];
const YEARS = ["year", "release_year", "date", "release_date"];

function attribute(item, names) {
  const found = Object.keys(item.attributes).find((name) => names.includes(name.toLowerCase()));
  return found === undefined ? null : item.attributes[found];
}

export function genres(item) {
  const value = attribute(item, GENRES);
  if (Array.isArray(value)) return value.filter(Boolean).map(String);
  return value ? String(value).split(/[|,;]/).map((one) => one.trim()).filter(Boolean) : [];
}

export function year(item) {
  const found = /\d{4}/.exec(String(attribute(item, YEARS) ?? ""));
  return found ? found[0] : "";
}

const hash = (text) => [...text].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) >>> 0, 7);

// "Fugitive, The" is how catalogues sort; people say it the other way round.
export const shown = (title) => title.replace(/^(.+), (The|An?)$/, "$2 $1");

function initials(title) {
  const words = title.replace(/^(the|an?) /i, "").match(/[\p{L}\p{N}]+/gu) ?? ["?"];
  return words.slice(0, 2).map((word) => [...word][0].toUpperCase()).join("");
}

export function tile(item) {
  const element = make("span", { cls: "tile", text: initials(item.title), "aria-hidden": "true" });
  const hue = (hash(genres(item)[0] ?? "") * 47 + (hash(item.title) % 50)) % 360;
  element.style.setProperty("--hue", hue);
  return element;
}

export function facts(item) {
  const line = make("p", { cls: "facts" });
  if (year(item)) line.append(make("span", { cls: "year", text: year(item) }));
  for (const genre of genres(item).slice(0, 3)) line.append(make("span", { cls: "chip", text: genre }));
  return line;
}

export function score(row, best, worst) {
  const share = best > worst ? (row.score - worst) / (best - worst) : 1;
  const bar = make("span", { cls: "bar", "aria-hidden": "true" }, make("span"));
  bar.firstChild.style.setProperty("width", `${Math.round(12 + 88 * share)}%`);
  const text = Math.abs(row.score) >= 100 ? row.score.toFixed(0) : row.score.toFixed(2);
  return make("span", { cls: "score" }, bar, make("span", { cls: "number", text, title: "score" }));
}
