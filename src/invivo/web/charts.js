// The page's charts: tokens by purpose (stacked), percentiles over time, a job's loss over steps.

import uPlot from "./vendor/uplot/uPlot.esm.js";
import * as format from "./format.js";
import { cssColour } from "./theme.js";

const FONT = "12px system-ui, sans-serif";

function axisStyle() {
  return {
    stroke: cssColour("--muted"),
    font: FONT,
    grid: { stroke: cssColour("--line"), width: 1 },
    ticks: { show: false },
  };
}

// A chart that rebuilds itself when its colours or its hidden series change.
class Chart {
  constructor(root, legend, series) {
    this.root = root;
    this.series = series;
    this.data = [[], ...series.map(() => [])];
    this.window = 300;
    this.now = 0;
    this.hidden = new Set();
    this.values = legend ? this.buildLegend(legend) : [];
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(root);
  }

  buildLegend(legend) {
    return this.series.map((entry, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "key";
      button.setAttribute("aria-pressed", "true");
      const swatch = document.createElement("i");
      swatch.style.background = `var(${entry.colour})`;
      const value = document.createElement("b");
      button.append(swatch, entry.name, value);
      button.addEventListener("click", () => {
        if (this.hidden.has(i)) this.hidden.delete(i);
        else this.hidden.add(i);
        button.setAttribute("aria-pressed", String(!this.hidden.has(i)));
        this.draw();
      });
      legend.append(button);
      return value;
    });
  }

  size() {
    return { width: this.root.clientWidth, height: this.root.clientHeight };
  }

  showValues(index) {
    const at = index ?? this.data[0].length - 1;
    this.values.forEach((element, i) => {
      element.textContent = this.formatValue(this.data[i + 1][at]);
    });
  }

  update(now, data) {
    this.now = now;
    this.data = data;
    const empty = !data.slice(1).some((values) => values.some((v) => v > 0));
    this.root.classList.toggle("is-empty", empty);
    this.draw();
    if (this.plot.cursor.idx == null) this.showValues();
  }

  draw() {
    const data = this.shown();
    if (this.plot) this.plot.setData(data);
    else this.plot = new uPlot(this.options(), data, this.root);
  }

  recolour() {
    this.plot?.destroy();
    this.plot = null;
    if (this.data[0].length) this.draw();
  }

  options() {
    return {
      ...this.size(),
      legend: { show: false },
      padding: [8, 6, 0, 0],
      cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
      scales: this.scales(),
      axes: this.axes(axisStyle()),
      series: [{}, ...this.seriesOptions()],
      bands: this.bands(),
      hooks: {
        setCursor: [(plot) => this.showValues(plot.cursor.idx)],
        draw: [(plot) => this.drawOver(plot)],
      },
    };
  }

  scales() {
    return {
      x: { time: false, range: () => [this.now - this.shownSeconds(), this.now] },
      y: { range: (_, low, high) => [0, Math.max(this.floor, (high || 0) * 1.12)] },
    };
  }

  axes(style) {
    return [
      {
        ...style,
        grid: { show: false },
        size: 24,
        splits: () => this.timeSplits(),
        values: (_, splits) => splits.map((s) => this.timeLabel(s)),
      },
      { ...style, size: 58, space: 34, values: (_, splits) => splits.map((v) => this.formatAxis(v)) },
    ];
  }

  drawOver() {}

  shownSeconds() {
    return this.window;
  }

  timeSplits() {
    const step = this.shownSeconds() > 120 ? 60 : 15;
    const splits = [];
    for (let back = this.shownSeconds(); back >= 0; back -= step) splits.push(this.now - back);
    return splits;
  }

  timeLabel(second) {
    const back = Math.round(this.now - second);
    if (back <= 0 || back >= this.shownSeconds()) return ""; // a label at an edge would be cut
    return back % 60 === 0 ? `−${back / 60} min` : `−${back} s`;
  }

  bands() {
    return [];
  }
}

export class StackedChart extends Chart {
  floor = 10;

  formatValue(value) {
    return value == null ? "" : format.count(value);
  }

  formatAxis(value) {
    return format.count(value);
  }

  // uPlot draws each series as the sum of itself and those below it. Over a long time several
  // seconds make one step: their mean.
  shown() {
    const width = this.window > 120 ? 3 : 1;
    const [seconds, ...purposes] = this.data;
    const starts = seconds.map((s, i) => i).filter((i) => i === 0 || seconds[i] % width === 0);
    const total = starts.map(() => 0);
    const mean = (values, from, to) => values.slice(from, to).reduce((a, b) => a + b, 0) / (to - from);
    const stacked = purposes.map((values, p) => {
      if (this.hidden.has(p)) return total.slice();
      return starts.map((from, i) => (total[i] += mean(values, from, starts[i + 1] ?? values.length)));
    });
    return [starts.map((i) => seconds[i]), ...stacked];
  }

  showValues(index) {
    const second = index == null ? null : this.plot.data[0][index];
    super.showValues(second == null ? null : this.data[0].indexOf(second));
  }

  seriesOptions() {
    return this.series.map((entry) => {
      return {
        fill: cssColour(entry.colour),
        width: 0,
        points: { show: false },
        paths: uPlot.paths.stepped({ align: 1 }),
      };
    });
  }

  // The fill of series i stops at the line of series i - 1.
  bands() {
    return this.series.slice(1).map((_, i) => ({ series: [i + 2, i + 1] }));
  }
}

export class PercentileChart extends Chart {
  floor = 0.01;

