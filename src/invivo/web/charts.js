// The page's charts: tokens by purpose (stacked) and percentiles over time (lines).

import uPlot from "./vendor/uplot/uPlot.esm.js";
import * as format from "./format.js";
import { cssColour, faded } from "./theme.js";

const FONT = "12px system-ui, sans-serif";

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
    const muted = cssColour("--muted");
    const grid = cssColour("--line");
    const axis = { stroke: muted, font: FONT, grid: { stroke: grid, width: 1 }, ticks: { show: false } };
    return {
      ...this.size(),
      legend: { show: false },
      padding: [8, 6, 0, 0],
      cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
      scales: {
        x: { time: true, range: () => [this.now - this.window, this.now] },
        y: { range: (_, low, high) => [0, Math.max(this.floor, (high || 0) * 1.12)] },
      },
      axes: [
        { ...axis, grid: { show: false }, space: 70, size: 28, values: (_, splits) => splits.map((s) => this.timeLabel(s)) },
        { ...axis, size: 58, space: 34, values: (_, splits) => splits.map((v) => this.formatAxis(v)) },
      ],
      series: [{}, ...this.seriesOptions()],
      bands: this.bands(),
      hooks: { setCursor: [(plot) => this.showValues(plot.cursor.idx)] },
    };
  }

  timeLabel(second) {
    const back = Math.round(this.now - second);
    if (back <= 0) return "now";
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

  // uPlot draws each series as the sum of itself and those below it.
  shown() {
    const total = this.data[0].map(() => 0);
    return [
      this.data[0],
      ...this.data.slice(1).map((values, i) => {
        if (this.hidden.has(i)) return total.slice();
        return values.map((v, t) => (total[t] += v || 0));
      }),
    ];
  }

  seriesOptions() {
    return this.series.map((entry) => {
      const colour = cssColour(entry.colour);
      return {
        stroke: colour,
        fill: faded(colour, 0.32),
        width: 1.5,
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
