// An answer token by token: coloured by probability, with the alternatives in a tooltip.

import { visible } from "./format.js";

const FULL = 5; // nats at which the colour is full

const tip = document.getElementById("tip");
let shownFor = null;

// Tokens whose bytes are no whole characters are joined until they are.
export function group(tokens) {
  const out = [];
  let decoder = new TextDecoder();
  let pending = null;
  for (const token of tokens) {
    if (!token.bytes) {
      out.push({ text: token.token, tokens: [token] });
      continue;
    }
    pending ||= { text: "", tokens: [] };
    pending.tokens.push(token);
    pending.text += decoder.decode(new Uint8Array(token.bytes), { stream: true });
    if (pending.text) {
      out.push(pending);
      pending = null;
    }
  }
  if (pending) out.push(pending);
  return out;
}

export function render(tokens) {
  const box = document.createElement("div");
  box.className = "tokens";
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "Answer by token. Arrow keys go from token to token.");
  for (const piece of group(tokens)) {
    const span = document.createElement("span");
    const logprob = piece.tokens.reduce((sum, token) => sum + token.logprob, 0);
    span.textContent = piece.text;
    span.style.setProperty("--doubt", (Math.min(1, Math.max(0, -logprob) / FULL) ** 0.7).toFixed(3));
    span.addEventListener("pointerenter", () => show(span, piece.tokens));
    span.addEventListener("pointerleave", hide);
    span.showTip = () => show(span, piece.tokens);
    box.append(span);
  }
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) {
      if (event.key === "Escape") hide();
      return;
    }
    event.preventDefault();
    const spans = [...box.children];
    const at = spans.indexOf(shownFor);
    const next = spans[Math.max(0, Math.min(spans.length - 1, at < 0 ? 0 : at + step))];
    next?.showTip();
  });
  box.addEventListener("blur", hide);
  return box;
}

// A token with its probability as a bar.
export function row(text, logprob, chosen) {
  const line = document.createElement("div");
  line.className = chosen ? "alt chosen" : "alt";
  const p = Math.exp(logprob);
  const word = document.createElement("code");
  word.textContent = visible(text);
  const bar = document.createElement("i");
  bar.style.setProperty("--p", p.toFixed(4));
  const value = document.createElement("span");
  value.textContent = p >= 0.001 ? `${(100 * p).toFixed(1)} %` : p.toExponential(1);
  line.append(word, bar, value);
  return line;
}

// The alternatives of some tokens beside what they belong to.
export function show(span, tokens) {
  hide();
  shownFor = span;
  span.classList.add("at");
  tip.replaceChildren();
  for (const token of tokens) {
    const top = token.top_logprobs || [];
    const isChosen = (alt) => alt.token === token.token && Math.abs(alt.logprob - token.logprob) < 1e-3;
    if (!top.some(isChosen)) tip.append(row(token.token, token.logprob, true));
    for (const alt of top) tip.append(row(alt.token, alt.logprob, isChosen(alt)));
  }
  tip.hidden = false;
  const at = span.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(innerWidth - size.width - 8, at.left + at.width / 2 - size.width / 2));
  const above = at.top - size.height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
}

export function hide() {
  shownFor?.classList.remove("at");
  shownFor = null;
  tip.hidden = true;
}
