// Requests to the server: API key, retries while the server is busy or unreachable, errors as codes.

const ATTEMPTS = 40; // about ten minutes at the longest pauses
const LONGEST_PAUSE_S = 20;
const LONGEST_ANSWER_S = 180;
const PASSING = new Set(["network", "timeout", "rate_limited", "queue_full", "not_ready", "stopping"]);
const KEY = "image-classifier-key";

/** Sends "pause" {error, seconds} when a request waits for a retry, and "clear" once none waits any more. */
export const line = new EventTarget();

let key = stored();
let askForKey = async () => null;
let asking = null;
const waking = new Set();

function stored() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

/** Set how to ask for a key: `ask(wrong)` resolves to a key or null. */
export const onKey = (ask) => { askForKey = ask; };

export const retryNow = () => [...waking].forEach((wake) => wake());
addEventListener("online", retryNow);

export class ApiError extends Error {
  constructor(code, message = "", wait_s = null, body = null) {
    super(message);
    Object.assign(this, { code, wait_s, body });
  }
}

const address = (path, query) => {
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== ""));
  return asked.size ? `${path}?${asked}` : path;
};

export const models = () => request("models");
export const model = (name) => request(address("model", { model: name }));

/** Classify files or URLs; the predictions come in their order. */
export async function predict(entries, query, signal) {
  try {
    return await request(address("predict", query), { method: "POST", signal, ...body(entries) });
  } catch (error) {
    if (error.body?.predictions) return error.body; // no readable image: each prediction has its error
    throw error;
  }
}

export const explain = (entry, query, signal) => request(address("explain", query), { method: "POST", signal, ...body([entry]) });

function body(entries) {
  if (entries[0].url) {
    return { headers: { "Content-Type": "application/json" }, body: JSON.stringify({ images: entries.map(({ url }) => ({ url })) }) };
  }
  const form = new FormData();
  for (const { file, name } of entries) form.append("images", file, name.split("/").pop());
  return { body: form };
}

async function request(path, options = {}) {
  for (let attempt = 1; ; attempt += 1) {
    const used = key;
    try {
      const answer = await once(path, options);
      if (!waking.size) line.dispatchEvent(new Event("clear")); // no request waits any more
      return answer;
    } catch (error) {
      if (error.code === "unauthorized") {
        if (!(await renewKey(used))) throw error;
      } else if (PASSING.has(error.code) && attempt < ATTEMPTS && !(error.code === "timeout" && attempt > 1)) {
        await pause(error, attempt, options.signal);
      } else {
        throw error;
      }
    }
  }
}

async function once(path, options) {
  const waiting = new AbortController();
  const cancel = () => waiting.abort(new DOMException("cancelled", "AbortError"));
  const late = setTimeout(() => waiting.abort(new ApiError("timeout")), LONGEST_ANSWER_S * 1000);
  options.signal?.addEventListener("abort", cancel);
  if (options.signal?.aborted) cancel();
  try {
    const headers = { ...options.headers, ...(key ? { "X-API-Key": key } : {}) };
    const response = await fetch(path, { ...options, headers, signal: waiting.signal, cache: "no-store", credentials: "same-origin" });
    const answer = await response.json().catch(() => null);
    if (response.ok && answer !== null) return answer;
    throw refusal(response, answer);
  } catch (error) {
    if (waiting.signal.aborted) throw waiting.signal.reason;
    throw error instanceof ApiError ? error : new ApiError("network", error.message);
  } finally {
    clearTimeout(late);
    options.signal?.removeEventListener("abort", cancel);
  }
}

const BY_STATUS = { 401: "unauthorized", 403: "forbidden", 404: "not_found", 408: "timeout", 413: "too_large", 415: "unsupported_media_type",
  422: "unreadable", 429: "rate_limited", 502: "network", 503: "not_ready", 504: "timeout" };

function refusal(response, answer) {
  const wait = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  const code = answer?.error?.code ?? BY_STATUS[response.status] ?? "other";
  return new ApiError(code, String(answer?.error?.message ?? ""), Number.isFinite(wait) ? Math.max(wait, 0) : null, answer);
}

function pause(error, attempt, signal) {
  const seconds = Math.min(error.wait_s ?? Math.min(2 ** (attempt - 1), 10), LONGEST_PAUSE_S * 3);
  line.dispatchEvent(new CustomEvent("pause", { detail: { error, seconds: Math.max(1, Math.ceil(seconds)) } }));
  return new Promise((resolve, reject) => {
    const end = (settle, value) => () => {
      clearTimeout(timer);
      waking.delete(wake);
      signal?.removeEventListener("abort", stop);
      settle(value);
    };
    const wake = end(resolve);
    const stop = end(reject, new DOMException("cancelled", "AbortError"));
    const timer = setTimeout(wake, 1000 * seconds + 300 * Math.random()); // random, so that tabs do not retry together
    waking.add(wake);
    signal?.addEventListener("abort", stop);
    if (signal?.aborted) stop();
  });
}

/** True if there is another key than the refused one. All requests share one dialog. */
async function renewKey(refused) {
  if (key !== refused) return true;
  asking ??= askForKey(Boolean(refused)).finally(() => { asking = null; });
  const given = await asking;
  if (!given) return false;
  key = given;
  try {
    sessionStorage.setItem(KEY, given);
  } catch { /* then it is asked for again after a reload */ }
  return true;
}
