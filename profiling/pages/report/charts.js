// Shares of each stage's time, by cause; and how microbatch and token times are distributed.

class Causes {
  constructor(report, theme, axis, tip, onFocus) {
    Object.assign(this, { report, theme, axis, tip, onFocus, scope: "run" });
    for (const button of document.querySelectorAll("[data-scope]")) {
      button.addEventListener("click", () => {
        this.scope = button.dataset.scope;
        document.querySelectorAll("[data-scope]").forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
        this.draw();
      });
    }
  }

  spent() {
    const { head, stages } = this.report;
    const [from, to] = this.scope === "run" ? [0, this.axis.stop] : [Math.max(this.axis.from, 0), Math.min(this.axis.to, this.axis.stop)];
    const totals = stages.map((row) => Array.from(row.between(from, to), (ticks) => ticks * head.tick_s));
    if (this.scope === "run") { // exactly as the ledger has it
      head.stages.forEach((stage, s) => stage.idle_s.forEach((seconds, c) => { totals[s][NUM_KINDS + c] = seconds; }));
    }
    return { totals, seconds: (to - from) * head.tick_s };
  }

  draw() {
    const { totals, seconds } = this.spent();
    document.getElementById("causes-window").textContent = this.scope === "run" ? "" : `${duration(seconds)} of the run`;
    const size = totals[0]?.length ?? 0;
    const mean = Array.from({ length: size }, (_, c) => sum(totals.map((each) => each[c])) / totals.length);
    const bars = [this.bar("all stages", mean, seconds, "mean"), ...totals.map((each, s) => this.bar(`stage ${s}`, each, seconds, ""))];
    document.getElementById("bars").replaceChildren(...bars);
    fitLabels();
    this.drawTable(totals, mean, seconds);
  }

  bar(name, spent, seconds, extra) {
    const idle = sum(spent.slice(NUM_KINDS)) / seconds;
    const parts = spent.map((value, c) => [value / seconds, c]).filter(([share]) => share > 0.0004);
    const segments = parts.map(([share, c]) => {
      const colour = this.theme.stage[c], label = words(this.theme.nameOf(c));
      return element("span", {
        class: "segment", style: { width: `${100 * share}%`, background: colour, color: inkOn(colour) },
        onpointermove: (event) => this.tip.showText([heading(name), factList([[this.tip.swatch(c, label), percent(share)], ["", duration(share * seconds)]])], event.clientX, event.clientY),
        onpointerleave: () => this.tip.hide(),
      }, element("span", { "data-share": percent(share, 0) }, `${label} ${percent(share, 0)}`));
    });
    const text = `${name}: ${parts.map(([share, c]) => `${words(this.theme.nameOf(c))} ${percent(share)}`).join(", ")}`;
    return element("div", { class: `bar ${extra}` }, element("b", {}, name), element("div", { class: "segments", role: "img", "aria-label": text }, ...segments), element("em", {}, `idle ${percent(idle)}`));
  }

  drawTable(totals, mean, seconds) {
    const { causes } = this.report.head;
    const rows = causes.map(([name, text], cause) => ({ name, text, cause, share: mean[NUM_KINDS + cause] / seconds, most: Math.max(...totals.map((each) => each[NUM_KINDS + cause])) / seconds }))
      .filter(({ most }) => most > 0.00005).sort((a, b) => b.share - a.share);
    const head = element("tr", {}, ...["cause", "of all stages", "stage with most"].map((name) => element("th", {}, name)));
    const body = rows.map(({ name, text, cause, share, most }) => element("tr", {
      tabindex: "0", class: "pick", "data-cause": name,
      onpointerenter: () => this.onFocus(NUM_KINDS + cause), onpointerleave: () => this.onFocus(null),
      onfocus: () => this.onFocus(NUM_KINDS + cause), onblur: () => this.onFocus(null),
    }, element("td", {}, this.tip.swatch(NUM_KINDS + cause, words(name)), element("small", {}, text)), element("td", {}, percent(share)), element("td", {}, percent(most))));
    document.getElementById("causes").replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
  }
}

// Of each label the longest form that has room in its bar: with its name, the share alone, or none.
// Hovering tells all of it.
function fitLabels() {
  const labels = [...document.querySelectorAll("#bars .segment > span")];
  for (const shorter of [(label) => label.dataset.share, () => ""]) {
    labels.filter((label) => label.offsetWidth + 8 > label.parentElement.clientWidth)
      .forEach((label) => { label.textContent = shorter(label); });
  }
}

// ---- distributions ----

