// Wires the page: the live stream feeds the dashboard, the jobs, the adapters and the chat.

import { Adapters } from "./adapters.js";
import { events, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { Dashboard } from "./dashboard.js";
import { JobForm } from "./job_form.js";
import { Jobs } from "./jobs.js";
import { Look } from "./look.js";
import { setUpTheme } from "./theme.js";
import { Training } from "./training.js";

const LONGEST_WAIT = 8000; // ms between two tries to reach the server

const $ = (id) => document.getElementById(id);
const STATES = {
  connecting: "Connecting", starting: "Starting", ready: "Ready", draining: "Draining", failed: "Failed",
  lost: "No answer, trying again",
};

const dashboard = new Dashboard();
const chat = new Chat();
const adapters = new Adapters((names) => {
  chat.setAdapters(names);
  jobForm.setAdapters(names);
});
const jobs = new Jobs((adapter) => {
  setView("chat");
  chat.talkTo(adapter);
});
const training = new Training();
const look = new Look();
const jobForm = new JobForm((id) => jobs.select(id));

function showState(state) {
  if ($("state").dataset.state === state) return;
  $("state").dataset.state = state;
  $("state-text").textContent = STATES[state] || state;
}

function show(snapshot) {
  showState(snapshot.state);
  chat.setModel(snapshot.model);
  dashboard.show(snapshot);
  adapters.show(snapshot.adapters);
  jobs.show(snapshot);
  training.look();
  jobForm.setModel(snapshot.model.name);
  look.setModel(snapshot.model);
}

function askForKey(message) {
  const dialog = $("key-dialog");
  $("key-message").textContent = message;
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      setKey(event.target.elements.key.value.trim());
      dialog.close();
      resolve();
    };
  });
}

async function follow() {
  let wait = 500;
  for (;;) {
    try {
      for await (const snapshot of events("v1/live/stream")) {
        show(snapshot);
        wait = 500;
      }
      showState("lost");
    } catch (error) {
      if (error.status === 401 || error.status === 403) {
        await askForKey(error.remedy || error.message);
        continue;
      }
      showState("lost");
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(LONGEST_WAIT, 2 * wait);
  }
}

// A narrow screen shows one of the three views; on a wide one the chat stands beside the others.
function setView(view) {
  document.body.dataset.view = view;
  for (const button of document.querySelectorAll("button[data-view]")) {
    button.setAttribute("aria-pressed", String(button.dataset.view === view));
  }
}

for (const button of document.querySelectorAll("button[data-view]")) {
  button.addEventListener("click", () => setView(button.dataset.view));
}
document.querySelector(".skip").addEventListener("click", () => setView("chat"));
setUpTheme($("theme"), () => {
  dashboard.recolour();
  jobs.recolour();
  training.recolour();
});
follow();
