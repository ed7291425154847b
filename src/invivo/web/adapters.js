// The card of loaded adapters, and loading and unloading them.

import { call, download } from "./api.js";

const $ = (id) => document.getElementById(id);

function describe(error) {
  return error.remedy ? `${error.message} ${error.remedy}` : error.message;
}

export class Adapters {
  constructor(onChange) {
    this.onChange = onChange;
    this.shown = "";
    const dialog = $("adapter-dialog");
    const form = $("adapter-form");
    $("adapter-open").addEventListener("click", () => dialog.showModal());
    dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
    form.elements.files.addEventListener("change", () => (form.elements.source.value = "files"));
    form.elements.path.addEventListener("input", () => (form.elements.source.value = "path"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.load(dialog, form);
    });
  }

  async load(dialog, form) {
    const problem = form.querySelector(".error");
    const submit = form.querySelector("[type=submit]");
    const name = form.elements.name.value;
    problem.hidden = true;
    submit.disabled = true;
    try {
      if (form.elements.source.value === "path") {
        await call("POST", "v1/adapters", { json: { name, path: form.elements.path.value } });
      } else {
        const upload = new FormData();
        upload.append("name", name);
        for (const file of form.elements.files.files) {
          upload.append(file.name.endsWith(".json") ? "config" : "weights", file, file.name);
        }
        await call("POST", "v1/adapters/upload", { form: upload });
      }
      form.reset();
      dialog.close();
    } catch (error) {
      problem.textContent = describe(error);
      problem.hidden = false;
    } finally {
      submit.disabled = false;
    }
  }

  async save(name, button) {
    await this.attempt(button, () =>
      download(`v1/adapters/${encodeURIComponent(name)}/content`, `${name.replace(":", "-")}.zip`),
    );
    button.disabled = false;
  }

  async unload(name, button) {
    const path = `v1/adapters/${encodeURIComponent(name)}`;
    const done = await this.attempt(button, () => call("DELETE", path));
    button.disabled = done;
  }

  // Whether it went well; what did not is shown.
  async attempt(button, action) {
    const problem = $("adapters-error");
    problem.hidden = true;
    button.disabled = true;
    try {
      await action();
    } catch (error) {
      problem.textContent = describe(error);
      problem.hidden = false;
      return false;
    }
    return true;
  }

  button(text, name, action) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "small-button";
    button.textContent = text;
    button.setAttribute("aria-label", `${text} ${name}`);
    button.addEventListener("click", () => action.call(this, name, button));
    return button;
  }

  show(list) {
    const key = JSON.stringify(list);
    if (key === this.shown) return;
    this.shown = key;
    $("adapters-empty").hidden = list.length > 0;
    $("adapters").replaceChildren(...list.map((adapter) => this.item(adapter)));
    this.onChange(list.map((adapter) => adapter.name));
  }

  item(adapter) {
    const item = document.createElement("li");
    const name = document.createElement("strong");
    name.textContent = adapter.name;
    const facts = document.createElement("span");
    facts.className = "muted small";
    const parts = [`v${adapter.version}`, `rank ${adapter.rank}`];
    if (adapter.running) parts.push(`${adapter.running} running`);
    facts.textContent = parts.join(" · ");
    const buttons = document.createElement("span");
    buttons.className = "adapter-buttons";
    buttons.append(
      this.button("Save", adapter.name, this.save),
      this.button("Unload", adapter.name, this.unload),
    );
    item.append(name, facts, buttons);
    return item;
  }
}