function drawMicrobatchTimes(report, theme) {
  const { stages, head } = report;
  const height = Math.max(40 + stages.length * 34, 290);
  const { pen, width } = fitCanvas(document.getElementById("microbatch-times"), height);
  const left = 56, right = width - 62, room = right - left, bins = Math.max(Math.floor(room / 3), 10);
  const [low, high] = rangeOf(stages);
  if (!(high > 0)) return;
  const at = (ticks) => Math.log(Math.max(ticks, low) / low) / Math.log(high / low);
  const each = (height - 34) / stages.length;
  pen.textBaseline = "middle";
  stages.forEach((row, stage) => {
    const counts = Array.from({ length: bins }, () => [0, 0, 0, 0]);
    for (let i = 0; i < row.count; i++) if (!row.isHead[i]) counts[Math.min(bins - 1, Math.floor(at(row.ends[i] - row.starts[i]) * bins))][row.kind[i]] += 1;
    const most = Math.max(...counts.map(sum), 1), base = 6 + (stage + 1) * each - 4;
    counts.forEach((kinds, b) => {
      let y = base;
      kinds.forEach((count, kind) => {
        const tall = (count / most) * (each - 8);
        pen.fillStyle = theme.full[kind];
        pen.fillRect(left + (b / bins) * room, y - tall, room / bins - 0.5, tall);
        y -= tall;
      });
    });
    pen.fillStyle = theme.line;
    pen.fillRect(left, base, room, 1);
    pen.fillStyle = theme.ink;
    pen.fillText(`stage ${stage}`, 0, base - each / 2 + 6);
    pen.fillStyle = theme.quiet;
    pen.fillText(duration(medianOf(row) * head.tick_s, 2), right + 6, base - each / 2 + 6);
  });
  pen.fillStyle = theme.quiet;
  pen.fillText("median", right + 6, height - 12);
  drawLogMarks(pen, theme, low * head.tick_s, high * head.tick_s, left, room, height - 12);
}

function rangeOf(stages) {
  let low = Infinity, high = 0;
  for (const row of stages) {
    for (let i = 0; i < row.count; i++) {
      const length = row.ends[i] - row.starts[i];
      if (length > 0 && length < low) low = length;
      if (length > high) high = length;
    }
  }
  return [low / 1.1, Math.max(high, low * 1.05) * 1.1];
}

function medianOf(row) {
  const lengths = new Float64Array(row.count);
  for (let i = 0; i < row.count; i++) lengths[i] = row.ends[i] - row.starts[i];
  return lengths.sort()[row.count >> 1] ?? 0;
}

function drawLogMarks(pen, theme, low, high, left, room, y) {
  pen.fillStyle = theme.quiet;
  pen.textAlign = "center";
  let taken = -Infinity;
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of high / low > 300 ? [1] : high / low > 12 ? [1, 3] : [1, 1.5, 2, 3, 4, 5, 6, 8]) {
      const value = factor * 10 ** power, x = left + (Math.log(value / low) / Math.log(high / low)) * room;
      const text = duration(value, 2), half = pen.measureText(text).width / 2;
      if (x < left || x > left + room || x - half < taken) continue;
      pen.fillRect(x, y - 12, 1, 4);
      pen.fillText(text, x, y);
      taken = x + half + 8;
    }
  }
  pen.textAlign = "left";
}

// Share of values that are at most so large, over a logarithmic axis; `values` are in order.
function drawShares(id, values, summary, theme) {
  const height = 260;
  const { pen, width } = fitCanvas(document.getElementById(id), height);
  pen.textBaseline = "middle";
  if (!values.length) {
    pen.fillStyle = theme.quiet;
    pen.fillText("there were none", 0, 20);
    return;
  }
  const left = 44, room = width - left - 14, top = 10, base = height - 34;
  const low = Math.max(values[0], values.at(-1) / 1e5, 1e-6) / 1.1, high = Math.max(values.at(-1), low * 1.2) * 1.1;
  const x = (value) => left + (Math.log(Math.max(value, low) / low) / Math.log(high / low)) * room;
  const y = (share) => base - share * (base - top);
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    pen.fillStyle = theme.line;
    pen.fillRect(left, y(share), room, 1);
    pen.fillStyle = theme.quiet;
    pen.fillText(percent(share, 0), 0, y(share));
  }
  const path = new Path2D();
  path.moveTo(left, base);
  values.forEach((value, i) => { path.lineTo(x(value), y(i / values.length)); path.lineTo(x(value), y((i + 1) / values.length)); });
  path.lineTo(left + room, y(1));
  const under = new Path2D(path);
  under.lineTo(left + room, base);
  under.closePath();
  pen.globalAlpha = 0.16;
  pen.fillStyle = theme.full[2];
  pen.fill(under);
  pen.globalAlpha = 1;
  pen.strokeStyle = theme.full[2];
  pen.lineWidth = 2;
  pen.stroke(path);
  drawLogMarks(pen, theme, low, high, left, room, height - 12);
  if (!summary) return;
  const marked = [["p50", 0.5], ["p90", 0.9], ["p99", 0.99]];
  marked.forEach(([name, share], n) => {
    const value = summary[name], line = base - 14 - 20 * (marked.length - 1 - n);
    pen.fillStyle = theme.accent;
    pen.beginPath();
    pen.arc(x(value), y(share), 4, 0, 7);
    pen.fill();
    pen.textAlign = "right"; // the corner under the curve's end is always free
    pen.fillStyle = theme.ink;
    pen.fillText(`${name}  ${duration(value)}`, left + room - 10, line);
    pen.textAlign = "left";
  });
}
