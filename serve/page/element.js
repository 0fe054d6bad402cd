// Elements in one call. What servers and models say goes in as text, so that none of it is ever read as HTML.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Set a text, if it is another one: selections and screen readers stay undisturbed.
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Put these children in, if they are others, and leave the focus where it was, if that is still there.
export function fill(node, children) {
  const same = node.children.length === children.length && children.every((child, at) => child === node.children[at]);
  if (same) return;
  const focused = document.activeElement;
  node.replaceChildren(...children);
  if (focused?.isConnected) focused.focus();
}
