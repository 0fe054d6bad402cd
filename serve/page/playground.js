// One prompt to several models at once, their answers side by side as they come, with the version that gave each.

import { ask, stream } from "./api.js";
import { element, fill, write } from "./element.js";
import { rate, seconds } from "./units.js";

const form = document.getElementById("ask-form");
const choices = document.getElementById("ask-models");
const older = document.getElementById("ask-versions");
const answers = document.getElementById("answers");
const status = document.getElementById("ask-status");
const stop = document.getElementById("ask-stop");
const field = (name) => form.elements.namedItem(name);

// By id: what GET v1/models says, and the label with its box.
let cards = new Map();
const boxes = new Map();

let running = null;

export function start() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  stop.addEventListener("click", () => running?.abort());
}

// Bring the boxes up to date, and return the name of the base; what is ticked stays so.
export async function refresh() {
  const { data } = await ask("v1/models");
  cards = new Map(data.map((card) => [card.id, card]));
  for (const id of boxes.keys()) if (!cards.has(id)) boxes.delete(id);
  for (const id of cards.keys()) if (!boxes.has(id)) boxes.set(id, makeBox(id, boxes.size === 0));
  const isVersion = (id) => id.includes("@");
  fill(choices, [...cards.keys()].filter((id) => !isVersion(id)).map((id) => boxes.get(id)));
  fill(older, [...cards.keys()].filter(isVersion).map((id) => boxes.get(id)));
  older.parentElement.hidden = !older.children.length;
  return data.length ? data[0].parent ?? data[0].id : "no model";
}

function makeBox(id, checked) {
  return element("label", {}, element("input", { type: "checkbox", name: "model", value: id, checked }), id);
}

async function run() {
  const models = new FormData(form).getAll("model");
  if (running || !models.length) {
    write(status, running ? "an answer is still on its way" : "choose a model first");
    return;
  }
  running = new AbortController();
  stop.disabled = false;
  write(status, `asking ${models.join(", ")}`);
  const cells = models.map(makeAnswer);
  fill(answers, cells.map((cell) => cell.article));
  const done = await Promise.all(cells.map((cell) => listen(cell, running.signal)));
  const whole = done.filter(Boolean).length;
  write(status, `${whole} of ${models.length} answered${running.signal.aborted ? ", stopped" : ""}`);
  if (document.activeElement === stop) field("prompt").focus();
  stop.disabled = true;
  running = null;
}

function makeAnswer(model, at) {
  const cell = { model };
  const heading = element("h3", { id: `answer-${at}` }, model);
  cell.version = element("p", { class: "version" });
  cell.figures = element("p", { class: "figures" });
  // A screen reader waits for the end, for the stream would be read in crumbs.
  const heard = { role: "log", "aria-live": "polite", "aria-busy": "true", "aria-labelledby": heading.id };
  cell.text = element("div", { class: "text", tabindex: 0, ...heard });
  cell.article = element("article", { "aria-labelledby": heading.id }, heading, cell.version, cell.text, cell.figures);
  return cell;
}

// Whether the answer came whole.
async function listen(cell, signal) {
  const began = performance.now();
  const since = () => (performance.now() - began) / 1000;
  let [first, last, tokens, end] = [null, null, 0, null];
  const show = () => {
    const speed = tokens > 1 && last > first ? `${rate((tokens - 1) / (last - first))} tokens/s` : null;
    const parts = [`${seconds(first)} to the first token`, speed, `${tokens} tokens`, end];
    write(cell.figures, parts.filter(Boolean).join(" \u00b7 "));
  };
  try {
    const [path, body] = question(cell.model);
    for await (const event of stream(path, body, signal)) {
      if (event instanceof Headers) {
        write(cell.version, event.get("x-qpack-version") ?? "");
        continue;
      }
      const choice = event.choices[0];
      const piece = choice?.delta?.content ?? choice?.text;
      if (piece) {
        last = since();
        first ??= last;
        tokens += 1;
        cell.text.append(piece);
      }
      if (choice?.finish_reason === "length") end = "cut at the most tokens";
      if (event.usage) tokens = event.usage.completion_tokens;
      show();
    }
    return true;
  } catch (error) {
    const stopped = error.name === "AbortError";
    end = stopped ? "stopped" : null;
    show();
    if (!stopped) cell.article.append(element("p", { class: "failed", role: "alert" }, error.message));
    return false;
  } finally {
    cell.text.ariaBusy = "false";
  }
}

// Where to ask and what. Without a chat template a model goes on with the text.
function question(model) {
  const [system, prompt] = [field("system").value, field("prompt").value];
  const body = {
    model,
    max_tokens: field("max_tokens").valueAsNumber,
    temperature: field("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (!cards.get(model).chat) return ["v1/completions", { ...body, prompt: system ? `${system}\n\n${prompt}` : prompt }];
  const messages = system ? [{ role: "system", content: system }] : [];
  return ["v1/chat/completions", { ...body, messages: [...messages, { role: "user", content: prompt }] }];
}