  constructor(root, legend) {
    super(root, legend, [
      { name: "p50", colour: "--p50" },
      { name: "p95", colour: "--p95" },
      { name: "p99", colour: "--p99", dash: [4, 3] },
    ]);
    this.promise = null; // seconds
    this.promiseKey = document.createElement("span");
    this.promiseKey.className = "key promise";
    this.promiseKey.hidden = true;
    this.promiseKey.append(document.createElement("i"), "objective", document.createElement("b"));
    legend.append(this.promiseKey);
  }

  // What the server's operator promises: a line that training keeps below.
  setPromise(seconds) {
    if (seconds === this.promise) return;
    this.promise = seconds;
    this.promiseKey.hidden = seconds == null;
    this.promiseKey.querySelector("b").textContent = format.seconds(seconds);
    if (this.plot) this.draw();
  }

  // The line is always in sight where values come near it, and never flattens those far below.
  scales() {
    const top = (high) => {
      const near = this.promise != null && (high || 0) > this.promise / 6;
      return Math.max(this.floor, 1.12 * Math.max(high || 0, near ? this.promise : 0));
    };
    return { ...super.scales(), y: { range: (_, low, high) => [0, top(high)] } };
  }

  drawOver(plot) {
    if (this.promise == null || this.promise > plot.scales.y.max) return;
    const { ctx, bbox } = plot;
    const y = Math.round(plot.valToPos(this.promise, "y", true));
    ctx.save();
    ctx.strokeStyle = cssColour("--bad");
    ctx.lineWidth = 1.5 * devicePixelRatio;
    ctx.setLineDash([7 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(bbox.left, y);
    ctx.lineTo(bbox.left + bbox.width, y);
    ctx.stroke();
    ctx.restore();
  }

  // The page has percentiles only since it was opened: the time axis grows with them.
  shownSeconds() {
    const held = this.now - (this.data[0][0] ?? this.now);
    return Math.min(this.window, Math.max(60, Math.ceil(held / 60) * 60));
  }

  formatValue(value) {
    return value == null ? "" : format.seconds(value);
  }

  formatAxis(value) {
    return value === 0 ? "0" : format.seconds(value);
  }

  shown() {
    return [
      this.data[0],
      ...this.data.slice(1).map((values, i) => (this.hidden.has(i) ? values.map(() => null) : values)),
    ];
  }

  seriesOptions() {
    return this.series.map((entry) => ({
      stroke: cssColour(entry.colour),
      width: 2,
      dash: entry.dash,
      points: { show: false },
      spanGaps: false,
    }));
  }
}

// Loss of every optimizer step, its running mean, that of held-out data, and the learning rate on an
// axis of its own.
export class LossChart extends Chart {
  constructor(root, legend) {
    super(root, legend, [
      { name: "loss", colour: "--loss-raw" },
      { name: "smoothed", colour: "--train" },
      { name: "learning rate", colour: "--rate" },
      { name: "held-out", colour: "--held-out" },
    ]);
    this.steps = 1;
  }

  // pairs: [step, loss]; rates: Map from step to learning rate; steps: of the whole job; held: Map
  // from step to the loss of held-out data.
  showJob(pairs, rates, steps, held = new Map()) {
    const xs = pairs.map(([step]) => step);
    // A job that has only just begun is not squeezed into the first pixels.
    this.steps = Math.max(2, Math.min(steps, Math.max(20, 1.5 * (xs.at(-1) ?? 0))));
    const losses = pairs.map(([, loss]) => loss);
    const at = (values) => xs.map((step) => values.get(step) ?? null);
    const data = [xs, losses, smoothed(losses), at(rates), at(held)];
    this.values.forEach((value, i) => { // what this job has not needs no key
      value.parentElement.hidden = i > 1 && data[i + 1].every((one) => one == null);
    });
    this.update(0, data);
  }

  scales() {
    return {
      x: { time: false, range: () => [1, this.steps] },
      y: { range: (_, low, high) => around(low, high) },
      rate: { range: (_, low, high) => [0, (high || 1) * 1.12] },
    };
  }

  axes(style) {
    return [
      {
        ...style,
        grid: { show: false },
        size: 24,
        incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5, 1e6],
        values: (_, splits) => splits.map((v) => format.count(v)),
      },
      { ...style, size: 44, space: 34, values: (_, splits) => splits.map((v) => v.toFixed(splits[1] - splits[0] < 0.5 ? 2 : 1)) },
      { ...style, scale: "rate", side: 1, size: 56, space: 40, grid: { show: false }, values: (_, splits) => splits.map((v) => (v ? format.scientific(v) : "")) },
    ];
  }

  formatValue(value) {
    return value == null ? "" : value < 0.05 ? format.scientific(value) : value.toFixed(3);
  }

  shown() {
    return [
      this.data[0],
      ...this.data.slice(1).map((values, i) => (this.hidden.has(i) ? values.map(() => null) : values)),
    ];
  }

  seriesOptions() {
    const line = (i, width, more) => ({
      stroke: cssColour(this.series[i].colour),
      width,
      points: { show: false },
      spanGaps: true,
      ...more,
    });
    const lone = (plot, i) => plot.data[0].length < 3 && i > 0;
    return [
      line(0, 1, { points: { show: lone, size: 5 } }),
      line(1, 2.5),
      line(2, 1.5, { scale: "rate", dash: [3, 3] }),
      line(3, 2, { points: { show: true, size: 6 } }),
    ];
  }
}

// An exponential mean that begins unbiased; steps without a loss do not count.
function smoothed(values, memory = 0.85) {
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    if (value == null) return null;
    sum = memory * sum + value;
    weight = memory * weight + 1;
    return sum / weight;
  });
}

function around(low, high) {
  if (low == null) return [0, 1];
  const space = Math.max(0.08 * (high - low), 0.05);
  return [Math.max(0, low - space), high + space];
}
