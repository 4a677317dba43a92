// The page: open the model, take photographs, show answers. Names of files and classes are inserted as text only.

import { Refusal, firstLine, openModel } from "./model.js";
import { UnusableFile, readImage, readsTruePixels } from "./pixels.js";

const MAX_CLASSES = 5; // that are shown of an answer
const find = (id) => document.getElementById(id);
const input = find("files");

const setStatus = (...content) => find("status").replaceChildren(...content);

/** An element with attributes; children are elements or text. */
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A name, which may be any text: <bdi> keeps one that reads right to left from reordering the text around it. */
function nameElement(name) {
  return element("bdi", {}, name.replace(/[\p{Cc}\p{Cs}\u202a-\u202e\u2066-\u2069]/gu, "\ufffd"));
}

function percent(probability) {
  if (probability < 1 && probability >= 0.9995) return "> 99.9%";
  return probability > 0 && probability < 0.0005 ? "< 0.1%" : `${(100 * probability).toFixed(1)}%`;
}

const counted = (count, singular, plural) => `${count.toLocaleString("en")} ${count === 1 ? singular : plural}`;

async function start() {
  find("notice").remove();
  try {
    const model = await openModel({ ...document.body.dataset }, (name, read, total) => {
      const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
      setStatus(`Loading ${name}: ${megabytes(read)} ${total ? `of ${megabytes(total)} ` : ""}MB`);
    });
    if (!(await readsTruePixels())) {
      throw new Refusal(
        "This browser changes the pixels that a page reads, as a protection against tracking, so answers would be " +
          "wrong. Allow this page to read canvases, or use another browser.",
      );
    }
    describe(model.metadata);
    takePhotographs(model);
  } catch (error) {
    refuse(error);
  }
}

/** Answer nothing, now and later. */
function refuse(error) {
  setStatus();
  input.disabled = true;
  const reason = error instanceof Refusal ? error.message : `Something went wrong (${firstLine(error)}).`;
  find("refusal").textContent = `This page classifies nothing. ${reason}`;
  find("refusal").hidden = false;
  if (!(error instanceof Refusal)) console.error(error);
}

/** Show what the file says about itself. */
function describe({ classes, evaluation, decision }) {
  find("class-count").textContent = classes.length.toLocaleString("en");
  find("class-names").append(...classes.map((label) => element("li", {}, nameElement(label))));
  const { precision_at_1: precision, count } = evaluation;
  find("precision").textContent = `${(100 * precision).toFixed(1)}%`;
  find("test-count").textContent = ` of ${counted(count, "image", "images")}`;
  if (decision) {
    const threshold = Number((100 * decision.threshold).toPrecision(4));
    find("threshold").textContent = `An answer below ${threshold}% counts as unsure.`;
  }
  find("facts").hidden = false;
}

function takePhotographs(model) {
  const queue = new Queue(model);
  find("clear").addEventListener("click", () => queue.clear());
  listen((files) => queue.add(files));
  input.disabled = false;
  setStatus("Ready. The model passed its self-test in this browser.");
}

/** The files that wait for an answer. One is classified at a time, as a large photograph takes much memory. */
class Queue {
  #model;
  #waiting = [];
  #results = []; // of the files since the queue was last empty
  #isBusy = false;

  constructor(model) {
    this.#model = model;
  }

