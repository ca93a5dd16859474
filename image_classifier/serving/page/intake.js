// Input: chosen files and folders, drag and drop, paste. All of it ends in `receive([{name, file | url}])`.
import { at, say } from "./dom.js";
import { looksLikeImage } from "./pictures.js";
import { t } from "./words.js";

const NO_TIME = /[:/]/g;

export const timeName = () => new Date().toLocaleTimeString("sv").replace(NO_TIME, ".");

/** Set up the page; `receive` takes images, `refuse` the key of an error text; `fetchesAddresses()`: does the server open URLs? */
export function openDoors({ receive, refuse, fetchesAddresses }) {
  const take = (found) => {
    const images = found.filter(({ file, inFolder }) => !inFolder || looksLikeImage(file)).filter(({ name }) => !/(^|\/)(\.|Thumbs\.db$)/.test(name));
    const skipped = found.length - images.length;
    if (skipped) say(t("said_skipped", { n: skipped }));
    if (images.length) receive(images);
    else if (skipped) refuse("said_skipped", { n: skipped });
  };
  const takeAddresses = (text) => {
    const urls = text.split(/\s+/).filter((word) => /^https?:\/\/\S+$/i.test(word));
    if (!urls.length) return refuse(text.trim() ? "bad_address" : "no_text");
    return fetchesAddresses() ? receive(urls.map((url) => ({ url, name: url }))) : refuse("no_urls");
  };
  chosenFiles(take);
  dropped(take, takeAddresses);
  pasted(take, takeAddresses, refuse);
  at("address-form").addEventListener("submit", (event) => {
    event.preventDefault();
    takeAddresses(at("address").value);
    at("address").value = "";
  });
}

function chosenFiles(take) {
  const inputs = { choose: at("files"), folder: at("tree") };
  for (const [button, input] of Object.entries(inputs)) at(button).addEventListener("click", () => input.click());
  for (const input of [at("files"), at("tree"), at("capture")]) {
    input.addEventListener("change", () => {
      take([...input.files].map((file) => ({ file, name: file.webkitRelativePath || file.name, inFolder: input === at("tree") })));
      input.value = ""; // allows choosing the same file again
    });
  }
  at("folder").hidden = !("webkitdirectory" in at("tree")) || matchMedia("(pointer: coarse)").matches;
}

function dropped(take, takeAddresses) {
  const carries = (event) => ["Files", "text/uri-list"].some((type) => event.dataTransfer?.types.includes(type));
  let hiding = null;
  const veil = (shown) => {
    clearTimeout(hiding);
    at("veil").hidden = !shown;
    if (shown) hiding = setTimeout(() => veil(false), 400); // dragover repeats while something is dragged over the page
  };
  addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
    veil(true);
  });
  addEventListener("drop", async (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    veil(false);
    const { items, files } = event.dataTransfer;
    const text = event.dataTransfer.getData("text/uri-list");
    const entries = [...items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    if (entries.length) take((await Promise.all(entries.map((entry) => walk(entry, false)))).flat());
    else if (files.length) take([...files].map((file) => ({ file, name: file.name })));
    else if (text) takeAddresses(text);
  });
}

/** All files below an entry of the file system, without those that cannot be opened. */
async function walk(entry, inFolder) {
  if (entry.isFile) {
    const file = await new Promise((resolve) => entry.file(resolve, () => resolve(null)));
    return file ? [{ file, name: entry.fullPath.replace(/^\//, "") || file.name, inFolder }] : [];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve) => reader.readEntries(resolve, () => resolve([]))); // at most a hundred per call
    if (!some.length) break;
    for (const each of some) found.push(...(await walk(each, true)));
  }
  return found.sort((one, other) => one.name.localeCompare(other.name, "en", { numeric: true }));
}

function pasted(take, takeAddresses, refuse) {
  document.addEventListener("paste", (event) => {
    if (event.target.closest?.("input, textarea")) return; // pasted into a text field
    const { files } = event.clipboardData;
    const text = event.clipboardData.getData("text/plain");
    event.preventDefault();
    if (files.length) take([...files].map((file) => ({ file, name: pastedName(file) })));
    else if (/^\s*https?:/i.test(text)) takeAddresses(text);
    else refuse("no_text");
  });
}

/** Browsers name every pasted image image.png: add the time. */
function pastedName(file) {
  if (!/^(image|unnamed)?(\.\w+)?$/.test(file.name)) return file.name;
  return t("pasted_name", { time: timeName(), suffix: file.type.split("/")[1]?.split("+")[0] || "png" });
}
