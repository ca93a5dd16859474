// The answers as CSV, safe to open in a spreadsheet.

const COLUMNS = ["path", "predicted_class", "confidence", "decision", "reason", "model", "model_version", "sent_as"];

/** A cell: formulas become text, special characters are quoted. */
function cell(value) {
  if (typeof value === "number") return String(value);
  const text = String(value ?? "").replace(/^(?=\s*[=+\-@\t\r])/, "'");
  return /[",;\r\n]/.test(text) || text !== text.trim() ? `"${text.replaceAll('"', '""')}"` : text;
}

/** All entries that have an answer or an error, as CSV with a byte order mark. */
export function table(entries) {
  const classes = [...new Set(entries.flatMap((entry) => (entry.bars ?? []).map(([name]) => name)))].sort();
  const rows = entries.map((entry) => {
    const { answer, error, errorText = "" } = entry;
    const shares = new Map(entry.bars ?? []);
    const [label, confidence, decision, reason] = answer
      ? [answer.predicted_class, answer.confidence, answer.decision, answer.reason]
      : ["", "", error ? "error" : "", errorText];
    return [entry.name, label, confidence, decision, reason, entry.modelName, entry.version, sentAs(entry.shrunk), ...classes.map((name) => shares.get(name) ?? "")];
  });
  return `\ufeff${[[...COLUMNS, ...classes], ...rows].map((row) => row.map(cell).join(",")).join("\r\n")}\r\n`;
}

/** The size of the copy that was sent, if it was made smaller. */
const sentAs = (shrunk) => (shrunk ? `${shrunk.width} x ${shrunk.height}` : "");

export function save(text, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
