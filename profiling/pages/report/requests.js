// The table of requests: which waited how long, and the stages' idle time before its microbatches.

const REQUEST_COLUMNS = [
  ["request", (row) => row[0], (row) => String(row[0])],
  ["arrived", (row) => row[1], (row) => duration(row[1])],
  ["prompt", (row) => row[2], (row) => grouped(row[2])],
  ["output", (row) => row[3], (row) => grouped(row[3])],
  ["end", (row) => row[4], (row) => row[4]],
  ["first token after", (row) => row[5] ?? -1, (row) => (row[5] === null ? "–" : duration(row[5]))],
  ["between tokens, mean", (row) => row[6] ?? -1, (row) => (row[6] === null ? "–" : duration(row[6]))],
  ["largest", (row) => row[7] ?? -1, (row) => (row[7] === null ? "–" : duration(row[7]))],
  ["idle before it", (row) => row[8], (row) => duration(row[8])],
];
const ROWS_AT_ONCE = 20;

class Requests {
  constructor(report, theme, tip, onPick) {
    Object.assign(this, { report, theme, tip, onPick, by: 8, down: true, shown: ROWS_AT_ONCE });
    this.table = document.getElementById("requests");
    const { num_requests: all, num_ended: ended, requests } = report.head;
    const part = requests.length < all ? `the worst ${grouped(requests.length)} of ${grouped(all)}` : counted(all, "request");
    document.getElementById("requests-count").textContent = ended < all ? `${part}; ${grouped(all - ended)} had not ended` : part;
    document.getElementById("more").addEventListener("click", () => { this.shown += 4 * ROWS_AT_ONCE; this.draw(); });
  }

  draw() {
    const value = REQUEST_COLUMNS[this.by][1];
    const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0) * (this.down ? -1 : 1);
    const rows = [...this.report.head.requests].sort((a, b) => compare(value(a), value(b)));
    const most = Math.max(...rows.map((row) => row[8]), 1e-12);
    const head = element("tr", {}, ...REQUEST_COLUMNS.map(([name], column) => element("th", { "aria-sort": column !== this.by ? "none" : this.down ? "descending" : "ascending" },
      element("button", { type: "button", onclick: () => this.sortBy(column) }, name))), element("th", {}, "for what"));
    const body = rows.slice(0, this.shown).map((row) => element("tr", { tabindex: "0", class: "pick", title: "Show its time in the timeline", onclick: () => this.onPick(row), onkeydown: (event) => { if (event.key === "Enter") this.onPick(row); } },
      ...REQUEST_COLUMNS.map(([, , text]) => element("td", {}, text(row))), element("td", {}, this.causes(row, most))));
    this.table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
    document.getElementById("more").hidden = rows.length <= this.shown;
  }

  sortBy(column) {
    this.down = column === this.by ? !this.down : column !== 0 && column !== 1 && column !== 4;
    this.by = column;
    this.draw();
  }

  causes(row, most) {
    const parts = row[9].map(([cause, seconds]) => element("span", { style: { width: `${(100 * seconds) / most}%`, background: this.theme.full[NUM_KINDS + cause] } }));
    const facts = [...row[9]].sort((a, b) => b[1] - a[1]).map(([cause, seconds]) => [this.tip.swatch(NUM_KINDS + cause, words(this.report.head.causes[cause][0])), duration(seconds)]);
    return element("div", {
      class: "mini", onpointermove: (event) => this.tip.showText([heading(`Request ${row[0]}`, "idle time of all stages before its microbatches"), factList(facts)], event.clientX, event.clientY),
      onpointerleave: () => this.tip.hide(),
    }, ...parts);
  }
}
