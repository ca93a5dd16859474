// The dialogs of the page: closing them, and the one for the API key.
import { at } from "./dom.js";
import { t } from "./words.js";

export function wireDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); }); // a click outside
  }
}

/** Resolves to the typed key, or null if the dialog is closed. */
export function askForKey(wrong) {
  const dialog = at("key-dialog");
  const form = dialog.querySelector("form");
  at("key-words").textContent = t(wrong ? "key_wrong" : "key_words");
  at("key-words").classList.toggle("problem", wrong);
  at("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    let given = null;
    form.onsubmit = () => { given = at("key").value.trim() || null; };
    dialog.addEventListener("close", () => resolve(given), { once: true });
  });
}
