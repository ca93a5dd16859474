"use strict";
// Lets a person search, decide on each image, and save the decisions as fix.csv. Without the script the page shows everything.
const search = document.getElementById("search");
const save = document.getElementById("save");
const status = document.getElementById("status");
const entries = [...document.querySelectorAll("[data-entry]")].map((entry) => ({ entry, text: entry.textContent.toLowerCase() }));
const delimiter = document.getElementById("decided").dataset.delimiter;
const choices = [...document.querySelectorAll(".choices")];

function cell(text) {
  return /[",;\r\n]/.test(text) || text.startsWith("#") ? `"${text.replaceAll('"', '""')}"` : text;
}

function action(choice) {
  const pressed = choice.querySelector('button[aria-pressed="true"]');
  return pressed ? pressed.dataset.action : "";
}

function row(choice) {
  const done = action(choice);
  const label = done === "relabel" || done === "" ? choice.querySelector("input").value.trim() : "";
  return [choice.dataset.path, choice.dataset.label, done, label, choice.dataset.reason].map(cell).join(delimiter) + "\n";
}

function update() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const { entry, text } of entries) {
    entry.hidden = !words.every((word) => text.includes(word));
    count += entry.hidden ? 0 : 1;
  }
  document.getElementById("nothing").hidden = count > 0 || entries.length === 0;
  const decided = choices.filter(action).length;
  const missing = choices.filter((choice) => action(choice) === "relabel" && !choice.querySelector("input").value.trim()).length;
  save.disabled = missing > 0;
  const shown = words.length ? `${count} of ${entries.length} shown, ` : "";
  status.textContent = missing ? `${shown}${missing} marked “relabel” without a label` : `${shown}${decided} of ${choices.length} decided`;
}

for (const choice of choices) {
  choice.hidden = false;
  choice.querySelector("input").addEventListener("input", update);
  for (const button of choice.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      for (const other of choice.querySelectorAll("button")) {
        other.setAttribute("aria-pressed", String(on && other === button));
      }
      update();
    });
  }
}
save.addEventListener("click", () => {
  const decided = Uint8Array.from(atob(document.getElementById("decided").textContent), (letter) => letter.charCodeAt(0)); // unchanged, byte for byte
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([decided, choices.map(row).join("")], { type: "text/csv" }));
  link.download = "fix.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});
search.addEventListener("input", update);
document.getElementById("tools").hidden = choices.length === 0;
update(); // the browser keeps the text when going back
