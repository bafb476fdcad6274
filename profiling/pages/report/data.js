// What html_data.py packed, as typed arrays; and how much of a row's time went where, up to any moment.

const DECODE = 0, MIXED = 1, PREFILL = 2, UNKNOWN = 3;
const NUM_KINDS = 4;
const GROUP = 8; // blocks between two sums that are kept

const elementText = (id) => document.getElementById(id).textContent;

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

async function inflate(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function makeColumns(bytes, layout) {
  return (name) => {
    const [offset, length, width] = layout[name];
    const part = bytes.subarray(offset, offset + length);
    if (width === 1) return part;
    const count = length / 4;
    const values = new Uint32Array(count);
    for (let i = 0; i < count; i++) {
      values[i] = part[i] | (part[count + i] << 8) | (part[2 * count + i] << 16) | (part[3 * count + i] << 24);
    }
    return values;
  };
}

// The last place whose value is at most `wanted`, or -1.
function lastAtMost(values, wanted, length = values.length) {
  let low = 0, high = length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= wanted) low = middle + 1; else high = middle;
  }
  return low - 1;
}

// A row of blocks. Its time goes to categories: kinds of blocks first, then causes of the gaps.
class Row {
  constructor(name, column, kinds, numCauses) {
    this.isDriver = name === "driver";
    const gaps = column(`${name}.gap`), lengths = column(`${name}.length`);
    this.count = lengths.length;
    this.place = column(`${name}.place`);
    this.isHead = this.isDriver ? new Uint8Array(this.count) : column(`${name}.head`);
    this.starts = new Float64Array(this.count + 1); // the last one: the end of the run
    this.ends = new Float64Array(this.count);
    this.kind = new Uint8Array(this.count);
    for (let i = 0, at = 0; i < this.count; i++) {
      this.starts[i] = at += gaps[i];
      this.ends[i] = at += lengths[i];
    }
    this.starts[this.count] = (this.count ? this.ends[this.count - 1] : 0) + gaps[this.count];
    for (let i = 0; i < this.count; i++) this.kind[i] = kinds(i, this.place[i]);
    this.size = NUM_KINDS + numCauses;
    this.takeCauses(name, column);
    this.sumUp();
  }

  takeCauses(name, column) {
    this.firstCause = new Uint32Array(this.count + 2);
    this.cause = this.share = new Uint8Array(0);
    if (this.isDriver) return;
    const counts = column(`${name}.causes`);
    for (let i = 0; i <= this.count; i++) this.firstCause[i + 1] = this.firstCause[i] + counts[i];
    this.cause = column(`${name}.cause`);
    this.share = column(`${name}.share`);
  }

  sumUp() {
    const groups = Math.floor(this.count / GROUP) + 1;
    this.sums = new Float64Array((groups + 1) * this.size);
    this.groupAt = new Float64Array(groups + 1);
    const running = new Float64Array(this.size);
    for (let i = 0; i <= this.count; i++) {
      if (i % GROUP === 0) {
        this.sums.set(running, (i / GROUP) * this.size);
        this.groupAt[i / GROUP] = this.gapStart(i);
      }
      this.addGap(running, i, Infinity);
      if (i < this.count) running[this.kind[i]] += this.ends[i] - this.starts[i];
    }
    this.sums.set(running, groups * this.size);
    this.groupAt[groups] = this.starts[this.count];
  }

  gapStart(i) { return i ? this.ends[i - 1] : 0; }

  addGap(totals, i, until) {
    const start = this.gapStart(i);
    const length = Math.min(this.starts[i], until) - start;
    if (length <= 0) return;
    for (let c = this.firstCause[i]; c < this.firstCause[i + 1]; c++) {
      totals[NUM_KINDS + this.cause[c]] += (length * this.share[c]) / 255;
    }
  }

