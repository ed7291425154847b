// The dialog that starts a job: uploads the file, asks for the job, and waits until the file's
// lines were read, so that what is wrong with them is told where it can be put right.

import { call } from "./api.js";

const PATH = "v1/fine_tuning/jobs";
const SIZES = { lora: "Rank", adapter: "Width", prefix: "Virtual tokens", soft_prompt: "Virtual tokens" };
const LINEAR = ["lora", "ia3"]; // methods that sit on linear maps; the others have their usual places
const PERIOD = 500; // ms between two looks at a job whose file is being read

const $ = (id) => document.getElementById(id);

export class JobForm {
  constructor(onStarted) {
    this.onStarted = onStarted;
    this.model = "";
    this.dialog = $("job-dialog");
    this.form = $("job-form");
    $("job-open").addEventListener("click", () => this.dialog.showModal());
    this.dialog.querySelector("[data-close]").addEventListener("click", () => this.dialog.close());
    for (const name of ["method", "start"]) {
      this.form.elements[name].addEventListener("change", () => this.fit());
    }
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
  }

  setModel(name) {
    this.model = name;
  }

  // What there is to learn further.
  setAdapters(names) {
    const { start } = this.form.elements;
    const chosen = names.includes(start.value) ? start.value : "";
    start.replaceChildren(new Option("the base model", ""), ...names.map((name) => new Option(name, name)));
    start.value = chosen;
    $("job-start").hidden = names.length === 0;
    this.fit();
  }

  // Shows only the fields that the method has; an adapter to begin with brings its own.
  fit() {
    const { method, r, start } = this.form.elements;
    const further = start.value !== "";
    const size = further ? undefined : SIZES[method.value];
    method.closest("label").hidden = further;
    r.closest("label").hidden = !size;
    r.disabled = !size;
    $("job-size-name").textContent = size || "";
    $("job-maps").hidden = further || !LINEAR.includes(method.value);
  }

  body(file, held) {
    const fields = this.form.elements;
    const method = fields.method.value;
    const start = fields.start.value;
    const hyperparameters = {
      learning_rate: Number(fields.learning_rate.value),
      steps: Number(fields.steps.value),
      batch_size: Number(fields.batch_size.value),
      publish_every: Number(fields.publish_every.value),
    };
    if (!start) Object.assign(hyperparameters, this.bypass(method));
    const suffix = fields.suffix.value.trim();
    return {
      model: start ? `${this.model}:${start}` : this.model,
      training_file: file.id,
      ...(held && { validation_file: held.id }),
      hyperparameters,
      ...(suffix && { suffix }),
    };
  }

  bypass(method) {
    const fields = this.form.elements;
    const maps = [...this.form.querySelectorAll("[name=on]:checked")].map((box) => box.value);
    return {
      method,
      ...(SIZES[method] && { r: Number(fields.r.value) }),
      ...(LINEAR.includes(method) && maps.length && { on: maps }),
    };
  }

  async start() {
    const submit = this.form.querySelector("[type=submit]");
    const label = submit.textContent;
    const say = (text) => (submit.textContent = text);
    submit.disabled = true;
    this.tell([]);
    try {
      say("Uploading…");
      const file = await uploaded(this.form.elements.file);
      const held = await uploaded(this.form.elements.validation);
      say("Reading the file…");
      const job = await this.read(await call("POST", PATH, { json: this.body(file, held) }));
      this.onStarted(job.id);
      if (job.status === "failed") {
        this.tell(await problems(job));
      } else {
        this.dialog.close();
        this.form.reset();
        this.fit();
      }
    } catch (error) {
      this.tell([error.remedy ? `${error.message} ${error.remedy}` : error.message]);
    } finally {
      submit.disabled = false;
      say(label);
    }
  }

  async read(job) {
    while (job.status === "validating_files" && this.dialog.open) {
      await new Promise((resolve) => setTimeout(resolve, PERIOD));
      job = await call("GET", `${PATH}/${encodeURIComponent(job.id)}`);
    }
    return job;
  }

  tell(messages) {
    const list = document.createElement("ol");
    list.append(
      ...messages.map((message) => {
        const item = document.createElement("li");
        item.textContent = message;
        return item;
      }),
    );
    $("job-problems").replaceChildren(...(messages.length ? [list] : []));
    $("job-problems").hidden = messages.length === 0;
  }
}

// What the server says of the file that was chosen; nothing was chosen: undefined.
async function uploaded(input) {
  if (!input.files.length) return undefined;
  const upload = new FormData();
  upload.append("purpose", "fine-tune");
  upload.append("file", input.files[0]);
  return call("POST", "v1/files", { form: upload });
}

// One message a bad line, or why else the job could not begin.
async function problems(job) {
  const events = await call("GET", `${PATH}/${encodeURIComponent(job.id)}/events?limit=100`);
  const lines = events.data
    .filter((event) => event.level === "error" && event.data?.line != null)
    .sort((a, b) => a.data.line - b.data.line);
  return lines.length ? lines.map((event) => event.message) : [job.error?.message || "The job failed."];
}
