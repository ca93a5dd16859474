// Images larger than the server accepts (photos of phones often are) are made smaller before they are sent.

const DRAWABLE = 2 ** 24; // pixels that every browser can draw
const QUALITY = 0.92;
const ATTEMPTS = 8;

/** A smaller copy: {file, width, height, size, old}; null if the file fits or cannot be drawn. */
export async function fitted(file, limits) {
  if (limits.formats.length && !limits.formats.includes("JPEG")) return null;
  const old = { ...(await sidesOf(file)), size: file.size };
  const pixels = old.width * old.height;
  if (!pixels || (file.size <= limits.max_bytes && pixels <= limits.max_pixels)) return null;
  const bitmap = await createImageBitmap(file).catch(() => null); // rotated by EXIF
  if (!bitmap) return null;
  try {
    let scale = Math.min(1, Math.sqrt(Math.min(limits.max_pixels, DRAWABLE) / pixels));
    for (let attempt = 0; attempt < ATTEMPTS; attempt += 1) {
      const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.floor(side * scale)));
      const blob = await drawn(bitmap, width, height);
      if (!blob) return null;
      if (blob.size <= limits.max_bytes && width * height <= limits.max_pixels) return { file: blob, width, height, size: blob.size, old };
      scale *= 0.95 * Math.min(1, Math.sqrt(limits.max_bytes / blob.size));
    }
    return null;
  } finally {
    bitmap.close();
  }
}

/** Width and height by the file's header, without decoding; zeros if the browser cannot read it. */
async function sidesOf(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await new Promise((resolve, reject) => Object.assign(image, { onload: resolve, onerror: reject }));
    return { width: image.naturalWidth, height: image.naturalHeight };
  } catch {
    return { width: 0, height: 0 };
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

/** A JPEG of this size; transparent areas become white, as on the server. */
function drawn(bitmap, width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
}
