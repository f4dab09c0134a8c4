// The student in the browser: text -> token ids -> vector -> labels and nearest sentences.
import { AutoModel, AutoTokenizer, Tensor, env } from "./vendor/transformers.js";

const here = new URL(".", import.meta.url);
const at = (id) => document.getElementById(id);

env.allowLocalModels = true;
env.allowRemoteModels = false;
env.localModelPath = here.pathname;
env.useBrowserCache = env.useWasmCache = false; // `keep` keeps the files
env.fetch = async (url) => {
  const body = await download(url);
  return new Response(body, { headers: { "content-length": body.size } });
};
env.backends.onnx.wasm.wasmPaths = {
  mjs: new URL("vendor/ort-wasm.js", here).href,
  wasm: new URL("vendor/ort-wasm.wasm", here).href, // not asked for, since `load` gives its content
};

/** An element with text and, perhaps, a class. Text never becomes HTML. */
function make(tag, text = "", name = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = name;
  return element;
}

/** The float32 numbers of a base64 text. */
function floats(text) {
  return new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

function dot(a, b, row = 0) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[row * a.length + i];
  return sum;
}

let page, tokenizer, model, tokens;
let received = 0;
const downloads = new Map();

/** The content of a file as a Blob, loaded once, with progress: transformers.js asks for some files twice. */
function download(url) {
  const read = async () => {
    const response = await fetch(url);
    if (!response.ok) throw new Error(`${url} is missing (${response.status})`);
    const reader = response.body.getReader();
    const parts = [];
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      parts.push(part.value);
      received += part.value.length;
      at("progress").value = received / page.bytes;
    }
    return new Blob(parts);
  };
  if (!downloads.has(String(url))) downloads.set(String(url), read());
  return downloads.get(String(url));
}

/** Token ids of a text. A long one is truncated before the special tokens at its end; transformers.js drops these. */
function tokenize(text) {
  const ids = tokenizer.encode(page.prefix + text);
  if (ids.length <= page.max_length) return ids;
  const bare = tokenizer.encode(page.prefix + text, { add_special_tokens: false });
  const before = ids.findIndex((_, i) => bare.every((id, j) => id === ids[i + j]));
  const after = ids.slice(before + bare.length);
  return [...ids.slice(0, page.max_length - after.length), ...after];
}

/** Token ids and the sentence vector of a text, as kdlib gives them, and the milliseconds it took. */
async function encode(text) {
  const start = performance.now();
  const ids = tokenize(text);
  const whole = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, ids.length]);
  const output = await model({ input_ids: whole(ids), attention_mask: whole(ids.map(() => 1)) });
  return { ids, vector: output.sentence_embedding.data, ms: performance.now() - start };
}

/** The probability of each label of a task, by the run's linear probe. */
function classify(task, vector) {
  const scores = task.labels.map((_, i) => dot(vector, task.weights, i) + task.bias[i]);
  if (task.kind === "multilabel") return scores.map((score) => 1 / (1 + Math.exp(-score)));
  const top = Math.max(...scores);
  const parts = scores.map((score) => Math.exp(score - top));
  const total = parts.reduce((a, b) => a + b);
  return parts.map((part) => part / total);
}

/** The page's sentences by cosine of centred vectors, best first, without the query itself. */
function nearest(vector, text, count = 6) {
  const centred = vector.map((value, i) => value - page.mean[i]);
  const length = Math.sqrt(dot(centred, centred)) || 1e-9;
  return page.sentences
    .map((sentence, i) => ({ sentence, cosine: dot(centred, page.units, i) / length }))
    .filter((found) => found.sentence !== text)
    .sort((a, b) => b.cosine - a.cosine)
    .slice(0, count);
}

const times = [];

