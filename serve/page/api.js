// The server's API: JSON, uploads that tell how far they are, streams of events. Paths are relative to the page, so that
// it works behind a proxy's prefix. The browser adds the key that it was given for the page.

export class ApiError extends Error {
  // Status 0: nothing was answered.
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, { method = "GET", body, signal } = {}) {
  return (await send(path, method, body, signal)).json();
}

// Send a name's files; `progress` is called with how much of them has gone, from 0 to 1.
export function upload(name, files, { promote, progress }) {
  const form = new FormData();
  for (const file of files) form.append("file", file, file.name);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not tell of progress
    request.open("POST", `v1/adapters/${encodeURIComponent(name)}?promote=${promote}`);
    request.upload.addEventListener("progress", (event) => progress(event.loaded / event.total));
    request.addEventListener("error", () => reject(silence()));
    request.addEventListener("load", () => {
      if (request.status < 300) resolve(JSON.parse(request.response));
      else reject(refusal(request.status, request.response));
    });
    request.send(form);
  });
}

// Yields the answer's headers first, then each event's data.
export async function* stream(path, body, signal) {
  const response = await send(path, "POST", body, signal);
  yield response.headers;
  let rest = "";
  for await (const text of pieces(response)) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield parsed(line.slice("data: ".length));
    }
  }
}

async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) yield piece.value;
}

function parsed(data) {
  const event = JSON.parse(data);
  if (event.error) throw new ApiError(event.error.message, event.error.code);
  return event;
}

async function send(path, method, body, signal) {
  let response;
  try {
    const json = body === undefined ? {} : { body: JSON.stringify(body), headers: { "content-type": "application/json" } };
    response = await fetch(path, { method, signal, ...json });
  } catch (error) {
    throw error.name === "AbortError" ? error : silence();
  }
  if (!response.ok) throw refusal(response.status, await response.text());
  return response;
}

function silence() {
  return new ApiError("the server does not answer", 0);
}

function refusal(status, text) {
  try {
    return new ApiError(JSON.parse(text).error.message, status);
  } catch {
    return new ApiError(`the answer has status ${status}`, status);
  }
}
