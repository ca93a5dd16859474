// Take a photo: with the camera app on phones, else in a dialog.
import { timeName } from "./intake.js";
import { at } from "./dom.js";
import { t } from "./words.js";

let stream = null;
let cameras = [];
let chosen = 0;

export async function openCamera(receive) {
  const button = at("photo");
  if (matchMedia("(pointer: coarse)").matches) {
    button.hidden = false;
    button.addEventListener("click", () => at("capture").click());
    return;
  }
  button.addEventListener("click", () => {
    at("camera").showModal();
    start();
  });
  at("shoot").addEventListener("click", () => shoot(receive));
  at("other-camera").addEventListener("click", () => {
    chosen += 1;
    start();
  });
  at("camera").addEventListener("close", stop);
  const look = async () => {
    button.hidden = !(await videoInputs()).length;
  };
  navigator.mediaDevices?.addEventListener("devicechange", look);
  await look();
}

/** Undefined where the browser has none, and on insecure pages. */
const videoInputs = async () => ((await navigator.mediaDevices?.enumerateDevices().catch(() => [])) ?? []).filter(({ kind }) => kind === "videoinput");

async function start() {
  stop();
  words("camera_start");
  const id = cameras.length ? cameras[chosen % cameras.length].deviceId : "";
  try {
    const found = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1920 }, height: { ideal: 1080 }, ...(id ? { deviceId: { exact: id } } : {}) } });
    if (!at("camera").open) return found.getTracks().forEach((track) => track.stop());
    stream = found;
    at("video").srcObject = stream;
    await at("video").play();
    cameras = await videoInputs();
    at("other-camera").hidden = cameras.length < 2;
    at("shoot").disabled = false;
    at("shoot").focus();
    words(null);
  } catch (error) {
    if (at("camera").open) words({ NotAllowedError: "camera_refused", NotFoundError: "camera_none" }[error.name] ?? "camera_busy");
  }
}

function stop() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = at("video").srcObject = null;
  at("shoot").disabled = true;
}

function words(key) {
  at("camera-words").textContent = key ? t(key) : "";
  at("video").hidden = Boolean(key);
}

async function shoot(receive) {
  const { videoWidth: width, videoHeight: height } = at("video");
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  canvas.getContext("2d").drawImage(at("video"), 0, 0);
  const photo = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
  at("camera").close();
  if (photo) receive([{ name: t("photo_name", { time: timeName() }), file: photo }]);
}
