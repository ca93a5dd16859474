// One image and its answer as an element. It is rebuilt when the entry changes, except for the picture.
import { foreign, h, icon } from "./dom.js";
import { hasUnseen, isEmpty, overlay } from "./heat.js";
import { frameOf } from "./pictures.js";
import { bytes, languageNow, percent, t } from "./words.js";

const FEW = 5;

/** Return the element of an entry; `actions` has remove, again, explain(entry, class), expand. */
export function cardOf(entry, actions) {
  const frame = frameOf(entry);
  const shown = entry.heats?.get(entry.explained) ?? null;
  const parts = { waiting, sending: waiting, done: answered, error: failed }[entry.state](entry, actions);
  const unsure = isUnsure(entry);
  const card = h("li", { className: `entry ${entry.state}${unsure ? " unsure" : ""}`, data: { entry: entry.id } },
    h("div", { className: "mat" }, frame),
    h("div", { className: "words" },
      h("div", { className: "file" }, foreign(entry.name, { className: "path", title: entry.name }),
        h("button", { type: "button", className: "bare", title: t("remove", { name: "" }).trim(), "aria-label": t("remove", { name: entry.name }), data: { key: "remove" },
          onclick: () => actions.remove(entry) }, icon("close"))),
      ...parts, entry.shrunk ? shrunkWords(entry.shrunk) : null));
  if (shown) frame.style.setProperty("--aspect", aspectOf(entry, shown));
  overlay(frame, shown, { name: entry.name, className: entry.explained, aspect: shown ? aspectOf(entry, shown) : 1 });
  return card;
}

/** The note that a smaller copy was sent. */
function shrunkWords({ old, width, height, size }) {
  const holes = { width, height, size: bytes(size), old_width: old.width, old_height: old.height, old_size: bytes(old.size) };
  return h("p", { className: "small soft shrunk", textContent: t("shrunk", holes) });
}

export const isUnsure = (entry) => entry.state === "done" && entry.answer.decision === "abstain";

const aspectOf = (entry, rows) => (entry.preview ? entry.preview.width / entry.preview.height : rows[0].length / rows.length);

function waiting(entry) {
  return [
    h("h3", { className: "verdict soft", textContent: t(entry.state) }),
    h("div", { className: "ghosts", "aria-hidden": "true" }, ...Array.from({ length: 3 }, () => h("i"))),
  ];
}

function failed(entry, actions) {
  return [
    h("h3", { className: "verdict" }, icon("alarm"), t("failed")),
    ...errorWords(entry.error),
    entry.error.again && (entry.file || entry.url)
      ? h("p", { className: "deeds" }, h("button", { type: "button", textContent: t("again"), data: { key: "again" }, onclick: () => actions.again(entry) })) : null,
  ];
}

/** The error: in the page's language, then the server's message in English. */
function errorWords({ words, text }) {
  return [
    words ? h("p", { textContent: t(...words) }) : null,
    text ? h("p", { className: words ? "small soft said" : "said", lang: "en" }, foreign(text)) : null,
  ];
}

export const errorText = ({ words, text }) => [words ? t(...words) : "", text].filter(Boolean).join(" ");

function answered(entry, actions) {
  const { answer } = entry;
  const unsure = isUnsure(entry);
  return [
    ...(unsure ? unsureWords(answer) : [
      h("h3", { className: "verdict" }, foreign(answer.predicted_class), h("b", { textContent: percent(answer.confidence) })),
      others(answer),
    ]),
    unsure ? h("p", { className: "small soft", textContent: t("unsure_leaning") }) : null,
    bars(entry, actions),
    deeds(entry, actions),
    explanation(entry),
    entry.showModel ? h("p", { className: "small soft" }, foreign(t("answered_by", { model: entry.modelName, version: entry.version }))) : null,
  ];
}

function unsureWords({ reason, prediction_set: set }) {
  return [
    h("h3", { className: "verdict" }, icon("unsure"), t("unsure")),
    reason ? reasonWords(reason) : null,
    set ? h("p", { className: "small" }, t(set.length ? "unsure_set" : "unsure_empty")) : null,
    set?.length ? chips(set) : null,
  ];
}

