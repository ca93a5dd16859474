// The model card: name, accuracy, and what images it accepts.
import { at, foreign, h } from "./dom.js";
import { bytes, moment, number, percent, t } from "./words.js";

const SHOWN_CLASSES = 12;

export function showAbout(model) {
  const { limits, decision, provenance } = model;
  const made = Date.parse(provenance?.created ?? "");
  const rows = [
    ["about_name", model.name],
    ["about_version", model.version],
    ["about_made", Number.isNaN(made) ? "" : moment(made)],
    ["about_backend", model.backend],
    ["about_size", model.image_size ? t("about_pixels", { size: model.image_size }) : ""],
    ["about_accuracy", accuracy(model)],
    ["about_threshold", threshold(model)],
    ["about_unlike", decision && typeof decision.ood_limit === "number" ? t("about_unlike_value") : ""],
    ["about_note", decision?.note],
    ["about_takes", t("about_takes_value", { formats: limits.formats.join(", "), size: bytes(limits.max_bytes), pixels: number(limits.max_pixels / 1e6) })],
  ];
  at("card-body").replaceChildren(
    h("dl", {}, ...rows.filter(([, value]) => value).map(([word, value]) => h("div", {}, h("dt", { textContent: t(word) }), h("dd", {}, foreign(String(value)))))),
    h("h3", { textContent: `${t("about_classes")} (${number(model.classes.length)})` }),
    h("ul", { className: "chips tall", tabIndex: 0, "aria-label": t("about_classes"), role: "list" }, ...model.classes.map((name) => h("li", {}, foreign(name)))),
  );
}

/** The higher of the server's threshold and the model's. */
function threshold({ threshold: configured, decision }) {
  const value = Math.max(configured ?? 0, decision?.threshold ?? 0);
  return value > 0 ? t("about_threshold_value", { value: percent(value) }) : t("about_threshold_none");
}

function accuracy({ metrics, intervals }) {
  const part = ["test", "val"].find((name) => typeof metrics?.[name]?.accuracy === "number");
  if (!part) return "";
  const value = percent(metrics[part].accuracy);
  const [low, high] = intervals?.[part]?.accuracy ?? [];
  return typeof low === "number" ? t("about_measured", { value, low: percent(low), high: percent(high), part }) : t("about_measured_alone", { value, part });
}

/** The text above the drop zone: model, number of classes, accepted files. */
export function showLead(model) {
  at("brand").textContent = model.name;
  at("lead").replaceChildren(foreign(t("lead", { model: model.name, classes: t("classes_n", { n: model.classes.length }) })));
  at("limits").textContent = t("limits", { formats: model.limits.formats.join(", "), size: bytes(model.limits.max_bytes) });
  const names = model.classes.slice(0, SHOWN_CLASSES).map((name) => h("li", {}, foreign(name)));
  const rest = model.classes.length - names.length;
  at("classes").replaceChildren(...names, ...(rest > 0 ? [h("li", { className: "soft", textContent: t("more_classes", { n: rest }) })] : []));
}
