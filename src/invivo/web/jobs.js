// The card of fine-tuning jobs: their list, and one of them with its curve, events and orders.

import { call } from "./api.js";
import { LossChart } from "./charts.js";
import * as format from "./format.js";

const ENDED = ["succeeded", "failed", "cancelled"];
const PATH = "v1/fine_tuning/jobs";
const PERIOD = 2000; // ms between two looks at the job that is shown
const EVENTS = 1000; // asked for at the first look; later ones ask for fewer
const WORDS = { validating_files: "reading the file" };

const $ = (id) => document.getElementById(id);

function describe(error) {
  return error.remedy ? `${error.message} ${error.remedy}` : error.message;
}

function keyOf(job) {
  return job.id || job.name;
}

export class Jobs {
  constructor(onChat) {
    this.onChat = onChat;
    this.rows = new Map();
    this.chosen = null; // by the reader; otherwise the newest that runs
    this.shown = null; // key of the job in sight
    this.forget();
    this.chart = new LossChart($("loss-chart"), $("loss-legend"));
    for (const order of ["pause", "resume"]) {
      $(`job-${order}`).addEventListener("click", () => this.order(order));
    }
    $("job-cancel").addEventListener("click", () => this.cancel());
    $("job-chat").addEventListener("click", () => this.onChat(this.job.name));
  }

  recolour() {
    this.chart.recolour();
  }

  forget() {
    this.detail = null;
    this.events = new Map();
    this.rates = new Map();
    this.lookedAt = -Infinity;
    this.looking = false;
    this.refused = "";
  }

  select(key) {
    this.chosen = key;
    if (this.snapshot) this.show(this.snapshot);
  }

  show(snapshot) {
    this.snapshot = snapshot;
    const jobs = (snapshot.jobs || []).toReversed(); // the newest first
    $("jobs-empty").hidden = jobs.length > 0;
    $("jobs-body").hidden = jobs.length === 0;
    const running = jobs.filter((job) => stateOf(job) === "running").length;
    $("jobs-sub").textContent = running ? `${running} running` : "";
    this.showList(jobs, snapshot.time);
    const chosen = jobs.find((job) => keyOf(job) === this.chosen);
    this.job = chosen || jobs.find((job) => !ENDED.includes(stateOf(job))) || jobs[0];
    if (!this.job) return;
    if (keyOf(this.job) !== this.shown) {
      this.shown = keyOf(this.job);
      this.forget();
    }
    for (const [key, row] of this.rows) row.button.setAttribute("aria-current", String(key === this.shown));
    this.showJob();
    this.look();
  }

  // Rows are kept by job, so that the reader's focus stays where it is.
  showList(jobs, now) {
    const list = $("job-list");
    const seen = new Set(jobs.map(keyOf));
    jobs.forEach((job, i) => {
      let row = this.rows.get(keyOf(job));
      if (!row) {
        row = new Row(() => this.select(keyOf(job)));
        this.rows.set(keyOf(job), row);
      }
      row.show(job, now);
      if (list.children[i] !== row.item) list.insertBefore(row.item, list.children[i] || null);
    });
    for (const [key, row] of this.rows) {
      if (!seen.has(key)) {
        row.item.remove();
        this.rows.delete(key);
      }
    }
  }

  // The snapshot has how a job stands; the whole curve, events and settings are asked for.
  async look() {
    const job = this.job;
    const now = performance.now();
    const done = this.detail && ENDED.includes(this.detail.status);
    if (!job.id || this.looking || done || this.refused || now - this.lookedAt < PERIOD) return;
    this.looking = true;
    this.lookedAt = now;
    const path = `${PATH}/${encodeURIComponent(job.id)}`;
    try {
      const limit = this.events.size ? 100 : EVENTS;
      // One after the other: of a job that has ended, the events that follow are all there are.
      const detail = await call("GET", path);
      const events = await call("GET", `${path}/events?limit=${limit}`);
      if (this.shown !== job.id) return;
      this.detail = detail;
      this.take(events.data);
    } catch (error) {
      if ([401, 403, 404].includes(error.status)) this.refused = describe(error);
    } finally {
      if (this.shown === job.id) {
        this.looking = false;
        this.showJob();
      }
    }
  }

  take(events) {
    for (const event of events) {
      if (this.events.has(event.id)) continue;
      this.events.set(event.id, event);
      const { step, learning_rate: rate } = event.data || {};
      if (event.type === "metrics" && rate != null) this.rates.set(step, rate);
    }
  }

