// Answers survive a reload, until the tab is closed. Files do not (a page cannot keep them), so these have no heat maps.

import { barsOf } from "./sender.js";

const PLACE = "image-classifier-answers";
const MOST = 120;
const SIDE = 240; // of a saved preview, about 8 kB

let soon = null;

/** Save the newest entries soon: many changes in a row are written once. */
export function keep(entries) {
  clearTimeout(soon);
  soon = setTimeout(() => write(entries), 800);
}

function write(entries) {
  const kept = entries.filter(({ state }) => state === "done" || state === "error").slice(0, MOST).map(plain);
  for (let most = kept.length; ; most = Math.floor(most / 2)) { // save fewer if the browser has no more space
    try {
      return most ? sessionStorage.setItem(PLACE, JSON.stringify(kept.slice(0, most))) : sessionStorage.removeItem(PLACE);
    } catch {
      if (!most) return undefined; // this browser stores nothing
    }
  }
}

function plain(entry) {
  const { name, state, answer, error, modelName, version, showModel, shrunk } = entry;
  entry.small ??= entry.preview?.kept ? entry.preview : smaller(entry);
  return { name, state, answer, error, modelName, version, showModel, shrunk, preview: entry.small };
}

function smaller({ frame, preview }) {
  const image = frame?.querySelector("img");
  if (!preview || !image?.complete || !image.naturalWidth) return null;
  const scale = Math.min(1, SIDE / Math.max(preview.width, preview.height));
  const [width, height] = [preview.width, preview.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(image, 0, 0, width, height);
  return { url: canvas.toDataURL("image/jpeg", 0.75), width, height, kept: true };
}

/** Entries saved before the reload, newest first. */
export function kept() {
  try {
    const entries = JSON.parse(sessionStorage.getItem(PLACE) ?? "[]");
    return entries.map((entry) => ({ ...entry, file: null, url: null, size: 0, bars: entry.answer && barsOf(entry.answer) }));
  } catch {
    return [];
  }
}
