// The API's page, made from openapi.json: no package from elsewhere is loaded.

import { call, onTokenWanted } from "./api.js";
import { byId, fill, make } from "./dom.js";

onTokenWanted(() => new Promise((done) => {
  byId("token-dialog").showModal();
  byId("token-dialog").addEventListener("close", () => done(byId("token").value), { once: true });
}));

const api = await call("GET", "/openapi.json");
const follow = (schema) =>
  (schema?.$ref ? api.components.schemas[schema.$ref.split("/").at(-1)] : schema) ?? {};

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  const several = schema.anyOf ?? schema.oneOf;
  if (several) return [...new Set(several.map(typeOf))].join(" or ");
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  return schema.type ?? "any";
}

function table(rows) {
  return make("table", {}, make("tbody", {}, ...rows.map(([name, schema, required, text]) =>
    make("tr", {}, make("th", { scope: "row", text: name }),
      make("td", { text: typeOf(schema) + (required ? "" : `, default ${JSON.stringify(schema.default ?? null)}`) }),
      make("td", { text: text ?? "" })))));
}

const fields = (schema) => Object.entries(schema.properties ?? {}).map(([name, field]) =>
  [name, field, (schema.required ?? []).includes(name), field.description]);

function bodies(schema) {
  return (schema.anyOf ?? [schema]).map(follow).filter((one) => one.properties);
}

function route(method, path, does) {
  const body = does.requestBody?.content?.["application/json"]?.schema;
  const [status, reply] = Object.entries(does.responses).find(([code]) => code[0] === "2") ?? [];
  const answer = follow(reply?.content?.["application/json"]?.schema);
  return make("section", { cls: "route panel" },
    make("h3", {}, make("span", { cls: "badge", text: method.toUpperCase() }), make("span", { text: path })),
    make("p", { text: does.description ?? does.summary }),
    does.parameters && table(does.parameters.map((one) =>
      [one.name, one.schema, one.required, one.description])),
    ...(body ? bodies(body).flatMap((one) => [make("p", { cls: "hint", text: "Body" }), table(fields(one))]) : []),
    make("details", {}, make("summary", { text: `Answer ${status}` }),
      answer.properties ? table(fields(answer).map(([n, s, , d]) => [n, s, true, d])) : make("p", { text: "text" })));
}

fill(byId("docs"), make("h1", { text: "The API" }), make("p", { text: api.info.description }),
  ...Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, does]) => route(method, path, does))));
