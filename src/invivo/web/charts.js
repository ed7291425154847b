// The page's charts: tokens by purpose (stacked) and percentiles over time (lines).

import uPlot from "./vendor/uplot/uPlot.esm.js";
import * as format from "./format.js";
import { cssColour } from "./theme.js";

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
        x: { time: false, range: () => [this.now - this.shownSeconds(), this.now] },
        y: { range: (_, low, high) => [0, Math.max(this.floor, (high || 0) * 1.12)] },
      },
      axes: [
        {
          ...axis,
          grid: { show: false },
          size: 24,
          splits: () => this.timeSplits(),
          values: (_, splits) => splits.map((s) => this.timeLabel(s)),
        },
        { ...axis, size: 58, space: 34, values: (_, splits) => splits.map((v) => this.formatAxis(v)) },
      ],
      series: [{}, ...this.seriesOptions()],
      bands: this.bands(),
      hooks: { setCursor: [(plot) => this.showValues(plot.cursor.idx)] },
    };
  }

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
