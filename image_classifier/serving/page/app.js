// The page: images go to the server, its answers go to the list.
import { model as askModel, models as askModels, onKey } from "./api.js";
import { showAbout, showLead } from "./about.js";
import { hideBanner, refuse, wireBanner } from "./banner.js";
import { openCamera } from "./camera.js";
import { errorText, isUnsure } from "./card.js";
import { save, table } from "./csv.js";
import { askForKey, wireDialogs } from "./dialogs.js";
import { at, h, say } from "./dom.js";
import { openDoors, timeName } from "./intake.js";
import { keep, kept } from "./kept.js";
import { List } from "./list.js";
import { Sender, heatOf, wordOf } from "./sender.js";
import { onLanguage, percent, speak, t, writePage } from "./words.js";

const asked = new Map(); // name of a model ("" is the default one) -> promise of its card
let known = null; // card of the chosen model, once it has arrived
let listed = [];
let numbers = 0;

const list = new List({ remove, again, explain, expand });
const sender = new Sender(changed);

/** The card of the chosen model; requested once, and again after a failure. */
function modelNow() {
  const name = at("model").value;
  if (!asked.has(name)) {
    const answer = askModel(name);
    asked.set(name, answer);
    answer.then((model) => { if (at("model").value === name) showModel(model); }, () => asked.delete(name));
  }
  return asked.get(name);
}

function showModel(model) {
  known = model;
  showLead(model);
  at("classes").hidden = at("about").hidden = false;
  at("address-form").hidden = !model.urls;
  at("files").accept = model.limits.formats.map((format) => `image/${format.toLowerCase()}`).join(",");
  if (at("card").open) showAbout(model);
}

async function showModels() {
  try {
    listed = (await askModels()).models;
  } catch (error) {
    return refuse(wordOf(error));
  }
  at("model").replaceChildren(...listed.map(({ name, ready }) => h("option", { value: name, textContent: ready ? name : t("not_ready", { model: name }) })));
  at("model").value = (listed.find((model) => model.default) ?? listed[0])?.name ?? "";
  at("model-choice").hidden = listed.length < 2;
  document.body.classList.toggle("many-models", listed.length > 1);
}

function receive(found) {
  hideBanner();
  const entries = found.map(({ name, file = null, url = null }) => ({ id: (numbers += 1), name, file, url, size: file?.size ?? 0, state: "waiting" }));
  list.add(entries); // shown as waiting before the first request
  send(entries);
  const { top } = at("history").getBoundingClientRect();
  if (top < 0 || top > 0.7 * innerHeight) at("history").scrollIntoView();
}

function send(entries) {
  sender.send(entries, modelPromise());
  showProgress();
}

/** The same promise for the same model, so that its images share requests. */
function modelPromise() {
  const promise = listed.length ? modelNow() : ready.then(modelNow);
  promise.catch(() => {}); // each entry shows the error
  return promise;
}

function changed(entry) {
  if (entry.state === "done") {
    entry.explainable = Boolean(entry.info.explain && entry.file);
    entry.showModel = listed.length > 1;
  }
  if (entry.error) entry.errorText = errorText(entry.error);
  list.changed(entry);
  keep(list.entries);
  showProgress();
  if (entry.state === "done" || entry.state === "error") tell(entry);
}

function tell(entry) {
  if (sender.run.length === 1) return say(t("said_one", { name: entry.name, answer: answerOf(entry) }));
  if (sender.busy) return;
  const count = (test) => sender.run.filter(test).length;
  say(t("said_all", { images: t("images_n", { n: sender.run.length }), unsure: count(isUnsure), errors: count(({ state }) => state === "error") }));
}

function answerOf(entry) {
  if (entry.error) return entry.errorText;
  return isUnsure(entry) ? t("unsure") : t("said_label", { class: entry.answer.predicted_class, percent: percent(entry.answer.confidence) });
}

function showProgress() {
  const { busy, answered, run: { length: total } } = sender;
  at("progress").hidden = !busy;
  at("bar").max = Math.max(total, 1);
  at("bar").value = answered;
  at("progress-text").textContent = t("progress", { done: answered, all: total });
  at("save").disabled = !list.entries.some(({ state }) => state === "done" || state === "error");
}

function remove(entry) {
  list.remove(entry);
  keep(list.entries);
  say(t("said_removed", { name: entry.name }));
  showProgress();
}

function again(entry) {
  send([entry]);
  list.changed(entry);
}

function expand(entry) {
  entry.expanded = !entry.expanded;
  list.changed(entry);
}

async function explain(entry, className) {
  const showing = entry.explained === className && !entry.heatError;
  Object.assign(entry, { explained: showing ? null : className, heatError: null, heats: entry.heats ?? new Map() });
  list.changed(entry);
  if (showing || entry.heats.has(className)) return;
  say(t("explaining", { class: className }));
  try {
    entry.heats.set(className, await heatOf(entry, className));
    if (entry.explained === className) say(t("heat_title", { class: className }));
  } catch (error) {
    if (entry.explained === className) entry.heatError = { words: [wordOf(error)], text: error.message };
  }
  list.changed(entry);
}

function clear() {
  sender.cancel();
  list.clear();
  keep(list.entries);
  hideBanner();
  showProgress();
  say(t("said_cleared"));
  at("choose").focus();
}

function rewrite() {
  at("save").title = t("save_label");
  at("save").setAttribute("aria-label", t("save_label"));
  at("clear").setAttribute("aria-label", t("clear_label"));
  if (matchMedia("(pointer: coarse)").matches) document.querySelector(".invitation").textContent = t("invitation_touch");
  if (known) showModel(known);
  for (const entry of list.entries) if (entry.error) entry.errorText = errorText(entry.error);
  list.draw({ anew: true });
  showProgress();
}

wireBanner();
wireDialogs();
onKey(askForKey);
onLanguage(rewrite);
for (const button of document.querySelectorAll("[data-language]")) button.addEventListener("click", () => speak(button.dataset.language));
at("cancel").addEventListener("click", () => sender.cancel());
at("clear").addEventListener("click", clear);
at("save").addEventListener("click", () => save(table(list.entries), `answers ${new Date().toLocaleDateString("sv")} ${timeName()}.csv`));
at("about").addEventListener("click", () => {
  showAbout(known);
  at("card").showModal();
});
at("model").addEventListener("change", () => { modelNow().then(showModel, (error) => refuse(wordOf(error))); });
addEventListener("beforeunload", (event) => { if (sender.busy) event.preventDefault(); });
writePage();
list.entries.push(...kept().map((entry) => ({ ...entry, id: (numbers += 1) })));
rewrite();
openDoors({ receive, refuse, fetchesAddresses: () => Boolean(known?.urls) });
openCamera(receive);
const ready = showModels();
ready.then(modelNow).catch((error) => refuse(wordOf(error)));
