// The chat box: sends, streams, stops, and measures each answer.

import { events } from "./api.js";
import * as format from "./format.js";
import * as markdown from "./markdown.js";
import * as tokens from "./tokens.js";

const $ = (id) => document.getElementById(id);
const REMEMBERED = ["temperature", "max-tokens", "system", "mode"];
const REASONS = {
  stop: "", length: "cut at the longest answer", cancelled: "stopped", tool_calls: "asks for a tool",
};

export class Chat {
  constructor() {
    this.model = "";
    this.messages = [];
    this.answers = [];
    this.running = null; // AbortController of the answer that is streaming
    this.recall();
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.submit();
      }
    });
    $("prompt").addEventListener("input", grow);
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.running?.abort();
    });
    $("stop").addEventListener("click", () => this.running?.abort());
    $("new-chat").addEventListener("click", () => this.clear());
    $("colour").addEventListener("change", () => this.answers.forEach((answer) => answer.draw()));
    $("settings-open").addEventListener("click", () => {
      const open = $("settings").hidden;
      $("settings").hidden = !open;
      $("settings-open").setAttribute("aria-expanded", String(open));
    });
    $("settings").addEventListener("submit", (event) => event.preventDefault());
    for (const button of document.querySelectorAll(".suggestions button")) {
      button.addEventListener("click", () => this.send(button.textContent));
    }
  }

  recall() {
    for (const id of REMEMBERED) {
      const saved = localStorage.getItem(`invivo-${id}`);
      if (saved !== null) $(id).value = saved;
      $(id).addEventListener("input", () => localStorage.setItem(`invivo-${id}`, $(id).value));
    }
    const showTemperature = () => ($("temperature-value").textContent = Number($("temperature").value).toFixed(2));
    $("temperature").addEventListener("input", showTemperature);
    showTemperature();
  }

  setModel(model) {
    if (this.model === model.name) return;
    this.model = model.name;
    const talks = model.has_chat_template !== false;
    $("mode").options[0].disabled = !talks;
    if (!talks) $("mode").value = "text";
  }

  setAdapters(names) {
    const select = $("adapter");
    const chosen = select.value;
    select.replaceChildren(new Option("Base model", ""), ...names.map((name) => new Option(name, name)));
    select.value = names.includes(chosen) ? chosen : "";
  }

  // A new conversation with this adapter.
  talkTo(adapter) {
    this.clear();
    $("adapter").value = adapter;
    $("settings").hidden = false;
    $("settings-open").setAttribute("aria-expanded", "true");
    $("prompt").focus();
  }

  clear() {
    this.running?.abort();
    this.messages = [];
    this.answers = [];
    for (const message of document.querySelectorAll(".message")) message.remove();
    $("welcome").hidden = false;
    $("prompt").focus();
  }

  submit() {
    const text = $("prompt").value;
    if (!text.trim() || this.running) return;
    $("prompt").value = "";
    grow();
    this.send(text);
  }

  async send(text) {
    if (this.running) return;
    $("welcome").hidden = true;
    this.messages.push({ role: "user", content: text });
    const question = bubble("user");
    question.textContent = text;
    const answer = new Answer(bubble("assistant"));
    this.answers.push(answer);
    this.running = new AbortController();
    this.showRunning(true);
    scrollDown(true);
    await answer.stream(this.path(), this.body(text), this.running.signal);
    // An answer that failed is no part of the conversation; its question may be sent again.
    if (answer.failed) {
      this.messages.pop();
      if (!$("prompt").value) $("prompt").value = text;
      grow();
    } else {
      this.messages.push({ role: "assistant", content: answer.text });
    }
    this.running = null;
    this.showRunning(false);
  }

  path() {
    return $("mode").value === "text" ? "v1/completions" : "v1/chat/completions";
  }

  body(text) {
    const adapter = $("adapter").value;
    const colour = $("colour").checked;
    const common = {
      model: adapter ? `${this.model}:${adapter}` : this.model,
      temperature: Number($("temperature").value),
      max_tokens: Math.max(1, Math.floor(Number($("max-tokens").value)) || 256),
      stream: true,
      stream_options: { include_usage: true },
    };
    if ($("mode").value === "text") return { ...common, prompt: text, ...(colour && { logprobs: 5 }) };
    const system = $("system").value.trim();
    const messages = system ? [{ role: "system", content: system }, ...this.messages] : this.messages;
    return { ...common, messages, ...(colour && { logprobs: true, top_logprobs: 5 }) };
  }

  showRunning(running) {
    $("send").hidden = running;
    $("stop").hidden = !running;
    $("log").setAttribute("aria-busy", String(running));
    if (!running && document.activeElement === document.body) $("prompt").focus();
  }
}

