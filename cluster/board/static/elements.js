// Elements that are made once and changed in place, so that focus, selection and tooltips stay while numbers change.
const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  set(made, attributes);
  made.append(...children);
  return made;
}

function drawn(tag, attributes = {}) {
  const made = document.createElementNS(SVG, tag);
  set(made, attributes);
  return made;
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) node.removeAttribute(name);
    else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
  }
}

// A path of this service. Where the page's own address holds a key, the browser has it; a script may not repeat it.
function ours(path) {
  const url = new URL(path, document.baseURI);
  url.username = url.password = "";
  return url;
}

function say(node, text) { if (node.textContent !== text) node.textContent = text; }

// Children of `parent`, one for each item and in their order; those of items that are gone go.
function keep(parent, items, key, make, update) {
  const known = parent.kept ?? (parent.kept = new Map());
  const there = new Set();
  let before = null;
  for (const item of items) {
    const name = key(item);
    there.add(name);
    if (!known.has(name)) known.set(name, make(item));
    const node = known.get(name);
    update(node, item);
    const next = before ? before.nextSibling : parent.firstChild;
    if (next !== node) parent.insertBefore(node, next);
    before = node;
  }
  for (const [name, node] of known) if (!there.has(name)) { node.remove(); known.delete(name); }
}

function byId(id) { return document.getElementById(id); }