  showJob() {
    const { job, detail } = this;
    const state = stateOf(job);
    $("job-name").textContent = job.name;
    $("job-status").className = `tag ${state}`;
    $("job-status").textContent = WORDS[state] || state;
    const orders = Boolean(job.id) && !this.refused;
    const served = this.snapshot.adapters.some((adapter) => adapter.name === job.name);
    $("job-chat").hidden = !served;
    $("job-pause").hidden = !orders || !["queued", "running"].includes(state);
    $("job-resume").hidden = !orders || state !== "paused";
    $("job-cancel").hidden = !orders || ENDED.includes(state);
    const pairs = detail?.losses?.length ? detail.losses.map((loss, i) => [i + 1, loss]) : job.losses || [];
    const nothing = pairs.length === 0 && ENDED.includes(state);
    $("loss-chart").hidden = $("loss-legend").hidden = nothing;
    const held = new Map((detail?.validations || []).map((one) => [one.step, one.loss]));
    if (!nothing) this.chart.showJob(pairs, this.rates, job.steps, held);
    $("job-facts").textContent = detail ? facts(detail) : this.refused;
    this.showError(this.problem || (ENDED.includes(state) || state === "paused" ? detail?.error?.message : ""));
    this.showEvents();
  }

  showError(message) {
    const element = $("job-error");
    element.hidden = !message;
    if (element.textContent !== (message || "")) element.textContent = message || "";
  }

  showEvents() {
    const told = [...this.events.values()].filter((event) => event.type !== "metrics");
    const key = `${this.shown} ${told.length}`;
    if (key === this.eventsShown) return;
    this.eventsShown = key;
    told.sort((a, b) => b.created_at - a.created_at);
    $("job-events").replaceChildren(...told.map(eventItem));
  }

  async order(order) {
    const path = `${PATH}/${encodeURIComponent(this.job.id)}/${order}`;
    const button = $(`job-${order}`);
    button.disabled = true;
    this.problem = "";
    try {
      await call("POST", path);
      this.lookedAt = -Infinity;
    } catch (error) {
      this.problem = describe(error);
    } finally {
      button.disabled = false;
      this.showJob();
      this.look();
    }
  }

  cancel() {
    const dialog = $("cancel-dialog");
    $("cancel-message").textContent =
      `${this.job.name} has done ${this.job.step} of ${this.job.steps} steps. ` +
      "What it has published stays; the job cannot go on afterwards.";
    dialog.returnValue = "";
    dialog.onclose = () => dialog.returnValue === "cancel" && this.order("cancel");
    dialog.showModal();
  }
}

// One job in the list.
class Row {
  constructor(onSelect) {
    this.item = document.createElement("li");
    this.button = document.createElement("button");
    this.button.type = "button";
    this.button.addEventListener("click", onSelect);
    this.name = document.createElement("strong");
    this.tag = document.createElement("span");
    this.bar = document.createElement("span");
    this.bar.className = "bar";
    this.bar.append(document.createElement("i"));
    this.line = document.createElement("span");
    this.line.className = "muted";
    this.button.append(this.name, this.tag, this.bar, this.line);
    this.item.append(this.button);
  }

  show(job, now) {
    const state = stateOf(job);
    const put = (element, value) => element.textContent !== value && (element.textContent = value);
    put(this.name, job.name);
    this.tag.className = `tag ${state}`;
    put(this.tag, WORDS[state] || state);
    this.bar.firstElementChild.style.width = `${job.steps ? (100 * job.step) / job.steps : 0}%`;
    const parts = job.steps ? [`step ${format.count(job.step)} of ${format.count(job.steps)}`] : [];
    if (job.loss != null) parts.push(`loss ${job.loss.toFixed(3)}`);
    if (state === "running" && job.waits_for) {
      parts.push(`waits: ${job.waits_for}`);
    } else if (state === "running") {
      if (job.tokens_per_second != null) parts.push(`${format.rate(job.tokens_per_second)} tok/s`);
      if (job.estimated_finish) parts.push(format.left(job.estimated_finish - now));
    }
    put(this.line, parts.filter(Boolean).join(" · ") || "–");
  }
}

function stateOf(job) {
  return job.status || job.state;
}

function facts(job) {
  const h = job.hyperparameters;
  const parts = [
    h.start ? `${h.start} further` : "",
    h.method,
    h.on?.length ? `on ${h.on.join(", ")}` : "",
    h.r ? `r ${h.r}` : "",
    `learning rate ${format.scientific(h.learning_rate)} ${h.schedule}`,
    `${h.batch_size} examples a step`,
    job.trained_tokens ? `${format.count(job.trained_tokens)} tokens learned` : "",
    heldOut(job),
  ];
  return parts.filter(Boolean).join(" · ");
}

function heldOut(job) {
  const last = job.validations?.at(-1);
  if (last?.loss == null) return "";
  const right = last.accuracy == null ? "" : `, ${(100 * last.accuracy).toFixed(0)} % of tokens right`;
  return `held-out loss ${last.loss.toFixed(3)}${right}`;
}

function eventItem(event) {
  const item = document.createElement("li");
  const time = document.createElement("time");
  time.textContent = new Date(1000 * event.created_at).toLocaleTimeString("en-GB");
  const text = document.createElement("span");
  text.className = event.level;
  text.textContent = event.message;
  item.append(time, text);
  return item;
}