async function answer() {
  const text = at("sentence").value.trim();
  for (const id of ["speed", "labels", "nearest"]) at(id).hidden = !text;
  if (!text) return;
  const { ids, vector, ms } = await encode(text);
  if (text !== at("sentence").value.trim()) return; // the text changed meanwhile
  times.push(ms);
  const middle = times.slice(-15).sort((a, b) => a - b)[Math.floor(Math.min(times.length, 15) / 2)];
  at("ms").textContent = `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
  at("count").textContent = ids.length;
  at("rate").textContent = Math.round(1000 / middle);
  at("tokens").replaceChildren(
    ...ids.map((id) => Object.assign(make("span", tokens.get(id)), { title: `token ${id}` })),
  );
  at("labels").replaceChildren(make("h2", "Labels"), ...page.probes.flatMap((task) => bars(task, vector)));
  at("labels").hidden = !page.probes.length;
  at("nearest").querySelector("ol").replaceChildren(
    ...nearest(vector, text).map(({ sentence, cosine }) => {
      const row = make("li");
      row.append(make("b", cosine.toFixed(2)), Object.assign(make("span", sentence), { dir: "auto" }));
      return row;
    }),
  );
}

function bars(task, vector) {
  const shares = classify(task, vector);
  const order = shares.map((_, i) => i).sort((a, b) => shares[b] - shares[a]);
  const rows = order.map((i, place) => {
    const yes = task.kind === "multilabel" ? shares[i] >= 0.5 : place === 0;
    const row = make("div", "", yes ? "bar best" : "bar");
    const bar = make("i");
    bar.style.width = `${100 * shares[i]}%`;
    row.append(make("span", task.labels[i].replaceAll("_", " ")), bar, make("b", `${(100 * shares[i]).toFixed(0)}%`));
    return row;
  });
  const name = task.name.replaceAll("_", " ");
  return [make("h3", task.kind === "multilabel" ? `${name} (each label alone)` : name), ...rows];
}

function describe() {
  const language = new Intl.DisplayNames("en", { type: "language" }).of(page.code);
  document.title = `${language}: a student in the browser`;
  at("run").textContent = `Student of ${page.teacher} · profile ${page.profile}`;
  at("title").textContent = `${language}: a sentence encoder, on this device`;
  at("facts").textContent =
    `${page.layers} layers, ${(page.parameters / 1e6).toFixed(1)} million parameters, ` +
    `${page.megabytes.toFixed(0)} MB with 8-bit weights.` +
    (page.profile === "smoke" ? " A smoke run is a small trial: its labels and neighbours mean little." : "");
  at("searched").textContent = `Of ${page.sentences.length} sentences that the student has not read, with the cosine.`;
  at("sentence").lang = page.code;
  at("examples").replaceChildren(
    ...page.examples.map((text) => {
      const chip = Object.assign(make("button", text), { type: "button", dir: "auto" });
      chip.onclick = () => {
        at("sentence").value = text;
        answer();
      };
      return chip;
    }),
  );
  if (page.scores.length) {
    at("scores").hidden = false;
    at("scores").querySelector("table").append(
      ...[["task", "metric", "teacher", "student", "test items"], ...page.scores].map((cells, i) => {
        const row = make("tr");
        row.append(...cells.map((cell) => make(i ? "td" : "th", cell)));
        return row;
      }),
    );
  }
}

async function load() {
  page = await (await fetch(new URL("data.json", here))).json();
  for (const key of ["units", "mean"]) page[key] = floats(page[key]);
  for (const task of page.probes) task.weights = floats(task.weights);
  describe();
  at("status").textContent = `Loading ${(page.bytes / 1e6).toFixed(0)} MB, once…`;
  env.backends.onnx.wasm.wasmBinary = await (await download(new URL("vendor/ort-wasm.wasm", here))).arrayBuffer();
  tokenizer = await AutoTokenizer.from_pretrained("model");
  tokens = new Map([...tokenizer.get_vocab()].map(([token, id]) => [id, token]));
  model = await AutoModel.from_pretrained("model", { dtype: "int8", device: "wasm" });
  downloads.clear();
  await encode(page.examples[0] ?? "a"); // the first sentence is slower
  at("progress").hidden = true;
  at("status").textContent = `Ready after ${(performance.now() / 1000).toFixed(1)} s.`;
  at("sentence").disabled = false;
  at("sentence").value ||= page.examples[0] ?? "";
  let wait;
  at("sentence").oninput = () => {
    clearTimeout(wait);
    wait = setTimeout(answer, 150);
  };
  await answer();
  await keep();
}

/** Keep every file that this page has loaded, so that it opens again without a network. */
async function keep() {
  if (!navigator.serviceWorker) return; // as over plain http from another machine
  await navigator.serviceWorker.register(new URL("offline.js", here));
  const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
  const own = loaded.filter((name) => name.startsWith(here.href));
  await (await caches.open("kdlib-page")).addAll(new Set([here.href, ...own]));
  document.documentElement.dataset.kept = own.length;
}

globalThis.student = { encode, classify, nearest, page: () => page }; // for the console, and for tests
load().catch((error) => {
  at("progress").hidden = true;
  at("status").className = "failed";
  at("status").textContent = `The model could not be loaded: ${error.message}`;
});