  // Ticks by category from the start of the run to `at`; `roughly`: even within a group.
  until(at, totals, roughly = false) {
    const { size, sums } = this;
    if (roughly) {
      const group = Math.min(Math.max(lastAtMost(this.groupAt, at), 0), this.groupAt.length - 2);
      const length = this.groupAt[group + 1] - this.groupAt[group];
      const share = length > 0 ? Math.min((at - this.groupAt[group]) / length, 1) : 0;
      for (let c = 0, o = group * size; c < size; c++, o++) totals[c] = sums[o] + (sums[o + size] - sums[o]) * share;
      return;
    }
    const last = lastAtMost(this.starts, at, this.count); // the block that began last
    const group = Math.floor(Math.max(last, 0) / GROUP);
    for (let c = 0, o = group * size; c < size; c++, o++) totals[c] = sums[o];
    for (let i = group * GROUP; i <= last; i++) {
      this.addGap(totals, i, Infinity);
      totals[this.kind[i]] += Math.min(this.ends[i], at) - this.starts[i];
    }
    this.addGap(totals, last + 1, at);
  }

  // Whether steps of so many ticks hold a group and more.
  isRough(step) { return (this.count / this.starts[this.count]) * step >= GROUP; }

  between(start, stop) {
    const before = new Float64Array(this.size), after = new Float64Array(this.size);
    this.until(start, before);
    this.until(stop, after);
    return after.map((value, c) => value - before[c]);
  }

  // The block of a microbatch, or -1; on the driver's row its plan (kind 0) or completion (kind 1),
  // on a stage's its layers (0) or its head, where that is a block by itself (1).
  find(place, kind = 0) {
    if (this.blockOf === undefined) {
      let most = 0;
      for (let i = 0; i < this.count; i++) most = Math.max(most, this.place[i]);
      this.blockOf = new Int32Array(2 * (most + 1)).fill(-1);
      for (let i = 0; i < this.count; i++) this.blockOf[2 * this.place[i] + (this.isDriver ? this.kind[i] : this.isHead[i])] = i;
    }
    return this.blockOf[2 * place + kind] ?? -1;
  }
}

async function readReport() {
  const head = JSON.parse(elementText("head"));
  const column = makeColumns(await inflate(elementText("columns")), head.layout);
  const index = column("microbatch.index");
  for (let i = 1; i < index.length; i++) index[i] += index[i - 1];
  const microbatches = { index, kind: column("microbatch.kind"), tokens: column("microbatch.tokens") };
  const numCauses = head.causes.length;
  const stages = head.stages.map((_, s) => new Row(`stage${s}`, column, (i, place) => microbatches.kind[place], numCauses));
  const driverKind = column("driver.kind");
  const driver = new Row("driver", column, (i) => driverKind[i], numCauses);
  const queue = { at: Float64Array.from(column("queue.at")), kv: column("queue.kv"), running: column("queue.running"), waiting: column("queue.waiting") };
  for (let i = 1; i < queue.at.length; i++) queue.at[i] += queue.at[i - 1];
  queue.most = [...queue.running, ...queue.waiting].reduce((a, b) => Math.max(a, b), 1);
  return { head, microbatches, stages, driver, queue, details: new Details(head.block) };
}

// What only a look at one microbatch needs; unpacked when it is looked at.
class Details {
  constructor(size) {
    this.size = size;
    this.blocks = new Map();
  }

  async of(place) {
    const number = Math.floor(place / this.size);
    if (!this.blocks.has(number)) this.blocks.set(number, this.read(number));
    return this.pick(await this.blocks.get(number), place % this.size);
  }

  async read(number) {
    this.lines ??= elementText("details").trim().split("\n");
    const block = JSON.parse(new TextDecoder().decode(await inflate(this.lines[number])));
    block.chunks = this.unpackChunks(block.chunks);
    return block;
  }

  unpackChunks({ counts, requests, lengths, starts, sampled }) {
    const stops = new Map();
    let next = 0, request = 0;
    return counts.map((count) => Array.from({ length: count }, () => {
      request += requests[next];
      const start = (stops.get(request) ?? 0) + starts[next];
      const chunk = { request, start, stop: start + lengths[next], sampled: sampled[next] };
      stops.set(request, chunk.stop);
      next += 1;
      return chunk;
    }));
  }

  pick(block, at) {
    const plan = block.plans[at];
    return {
      plan: plan && { waitedFor: plan[0], after: plan[1], woken: plan[2], start: plan[3], sent: plan[4], free: plan[5], predicted: plan[6], completed: plan[7] },
      spans: block.spans.map((columns) => columns.length[at] !== null
        ? Object.fromEntries(Object.entries(columns).map(([name, values]) => [name, values[at]])) : null),
      chunks: block.chunks[at],
    };
  }
}
