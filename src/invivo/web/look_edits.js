// Changes to layers, heads and feed-forwards, and the answers without and with them.

import { call } from "./api.js";
import * as tokens from "./tokens.js";

const WRITTEN = 24; // tokens of the answers that are compared
const MOST = 32; // changes

const $ = (id) => document.getElementById(id);

function nameOf({ layer, head, mlp }) {
  if (mlp) return `feed-forward of layer ${layer}`;
  return head === undefined ? `layer ${layer}` : `head ${head} of layer ${layer}`;
}

function sitesOf({ layer, head, mlp }) {
  if (mlp) return `layers.${layer}.mlp.out`;
  if (head !== undefined) return `layers.${layer}.attn.head.${head}.z`;
  return [`layers.${layer}.attn.out`, `layers.${layer}.mlp.out`];
}

export class Edits {
  constructor(onChange) {
    this.onChange = onChange;
    this.edits = []; // { place, factor }
    this.asked = 0;
    $("edits-clear").addEventListener("click", () => this.set([]));
    this.list();
  }

  // Another prompt: the changes stay.
  start(model, prompt) {
    this.model = model;
    this.prompt = prompt;
    this.plain = null;
    this.compare();
  }

  steps() {
    return this.edits.map(({ place, factor }) => ({ at: sitesOf(place), do: "scale", a: factor }));
  }

  add(place) {
    const name = nameOf(place);
    if (this.edits.some((edit) => nameOf(edit.place) === name) || this.edits.length >= MOST) {
      document.querySelector(`#edits li[data-name="${name}"] input`)?.focus();
      return;
    }
    this.set([...this.edits, { place, factor: 0 }]);
  }

  set(edits) {
    this.edits = edits;
    this.list();
    this.compare();
    this.onChange();
  }

  list() {
    $("edits-empty").hidden = this.edits.length > 0;
    $("edits-clear").disabled = this.edits.length === 0;
    $("edits").replaceChildren(...this.edits.map((edit) => this.item(edit)));
  }

  item(edit) {
    const item = document.createElement("li");
    item.dataset.name = nameOf(edit.place);
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type: "number", step: "0.25", min: "-10", max: "10", value: String(edit.factor) });
    input.addEventListener("change", () => {
      const factor = Number(input.value);
      if (input.value === "" || !input.checkValidity() || !Number.isFinite(factor)) {
        input.value = String(edit.factor);
        return;
      }
      edit.factor = factor;
      this.compare();
      this.onChange();
    });
    label.append(`${nameOf(edit.place)} ×`, input);
    const remove = document.createElement("button");
    Object.assign(remove, { type: "button", className: "small-button", textContent: "×", title: `Undo: ${nameOf(edit.place)}` });
    remove.addEventListener("click", () => this.set(this.edits.filter((other) => other !== edit)));
    item.append(label, remove);
    return item;
  }

  async compare() {
    const number = ++this.asked;
    if (!this.prompt) return;
    $("answers").hidden = false;
    try {
      this.plain ??= this.answer([]);
      show("plain", await this.plain);
      if (number !== this.asked) return;
      $("answers").classList.toggle("alone", this.edits.length === 0);
      if (this.edits.length === 0) return;
      const changed = await this.answer(this.steps());
      if (number === this.asked) show("changed", changed);
    } catch (error) {
      if (number !== this.asked) return;
      this.plain = null;
      $("look-error").textContent = error.remedy ? `${error.message}. ${error.remedy}` : error.message;
      $("look-error").hidden = false;
    }
  }

  async answer(steps) {
    const json = { model: this.model, ...this.prompt, max_tokens: WRITTEN, temperature: 0 };
    if (steps.length) json.interventions = { steps };
    if (this.prompt.messages) {
      Object.assign(json, { logprobs: true, top_logprobs: 5 });
      const choice = (await call("POST", "v1/chat/completions", { json })).choices[0];
      const first = choice.logprobs.content[0];
      return {
        text: choice.message.content,
        chosen: first.token,
        next: first.top_logprobs.map(({ token, logprob }) => [token, logprob]),
      };
    }
    json.logprobs = 5;
    const choice = (await call("POST", "v1/completions", { json })).choices[0];
    return {
      text: choice.text,
      chosen: choice.logprobs.tokens[0],
      next: Object.entries(choice.logprobs.top_logprobs[0] || {}),
    };
  }
}

// An answer, and the likeliest first tokens: { text, chosen, next: [[token, log-probability], ...] }.
function show(which, { text, chosen, next }) {
  $(`answer-${which}`).textContent = text.trim() || "(nothing)";
  $(`next-${which}`).replaceChildren(...next.map(([token, logprob]) => tokens.row(token, logprob, token === chosen)));
}
