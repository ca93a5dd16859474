// The banner: the server is unreachable, or the dropped files held no image.
import { line, retryNow } from "./api.js";
import { at } from "./dom.js";
import { t } from "./words.js";
import { wordOf } from "./sender.js";

let counting = null;
let press = () => {};

function show(text, button, deed) {
  clearInterval(counting);
  at("banner").hidden = false;
  at("banner").classList.toggle("waiting", deed === retryNow);
  if (at("banner-text").textContent !== text) at("banner-text").textContent = text; // screen readers repeat it only when it changes
  at("banner-count").textContent = "";
  at("banner-button").textContent = button;
  press = deed;
}

export function hideBanner() {
  clearInterval(counting);
  at("banner").hidden = true;
  at("banner-text").textContent = "";
}

export const refuse = (word, holes) => show(t(word, holes), t("close"), hideBanner);

export function wireBanner() {
  at("banner-button").addEventListener("click", () => press());
  line.addEventListener("pause", ({ detail: { error, seconds } }) => {
    show(t(wordOf(error)), t("retry_now"), retryNow);
    const end = Date.now() + 1000 * seconds;
    const count = () => { at("banner-count").textContent = t("retry_in", { n: Math.max(1, Math.ceil((end - Date.now()) / 1000)) }); };
    count();
    counting = setInterval(count, 500);
  });
  line.addEventListener("clear", () => { if (press === retryNow) hideBanner(); });
}
