"use strict";

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const nameOf = (schema) => schema.$ref.split("/").pop();

/** The values that a schema takes, in words; names of other objects are links. */
function valuesOf(schema) {
  if (schema === undefined || Object.keys(schema).length === 0) return ["any"];
  if (schema.$ref) return [element("a", { href: "#" + nameOf(schema) }, nameOf(schema))];
  if (schema.const !== undefined) return [JSON.stringify(schema.const)];
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(", ")];
  const either = schema.anyOf || schema.oneOf;
  if (either) return either.flatMap((one, place) => (place ? [" or ", ...valuesOf(one)] : valuesOf(one)));
  if (schema.type === "array") {
    const most = schema.maxItems === undefined ? "" : ` of at most ${schema.maxItems}`;
    return [`list${most}: `, ...valuesOf(schema.items)];
  }
  return [[].concat(schema.type || "object").join(" or ") + rangeOf(schema)];
}

/** JSON's whole numbers may be larger than those that this language holds. */
const shown = (number) => (number > Number.MAX_SAFE_INTEGER ? `about ${number.toExponential(2)}` : number);

function rangeOf(schema) {
  const ends = [];
  if (schema.minimum !== undefined) ends.push(`from ${shown(schema.minimum)}`);
  if (schema.exclusiveMinimum !== undefined) ends.push(`above ${shown(schema.exclusiveMinimum)}`);
  if (schema.maximum !== undefined) ends.push(`to ${shown(schema.maximum)}`);
  if (schema.maxLength !== undefined) ends.push(`of at most ${schema.maxLength} characters`);
  return ends.length ? " " + ends.join(" ") : "";
}

const isNeutral = (field) => (field.description || "").startsWith("accepted only without an effect");

function fieldsOf(schema, rows) {
  return element("table", {}, ...rows.map(([name, field]) => {
    const wanted = (schema.required || []).includes(name) ? " (wanted)" : "";
    const set = field.default !== undefined && field.default !== null && typeof field.default !== "object";
    const usual = set ? ` · else ${JSON.stringify(field.default)}` : "";
    return element("tr", {},
      element("td", {}, element("code", {}, name), wanted),
      element("td", {}, ...valuesOf(field), usual),
      element("td", {}, field.description || ""));
  }));
}

function objectOf(name, schema) {
  const rows = Object.entries(schema.properties || {});
  const ours = rows.filter(([, field]) => !isNeutral(field)), others = rows.filter(([, field]) => isNeutral(field));
  const section = element("section", { id: name }, element("h2", {}, name));
  if (schema.description) section.append(element("p", {}, schema.description));
  section.append(fieldsOf(schema, ours));
  if (others.length) {
    const about = element("summary", {}, `${others.length} fields of other APIs, taken where they ask for nothing`);
    section.append(element("details", {}, about, fieldsOf(schema, others)));
  }
  return section;
}

function contentOf(label, content) {
  const parts = Object.entries(content || {}).flatMap(([kind, { schema }]) => [` ${kind} `, ...valuesOf(schema)]);
  return element("p", {}, `${label}:`, ...parts);
}

function operationOf(method, path, operation) {
  const section = element("section", { id: operation.operationId },
    element("p", {}, element("span", { class: "method" }, method), element("code", {}, path), " · " + operation.summary));
  if (operation.requestBody) section.append(contentOf("body", operation.requestBody.content));
  section.append(contentOf("answer", operation.responses["200"].content));
  return section;
}

async function show() {
  const about = document.getElementById("about"), main = document.getElementById("main");
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`openapi.json: ${response.status}`);
  const whole = await response.json();
  about.replaceChildren(`Version ${whole.info.version}. ${whole.info.description} `,
    element("a", { href: "openapi.json" }, "openapi.json"));
  main.append(element("h2", {}, "Paths"));
  for (const [path, methods] of Object.entries(whole.paths)) {
    for (const [method, operation] of Object.entries(methods)) main.append(operationOf(method, path, operation));
  }
  for (const [name, schema] of Object.entries(whole.components.schemas)) main.append(objectOf(name, schema));
}

show().catch((error) => { document.getElementById("about").textContent = `This page cannot be shown: ${error.message}`; });
