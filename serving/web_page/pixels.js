// From an image file to the pixels that a model takes: upright, on white, grey or RGB, as convline/images.py makes them.

const TILE = 2048; // pixels; one canvas of a whole photograph would be larger than phones allow
const MAX_PIXELS = 2 ** 26; // a model needs about 20 bytes of memory for each
const THUMBNAIL = 256; // pixels, its longer side

/** A reason why a file gets no answer; the message is for the visitor. */
export class UnusableFile extends Error {}

/**
 * Decode an image file.
 *
 * Returns its pixels, a Uint8Array of height x width x channels, height, width, and a canvas with a thumbnail. Throws
 * UnusableFile.
 */
export async function readImage(file, channels) {
  if (!file.size) throw new UnusableFile("The file is empty.");
  const bitmap = await decode(file);
  try {
    const { width, height } = bitmap;
    if (width * height > MAX_PIXELS) {
      throw new UnusableFile(`The image is too large: ${width} x ${height} pixels; the limit is 67 million.`);
    }
    return { pixels: readPixels(bitmap, channels), height, width, thumbnail: thumbnailOf(bitmap) };
  } catch (error) {
    if (error instanceof UnusableFile) throw error;
    // a RangeError or a DOMException, where memory does not suffice
    throw new UnusableFile(`This browser cannot read the pixels of the image (${error.message}).`);
  } finally {
    bitmap.close();
  }
}

async function decode(file) {
  try {
    return await createImageBitmap(file, {
      imageOrientation: "from-image",
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
    });
  } catch {
    throw new UnusableFile(
      "This browser cannot decode the file: it is not an image, is damaged, or is of a format that the browser does " +
        "not know. Try it as JPEG or PNG.",
    );
  }
}

function readPixels(bitmap, channels) {
  const { width, height } = bitmap;
  const pixels = new Uint8Array(width * height * channels);
  const context = newCanvas(Math.min(TILE, width), Math.min(TILE, height)).getContext("2d", {
    willReadFrequently: true,
    colorSpace: "srgb",
  });
  let isVisible = false;
  for (let top = 0; top < height; top += TILE) {
    for (let left = 0; left < width; left += TILE) {
      const [tileWidth, tileHeight] = [Math.min(TILE, width - left), Math.min(TILE, height - top)];
      context.clearRect(0, 0, tileWidth, tileHeight);
      context.drawImage(bitmap, left, top, tileWidth, tileHeight, 0, 0, tileWidth, tileHeight);
      const { data } = context.getImageData(0, 0, tileWidth, tileHeight);
      for (let y = 0; y < tileHeight; y++) {
        const row = data.subarray(y * tileWidth * 4, (y + 1) * tileWidth * 4);
        isVisible = convertRow(row, pixels, ((top + y) * width + left) * channels, channels) || isVisible;
      }
    }
  }
  // a canvas that a browser could not draw is transparent, too, and gets no answer
  if (!isVisible) {
    throw new UnusableFile("This browser reads no pixels from the image, or all of them are transparent.");
  }
  return pixels;
}

/** Write a row of RGBA to `pixels` from `at`: on white, as grey or RGB. Returns whether any pixel is visible. */
function convertRow(rgba, pixels, at, channels) {
  let isVisible = false;
  for (let i = 0; i < rgba.length; i += 4) {
    let [r, g, b, alpha] = [rgba[i], rgba[i + 1], rgba[i + 2], rgba[i + 3]];
    if (alpha) isVisible = true;
    if (alpha !== 255) [r, g, b] = [onWhite(r, alpha), onWhite(g, alpha), onWhite(b, alpha)];
    if (channels === 1) {
      pixels[at++] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; // Pillow's convert("L")
    } else {
      pixels[at++] = r;
      pixels[at++] = g;
      pixels[at++] = b;
    }
  }
  return isVisible;
}

const onWhite = (value, alpha) => Math.round((value * alpha + 255 * (255 - alpha)) / 255);

function thumbnailOf(bitmap) {
  const scale = Math.min(1, THUMBNAIL / Math.max(bitmap.width, bitmap.height));
  const side = (length) => Math.max(1, Math.round(length * scale));
  const canvas = newCanvas(side(bitmap.width), side(bitmap.height));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // as the model gets transparent pixels
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function newCanvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

/** Whether a known image has the pixels that it should have: some browsers change them, against tracking. */
export async function readsTruePixels() {
  const side = 16;
  const known = new ImageData(side, side);
  known.data.forEach((_, i) => (known.data[i] = i % 4 === 3 ? 255 : (i * i * 31 + i * 7) % 256));
  const canvas = newCanvas(side, side);
  canvas.getContext("2d").putImageData(known, 0, 0);
  const file = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!file) return false;
  const { pixels } = await readImage(file, 3);
  return pixels.every((value, i) => value === known.data[Math.floor(i / 3) * 4 + (i % 3)]);
}
