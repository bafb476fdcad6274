// What is told of the thing under the pointer, and of the microbatch that is followed.

const MOST_CHUNKS = 7;

class Tip {
  constructor(report, theme, timeline) {
    Object.assign(this, { report, theme, timeline, asked: 0 });
    this.box = document.getElementById("tip");
  }

  hide() { this.asked += 1; this.box.hidden = true; }

  async show(found, x, y) {
    const asked = ++this.asked;
    const [known, more] = this.content(found);
    if (!known) return this.hide();
    this.put([known], x, y);
    if (!more) return;
    const added = await more();
    if (asked === this.asked) this.put([known, added], x, y);
  }

  showText(nodes, x, y) { this.asked += 1; this.put(nodes, x, y); }

  put(nodes, x, y) {
    this.box.replaceChildren(...nodes.filter(Boolean));
    this.box.hidden = false;
    const { width, height } = this.box.getBoundingClientRect();
    const left = x + 18 + width > innerWidth ? Math.max(x - width - 18, 8) : x + 18;
    const top = Math.min(Math.max(y - 20, 8), Math.max(innerHeight - height - 8, 8));
    Object.assign(this.box.style, { left: `${left}px`, top: `${top}px` });
  }

  // What is known at once, and a function that fetches the rest.
  content(found) {
    if (found.track) return [this.ofTrack(found)];
    if (found.column) return [this.ofColumn(found)];
    if (found.gap !== undefined) return [found.stage < 0 ? null : this.ofGap(found)];
    if (found.block === undefined) return [null];
    return found.stage < 0 ? this.ofDriver(found) : this.ofBlock(found);
  }

  seconds(ticks) { return duration(ticks * this.report.head.tick_s); }

  ofTrack({ track, tick }) {
    const { queue, head } = this.report;
    if (track === "idle") return null;
    const i = lastAtMost(queue.at, tick);
    if (i < 0) return null;
    const facts = track === "requests"
      ? [["running", grouped(queue.running[i])], ["waiting", grouped(queue.waiting[i])]]
      : [["blocks in use", `${grouped(queue.kv[i])} of ${grouped(head.kv_blocks)}`], ["", percent(queue.kv[i] / (head.kv_blocks || 1))]];
    return element("div", {}, heading(track), factList(facts));
  }

  ofColumn({ line, tick, stage }) {
    const step = this.timeline.axis.span / this.timeline.axis.width;
    const spent = line.row.between(Math.max(tick - 2 * step, 0), Math.min(tick + 2 * step, this.timeline.axis.stop));
    const all = Math.max(Math.min(tick + 2 * step, this.timeline.axis.stop) - Math.max(tick - 2 * step, 0), 1);
    const name = stage < 0 ? "Driver" : `Stage ${stage}`;
    const facts = [...spent.entries()].filter(([, ticks]) => ticks / all > 0.0005).map(([c, ticks]) => [
      this.swatch(c, stage < 0 ? `${DRIVER_NAMES[c]}s` : c < NUM_KINDS ? `${KIND_NAMES[c]} microbatches` : words(this.theme.nameOf(c)), stage < 0), percent(ticks / all)]);
    if (stage < 0) facts.push(["neither", percent(Math.max(1 - sum(spent) / all, 0))]);
    return element("div", {}, heading(name, `within ${this.seconds(4 * step)}`), factList(facts));
  }

  swatch(category, text, ofDriver = false) {
    const colour = (ofDriver ? DRIVER_COLOURS[category]?.[darkMode.matches ? 1 : 0] : null) ?? this.theme.full[category];
    return element("span", {}, element("i", { class: "swatch", style: { background: colour } }), text);
  }

  ofGap({ line, gap, stage }) {
    const { row } = line;
    const length = row.starts[gap] - row.gapStart(gap);
    const next = gap < row.count ? `before ${row.isHead[gap] ? "the head of " : ""}microbatch ${this.report.microbatches.index[row.place[gap]]}` : "after its last microbatch";
    return element("div", {}, heading(`Stage ${stage} idle for ${this.seconds(length)}`, next), ...this.causesOf(row, gap));
  }

