// Colours and words. Causes go by family: supply of work in greys and violets, differences between
// microbatches in yellows to browns, between stages in magentas, messages in greens, trouble in reds.

const CAUSE_COLOURS = {
  fill: ["#8c877d", "#9a948a"],
  drain: ["#b5b0a6", "#716c63"],
  no_requests: ["#dcd8cf", "#47443e"],
  too_few_microbatches: ["#7b6bbd", "#9384d8"],
  kv_full: ["#43307f", "#6650b0"],
  prefill_length: ["#f0a202", "#f0a202"],
  prefill_vs_decode: ["#f7d046", "#f7d046"],
  context_length: ["#c67b10", "#cf8a24"],
  decode_count: ["#8a5a0b", "#a06c17"],
  stage_imbalance: ["#d455a2", "#dd62ad"],
  head_and_sampling: ["#8b1a62", "#a82c7b"],
  all_reduce: ["#e39ac4", "#eab0d2"],
  rank_wait: ["#5b1145", "#7a2260"],
  token_feedback: ["#00a087", "#00a78d"],
  planning: ["#00695a", "#00806d"],
  control: ["#6fcdb5", "#6fcdb5"],
  link: ["#86b817", "#8fc31d"],
  jitter: ["#e4572e", "#ee6540"],
  fault: ["#a10d0d", "#c22020"],
  unknown: ["#2b2b2b", "#f2f2f2"],
};
const KIND_COLOURS = [["#bdd3ee", "#3d5a80"], ["#7ea6d9", "#5b86bd"], ["#3c6fb4", "#8db6ea"], ["#cfd4da", "#5a6068"]];
const DRIVER_COLOURS = [["#5b6672", "#b3bcc6"], ["#a9b3bd", "#68727d"], ["#a9b3bd", "#68727d"], ["#a9b3bd", "#68727d"]];
const KIND_NAMES = ["decode", "mixed", "prefill", "not known"];
const DRIVER_NAMES = ["plan", "completion"];

const darkMode = matchMedia("(prefers-color-scheme: dark)");

// Colours of a row's categories, those that are not looked at paled.
class Theme {
  constructor(causes) {
    this.causes = causes;
    this.focus = null; // a category, or null for all
    this.refresh();
  }

  refresh() {
    const dark = darkMode.matches ? 1 : 0;
    const style = getComputedStyle(document.documentElement);
    const named = (name) => style.getPropertyValue(name).trim();
    this.paper = named("--paper");
    this.ink = named("--ink");
    this.quiet = named("--quiet");
    this.line = named("--line");
    this.accent = named("--accent");
    this.sunken = named("--sunken");
    this.full = [...KIND_COLOURS.map((pair) => pair[dark]), ...this.causes.map(([name]) => CAUSE_COLOURS[name]?.[dark] ?? "#888888")];
    const paled = (colours) => colours.map((colour, c) => this.focus === null || this.focus === c ? colour : mixed(colour, this.paper, 0.82));
    this.stage = paled(this.full);
    this.driver = [...DRIVER_COLOURS.map((pair) => pair[dark]), ...this.full.slice(NUM_KINDS)];
    if (this.focus !== null) this.driver = this.driver.map((colour) => mixed(colour, this.paper, 0.82));
    this.stageWords = Uint32Array.from(this.stage, wordOf);
    this.driverWords = Uint32Array.from(this.driver, wordOf);
    this.sunkenWord = wordOf(this.sunken);
  }

  nameOf(category) {
    return category < NUM_KINDS ? KIND_NAMES[category] : this.causes[category - NUM_KINDS][0];
  }
}

const channels = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
const hex = (values) => "#" + values.map((value) => Math.round(value).toString(16).padStart(2, "0")).join("");
function mixed(colour, other, share) {
  const [a, b] = [channels(colour), channels(other)];
  return hex(a.map((value, i) => value * (1 - share) + b[i] * share));
}
function wordOf(colour) { // as ImageData wants it, on a machine that is little-endian
  const [red, green, blue] = channels(colour);
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}
function inkOn(colour) {
  const [red, green, blue] = channels(colour);
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#15191f" : "#ffffff";
}

// ---- words ----

const words = (name) => name.replaceAll("_", " ");
const percent = (share, digits = 1) => `${(100 * share).toFixed(share !== 0 && share < 0.0005 ? 2 : digits)} %`;
const rate = (number) => (number < 100 ? number.toFixed(1) : grouped(number));
const grouped = (number) => Math.round(number).toLocaleString("en-US");

function duration(seconds, digits = 3) {
  const size = Math.abs(seconds);
  if (size === 0) return "0 s";
  const [value, unit] = size >= 120 ? [seconds / 60, "min"] : size >= 1 ? [seconds, "s"] : size >= 1e-3 ? [seconds * 1e3, "ms"] : [seconds * 1e6, "µs"];
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.max(Math.abs(value), 1))));
  return `${Number(value.toFixed(unit === "µs" ? Math.min(decimals, 0) : decimals))} ${unit}`;
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(made.style, value);
    else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// A canvas at the resolution of the screen; draws in CSS pixels.
function fitCanvas(canvas, height) {
  const width = canvas.clientWidth, scale = devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = FONT;
  return { pen, width, height };
}
const FONT = '12px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
