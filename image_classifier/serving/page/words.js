// The page's language: its texts and number formats.
import { DICTIONARY } from "./dictionary.js";

const LANGUAGES = ["en", "ru"];
const REMEMBERED = "image-classifier-language";
const changed = new EventTarget();

let language = remembered() ?? (navigator.languages ?? [navigator.language]).map((tag) => tag.slice(0, 2)).find((tag) => LANGUAGES.includes(tag)) ?? "en";

function remembered() {
  try {
    const kept = localStorage.getItem(REMEMBERED);
    return LANGUAGES.includes(kept) ? kept : null;
  } catch {
    return null; // this browser stores nothing
  }
}

export const languageNow = () => language;

export function speak(tag) {
  language = tag;
  try {
    localStorage.setItem(REMEMBERED, tag);
  } catch { /* then it is forgotten when the tab is closed */ }
  writePage();
  changed.dispatchEvent(new Event("change"));
}

export const onLanguage = (listener) => changed.addEventListener("change", listener);

/** The text for `key` with its {holes} filled; `n` chooses the plural form. */
export function t(key, holes = {}) {
  const entry = DICTIONARY[key][LANGUAGES.indexOf(language)];
  const text = typeof entry === "string" ? entry : entry[formOf(holes.n)];
  return text.replace(/\{(\w+)\}/g, (hole, name) => (name in holes ? written(holes[name]) : hole));
}

function formOf(n) {
  const form = new Intl.PluralRules(language).select(n);
  return form === "one" ? 0 : language === "ru" && form === "many" ? 2 : 1;
}

const written = (value) => (typeof value === "number" ? number(value) : String(value));

export const number = (value, digits = 0) => new Intl.NumberFormat(language, { maximumFractionDigits: digits }).format(value);

/** A probability as a percentage, never rounded to 100 % or 0 %. */
export function percent(share) {
  const format = (value, digits = 1) => new Intl.NumberFormat(language, { style: "percent", minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
  if (share === 1 || share === 0) return format(share, 0);
  if (share > 0.9995 - 1e-12) return `>\u202f${format(0.999)}`;
  if (share < 0.0005) return `<\u202f${format(0.001)}`;
  return format(share);
}

export function bytes(size, digits = size < 10 * 2 ** 20 ? 1 : 0) {
  const [value, unit] = size >= 2 ** 20 ? [size / 2 ** 20, "megabyte"] : [Math.max(size / 2 ** 10, 0.1), "kilobyte"];
  return new Intl.NumberFormat(language, { style: "unit", unit, maximumFractionDigits: digits }).format(value).replace(/\s/g, "\u00a0");
}

/** A size and its limit, with enough digits to tell them apart. */
export function differing(size, limit) {
  const digits = [0, 1, 2, 3, 4, 5, 6].find((some) => bytes(size, some) !== bytes(limit, some)) ?? 7;
  return { size: bytes(size, digits), limit: bytes(limit, digits) };
}

export const moment = (when) => new Intl.DateTimeFormat(language, { dateStyle: "medium" }).format(when);

/** Write the texts of index.html. */
export function writePage() {
  document.documentElement.lang = language;
  document.title = t("page");
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = t(element.dataset.word);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", t(element.dataset.label));
  for (const button of document.querySelectorAll("[data-language]")) button.setAttribute("aria-pressed", String(button.dataset.language === language));
}
