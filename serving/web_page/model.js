// Load an exported ONNX file and onnxruntime-web. Both are refused unless they are the files that this page was made
// with, and compute what the model computed when it was exported.

import { readMetadata } from "./metadata.js";
import { Sha256 } from "./sha256.js";

const LOG_FATAL_ONLY = 4; // onnxruntime's log severity: errors are thrown anyway

/** A reason not to answer; the message is for the visitor. */
export class Refusal extends Error {}

/**
 * Open the model of this page.
 *
 * `files` names model, runtime (its JavaScript) and wasm, and has the SHA-256 of model and wasm. `onProgress` gets the
 * name of a file, how many bytes of it have come, and how many there are (0 if unknown). Throws Refusal.
 */
export async function openModel(files, onProgress) {
  const bytes = await fetchChecked(files.model, files.modelSha256, onProgress);
  const metadata = readMetadata(bytes, "convline.");
  const wasm = await fetchChecked(files.wasm, files.wasmSha256, onProgress);
  const ort = await importRuntime(files.runtime);
  ort.env.wasm.wasmBinary = wasm;
  ort.env.wasm.numThreads = 1; // threads need headers that plain file servers do not send
  ort.env.logLevel = "fatal";
  let session;
  try {
    session = await ort.InferenceSession.create(bytes, {
      executionProviders: ["wasm"],
      graphOptimizationLevel: "all",
      logSeverityLevel: LOG_FATAL_ONLY,
    });
  } catch (error) {
    throw new Refusal(`This browser cannot run the model (${firstLine(error)}). Try a newer browser.`);
  }
  const model = new Model(ort, session, metadata);
  await model.selfTest();
  return model;
}

/** An opened and tested model; `metadata` is what the file states under `convline.`. */
export class Model {
  #ort;
  #session;

  constructor(ort, session, metadata) {
    this.#ort = ort;
    this.#session = session;
    this.metadata = metadata;
  }

  get channels() {
    return this.metadata.image.channels;
  }

  /**
   * For one image, a Uint8Array of height x width x channels: the probability of each class, a Float32Array, and how
   * unfamiliar the image is, a number, where the model tells it.
   */
  async classify({ pixels, height, width }) {
    const { probability, unfamiliar } = await this.#run(pixels, [1, height, width, this.channels]);
    return { probabilities: probability.data, unfamiliar: unfamiliar?.data[0] };
  }

  /** Throws Refusal unless the model gives what its file states for images that a formula makes. */
  async selfTest() {
    const { images, logits, tolerance, unfamiliar } = this.metadata.probe;
    const { height, width, channels } = this.metadata.image;
    const shape = [images, height, width, channels];
    let outputs;
    try {
      outputs = await this.#run(probeImages(...shape), shape);
    } catch (error) {
      throw new Refusal(`The model does not run in this browser (${firstLine(error)}).`);
    }
    checkOutput(outputs.logit.data, logits.flat(), tolerance);
    if (unfamiliar) {
      const share = tolerance / largestMagnitude(logits.flat());
      checkOutput(outputs.unfamiliar.data, unfamiliar, share * largestMagnitude(unfamiliar));
    }
  }

  #run(pixels, shape) {
    return this.#session.run({ image: new this.#ort.Tensor("uint8", pixels, shape) });
  }
}

/** Throws Refusal for values that are further than `tolerance` from the expected ones, or not as many. */
function checkOutput(values, expected, tolerance) {
  let largest = values.length === expected.length ? 0 : Infinity;
  values.forEach((value, i) => (largest = Math.max(largest, Math.abs(value - expected[i])))); // NaN stays
  if (!(largest <= tolerance)) {
    throw new Refusal(
      `The model failed its self-test: its scores differ by ${largest.toPrecision(3)} from those at export ` +
        `(at most ${tolerance.toPrecision(3)} is accepted). The file is damaged, or this browser computes wrongly.`,
    );
  }
}

/** At least 1. */
function largestMagnitude(values) {
  return values.reduce((largest, value) => Math.max(largest, Math.abs(value)), 1);
}

/** The formula of `probe_images` in serving/model.py: uint8 [images, height, width, channels]. */
function probeImages(images, height, width, channels) {
  const pixels = new Uint8Array(images * height * width * channels);
  let at = 0;
  for (let i = 0; i < images; i++) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        for (let c = 0; c < channels; c++) {
          const ramp = (i + 1) * 17 * y + (2 * i + 3) * 13 * x + 71 * c + 31 * i * i;
          const noise = (x * y * (i + 5) + 7 * x * x + 3 * y * (c + 1)) % 97;
          pixels[at++] = (ramp + noise) % 256;
        }
      }
    }
  }
  return pixels;
}

/** The bytes of a file. Throws Refusal if it cannot be loaded, or has another SHA-256. */
async function fetchChecked(name, sha256, onProgress) {
  let parts, length;
  const hash = new Sha256();
  try {
    const response = await fetch(name, { cache: "no-cache" }); // asks the server whether its copy is still the newest
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    const isCompressed = response.headers.has("content-encoding"); // then its length is not that of the bytes read
    const total = isCompressed ? 0 : Number(response.headers.get("content-length"));
    [parts, length] = await readParts(response.body.getReader(), hash, (read) => onProgress(name, read, total));
  } catch (error) {
    throw new Refusal(`${name} could not be loaded (${firstLine(error)}). Reload the page to try again.`);
  }
  if (hash.hexDigest() !== sha256) {
    throw new Refusal(
      `${name} is not the file that this page was made with: it is damaged or was replaced. Reload the page; if ` +
        "that does not help, the page has to be made and uploaded again.",
    );
  }
  const bytes = new Uint8Array(length);
  let offset = 0;
  for (const part of parts) {
    bytes.set(part, offset);
    offset += part.length;
  }
  return bytes;
}

async function readParts(reader, hash, onRead) {
  const parts = [];
  let length = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return [parts, length];
    parts.push(value);
    hash.update(value);
    length += value.length;
    onRead(length);
  }
}

async function importRuntime(name) {
  try {
    return await import(`./${name}`);
  } catch (error) {
    throw new Refusal(`${name} could not be loaded (${firstLine(error)}). Reload the page to try again.`);
  }
}

/** The message of anything that was thrown; onnxruntime also throws numbers. */
export function firstLine(error) {
  return String(error?.message ?? error).split("\n")[0].slice(0, 200);
}
