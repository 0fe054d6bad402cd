// A question before what cannot be undone. The browser keeps the focus inside, ends it on Escape, and gives it back.

import { write } from "./element.js";

const dialog = document.getElementById("sure");

export function sure(question, consequence, verb) {
  write(document.getElementById("sure-question"), question);
  write(document.getElementById("sure-consequence"), consequence);
  write(document.getElementById("sure-yes"), verb);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    // The end of a question may be told when the next is there already.
    dialog.onclose = () => dialog.open || resolve(dialog.returnValue === "yes");
  });
}
