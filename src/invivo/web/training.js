// The card of training runs: which there are, and one of them with its curve.

import { call } from "./api.js";
import { LossChart } from "./charts.js";
import * as format from "./format.js";

const PERIOD = 5000; // ms between two looks
const TAGS = { running: "running", done: "succeeded", diverged: "failed", failed: "failed", killed: "failed" };

const $ = (id) => document.getElementById(id);

export class Training {
  constructor() {
    this.runs = [];
    this.chosen = null; // by the reader; otherwise the newest
    this.refused = false;
    this.lookedAt = -Infinity;
    this.chart = null;
  }

  recolour() {
    this.chart?.recolour();
  }

  // Called with every live snapshot, which has nothing of runs: they belong to other processes.
  async look() {
    const now = performance.now();
    if (this.refused || document.hidden || now - this.lookedAt < PERIOD) return;
    this.lookedAt = now;
    try {
      this.runs = (await call("GET", "v1/training/runs")).data;
      this.show();
    } catch (error) {
      this.refused = [401, 403, 404].includes(error.status);
    }
  }

  show() {
    $("training-card").hidden = this.runs.length === 0;
    if (!this.runs.length) return;
    this.chart ||= new LossChart($("training-chart"), $("training-legend"));
    const running = this.runs.filter((run) => run.status === "running").length;
    $("training-sub").textContent = running ? `${running} running` : "";
    const shown = this.runs.find((run) => run.name === this.chosen) || this.runs[0];
    const focused = document.activeElement?.dataset?.run;
    $("training-list").replaceChildren(...this.runs.map((run) => this.row(run, run === shown)));
    if (focused) this.button(focused)?.focus();
    const rates = new Map(shown.curve.map(([step, , rate]) => [step, rate]));
    this.chart.showJob(shown.curve.map(([step, loss]) => [step, loss]), rates, shown.steps);
    $("training-facts").textContent = facts(shown);
  }

  button(name) {
    return [...$("training-list").querySelectorAll("button")].find((one) => one.dataset.run === name);
  }

  row(run, isShown) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.run = run.name;
    button.setAttribute("aria-current", String(isShown));
    button.addEventListener("click", () => {
      this.chosen = run.name;
      this.show();
    });
    const name = document.createElement("strong");
    name.textContent = run.name;
    const tag = document.createElement("span");
    tag.className = `tag ${TAGS[run.status] || "paused"}`;
    tag.textContent = run.status === "time" ? "paused" : run.status;
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.append(document.createElement("i"));
    bar.firstElementChild.style.width = `${(100 * run.step) / run.steps}%`;
    const line = document.createElement("span");
    line.className = "muted";
    line.textContent = [
      `step ${format.count(run.step)} of ${format.count(run.steps)}`,
      run.loss == null ? "" : `loss ${run.loss.toFixed(3)}`,
    ].filter(Boolean).join(" · ");
    button.append(name, tag, bar, line);
    item.append(button);
    return item;
  }
}

function facts(run) {
  const held = run.held_out.at(-1);
  const parts = [`${format.count(run.parameters)} parameters`, `${format.count(run.tokens)} tokens learned from`];
  if (run.status === "running" && run.tokens_per_second != null) parts.push(`${format.rate(run.tokens_per_second)} tok/s`);
  if (held && run.measure === "accuracy") parts.push(`${(100 * held[1]).toFixed(1)} % of the questions right at step ${held[0]}`);
  else if (held) parts.push(`${held[1].toFixed(3)} bits a byte of held-out text at step ${held[0]}`);
  return parts.join(" · ");
}
