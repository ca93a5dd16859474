"use strict";
// Filters the page by words and severity. Without the script the page shows everything.
const search = document.getElementById("search");
const buttons = [...document.querySelectorAll("button[data-severity]")];
const status = document.getElementById("status");
const sections = [...document.querySelectorAll("section[data-severity]")];
const entries = sections.flatMap((section) => [...section.querySelectorAll("[data-entry]")].map((entry) => {
  const text = `${section.dataset.kind} ${section.querySelector("h2").textContent} ${entry.dataset.detail || ""} ${entry.textContent}`;
  return { section, entry, text: text.toLowerCase() };
}));

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const severities = new Set(buttons.filter((button) => button.getAttribute("aria-pressed") === "true").map((button) => button.dataset.severity));
  const visible = new Map(sections.map((section) => [section, 0]));
  let count = 0;
  for (const { section, entry, text } of entries) {
    const shown = severities.has(section.dataset.severity) && words.every((word) => text.includes(word));
    entry.hidden = !shown;
    if (shown) {
      visible.set(section, visible.get(section) + 1);
      count += 1;
    }
  }
  visible.forEach((number, section) => { section.hidden = number === 0; });
  const all = words.length === 0 && severities.size === buttons.length;
  status.textContent = all ? "" : `${count} of ${entries.length} shown`;
  document.getElementById("nothing").hidden = count > 0 || entries.length === 0;
}

search.addEventListener("input", filter);
for (const button of buttons) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    filter();
  });
}
document.getElementById("tools").hidden = entries.length === 0;
filter(); // the browser keeps the text when going back
