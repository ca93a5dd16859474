// The list of entries, newest first: filtered, in pages, and redrawn only where something changed.
import { cardOf, isUnsure } from "./card.js";
import { at } from "./dom.js";
import { forget } from "./pictures.js";
import { t } from "./words.js";

const PAGE = 60;
const FILTERS = { all: () => true, unsure: isUnsure, error: ({ state }) => state === "error" };

export class List {
  entries = [];
  #filter = "all";
  #most = PAGE;
  #changed = new Set();
  #cards = new WeakMap();
  #soon = null;

  constructor(actions) {
    this.actions = actions;
    for (const button of this.#buttons()) {
      button.addEventListener("click", () => {
        this.#filter = button.dataset.filter;
        this.#most = PAGE;
        this.draw();
      });
    }
    at("more").addEventListener("click", () => {
      const first = this.#most;
      this.#most += PAGE;
      this.draw();
      at("list").children[first]?.querySelector("button")?.focus();
    });
  }

  #buttons = () => document.querySelectorAll("[data-filter]");

  add(entries) {
    this.entries.unshift(...entries);
    this.draw();
  }

  remove(entry) {
    const card = this.#cardOf(entry);
    const next = card?.nextElementSibling ?? card?.previousElementSibling;
    this.entries.splice(this.entries.indexOf(entry), 1);
    forget(entry);
    this.draw();
    (next ? at("list").querySelector(`[data-entry="${next.dataset.entry}"] [data-key="remove"]`) : at("choose"))?.focus();
  }

  clear() {
    this.entries.splice(0).forEach(forget);
    this.#filter = "all";
    this.draw();
  }

  /** Redraw the card of an entry soon: many changes are drawn once. */
  changed(entry) {
    this.#changed.add(entry);
    this.#cards.delete(entry);
    this.#soon ??= setTimeout(() => {
      this.#soon = null;
      const changed = [...this.#changed];
      this.#changed.clear();
      if (this.#filter !== "all") return this.draw();
      for (const each of changed) this.#redraw(each);
      this.#count();
    }, 40);
  }

  /** Show the filtered entries; unchanged cards stay, unless all are redrawn (`anew`). */
  draw({ anew = false } = {}) {
    if (anew) this.#cards = new WeakMap();
    const matching = this.entries.filter(FILTERS[this.#filter]);
    const rest = matching.length - this.#most;
    this.#keepingFocus(() => at("list").replaceChildren(...matching.slice(0, this.#most).map((entry) => this.#made(entry))));
    at("list").classList.toggle("alone", matching.length === 1);
    at("more").hidden = rest <= 0;
    at("more").textContent = rest > 0 ? t("more", { n: Math.min(rest, PAGE) }) : "";
    at("nothing").hidden = matching.length > 0;
    at("history").hidden = !this.entries.length;
    document.body.classList.toggle("started", this.entries.length > 0);
    this.#count();
  }

  #made(entry) {
    if (!this.#cards.has(entry)) this.#cards.set(entry, cardOf(entry, this.actions));
    return this.#cards.get(entry);
  }

  #cardOf = (entry) => at("list").querySelector(`[data-entry="${entry.id}"]`);

  #redraw(entry) {
    const card = this.#cardOf(entry);
    if (card && !entry.removed) this.#keepingFocus(() => card.replaceWith(this.#made(entry)));
  }

  #keepingFocus(draw) {
    const key = document.activeElement?.dataset?.key;
    const id = key && document.activeElement.closest("[data-entry]")?.dataset.entry;
    draw();
    if (id) at("list").querySelector(`[data-entry="${id}"] [data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
  }

  #count() {
    for (const button of this.#buttons()) {
      const kind = button.dataset.filter;
      const n = this.entries.filter(FILTERS[kind]).length;
      button.textContent = t(`filter_${kind}`, { n });
      button.setAttribute("aria-pressed", String(kind === this.#filter));
      button.disabled = kind !== "all" && n === 0 && kind !== this.#filter;
    }
  }
}
