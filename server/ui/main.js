// The page: what is said, to whom, and the buttons.

import { Answer } from "./answer.js";
import { request } from "./api.js";
import { Gauges } from "./gauges.js";
import { Knobs, NARROW } from "./knobs.js";
import { addUser, AnswerView, clear, showAlternatives } from "./view.js";

const THEME = "jaxllm-theme";
const byId = (id) => document.getElementById(id);

const knobs = new Knobs();
const input = byId("input");
let messages = []; // {role, content}: what was said so far
let running = null; // the Answer that is being read

async function loadModels() {
  try {
    const response = await request("v1/models", { key: knobs.key });
    const names = (await response.json()).data.map((card) => card.id);
    byId("model").replaceChildren(...names.map((name) => new Option(name, name)));
    byId("welcome-model").textContent = byId("model").value;
  } catch (error) {
    if (error.status === 401) knobs.askForKey();
  }
}

async function say(text) {
  if (running || !text || !knobs.check()) return;
  byId("welcome").hidden = true;
  messages.push({ role: "user", content: text });
  addUser(text);
  input.value = "";
  resize();
  await answer();
}

/** Answers the last message. */
async function answer() {
  if (!byId("model").value) await loadModels();
  const talk = messages;
  const view = new AnswerView();
  running = new Answer();
  busy(true);
  const system = knobs.system ? [{ role: "system", content: knobs.system }] : [];
  const body = {
    model: byId("model").value,
    messages: [...system, ...talk],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...knobs.fields(),
  };
  const current = running;
  const show = (pieces) => view.add(pieces);
  await current.read(body, knobs.key, show, (text) => view.think(text));
  if (running === current) {
    running = null;
    busy(false);
  }
  const length = talk.length;
  if (current.text) talk.push({ role: "assistant", content: current.text });
  const actions = [["Again", () => again(talk, length, view)]];
  if (current.text) actions.unshift(["Copy", (button) => copy(current.text, button)]);
  view.end(current.figures(), current.failure?.message, actions);
  if (current.failure?.status === 401) knobs.askForKey();
}

/** Only the last answer can be had anew: others have been answered themselves. */
function again(talk, length, view) {
  if (running || talk !== messages || talk.length > length + 1) return;
  talk.length = length;
  view.remove();
  if (knobs.check()) answer();
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function startAnew() {
  running?.stop();
  running = null;
  busy(false);
  messages = [];
  clear();
  byId("welcome").hidden = false;
  input.focus();
}

function busy(is) {
  byId("composer").classList.toggle("busy", is);
  byId("send").title = is ? "Stop" : "Send";
  byId("send").setAttribute("aria-label", byId("send").title);
}

function resize() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
}

function switchTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const next = (sessionStorage.getItem(THEME) ?? system) === "dark" ? "light" : "dark";
  sessionStorage.setItem(THEME, next);
  theme(next);
}

function togglePanel() {
  const narrow = matchMedia(NARROW).matches;
  document.body.classList.toggle(narrow ? "panel-open" : "panel-hidden");
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.stop();
  else say(input.value.trim());
});
input.addEventListener("input", resize);
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  say(input.value.trim());
});
for (const idea of byId("ideas").children) {
  idea.addEventListener("click", () => say(idea.textContent));
}
byId("new").addEventListener("click", startAnew);
byId("theme").addEventListener("click", switchTheme);
byId("panel").addEventListener("click", togglePanel);
byId("key").addEventListener("change", loadModels);
byId("model").addEventListener("change", () => {
  byId("welcome-model").textContent = byId("model").value;
});
document.querySelector("main").addEventListener("pointerdown", () => {
  document.body.classList.remove("panel-open");
});

theme(sessionStorage.getItem(THEME));
showAlternatives();
loadModels();
new Gauges(() => knobs.key);
