// Short helpers for elements. Texts become text nodes only: names of files and classes are untrusted.

/** An element with properties (or, with a dash in the name, attributes) and children. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "data") Object.assign(element.dataset, value);
    else if (name in element && !name.includes("-")) element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  drawing.setAttribute("class", "icon");
  drawing.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  drawing.append(use);
  return drawing;
}

export const at = (id) => document.getElementById(id);

/** An untrusted text whose writing direction cannot affect its surroundings. */
export const foreign = (text, properties = {}) => h("bdi", { textContent: text, ...properties });

let speaking = null;

/** Announce a text to screen readers; many calls in a row make one announcement. */
export function say(text) {
  clearTimeout(speaking);
  speaking = setTimeout(() => { at("live").textContent = text; }, 150);
}