  async add(files) {
    if (input.disabled || !files.length) return;
    this.#waiting.push(...files);
    if (this.#isBusy) return;
    this.#isBusy = true;
    this.#results = [];
    try {
      while (this.#waiting.length) await this.#classifyNext();
      if (this.#results.length) setStatus(...summary(this.#results));
    } catch (error) {
      this.#waiting.length = 0;
      refuse(error);
    } finally {
      this.#isBusy = false;
    }
  }

  clear() {
    this.#waiting.length = 0;
    this.#results = []; // so that the answer for a file that is being classified is not shown
    find("results").replaceChildren();
    find("result-section").hidden = true;
    setStatus("Cleared.");
    input.focus();
  }

  async #classifyNext() {
    const results = this.#results;
    const file = this.#waiting.shift();
    const more = this.#waiting.length ? `, ${this.#waiting.length} more` : "";
    setStatus("Classifying ", nameElement(file.name), `${more} …`);
    await pause(20); // for the browser to show this: onnxruntime computes on its thread
    const result = await classify(file, this.#model);
    if (results !== this.#results) return;
    results.push(result);
    find("results").prepend(resultItem(result));
    find("result-section").hidden = false;
  }
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Call `add` with files that are chosen, dropped anywhere on the page, or pasted. */
function listen(add) {
  const zone = find("drop-zone");
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = ""; // so that the same file can be chosen again
    add(files);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("target");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) zone.classList.remove("target");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault(); // or the browser would leave the page and open the file
    zone.classList.remove("target");
    add([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => {
    add([...event.clipboardData.files]);
  });
}

/** What is said at the end, in text that a screen reader reads out. */
function summary(results) {
  const [{ file, problem, ranked, isSure }] = results;
  if (results.length === 1 && !problem) {
    const [{ label, probability }] = ranked;
    return [nameElement(file.name), ": ", nameElement(isSure ? label : "unsure"), `, ${percent(probability)}`];
  }
  const unusable = results.filter((result) => result.problem).length;
  const classified = results.length - unusable;
  const parts = [counted(classified, "photograph was classified", "photographs were classified")];
  if (unusable) parts.push(`${counted(unusable, "file", "files")} could not be used`);
  return [`${parts.join("; ")}.`];
}

/**
 * The result for a `file`: its `thumbnail`, if it could be decoded, and either the most probable classes, `ranked`,
 * with `isSure` and, where the model tells it, `unfamiliar`; or a `problem`, the sentence that says why there is no
 * answer. Throws Refusal if the model does not work any more.
 */
async function classify(file, model) {
  const result = { file };
  try {
    const image = await readImage(file, model.channels);
    result.thumbnail = image.thumbnail;
    const { probabilities, unfamiliar } = await runModel(model, image);
    Object.assign(result, rank(probabilities, model.metadata), { unfamiliar });
  } catch (error) {
    if (!(error instanceof UnusableFile)) throw error;
    result.problem = error.message;
  }
  return result;
}

/** As `model.classify`; throws UnusableFile if the model fails for this image only. */
async function runModel(model, image) {
  let answer;
  try {
    answer = await model.classify(image);
  } catch (error) {
    await model.selfTest(); // after some errors, such as too little memory, the model does not work any more
    const size = `${image.width} x ${image.height}`;
    throw new UnusableFile(`The model could not process the image of ${size} pixels (${firstLine(error)}).`);
  }
  const { probabilities, unfamiliar = 0 } = answer;
  if (![...probabilities, unfamiliar].every(Number.isFinite)) {
    throw new UnusableFile("The model's scores for it are not finite.");
  }
  return answer;
}

/** The most probable classes, each with label and probability, and whether the first one reaches the threshold. */
function rank(probabilities, { classes, decision }) {
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a] || a - b);
  const ranked = order.slice(0, MAX_CLASSES).map((i) => ({ label: classes[i], probability: probabilities[i] }));
  return { ranked, isSure: decision === undefined || ranked[0].probability >= decision.threshold };
}

/** The list item for a file: its answer, or why there is none. */
function resultItem({ file, thumbnail, problem, ranked, isSure, unfamiliar }) {
  const picture = element("div", { class: "thumbnail" });
  if (thumbnail) {
    thumbnail.setAttribute("role", "img");
    thumbnail.setAttribute("aria-label", `Thumbnail of ${file.name}`);
    if (Math.max(thumbnail.width, thumbnail.height) <= 64) thumbnail.classList.add("small");
    picture.append(thumbnail);
  }
  const heading = element("h3", {}, nameElement(file.name));
  const content = problem ? [element("p", { class: "wrong" }, problem)] : answer(ranked, isSure, unfamiliar);
  return element("li", {}, picture, element("div", { class: "answer" }, heading, ...content));
}

/** A bar for the eye alone: a screen reader has the percentage. */
function bar(probability) {
  const filled = element("div", {});
  filled.style.width = `${100 * probability}%`;
  return element("div", { class: "bar", "aria-hidden": "true" }, filled);
}

/** The decision, the most probable classes, and a warning where the image is unlike the training images. */
function answer(ranked, isSure, unfamiliar) {
  const rows = ranked.map(({ label, probability }) =>
    element(
      "li",
      {},
      element("span", { class: "label" }, nameElement(label)),
      element("data", { value: probability }, percent(probability)),
      bar(probability),
    ),
  );
  return [
    isSure
      ? element("p", { class: "decision" }, nameElement(ranked[0].label))
      : element("p", { class: "decision unsure" }, "unsure"),
    ...(unfamiliar > 1 ? [element("p", { class: "unfamiliar" }, "Unlike the images that the model learned from.")] : []),
    element("ol", { class: "classes", "aria-label": "Most probable classes" }, ...rows),
  ];
}

await start();