class Answer {
  constructor(root) {
    this.text = "";
    this.tokens = [];
    this.count = 0;
    this.failed = false;
    this.content = document.createElement("div");
    this.content.className = "content waiting";
    this.meta = document.createElement("p");
    this.meta.className = "meta";
    root.append(this.content, this.meta);
    this.pending = false;
  }

  async stream(path, json, signal) {
    const start = performance.now();
    let first = null;
    let last = null;
    let reason = "";
    try {
      for await (const event of events(path, { json, signal })) {
        if (event.usage) this.count = event.usage.completion_tokens;
        const choice = event.choices?.[0];
        if (!choice) continue;
        const piece = choice.delta?.content ?? choice.text ?? "";
        const logprobs = readLogprobs(choice.logprobs);
        if (piece || logprobs.length) {
          last = performance.now();
          first ??= last;
          this.text += piece;
          this.tokens.push(...logprobs);
          if (!event.usage) this.count += logprobs.length || 1;
        }
        if (choice.finish_reason) reason = REASONS[choice.finish_reason] ?? choice.finish_reason;
        this.showMeta(start, first, last, "");
        this.drawSoon();
      }
    } catch (error) {
      if (signal.aborted) reason = "stopped";
      else this.fail(error);
    }
    this.content.classList.remove("waiting");
    if (!this.failed) this.showMeta(start, first, last, reason);
    this.draw();
  }

  showMeta(start, first, last, reason) {
    const parts = [];
    if (first !== null) {
      parts.push(`first token ${format.seconds((first - start) / 1000)}`);
      const span = (last - first) / 1000;
      if (this.count > 1 && span > 0) parts.push(`${format.rate((this.count - 1) / span)} tok/s`);
      parts.push(`${format.count(this.count)} tokens`);
    }
    if (reason) parts.push(reason);
    this.meta.textContent = parts.join(" · ");
  }

  fail(error) {
    this.failed = true;
    this.meta.className = "meta error";
    this.meta.setAttribute("role", "alert");
    this.meta.textContent = error.remedy ? `${error.message}. ${error.remedy}` : error.message;
  }

  // At most one redraw a frame, however fast tokens come.
  drawSoon() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.draw();
    });
  }

  draw() {
    const follow = atBottom();
    tokens.hide();
    const byToken = $("colour").checked && this.tokens.length > 0;
    this.content.replaceChildren(byToken ? tokens.render(this.tokens) : markdown.render(this.text));
    if (this.text || this.failed) this.content.classList.remove("waiting");
    scrollDown(follow);
  }
}

// Chat answers carry a list of entries, text completions parallel lists.
function readLogprobs(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) return logprobs.content;
  return (logprobs.tokens || []).map((token, i) => ({
    token,
    logprob: logprobs.token_logprobs[i] ?? 0,
    top_logprobs: Object.entries(logprobs.top_logprobs?.[i] || {}).map(([text, logprob]) => ({ token: text, logprob })),
  }));
}

function bubble(role) {
  const message = document.createElement("div");
  message.className = `message ${role}`;
  const who = document.createElement("span");
  who.className = "visually-hidden";
  who.textContent = role === "user" ? "You: " : "Model: ";
  const body = document.createElement("div");
  body.className = "body";
  message.append(who, body);
  $("log").append(message);
  return body;
}

function atBottom() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function scrollDown(wanted) {
  if (wanted) $("log").scrollTop = $("log").scrollHeight;
}

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(200, prompt.scrollHeight + 2)}px`;
}
