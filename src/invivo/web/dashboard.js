// Draws one live snapshot: tiles, charts, recent requests.

import { PercentileChart, StackedChart } from "./charts.js";
import * as format from "./format.js";

const PURPOSES = {
  decode: "decode", prefill: "prefill", score: "score", train: "train", backward: "train backward",
};
const PROMISES = { ttft: "ttft_ms", itl: "tpot_ms" };
const PERCENTILES = ["p50", "p95", "p99"];
const HISTORY = 300; // seconds of percentiles kept by the page
const RATE_OVER = 5; // seconds averaged for the tiles

const $ = (id) => document.getElementById(id);

function text(id, value) {
  const element = $(id);
  if (element.textContent !== value) element.textContent = value;
}

function meter(id, part, whole) {
  const value = whole ? (100 * part) / whole : 0;
  $(id).setAttribute("aria-valuenow", value.toFixed(0));
  $(id).firstElementChild.style.width = `${Math.min(100, value)}%`;
}

function recentRate(values) {
  const whole = (values || []).slice(-RATE_OVER);
  return whole.length ? whole.reduce((a, b) => a + b, 0) / whole.length : null;
}

export class Dashboard {
  constructor() {
    this.tokens = new StackedChart(
      $("tokens-chart"),
      $("tokens-legend"),
      Object.entries(PURPOSES).map(([purpose, name]) => ({ name, colour: `--${purpose}` })),
    );
    this.latency = Object.fromEntries(
      ["ttft", "itl"].map((name) => [
        name,
        {
          chart: new PercentileChart($(`${name}-chart`), $(`${name}-legend`)),
          data: [[], ...PERCENTILES.map(() => [])],
        },
      ]),
    );
    this.charts = [this.tokens, this.latency.ttft.chart, this.latency.itl.chart];
    this.rows = new Map();
    for (const button of document.querySelectorAll("[data-window]")) {
      button.addEventListener("click", () => this.setWindow(Number(button.dataset.window)));
    }
  }

  setWindow(window) {
    for (const button of document.querySelectorAll("[data-window]")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.window) === window));
    }
    for (const chart of this.charts) {
      chart.window = window;
      if (chart.plot) chart.draw();
    }
  }

  recolour() {
    for (const chart of this.charts) chart.recolour();
  }

  show(snapshot) {
    this.showTiles(snapshot);
    const tokens = snapshot.tokens;
    this.tokens.update(Math.floor(snapshot.time), [
      tokens.seconds,
      ...Object.keys(PURPOSES).map((purpose) => tokens[purpose] || tokens.seconds.map(() => 0)),
    ]);
    for (const [name, { chart, data }] of Object.entries(this.latency)) {
      const now = snapshot.latency?.[name] || {};
      data[0].push(snapshot.time);
      PERCENTILES.forEach((p, i) => data[i + 1].push(now[p] ?? null));
      while (data[0][0] < snapshot.time - HISTORY) data.forEach((values) => values.shift());
      const promise = snapshot.slo?.[PROMISES[name]];
      chart.setPromise(promise ? promise / 1000 : null);
      chart.update(snapshot.time, data);
    }
    this.showRecent(snapshot);
  }

  showTiles(s) {
    const { model, kv, prefix, totals } = s;
    text("model-name", model.name);
    const facts = [format.parameters(model.parameters), model.dtype, model.device];
    if (model.max_model_len) facts.push(`${model.max_model_len.toLocaleString("en")} token context`);
    text("model-facts", facts.filter(Boolean).join(" · "));
    text("uptime", format.uptime(s.uptime));
    text("running", format.count(s.running));
    text("running-sub", s.max_running ? `of ${format.count(s.max_running)} seats` : "");
    text("waiting", format.count(s.waiting));
    text("waiting-sub", s.preemptions ? `${format.count(s.preemptions)} preempted so far` : "in the queue");
    text("decode-rate", format.rate(recentRate(s.tokens.decode)));
    text("decode-total", `${format.count(totals.decode)} so far`);
    text("prefill-rate", format.rate(recentRate(s.tokens.prefill)));
    text("prefill-total", `${format.count(totals.prefill)} so far`);
    text("kv", format.percent(kv.used, kv.total));
    text("kv-sub", `${format.count(kv.used * kv.block_size)} of ${format.count(kv.total * kv.block_size)}`);
    meter("kv-bar", kv.used, kv.total);
    text("prefix", format.percent(prefix.hits, prefix.queries));
    text("prefix-sub", prefix.queries ? `${format.count(prefix.hits)} of ${format.count(prefix.queries)}` : "no prompts yet");
    meter("prefix-bar", prefix.hits, prefix.queries);
    document.title = s.running ? `${s.running} running · ${model.name}` : `${model.name} · invivo`;
  }

  // Rows are kept by request, so that a reader's selection and the screen stay still.
  showRecent(snapshot) {
    const body = $("recent").tBodies[0];
    const seen = new Set();
    snapshot.recent.forEach((request, i) => {
      seen.add(request.id);
      let row = this.rows.get(request.id);
      if (!row) {
        row = document.createElement("tr");
        row.title = request.id;
        for (let c = 0; c < 8; c++) row.insertCell().className = c > 2 ? "n" : "";
        row.cells[0].append(document.createElement("span"));
        this.rows.set(request.id, row);
      }
      const state = row.cells[0].firstElementChild;
      state.className = `tag ${request.state}`;
      const cached = request.cached_tokens ? ` (${format.count(request.cached_tokens)} cached)` : "";
      const cells = [
        request.state,
        request.kind,
        request.adapter || "base",
        format.count(request.prompt_tokens) + cached,
        format.count(request.output_tokens),
        format.seconds(request.ttft),
        request.tpot ? format.rate(1 / request.tpot) : "–",
        format.ago(snapshot.time - request.started),
      ];
      cells.forEach((value, c) => {
        const cell = c === 0 ? state : row.cells[c];
        if (cell.textContent !== value) cell.textContent = value;
      });
      if (body.rows[i] !== row) body.insertBefore(row, body.rows[i] || null);
    });
    for (const [id, row] of this.rows) {
      if (!seen.has(id)) {
        row.remove();
        this.rows.delete(id);
      }
    }
    $("recent-empty").hidden = snapshot.recent.length > 0;
    const total = snapshot.totals?.requests;
    text("recent-sub", total == null ? "" : `${format.count(total)} since the start`);
  }
}