  causesOf(row, gap) {
    const length = row.starts[gap] - row.gapStart(gap);
    const parts = [];
    for (let c = row.firstCause[gap]; c < row.firstCause[gap + 1]; c++) parts.push([row.cause[c], row.share[c] / 255]);
    parts.sort((a, b) => b[1] - a[1]);
    if (!parts.length) return [];
    const facts = parts.map(([cause, share]) => [this.swatch(NUM_KINDS + cause, words(this.report.head.causes[cause][0])), this.seconds(length * share)]);
    return [factList(facts), element("p", { class: "why" }, sentence(this.report.head.causes[parts[0][0]][1]))];
  }

  ofBlock({ line, block, place, stage }) {
    const { microbatches } = this.report;
    const { row } = line;
    const kind = microbatches.kind[place];
    if (row.isHead[block]) return [this.ofHead(row, block, microbatches.index[place], stage)];
    const known = element("div", {}, heading(`Microbatch ${microbatches.index[place]} on stage ${stage}`, `${KIND_NAMES[kind]}, ${grouped(microbatches.tokens[place])} tokens`));
    return [known, async () => {
      const details = await this.report.details.of(place);
      return element("div", {}, factList(this.measured(details, stage, row, block)), chunkList(details.chunks));
    }];
  }

  ofHead(row, block, index, stage) {
    const gap = row.starts[block] - row.gapStart(block);
    const facts = [["took", this.seconds(row.ends[block] - row.starts[block])], ["idle before", gap ? this.seconds(gap) : "nothing"]];
    return element("div", {}, heading(`Head of microbatch ${index} on stage ${stage}`, "with the sampling; its layers were done on all stages"), factList(facts));
  }

  measured({ plan, spans, chunks }, stage, row, block) {
    const span = spans[stage];
    const facts = [["computed", this.seconds(row.ends[block] - row.starts[block])]];
    const predicted = plan?.predicted?.[stage];
    if (predicted) {
      const off = span.length / predicted - 1;
      facts.push(["predicted", `${this.seconds(predicted)} (${off >= 0 ? "+" : "-"}${percent(Math.abs(off), 0)})`]);
    }
    if (span?.cpu !== null && span) facts.push(["on its core", this.seconds(span.cpu)]);
    if (span?.head) facts.push(["head and sampling", this.seconds(span.head)]);
    if (span?.summed) facts.push(["all-reduce", this.seconds(span.summed)]);
    if (span?.waited) facts.push(["waited for a rank", this.seconds(span.waited)]);
    const gap = row.starts[block] - row.gapStart(block);
    facts.push(["idle before", gap ? this.seconds(gap) : "nothing"]);
    const decodes = chunks.filter((chunk) => chunk.stop - chunk.start === 1), prefills = chunks.filter((chunk) => chunk.stop - chunk.start > 1);
    if (prefills.length) facts.push(["prefill", `${grouped(sum(prefills.map((c) => c.stop - c.start)))} tokens of ${counted(prefills.length, "request")}`]);
    if (decodes.length) {
      const contexts = decodes.map((chunk) => chunk.stop);
      const [least, most] = [Math.min(...contexts), Math.max(...contexts)];
      facts.push(["decodes", `${decodes.length}, contexts ${least === most ? grouped(least) : `${grouped(least)} to ${grouped(most)}`}`]);
    }
    return facts;
  }

  ofDriver({ line, block, place }) {
    const { row } = line;
    const took = this.seconds(row.ends[block] - row.starts[block]);
    const index = this.report.microbatches.index[place];
    if (row.kind[block] === 1) return [element("div", {}, heading(`Result of microbatch ${index}`, `taken up in ${took}`))];
    const known = element("div", {}, heading(`Plan of microbatch ${index}`, `made and sent in ${took}`));
    return [known, async () => {
      const { plan, chunks } = await this.report.details.of(place);
      return element("div", {}, factList(planFacts(plan, this)), chunkList(chunks));
    }];
  }
}

