// Puts the page together.

function drawHeader({ head, stages, microbatches }) {
  document.getElementById("title").textContent = head.title;
  document.getElementById("facts").textContent = [...head.facts, `${grouped(microbatches.index.length)} microbatches`].join(" · ");
  const busy = sum(head.stages.map((stage) => stage.busy_s)) / (head.stages.length * head.seconds || 1);
  const totals = head.causes.map(([name], c) => [name, sum(head.stages.map((stage) => stage.idle_s[c])) / (head.stages.length * head.seconds || 1)]);
  const [largest, share] = totals.reduce((a, b) => (b[1] > a[1] ? b : a), ["", 0]);
  const tiles = [["time", duration(head.seconds)], ["stages busy", percent(busy)]];
  if (largest) tiles.push(["largest cause of idle", `${words(largest)}`, percent(share)]);
  if (head.summary) {
    tiles.push(["tokens/s", rate(head.summary.total_tokens_per_s), `${rate(head.summary.output_tokens_per_s)} output`]);
    tiles.push(["first token p99", duration(head.summary.ttft_s.p99), `p50 ${duration(head.summary.ttft_s.p50)}`]);
    if (head.summary.tbt_s) tiles.push(["between tokens p99", duration(head.summary.tbt_s.p99), `p50 ${duration(head.summary.tbt_s.p50)}`]);
  }
  document.getElementById("tiles").replaceChildren(...tiles.map(([name, value, more]) => element("div", {}, element("dt", {}, name), element("dd", {}, value, more ? element("small", {}, more) : null))));
  const { notes } = head;
  document.getElementById("notes").hidden = !notes.length;
  document.querySelector("#notes ul").replaceChildren(...notes.map((note) => element("li", {}, note)));
}

function drawLegend(report, theme, onFocus) {
  const present = new Set();
  report.stages.forEach((row) => row.between(0, report.head.stop).forEach((ticks, c) => { if (ticks > 0) present.add(c); }));
  const items = [...present].sort((a, b) => a - b).map((c) => element("button", {
    type: "button", class: "key", "data-category": c, "aria-pressed": "false", title: c < NUM_KINDS ? "" : report.head.causes[c - NUM_KINDS][1],
    onclick: (event) => onFocus(c, event.currentTarget),
  }, element("i", { class: "swatch", style: { background: theme.full[c] } }), words(theme.nameOf(c))));
  const split = items.findIndex((item) => Number(item.dataset.category) >= NUM_KINDS);
  const at = split < 0 ? items.length : split;
  document.getElementById("legend").replaceChildren(element("span", { class: "quiet" }, "computing"), ...items.slice(0, at), element("span", { class: "quiet" }, "idle for"), ...items.slice(at));
}

async function start() {
  const report = await readReport();
  const { head } = report;
  const axis = new TimeAxis(head.stop, head.tick_s);
  const theme = new Theme(head.causes);
  const timeline = new Timeline(report, theme, axis);
  const tip = new Tip(report, theme, timeline);
  const panel = new Selected(report, tip);
  let kept = null; // the category that a click on the legend keeps

  const focus = (category) => {
    theme.focus = category ?? kept;
    theme.refresh();
    timeline.wanted();
  };
  const keep = (category) => {
    kept = kept === category ? null : category;
    document.querySelectorAll(".key").forEach((key) => key.setAttribute("aria-pressed", String(Number(key.dataset.category) === kept)));
    focus(null);
  };
  const select = (place, bringIntoView = false) => {
    timeline.selected = place;
    panel.show(place);
    if (place !== null && bringIntoView) showMicrobatch(report, axis, place);
    timeline.wanted();
  };
  const causes = new Causes(report, theme, axis, tip, focus);
  const requests = new Requests(report, theme, tip, (row) => {
    const margin = (row[10] - row[1]) * 0.05;
    axis.glide((row[1] - margin) / head.tick_s, (row[10] + margin) / head.tick_s);
    timeline.canvas.focus();
  });
  new TimelineInput(timeline, tip, select);

  const drawAll = () => {
    theme.refresh();
    drawLegend(report, theme, keep);
    timeline.wanted();
    causes.draw();
    drawMicrobatchTimes(report, theme);
    drawShares("ttft", head.ttft_s, head.summary?.ttft_s, theme);
    drawShares("tbt", head.tbt_s, head.summary?.tbt_s, theme);
    requests.draw();
  };
  axis.onChange(() => {
    timeline.wanted();
    document.getElementById("window").textContent = axis.text();
    if (causes.scope === "view") causes.draw();
  });
  const actions = { in: () => axis.zoom(0.5), out: () => axis.zoom(2), all: () => axis.glide(0, axis.stop) };
  document.querySelectorAll("[data-do]").forEach((button) => button.addEventListener("click", actions[button.dataset.do]));
  darkMode.addEventListener("change", drawAll);
  addEventListener("resize", drawAll);

  drawHeader(report);
  timeline.draw();
  axis.showAll();
  timeline.draw();
  const drawn_ms = performance.now();
  document.documentElement.dataset.drawn = drawn_ms.toFixed(0); // since the page was asked for
  requestAnimationFrame(() => setTimeout(drawAll));
  if (location.hash === "#measure") measure(timeline, axis, drawn_ms);
  if (/^#\d/.test(location.hash)) showPart(location.hash, axis);
  window.pipeserveReport = { report, axis, timeline, select };
}

// "#from,to" in seconds: what a link into the report shows.
function showPart(hash, axis) {
  const [from, to] = hash.slice(1).split(",").map(Number);
  if (to > from) axis.show(from / axis.tick_s, to / axis.tick_s);
}

function showMicrobatch(report, axis, place) {
  const rows = report.stages.map((row) => [row, row.find(place)]).filter(([, i]) => i >= 0);
  if (!rows.length) return;
  const from = Math.min(...rows.map(([row, i]) => row.gapStart(i))), to = Math.max(...rows.map(([row, i]) => row.ends[i]));
  const span = to - from;
  if (from >= axis.from && to <= axis.to && span > axis.span / 20) return;
  axis.glide(from - span * 0.6, to + span * 0.6);
}

// Pans and zooms over the run and tells how long the frames took to draw.
function measure(timeline, axis, drawn_ms) {
  const tell = (name, times) => {
    times.sort((a, b) => a - b);
    return `${name}: median ${times[times.length >> 1].toFixed(1)} ms, largest ${times.at(-1).toFixed(1)} ms`;
  };
  const timed = (work) => { work(); const began = performance.now(); timeline.draw(); return performance.now() - began; };
  const lines = [`first frame: ${drawn_ms.toFixed(0)} ms`];
  for (const share of [1, 0.1, 0.01, 0.001, 0.0001]) {
    const span = axis.stop * share;
    const times = Array.from({ length: 30 }, (_, n) => timed(() => axis.show(axis.stop * 0.4 + n * span * 0.02, axis.stop * 0.4 + span + n * span * 0.02)));
    lines.push(tell(`${100 * share} % of the run`, times));
  }
  axis.showAll();
  console.log(lines.join("; "));
}

start().catch((error) => {
  document.getElementById("title").textContent = "This report could not be read";
  document.getElementById("facts").textContent = String(error);
  throw error;
});
