// Checks of files before they are sent, and small previews, made one at a time when they scroll into view.
import { icon } from "./dom.js";
import { differing, t } from "./words.js";

const LONGEST_SIDE = 640; // of a preview: sharp on a phone, about 50 kB each
const TINY = 100; // smaller images are shown without smoothing
const UNREAD = [ // common formats that the server does not read: [name, offset, bytes]
  ["HEIC", 4, "ftyphei"], ["HEIC", 4, "ftyphev"], ["HEIC", 4, "ftypmif1"], ["HEIC", 4, "ftypmsf1"], ["AVIF", 4, "ftypavi"], ["MP4", 4, "ftyp"], ["PDF", 0, "%PDF"],
  ["SVG", 0, "<svg"], ["XML", 0, "<?xml"], ["HTML", 0, "<!"], ["ZIP", 0, "PK\u0003\u0004"], ["Photoshop", 0, "8BPS"], ["JPEG XL", 0, "\u00ff\u000a"],
];
const READ = [
  ["JPEG", 0, "\u00ff\u00d8\u00ff"], ["PNG", 0, "\u0089PNG"], ["GIF", 0, "GIF8"], ["BMP", 0, "BM"], ["TIFF", 0, "II*\u0000"], ["TIFF", 0, "MM\u0000*"], ["WEBP", 8, "WEBP"],
];
const SUFFIX = /\.(jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?)$/i;

export const looksLikeImage = (file) => SUFFIX.test(file.name) || (/^image\//.test(file.type) && !SUFFIX.test(file.name));

/** Why a file cannot be sent, as a dictionary key and its values; null if it can. */
export async function obstacle(file, limits) {
  if (file.size === 0) return ["empty_file"];
  let start;
  try {
    start = String.fromCharCode(...new Uint8Array(await file.slice(0, 32).arrayBuffer()));
  } catch {
    return ["gone_file"];
  }
  const known = (table) => table.find(([, offset, mark]) => start.startsWith(mark, offset))?.[0];
  const format = known(READ) ?? known(UNREAD);
  if (format && limits.formats.length && !limits.formats.includes(format)) return ["wrong_format", { format, formats: limits.formats.join(", ") }];
  if (file.size > limits.max_bytes) return ["too_large", differing(file.size, limits.max_bytes)];
  return null; // the server checks the rest
}

const jobs = [];
let working = false;

const watcher = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) {
    if (!isIntersecting) continue;
    watcher.unobserve(target);
    jobs.push(target.show);
    work();
  }
}, { rootMargin: "1500px" });

async function work() {
  if (working) return;
  working = true;
  while (jobs.length) await jobs.shift()().catch(() => {});
  working = false;
}

/** The frame of an entry's image, made once; the preview appears when it scrolls into view. */
export function frameOf(entry) {
  if (entry.frame) return entry.frame;
  const frame = document.createElement("div");
  frame.className = "picture";
  entry.frame = frame;
  frame.show = async () => {
    if (entry.removed) return;
    entry.preview ??= await previewOf(entry.file);
    if (entry.removed) return forget(entry);
    entry.preview ? draw(entry, frame) : missing(frame);
  };
  if (entry.preview) draw(entry, frame);
  else if (entry.file) watcher.observe(frame);
  else missing(frame, Boolean(entry.url));
  return frame;
}

function missing(frame, linked = false) {
  const note = document.createElement("span");
  note.className = "small soft";
  note.dataset.word = "no_preview";
  note.textContent = t("no_preview");
  frame.classList.add("missing");
  frame.replaceChildren(icon(linked ? "link" : "picture"), note);
}

function draw(entry, frame) {
  const { url, width, height } = entry.preview;
  const image = new Image(width, height);
  image.src = url;
  image.alt = entry.name;
  image.decoding = "async";
  frame.style.setProperty("--aspect", width / height);
  frame.classList.toggle("tiny", Math.max(width, height) < TINY);
  frame.classList.add("shown");
  frame.prepend(image);
}

async function previewOf(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return null; // TIFF, or not an image
  }
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const type = Math.max(width, height) < TINY ? "image/png" : file.type === "image/jpeg" ? "image/jpeg" : "image/webp";
  const small = await new Promise((resolve) => canvas.toBlob(resolve, type, 0.85));
  return small && { url: URL.createObjectURL(small), width, height };
}

/** Free the memory of an entry. */
export function forget(entry) {
  entry.removed = true;
  if (entry.frame) watcher.unobserve(entry.frame);
  if (entry.preview) URL.revokeObjectURL(entry.preview.url);
  entry.preview = entry.frame = entry.file = null;
}
