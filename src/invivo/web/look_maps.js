// The two maps of the panel that looks inside, as tables whose cells can be clicked.

import { visible } from "./format.js";
import * as tokens from "./tokens.js";

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text != null) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function head(label, texts) {
  const thead = make("thead");
  const row = make("tr");
  const corner = make("th", label);
  corner.scope = "col";
  row.append(corner);
  for (const text of texts) {
    const cell = make("th", text);
    cell.scope = "col";
    row.append(cell);
  }
  thead.append(row);
  return thead;
}

// A layer's number as a button.
function layerCell(layer, onClick) {
  const cell = make("th");
  cell.scope = "row";
  const button = make("button", String(layer), "layer");
  button.type = "button";
  button.title = `Change layer ${layer}`;
  button.addEventListener("click", () => onClick(layer));
  cell.append(button);
  return cell;
}

// Layers down from the last, tokens across: the likeliest word, its probability as colour.
export function drawLens(table, captures, onLayer) {
  tokens.hide();
  const body = make("tbody");
  for (const capture of [...captures].reverse()) {
    const [nPositions, top] = capture.values.shape;
    const row = make("tr");
    row.append(layerCell(capture.layer, onLayer));
    for (let i = 0; i < nPositions; i++) {
      const alternatives = [];
      for (let k = i * top; k < (i + 1) * top; k++) {
        alternatives.push({ token: capture.words[k], logprob: Number(capture.values.data[k]) });
      }
      const best = alternatives[0];
      const p = Math.exp(best.logprob);
      const cell = make("td", visible(best.token));
      cell.style.setProperty("--p", p.toFixed(3));
      cell.classList.toggle("sure", p > 0.75);
      cell.addEventListener("pointerenter", () => tokens.show(cell, [{ ...best, top_logprobs: alternatives }]));
      cell.addEventListener("pointerleave", tokens.hide);
      row.append(cell);
    }
    body.append(row);
  }
  table.replaceChildren(head("layer", captures[0].tokens.map(visible)), body);
  const box = table.parentElement;
  box.scrollLeft = box.scrollWidth; // the end of the prompt is what goes on
}

// Layers down from the last, heads and the feed-forward across: shares in one token's logit.
export function drawHeads(table, rows, token, onPlace) {
  const width = Math.max(...rows.map((row) => row.heads.length));
  const all = rows.flatMap((row) => [...row.heads, row.mlp].map((part) => Math.abs(part[token])));
  const most = Math.max(...all) || 1;
  const body = make("tbody");
  for (const row of [...rows].reverse()) {
    const line = make("tr");
    line.append(layerCell(row.layer, (layer) => onPlace({ layer })));
    for (let h = 0; h < width; h++) {
      const part = row.heads[h];
      line.append(part ? shareCell(part[token], most, { layer: row.layer, head: h }, onPlace) : make("td"));
    }
    line.append(shareCell(row.mlp[token], most, { layer: row.layer, mlp: true }, onPlace));
    body.append(line);
  }
  const names = [...Array(width).keys()].map(String);
  table.replaceChildren(head("layer", [...names, "MLP"]), body);
}

function shareCell(value, most, place, onPlace) {
  const cell = make("td");
  const button = make("button", null, value < 0 ? "share against" : "share");
  button.type = "button";
  const name = place.mlp ? "feed-forward" : `head ${place.head}`;
  button.title = `layer ${place.layer}, ${name}: ${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
  button.setAttribute("aria-label", button.title);
  // The root, so that small shares can still be told from none.
  button.style.setProperty("--size", Math.sqrt(Math.abs(value) / most).toFixed(3));
  button.addEventListener("click", () => onPlace(place));
  cell.append(button);
  return cell;
}
