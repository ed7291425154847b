// The panel that looks inside: logit lens, direct shares of heads, and what changes to them do.

import { call } from "./api.js";
import { visible } from "./format.js";
import { Edits } from "./look_edits.js";
import { drawHeads, drawLens } from "./look_maps.js";

const COLUMNS = 48; // tokens of the lens, the last of the prompt
const TOP = 5;

const $ = (id) => document.getElementById(id);

export class Look {
  constructor() {
    this.model = "";
    this.asked = 0; // number of the latest question; answers to earlier ones are dropped
    this.prompt = null;
    this.shares = null;
    this.edits = new Edits(() => this.changed());
    $("look-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    $("look-prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.start();
      }
    });
    $("heads-token").addEventListener("change", () => this.drawHeads());
    $("look-edited").addEventListener("change", () => this.draw());
  }

  setModel({ name, has_chat_template: talks }) {
    this.model = name;
    $("look-chat").disabled = talks === false;
    if (talks === false) $("look-chat").checked = false;
  }

  async start() {
    const text = $("look-prompt").value;
    if (!text || !this.model) return;
    // What names the prompt in the body of a request.
    this.prompt = $("look-chat").checked ? { messages: [{ role: "user", content: text }] } : { prompt: text };
    this.edits.start(this.model, this.prompt);
    await this.draw();
  }

  changed() {
    if ($("look-edited").checked) this.draw();
  }

  async draw() {
    if (this.prompt === null) return;
    const number = ++this.asked;
    $("look-go").disabled = true;
    $("look-error").hidden = true;
    try {
      const found = await this.read(this.prompt, $("look-edited").checked ? this.edits.steps() : []);
      if (number !== this.asked) return;
      this.show(found);
    } catch (error) {
      if (number === this.asked) this.fail(error);
    } finally {
      if (number === this.asked) $("look-go").disabled = false;
    }
  }

  // The lens first, then the shares in the logits of the tokens that it finds at the end.
  async read(prompt, steps) {
    const [{ count }, { sites }] = await Promise.all([
      call("POST", "tokenize", { json: prompt.messages ? prompt : { text: prompt.prompt, special: true } }),
      call("GET", `v1/models/${this.model}`),
    ]);
    const pos = { range: [Math.max(0, count - COLUMNS), count] };
    const lens = await this.run(prompt, steps, [
      { capture: "layers.*.resid.post", pos, reduce: "lens", top: TOP, name: "lens" },
    ]);
    const last = lens.at(-1);
    const ids = last.ids.data.slice(-TOP);
    const share = { pos: "@last", reduce: "direct", tokens: ids };
    const outputs = [
      { capture: "layers.*.attn.out", name: "attn", ...share },
      { capture: "layers.*.mlp.out", name: "mlp", ...share },
      { capture: "final.norm.out", name: "logit", ...share },
      { capture: "final.norm.scale", pos: "@last", name: "scale" },
    ];
    if (sites.includes("attn.head.out")) outputs.push({ capture: "layers.*.attn.head.*.out", name: "heads", ...share });
    if (sites.includes("post1.scale")) outputs.push({ capture: "layers.*.post1.scale", pos: "@last", name: "post" });
    return { lens, count, words: last.words.slice(-TOP), shares: readShares(await this.run(prompt, steps, outputs), ids.length) };
  }

  async run(prompt, steps, out) {
    const body = { model: this.model, ...prompt, program: { steps, out } };
    return (await call("POST", "v1/run", { json: body })).data[0].rows[0].captures;
  }

  show({ lens, count, words, shares }) {
    this.shares = shares;
    const shown = lens[0].positions.length;
    $("lens-sub").textContent = shown < count ? `the last ${shown} of ${count} tokens` : `${count} tokens`;
    $("lens-empty").hidden = true;
    $("lens").hidden = false;
    drawLens($("lens"), lens, (layer) => this.edits.add({ layer }));
    const select = $("heads-token");
    const chosen = select.value;
    select.replaceChildren(...words.map((word, i) => new Option(visible(word), String(i))));
    if (this.words?.join() === words.join() && chosen) select.value = chosen;
    this.words = words;
    select.disabled = false;
    this.drawHeads();
  }

  drawHeads() {
    if (!this.shares) return;
    const rows = this.shares.rows;
    const token = Number($("heads-token").value);
    $("heads-empty").hidden = true;
    $("heads").hidden = false;
    $("heads-sub").textContent = `logit ${this.shares.logit[token].toFixed(2)} by head and MLP: orange for it, blue against`;
    drawHeads($("heads"), rows, token, (place) => this.edits.add(place));
  }

  fail(error) {
    $("look-error").textContent = error.remedy ? `${error.message}. ${error.remedy}` : error.message;
    $("look-error").hidden = false;
  }
}

// Shares of every layer's parts, the scales of the norms multiplied in: parts[token] are numbers.
function readShares(captures, nTokens) {
  const of = (name) => captures.filter((capture) => capture.name === name);
  const scale = of("scale")[0].values.data[0];
  const post = new Map(of("post").map((capture) => [capture.layer, capture.values.data[0]]));
  const parts = (capture, factor) => {
    const values = capture.values.data.map((x) => x * factor);
    const out = [];
    for (let i = 0; i < values.length; i += nTokens) out.push(values.slice(i, i + nTokens));
    return out;
  };
  const heads = new Map(of("heads").map((c) => [c.layer, parts(c, scale * (post.get(c.layer) ?? 1))]));
  const mlps = new Map(of("mlp").map((c) => [c.layer, parts(c, scale)[0]]));
  const rows = of("attn").map((c) => ({
    layer: c.layer,
    attn: parts(c, scale)[0],
    heads: heads.get(c.layer) ?? [],
    mlp: mlps.get(c.layer),
  }));
  return { rows, logit: of("logit")[0].values.data };
}
