// A heat map over an image. Values are interpolated first and coloured then, so that no wrong colours appear.
import { h } from "./dom.js";
import { t } from "./words.js";

const LONGEST_SIDE = 320;
// Inferno: its lightness rises evenly, so it works in grey and for colour-blind readers. The reports use it too.
const STOPS = [[0, 0, 4], [27, 12, 65], [74, 12, 107], [120, 28, 109], [165, 44, 96], [207, 68, 70], [237, 105, 37], [251, 155, 6], [247, 209, 61], [252, 255, 164]];

function colour(value) {
  const place = clamp(value, 1) * (STOPS.length - 1);
  const low = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[low].map((part, channel) => part + (place - low) * (STOPS[low + 1][channel] - part));
}

const clamp = (value, most) => Math.min(Math.max(value, 0), most);

/** Cubic B-spline: weights of the four cells around a point, by its distance from the second cell. */
const weights = (part) => [(1 - part) ** 3, 3 * part ** 3 - 6 * part ** 2 + 4, -3 * part ** 3 + 3 * part ** 2 + 3 * part + 1, part ** 3];

/** The value at a point, interpolated from known cells; null inside an unknown cell. */
function between(rows, up, across) {
  const [lowest, last] = [rows.length - 1, rows[0].length - 1];
  if (rows[clamp(Math.round(up), lowest)][clamp(Math.round(across), last)] === null) return null;
  const [top, left] = [Math.floor(up), Math.floor(across)];
  const [down, right] = [weights(up - top), weights(across - left)];
  let [sum, all] = [0, 0];
  for (let y = 0; y < 4; y += 1) {
    const row = rows[clamp(top - 1 + y, lowest)];
    for (let x = 0; x < 4; x += 1) {
      const value = row[clamp(left - 1 + x, last)];
      if (value === null) continue;
      sum += value * down[y] * right[x];
      all += down[y] * right[x];
    }
  }
  return sum / all;
}

/** The rows as smooth values of this size, scaled so that the maximum stays the same. */
function smooth(rows, width, height) {
  const values = [];
  for (let y = 0; y < height; y += 1) {
    const up = ((y + 0.5) / height) * rows.length - 0.5;
    for (let x = 0; x < width; x += 1) values.push(between(rows, up, ((x + 0.5) / width) * rows[0].length - 0.5));
  }
  const highest = (some) => some.reduce((most, value) => Math.max(most, value ?? 0), 0);
  const scale = highest(rows.flat()) / (highest(values) || 1);
  return values.map((value) => (value === null ? null : value * scale));
}

/** Draw rows of 0..1 or null on a canvas over an image of this shape. */
export function paint(canvas, rows, aspect) {
  canvas.width = Math.round(aspect >= 1 ? LONGEST_SIDE : LONGEST_SIDE * aspect) || 1;
  canvas.height = Math.round(aspect >= 1 ? LONGEST_SIDE / aspect : LONGEST_SIDE) || 1;
  const context = canvas.getContext("2d");
  const picture = context.createImageData(canvas.width, canvas.height);
  smooth(rows, canvas.width, canvas.height).forEach((value, place) => {
    picture.data.set(value === null ? [255, 255, 255, 135] : [...colour(value), 30 + 190 * value ** 0.7], 4 * place);
  });
  context.putImageData(picture, 0, 0);
}

/** The position of the maximum, as one of nine areas. */
export function placeOfMost(rows) {
  let most = [-1, 0, 0];
  rows.forEach((row, y) => row.forEach((value, x) => { if (value !== null && value > most[0]) most = [value, y, x]; }));
  const third = (place, all) => Math.min(2, Math.floor((3 * (place + 0.5)) / all));
  return 3 * third(most[1], rows.length) + third(most[2], rows[0].length);
}

export const isEmpty = (rows) => rows.every((row) => row.every((value) => !value));
export const hasUnseen = (rows) => rows.some((row) => row.some((value) => value === null));

/** Show the map over the frame of an image, or remove it (rows null). */
export function overlay(frame, rows, { name, className, aspect }) {
  frame.querySelector("canvas")?.remove();
  frame.classList.toggle("heated", Boolean(rows));
  if (!rows) return;
  const words = isEmpty(rows) ? t("heat_empty") : t("heat_alt", { name, class: className, place: t(`place_${placeOfMost(rows)}`) });
  const canvas = h("canvas", { role: "img", "aria-label": words });
  paint(canvas, rows, aspect);
  frame.append(canvas);
}
