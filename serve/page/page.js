// Keeps the page up to date: asks the server every two seconds while somebody looks, and says when it is gone.

import * as adapters from "./adapters.js";
import { ask } from "./api.js";
import { write } from "./element.js";
import { History } from "./figures.js";
import * as playground from "./playground.js";
import { rate, seconds } from "./units.js";
import * as upload from "./upload.js";

const POLL_MILLISECONDS = 2000;

const history = new History();
const status = document.getElementById("server-status");
const figure = (name) => document.getElementById(`now-${name}`);

let base = null;
let listed = null; // the names and versions that the playground knows
let mayManage = true; // until the server says otherwise
let timer;

// Ask for everything, and again in a while.
async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const list = mayManage ? await manage() : null;
    const names = list && JSON.stringify([list.aliases.map((alias) => alias.name), list.versions.map((one) => one.id)]);
    if (!list || names !== listed) {
      base = await playground.refresh();
      listed = names;
      write(document.getElementById("base"), base);
      document.title = `${base}: qpack`;
    }
    if (list) show(list);
    say("the server answers");
  } catch (error) {
    history.forget();
    listed = null;
    say(`${error.message}; trying again`, true);
  }
  clearTimeout(timer);
  timer = setTimeout(poll, POLL_MILLISECONDS);
}

// GET v1/adapters, or null where the key, or the machine, may not.
async function manage() {
  try {
    return await ask("v1/adapters");
  } catch (error) {
    if (error.status !== 403) throw error;
    mayManage = false;
    return null;
  }
}

function show(list) {
  const { running, waiting, slots, holders } = list.figures;
  history.add(list.figures);
  const now = history.all();
  write(figure("requests"), rate(now.requests));
  write(figure("tokens"), rate(now.tokens));
  write(figure("first"), seconds(now.first));
  write(figure("running"), String(running));
  write(figure("waiting"), String(waiting));
  write(figure("slots"), `${holders.length} of ${slots}`);
  adapters.update(base, list, history);
  for (const part of document.querySelectorAll(".managing")) part.hidden = false;
}

function say(text, failed = false) {
  write(status, text);
  status.classList.toggle("failed", failed);
}

adapters.start(poll);
upload.start(poll);
playground.start();
document.addEventListener("visibilitychange", poll);
poll();
