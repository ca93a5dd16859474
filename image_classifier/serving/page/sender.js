// Sends entries in small batches, so that the first answers come soon and a busy server is not flooded.
import { ApiError, explain, predict } from "./api.js";
import { fitted } from "./fitting.js";
import { obstacle } from "./pictures.js";

const IN_FLIGHT = 2;
const MOST_IMAGES = 8;
const MOST_BYTES = 4 * 2 ** 20; // half a minute on a slow connection

export class Sender {
  #waiting = [];
  #flying = 0;
  #stop = new AbortController();

  /** `changed(entry)` is called when the state of an entry changes. */
  constructor(changed) {
    this.changed = changed;
    this.run = []; // all entries since the sender was idle
    this.answered = this.flights = 0;
  }

  get busy() {
    return this.answered < this.run.length;
  }

  /** `model` is a promise of the answer of `GET /model`. */
  send(entries, model) {
    if (!this.busy) Object.assign(this, { run: [], answered: 0, flights: 0 });
    this.run.push(...entries);
    for (const entry of entries) Object.assign(entry, { state: "waiting", error: null, model });
    this.#waiting.push(...entries);
    this.#fly();
  }

  cancel() {
    const waiting = this.#waiting.splice(0);
    this.#stop.abort();
    this.#stop = new AbortController();
    for (const entry of waiting) this.#settle(entry, { words: ["cancelled"], again: true });
  }

  async #fly() {
    while (this.#flying < IN_FLIGHT && this.#waiting.length) {
      this.#flying += 1;
      this.#one(this.#waiting[0].model, this.#stop.signal).finally(() => {
        this.#flying -= 1;
        this.#fly();
      });
      await null; // this batch is taken before the next one is chosen
    }
  }

  async #one(model, signal) {
    const first = this.#waiting.shift(); // taken before the first await
    let batch = [first];
    try {
      const info = await Promise.race([model, abortion(signal)]);
      const { limits, name, classes } = info;
      batch.push(...this.#fellows(first, limits));
      for (const entry of batch) entry.info = info;
      batch = await this.#readable(batch, limits);
      if (batch.length) await this.#ask(batch, { model: name, top_k: classes.length }, signal);
    } catch (error) {
      for (const entry of batch) this.#settle(entry, failure(error));
    }
  }

  /** The rest of the batch: same model and kind, within the limits; the first batch is small. */
  #fellows(first, limits) {
    const most = Math.min(limits.max_images, this.flights ? MOST_IMAGES : MOST_IMAGES / 2);
    this.flights += 1;
    const budget = Math.min(MOST_BYTES, limits.max_bytes);
    const fellows = [];
    let size = first.size;
    while (fellows.length + 1 < most && this.#waiting.length) {
      const next = this.#waiting[0];
      size += next.size;
      if (next.model !== first.model || Boolean(next.url) !== Boolean(first.url) || size > budget) break;
      fellows.push(this.#waiting.shift());
    }
    return fellows;
  }

  async #readable(batch, limits) {
    const readable = [];
    for (const entry of batch) {
      if (!entry.url && !entry.removed) await fit(entry, limits);
      const words = entry.url || entry.removed ? null : await obstacle(entry.file, limits);
      if (words || entry.removed) this.#settle(entry, { words });
      else readable.push(entry);
    }
    return readable;
  }

  async #ask(batch, query, signal) {
    for (const entry of batch) {
      entry.state = "sending";
      this.changed(entry);
    }
    try {
      const answer = await predict(batch, query, signal);
      if (!(answer.predictions?.length === batch.length)) throw new ApiError("other");
      batch.forEach((entry, place) => this.#answer(entry, answer.predictions[place], answer));
    } catch (error) {
      const alone = ["too_large", "timeout", "bad_request", "unreadable", "unsupported_media_type"].includes(error.code) && batch.length > 1;
      if (!alone) throw error;
      for (const entry of batch) { // the request failed for all of them
        await this.#ask([entry], query, signal).catch((cause) => this.#settle(entry, failure(cause)));
      }
    }
  }

  #answer(entry, prediction, { model, model_version: version }) {
    if (entry.state === "done" || entry.state === "error") return;
    Object.assign(entry, { modelName: model, version });
    if (prediction.error) this.#settle(entry, { text: prediction.error });
    else {
      Object.assign(entry, { state: "done", answer: prediction, bars: barsOf(prediction) });
      this.answered += 1;
      this.changed(entry);
    }
  }

  #settle(entry, error) {
    if (entry.state === "done" || entry.state === "error") return;
    Object.assign(entry, { state: "error", error });
    this.answered += 1;
    this.changed(entry);
  }
}

/** Make a large image smaller, if the server reads its format; if the browser cannot, it stays as it is. */
async function fit(entry, limits) {
  const original = entry.file; // the entry may be removed meanwhile
  if (await obstacle(original, { ...limits, max_bytes: Infinity })) return;
  const smaller = await fitted(original, limits).catch(() => null);
  if (!smaller || entry.removed) return;
  const { file, ...shrunk } = smaller;
  Object.assign(entry, { file, shrunk, size: file.size });
}

const abortion = (signal) => new Promise((_, reject) => {
  signal.addEventListener("abort", () => reject(signal.reason), { once: true });
});

/** An error as a card shows it: a dictionary key, the server's message, and whether a retry may help. */
function failure(error) {
  if (error.name === "AbortError") return { words: ["cancelled"], again: true };
  if (error.code === "unauthorized") return { words: ["no_key"], again: true };
  if (!(error instanceof ApiError)) return { words: ["e_other"], text: error.message, again: true };
  const again = !["unreadable", "too_large", "unsupported_media_type"].includes(error.code);
  return { words: [wordOf(error)], text: error.code === "network" ? "" : error.message, again };
}

const KNOWN = ["network", "bad_request", "forbidden", "not_found", "timeout", "too_large", "unsupported_media_type", "unreadable", "rate_limited", "queue_full",
  "not_ready", "stopping"];
export const wordOf = (error) => `e_${KNOWN.includes(error.code) ? error.code : "other"}`;

/** [class, probability], most probable first: an object would sort classes named 0, 1, 2 to the front. */
export const barsOf = ({ all_predictions: shares }) => Object.entries(shares).sort(([, one], [, other]) => other - one);

/** The heat map of a class: rows of numbers, null outside the model's view. */
export async function heatOf(entry, className) {
  const answer = await explain(entry, { model: entry.modelName, class: className });
  return answer.heat;
}