function planFacts(plan, tip) {
  if (!plan) return [["", "no record of it"]];
  const facts = [];
  if (plan.waitedFor) {
    const reasons = { no_requests: "a request", window: "a place in the window", kv: "KV blocks", token: "a token" };
    facts.push(["waited for", reasons[plan.waitedFor] ?? plan.waitedFor]);
    facts.push(["woken by", plan.after >= 0 ? `the result of ${plan.after}` : "an arrival"]);
    if (plan.woken !== null) facts.push(["then until the plan", tip.seconds(Math.max(plan.start - plan.woken, 0))]);
  } else facts.push(["waited for", "nothing"]);
  facts.push(["free KV blocks then", grouped(plan.free)]);
  return facts;
}

const sum = (values) => values.reduce((a, b) => a + b, 0);
const counted = (number, noun) => `${grouped(number)} ${noun}${number === 1 ? "" : "s"}`;
const sentence = (text) => text[0].toUpperCase() + text.slice(1) + ".";
const heading = (text, quiet) => element("h3", {}, text, quiet ? element("small", {}, quiet) : null);
const factList = (facts) => element("dl", { class: "facts" }, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));

function chunkText({ request, start, stop, sampled }) {
  const what = stop - start === 1 ? `decode at ${grouped(start)}` : `prefill ${grouped(start)} to ${grouped(stop)}`;
  return `request ${request}: ${what}${sampled > 1 ? `, ${grouped(sampled)} tokens sampled` : ""}`;
}

function chunkList(chunks, most = MOST_CHUNKS) {
  const ordered = [...chunks].sort((a, b) => (b.stop - b.start) - (a.stop - a.start));
  const items = ordered.slice(0, most).map((chunk) => element("li", {}, chunkText(chunk)));
  if (ordered.length > most) items.push(element("li", { class: "quiet" }, `and ${ordered.length - most} more`));
  return element("ul", { class: "chunks" }, ...items);
}

// The panel under the timeline: one microbatch, stage by stage.
class Selected {
  constructor(report, tip) {
    Object.assign(this, { report, tip });
    this.box = document.getElementById("selected");
  }

  async show(place) {
    this.place = place;
    this.box.hidden = place === null;
    if (place === null) return;
    const details = await this.report.details.of(place);
    if (this.place !== place) return;
    const { microbatches } = this.report;
    const title = `Microbatch ${microbatches.index[place]}`;
    const what = `${KIND_NAMES[microbatches.kind[place]]}, ${grouped(microbatches.tokens[place])} tokens, ${counted(details.chunks.length, "request")}`;
    this.box.replaceChildren(
      element("div", { class: "followed" },
        element("div", {}, heading(title, what), factList(planFacts(details.plan, this.tip)), chunkList(details.chunks, 10)),
        element("div", { class: "scroll" }, this.table(details, place))));
  }

  table(details, place) {
    const head = ["stage", "idle before", "mostly for", "plan there", "input there", "computed", "on its core", "predicted", "sent after", "bytes"];
    const ago = (ticks) => ticks === null ? "–" : ticks < 0 ? `${this.tip.seconds(-ticks)} late` : `${this.tip.seconds(ticks)} before`;
    const rows = this.report.stages.map((row, stage) => {
      const i = row.find(place), span = details.spans[stage];
      if (i < 0 || !span) return [stage, "no record", "", "", "", "", "", "", "", ""];
      let cause = null, most = 0;
      for (let c = row.firstCause[i]; c < row.firstCause[i + 1]; c++) if (row.share[c] > most) [most, cause] = [row.share[c], row.cause[c]];
      const gap = row.starts[i] - row.gapStart(i), predicted = details.plan?.predicted?.[stage];
      return [stage, gap ? this.tip.seconds(gap) : "–", cause === null || !gap ? "" : this.tip.swatch(NUM_KINDS + cause, words(this.report.head.causes[cause][0])),
        ago(span.plan), ago(span.input), this.tip.seconds(row.ends[i] - row.starts[i]), span.cpu === null ? "–" : this.tip.seconds(span.cpu), predicted ? this.tip.seconds(predicted) : "–", span.sent === null ? "–" : this.tip.seconds(span.sent), grouped(span.bytes)];
    });
    return element("table", { class: "numbers" },
      element("thead", {}, element("tr", {}, ...head.map((name) => element("th", {}, name)))),
      element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, typeof cell === "number" ? String(cell) : cell))))));
  }
}
