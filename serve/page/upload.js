// A new version from files that are dropped or chosen: an adapter's folder, or the files of one. They are shown first, go
// with the button, and what the server's check says of them is shown as it is.

import { upload } from "./api.js";
import { element, write } from "./element.js";
import { bytes } from "./units.js";

const form = document.getElementById("upload-form");
const zone = document.getElementById("upload-zone");
const chosen = document.getElementById("upload-files");
const answer = document.getElementById("upload-answer");
const bar = document.getElementById("upload-progress");
const title = form.elements.namedItem("name");

// What PEFT and qpack write of an adapter. Pickles too: the server says what to do instead.
const OF_ADAPTERS = /^(adapter_.*|qpack_adapter\.json)$/;

let files = [];

// `then` is called after each version that was added.
export function start(then) {
  for (const kind of ["files", "folder"]) {
    const input = document.getElementById(`upload-${kind}-input`);
    document.getElementById(`upload-${kind}-button`).addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      const listed = [...input.files];
      take(listed.filter(isOnTop), listed[0]?.webkitRelativePath.split("/")[0]);
      input.value = ""; // so that the same can be chosen again
    });
  }
  // A file that misses the zone would replace the page.
  for (const event of ["dragover", "drop"]) window.addEventListener(event, (dragged) => dragged.preventDefault());
  zone.addEventListener("dragover", () => zone.classList.add("over"));
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", drop);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(then);
  });
}

// Of a folder, not of a folder in it.
function isOnTop(file) {
  return file.webkitRelativePath.split("/").length <= 2;
}

async function drop(event) {
  zone.classList.remove("over");
  // Before the first await: afterwards the list is empty.
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const folders = entries.filter((entry) => entry.isDirectory);
  if (folders.length > 1 || (folders.length && entries.length > 1)) {
    tell("drop one adapter at a time: its folder, or its files", true);
    return;
  }
  try {
    const listed = folders.length ? await list(folders[0]) : entries;
    take(await Promise.all(listed.map(opened)), folders[0]?.name);
  } catch (error) {
    tell(`the files can't be read: ${error.message}`, true);
  }
}

// The files of a folder; its reader gives some at a time, at the end none.
async function list(folder) {
  const reader = folder.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return found.filter((entry) => entry.isFile);
    found.push(...some);
  }
}

function opened(entry) {
  return new Promise((resolve, reject) => entry.file(resolve, reject));
}

function take(given, folder) {
  files = given.filter((file) => OF_ADAPTERS.test(file.name)).sort((one, other) => (one.name < other.name ? -1 : 1));
  const left = given.length - files.length;
  chosen.replaceChildren(...files.map((file) => element("li", {}, `${file.name}, ${bytes(file.size)}`)));
  if (!title.value && folder) title.value = folder.replace(/[^A-Za-z0-9._-]+/g, "-");
  if (!files.length) {
    tell("none of an adapter's files is among these: adapter_config.json, adapter_model.safetensors", true);
  } else {
    tell(`${files.length} files to upload${left ? `; ${left} that are no part of an adapter stay here` : ""}`);
    title.focus();
  }
}

async function send(then) {
  if (!files.length) {
    tell("drop or choose the adapter's files first", true);
    return;
  }
  const name = title.value;
  form.ariaBusy = "true";
  bar.hidden = false;
  tell(`uploading ${name}`);
  try {
    const version = await upload(name, files, {
      promote: form.elements.namedItem("promote").checked,
      progress: (share) => {
        bar.value = share;
        if (share === 1) tell(`checking ${name}`);
      },
    });
    tell(`${version.id} passed the check: rank ${version.rank}, ${bytes(version.size)}`);
    files = [];
    chosen.replaceChildren();
    title.value = "";
    await then();
  } catch (error) {
    tell(`refused: ${error.message}`, true);
  } finally {
    form.ariaBusy = "false";
    bar.hidden = true;
    bar.value = 0;
  }
}

function tell(text, failed = false) {
  write(answer, text);
  answer.classList.toggle("failed", failed);
}
