// The table of the base, the names and their versions: their state, what they do now, and what can be done to them.
// Rows stay while their version does, and only texts in them change, so focus and selection survive every update.

import { ask } from "./api.js";
import { sure } from "./dialog.js";
import { element, fill, write } from "./element.js";
import { bytes, moment, rate, seconds } from "./units.js";

const table = document.getElementById("adapters-table");
const region = table.parentElement;
const status = document.getElementById("adapters-status");

// By name, the base's too: a body of the table, its heading, and its rows by id.
const groups = new Map();

let changed;

// `then` is called after each change that was made here.
export function start(then) {
  changed = then;
}

// `list` is GET v1/adapters, and the history has its figures.
export function update(base, list, history) {
  const aliases = new Map(list.aliases.map((alias) => [alias.name, alias]));
  const versions = Map.groupBy(list.versions, (version) => version.name);
  const names = [base, ...[...versions.keys()].sort()];
  for (const name of groups.keys()) if (!names.includes(name)) groups.delete(name);
  for (const name of names) {
    if (!groups.has(name)) groups.set(name, { body: element("tbody"), heading: null, rows: new Map() });
    const group = groups.get(name);
    if (name === base) showBase(group, base);
    else showName(group, name, aliases.get(name), versions.get(name), list.figures.holders);
    for (const [id, row] of group.rows) showFigures(row, list.figures.models[id], history.of(id));
  }
  fill(table, [table.caption, table.tHead, ...names.map((name) => groups.get(name).body)]);
}

function showBase(group, base) {
  if (group.rows.size) return;
  const row = makeRow([base], []);
  row.state.append(badge("base"));
  group.rows.set(base, row);
  fill(group.body, [row.line]);
}

function showName(group, name, alias, versions, holders) {
  group.heading ??= makeHeading(name);
  write(group.heading.note, alias ? `answered by ${alias.live} since ${moment(alias.since)}` : "has no live version");
  group.heading.rollback.hidden = !alias;
  for (const id of group.rows.keys()) if (!versions.some((version) => version.id === id)) group.rows.delete(id);
  for (const version of versions) {
    if (!group.rows.has(version.id)) group.rows.set(version.id, makeVersion(version));
    showState(group.rows.get(version.id), version, alias, holders.includes(version.id));
  }
  fill(group.body, [group.heading.line, ...versions.map((version) => group.rows.get(version.id).line)]);
}

function showState(row, version, alias, holds) {
  const live = alias?.live === version.id;
  const percent = alias?.canaries[version.id];
  const states = [
    live && "live",
    percent && `canary ${percent} %`,
    alias?.shadow === version.id && "shadow",
    version.pinned && "pinned",
    holds ? "in a slot" : version.resident && "in memory",
  ].filter(Boolean);
  if (row.state.dataset.states !== states.join()) {
    row.state.dataset.states = states.join();
    row.state.replaceChildren(...states.flatMap((state) => [badge(state), " "])); // apart for those who hear them too
  }
  row.promote.hidden = live;
  row.remove.hidden = live;
  name(row.pin, version.pinned ? "Unpin" : "Pin", version.id);
  row.version = version;
}

function showFigures(row, counts, rates) {
  write(row.running, String(counts?.running ?? 0));
  write(row.waiting, String(counts?.waiting ?? 0));
  write(row.requests, rate(rates.requests));
  write(row.tokens, rate(rates.tokens));
  write(row.first, seconds(rates.first));
}

function makeVersion(version) {
  const { id, digest } = version;
  const path = `v1/adapters/${version.name}`;
  const promote = button("Promote", id, () => change(promote, `${path}/promote`, { version: digest }, `${id} is live`));
  const pin = button("Pin", id, () => {
    const pinned = !row.version.pinned;
    change(pin, `${path}/pin`, { version: digest, pinned }, `${id} is ${pinned ? "" : "no longer "}pinned`);
  });
  const remove = button("Remove", id, () => takeOut(remove, id, "Requests that run on it end on it."));
  const row = makeRow([element("span", { class: "unseen" }, version.name), `@${id.split("@")[1]}`], [promote, pin, remove]);
  write(row.rank, String(version.rank));
  write(row.size, bytes(version.size));
  row.added.append(moment(version.added), " ", element("small", {}, `by ${version.by}`));
  return Object.assign(row, { promote, pin, remove, version });
}

function makeRow(title, buttons) {
  const cell = (kind) => element("td", { class: kind });
  const row = { state: cell("states"), rank: cell("number"), size: cell("number"), added: cell("added") };
  for (const figure of ["running", "waiting", "requests", "tokens", "first"]) row[figure] = cell("number");
  const cells = Object.values(row);
  row.line = element("tr", {}, element("th", { scope: "row" }, ...title), ...cells, actions(buttons));
  return row;
}

function makeHeading(title) {
  const note = element("span", { class: "note" });
  const path = `v1/adapters/${title}`;
  const rollback = button("Roll back", title, () =>
    change(rollback, `${path}/rollback`, {}, (alias) => `${title} is answered by ${alias.live} again`));
  const remove = button("Remove all", title, () => takeOut(remove, title, "All its versions go. Requests that run on them end on them."));
  const heading = element("th", { scope: "rowgroup", colspan: 10 }, title, " ", note);
  const line = element("tr", { class: "name" }, heading, actions([rollback, remove]));
  return { line, note, rollback };
}

function actions(buttons) {
  return element("td", { class: "actions" }, ...buttons);
}

function badge(text) {
  return element("span", { class: `badge ${text.split(" ")[0]}` }, text);
}

function button(verb, what, click) {
  const made = element("button", { type: "button", click });
  name(made, verb, what);
  return made;
}

// Screen readers hear what the button is about too.
function name(control, verb, what) {
  write(control, verb);
  control.setAttribute("aria-label", `${verb} ${what}`);
}

async function takeOut(control, model, consequence) {
  if (!(await sure(`Remove ${model}?`, consequence, "Remove"))) return;
  await request(control, `v1/adapters/${model}`, { method: "DELETE" }, (answer) => `removed ${answer.removed.join(", ")}`);
  if (!control.isConnected) region.focus();
}

function change(control, path, body, said) {
  return request(control, path, { method: "POST", body }, said);
}

// `said` is what to say when it is done, or makes that of the answer. A button that waits keeps the focus.
async function request(control, path, options, said) {
  if (control.ariaBusy === "true") return;
  control.ariaBusy = "true";
  try {
    const answer = await ask(path, options);
    tell(typeof said === "string" ? said : said(answer));
    await changed();
  } catch (error) {
    tell(error.message, true);
  } finally {
    control.ariaBusy = "false";
  }
}

function tell(text, failed = false) {
  write(status, text);
  status.classList.toggle("failed", failed);
}