const chips = (names) => h("ul", { className: "chips" }, ...names.slice(0, 12).map((name) => h("li", {}, foreign(name))),
  names.length > 12 ? h("li", { className: "soft", textContent: t("more_classes", { n: names.length - 12 }) }) : null);

function others({ predicted_class: label, prediction_set: set }) {
  const rest = (set ?? []).filter((name) => name !== label);
  return rest.length ? h("div", { className: "small others" }, h("span", { className: "soft", textContent: t("may_also") }), chips(rest)) : null;
}

// The server's reasons are English: those with these words are shown in the page's language, others as they are.
const REASONS = [
  ["reason_unlike", /^unlike the training images\D*?(-?[\d.]*\d)\D+?(-?[\d.]*\d)/, Number],
  ["reason_low", /confidence\D*([\d.]*\d)\D+([\d.]*\d)/, (text) => percent(Number(text))],
];

function reasonWords(reason) {
  for (const [word, pattern, read] of REASONS) {
    const found = pattern.exec(reason);
    if (found) return h("p", { textContent: t(word, { score: precise(read(found[1])), limit: precise(read(found[2])) }) });
  }
  return h("p", { lang: "en" }, foreign(reason));
}

const precise = (value) => (typeof value === "number" ? new Intl.NumberFormat(languageNow(), { maximumFractionDigits: 3 }).format(value) : value);

function bars(entry, actions) {
  const all = entry.bars;
  const list = entry.expanded ? all : all.slice(0, FEW);
  const row = ([name, share]) => {
    const inside = [foreign(name), h("span", { textContent: percent(share) }), h("i", {}, h("s"))];
    inside[2].firstChild.style.width = `${100 * share}%`;
    if (!entry.explainable) return h("li", {}, h("div", { className: "bar" }, ...inside));
    return h("li", {}, h("button", { type: "button", className: "bar", "aria-pressed": String(entry.explained === name), data: { key: `bar ${name}` },
      "aria-label": t("bar_label", { class: name, percent: percent(share) }), onclick: () => actions.explain(entry, name) }, ...inside));
  };
  return h("ol", { className: "bars", "aria-label": t("bars") }, ...list.map(row));
}

function deeds(entry, actions) {
  const best = entry.answer.predicted_class;
  const showing = entry.explained !== null && entry.explained !== undefined;
  const explain = entry.explainable
    ? h("button", { type: "button", className: `tinted${showing ? " on" : ""}`, data: { key: "explain" },
      "aria-label": t(showing ? "unexplain" : "explain_label", { class: best }), onclick: () => actions.explain(entry, showing ? entry.explained : best) },
    icon("heat"), t(showing ? "unexplain" : "explain")) : null;
  const expand = entry.bars.length > FEW
    ? h("button", { type: "button", className: "quiet", "aria-expanded": String(Boolean(entry.expanded)), data: { key: "expand" }, onclick: () => actions.expand(entry),
      textContent: entry.expanded ? t("fewer_bars") : t("all_bars", { classes: t("classes_n", { n: entry.bars.length }) }) }) : null;
  return explain || expand ? h("p", { className: "deeds" }, explain, expand) : null;
}

function explanation(entry) {
  if (entry.explained === null || entry.explained === undefined) return null;
  if (entry.heatError) return h("div", { className: "explanation problem", role: "status" }, ...errorWords(entry.heatError).filter(Boolean));
  const rows = entry.heats?.get(entry.explained);
  if (!rows) return h("p", { className: "explanation soft small", textContent: t("explaining", { class: entry.explained }) });
  return h("div", { className: "explanation" },
    h("p", { className: "small" }, foreign(t("heat_title", { class: entry.explained }))),
    isEmpty(rows) ? h("p", { className: "small soft", textContent: t("heat_empty") })
      : h("p", { className: "scale small soft" }, h("span", { textContent: t("heat_none") }), h("i"), h("span", { textContent: t("heat_most") })),
    hasUnseen(rows) ? h("p", { className: "small soft", textContent: t("heat_unseen") }) : null);
}
