// Calls to the server that this page came from: JSON, event streams, typed errors, the key.

const KEY = "invivo-key";

export class ApiError extends Error {
  constructor(status, { message, remedy, param, type } = {}) {
    super(message || `The server answered ${status}.`);
    this.status = status;
    this.remedy = remedy || "";
    this.param = param || "";
    this.type = type || "";
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

function headers(extra) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...extra, Authorization: `Bearer ${key}` } : { ...extra };
}

async function failure(response) {
  let body = {};
  try {
    body = await response.json();
  } catch {
    // a body that is not JSON says nothing more than the status
  }
  return new ApiError(response.status, body.error || {});
}

export async function call(method, path, { json, form, signal } = {}) {
  const response = await fetch(path, {
    method,
    signal,
    headers: headers(json === undefined ? {} : { "Content-Type": "application/json" }),
    body: json === undefined ? form : JSON.stringify(json),
  });
  if (!response.ok) throw await failure(response);
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

// A file for the user's disk. fetch rather than a link, which cannot send a key.
export async function download(path, filename) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await failure(response);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = filename;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// Server-sent events as objects. fetch rather than EventSource, which can send neither a body
// nor a key.
export async function* events(path, { json, signal } = {}) {
  const response = await fetch(path, {
    method: json === undefined ? "GET" : "POST",
    signal,
    headers: headers({
      Accept: "text/event-stream",
      ...(json === undefined ? {} : { "Content-Type": "application/json" }),
    }),
    body: json === undefined ? undefined : JSON.stringify(json),
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value.replace(/\r/g, "");
      let end;
      while ((end = buffer.indexOf("\n\n")) >= 0) {
        const block = buffer.slice(0, end);
        buffer = buffer.slice(end + 2);
        const data = block
          .split("\n")
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart())
          .join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.status || 500, event.error);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
