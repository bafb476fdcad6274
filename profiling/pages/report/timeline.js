// The picture of all rows. Far out, each column of pixels shows what its time went to, stacked; close
// up, microbatches are blocks, and the gap before each is striped by the causes that it is put down to.

const GUTTER = 104, AXIS = 24, ROW_GAP = 5, BLOCKS_FROM = 5; // pixels that a block and its gap take

class Timeline {
  constructor(report, theme, axis) {
    Object.assign(this, { report, theme, axis, hovered: null, selected: null });
    this.canvas = document.getElementById("timeline");
    this.wholeRun = new WholeRun(report, theme, axis);
    this.strip = document.createElement("canvas");
    this.layOut();
  }

  layOut() {
    const { driver, stages } = this.report;
    const height = stages.length <= 2 ? 64 : stages.length <= 4 ? 46 : stages.length <= 8 ? 34 : 22;
    let top = AXIS;
    const take = (height, row) => { const made = { top, height, ...row }; top += height + ROW_GAP; return made; };
    this.rows = [take(22, { name: "driver", row: driver, stage: -1 })];
    stages.forEach((row, stage) => this.rows.push(take(height, { name: `stage ${stage}`, row, stage })));
    top += 8;
    this.tracks = [
      take(62, { name: "idle", draw: drawIdleTrack }),
      take(42, { name: "KV blocks", draw: drawKvTrack }),
      take(42, { name: "requests", draw: drawRequestTrack }),
    ];
    this.height = top;
  }

  wanted() { // draws once before the next frame, however often it is asked
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => { this.asked = false; this.draw(); });
  }

  draw() {
    const { pen, width } = fitCanvas(this.canvas, this.height);
    Object.assign(this, { pen, axisWidth: width });
    this.axis.left = GUTTER;
    this.axis.width = Math.max(width - GUTTER - 8, 10);
    this.drawMarks();
    this.rows.forEach((row) => this.drawRow(row));
    this.tracks.forEach((track) => { drawFrame(this, track); track.draw(this, track); });
    if (this.selected !== null) drawFollowed(this, this.selected, true);
    else if (this.hovered?.place !== undefined) drawFollowed(this, this.hovered.place, false);
    this.drawFaults();
    this.drawCrosshair();
    this.wholeRun.draw();
  }

  drawMarks() {
    const { pen, axis, theme } = this;
    pen.textBaseline = "middle";
    for (const { tick, text } of axis.marks(Math.max(axis.width / 130, 2))) {
      const x = Math.round(axis.x(tick)) + 0.5;
      pen.fillStyle = theme.line;
      pen.fillRect(x - 0.5, AXIS - 6, 1, this.height - AXIS);
      pen.fillStyle = theme.quiet;
      pen.textAlign = x + pen.measureText(text).width / 2 > this.axisWidth ? "right" : "center";
      pen.fillText(text, Math.min(x, this.axisWidth), 8);
    }
    pen.textAlign = "left";
  }

  // ---- rows ----

  drawRow(line) {
    const { pen, axis, theme } = this;
    const { row, top, height } = line;
    pen.fillStyle = theme.ink;
    pen.fillText(line.name, 0, top + (line.stage < 0 || height < 30 ? height / 2 : height / 2 - 8));
    if (line.stage >= 0 && height >= 30) {
      pen.fillStyle = theme.quiet;
      pen.fillText(`busy ${percent(this.busyShare(row))}`, 0, top + height / 2 + 8);
    }
    pen.fillStyle = theme.sunken;
    const left = Math.max(axis.x(0), axis.left), right = Math.min(axis.x(axis.stop), axis.left + axis.width);
    pen.fillRect(left, top, Math.max(right - left, 0), height);
    const first = Math.max(lastAtMost(row.starts, axis.from, row.count), 0);
    const last = lastAtMost(row.starts, axis.to, row.count);
    line.shown = [first, last];
    const perBlock = axis.width / Math.max(last - first + 1, 1);
    line.blocks = perBlock >= (line.stage < 0 ? BLOCKS_FROM / 2 : BLOCKS_FROM);
    if (line.blocks) this.drawBlocks(line, first, last);
    else this.drawDense(line);
  }

  busyShare(row) {
    const spent = row.between(Math.max(this.axis.from, 0), Math.min(this.axis.to, this.axis.stop));
    let busy = 0, all = 0;
    spent.forEach((ticks, c) => { all += ticks; if (c < NUM_KINDS) busy += ticks; });
    return all ? busy / all : 0;
  }

  // Bins start at multiples of their own length, so that panning moves them and does not change them.
  drawDense(line) {
    const { pen, axis } = this, { row, top, height } = line, bin = this.binOf(line);
    const step = (axis.span / axis.width) * bin, first = Math.floor(Math.max(axis.from, 0) / step);
    const columns = Math.ceil(Math.min(axis.to, axis.stop) / step) - first;
    const rows = Math.max(Math.round(height * (devicePixelRatio || 1)), 1);
    if (columns < 1) return;
    const image = new ImageData(columns, rows);
    this.fillColumns(new Uint32Array(image.data.buffer), row, line.stage < 0 ? this.theme.driverWords : this.theme.stageWords, first, step, columns, rows);
    this.strip.width = columns;
    this.strip.height = rows;
    this.strip.getContext("2d").putImageData(image, 0, 0);
    pen.save();
    pen.beginPath();
    pen.rect(axis.left, top, Math.min(axis.x(axis.stop) - axis.left, axis.width), height);
    pen.clip();
    pen.imageSmoothingEnabled = false;
    pen.drawImage(this.strip, axis.x(first * step), top, columns * bin, height);
    pen.restore();
  }

  // Pixels: enough for some blocks, so that a column shows shares and not whether it met a gap.
  binOf(line) {
    const perBlock = this.axis.width / Math.max(line.shown[1] - line.shown[0] + 1, 1);
    return Math.min(Math.max(Math.round(4 * perBlock), 2), 4);
  }

  fillColumns(pixels, row, words, first, step, columns, rows) {
    const stop = this.axis.stop, roughly = row.isRough(step);
    let before = new Float64Array(row.size), after = new Float64Array(row.size);
    row.until(Math.min(first * step, stop), before, roughly);
    for (let column = 0; column < columns; column++) {
      const start = (first + column) * step, end = Math.min(start + step, stop);
      row.until(end, after, roughly);
      let sum = 0, y = rows;
      for (let c = 0; c < row.size; c++) {
        const part = after[c] - before[c];
        if (part <= 0) continue;
        sum += part;
        const reached = rows - Math.min(Math.round((sum / (end - start)) * rows), rows);
        while (y > reached) pixels[--y * columns + column] = words[c];
      }
      while (y > 0) pixels[--y * columns + column] = this.theme.sunkenWord;
      [before, after] = [after, before];
    }
  }

  drawBlocks(line, first, last) {
    const { row } = line;
    this.pen.save();
    this.pen.beginPath();
    this.pen.rect(this.axis.left, line.top - 2, this.axis.width, line.height + 4);
    this.pen.clip();
    for (let i = first; i <= last + 1 && i <= row.count; i++) this.drawGap(line, i);
    for (let i = first; i <= last; i++) this.drawBlock(line, i);
    this.pen.restore();
  }

  drawBlock(line, i) {
    const { pen, axis, theme } = this;
    const { row, top, height } = line;
    const left = axis.x(row.starts[i]), right = axis.x(row.ends[i]);
    const width = Math.max(right - left - (right - left > 4 ? 1 : 0), line.stage < 0 ? 1 : 0.4);
    const colour = (line.stage < 0 ? theme.driver : theme.stage)[row.kind[i]];
    pen.fillStyle = colour;
    pen.fillRect(left, top, width, height);
    if (row.isHead[i]) this.drawHeadMark(left, top, width, height);
    const from = Math.max(left, axis.left), room = Math.min(left + width, axis.left + axis.width) - from;
    if (room < 40) return;
    const place = row.place[i], name = `${line.stage < 0 ? `${DRIVER_NAMES[row.kind[i]]} ` : row.isHead[i] ? "head " : ""}${this.report.microbatches.index[place]}`;
    if (pen.measureText(name).width + 10 > room) return;
    pen.fillStyle = inkOn(colour);
    const two = line.stage >= 0 && !row.isHead[i] && height >= 30 && room > 84;
    pen.fillText(name, from + 6, top + height / 2 - (two ? 7 : 0));
    if (two) {
      pen.globalAlpha = 0.75;
      pen.fillText(`${grouped(this.report.microbatches.tokens[place])} tokens`, from + 6, top + height / 2 + 8);
      pen.globalAlpha = 1;
    }
  }

  // A head by itself has its microbatch's colour, and a paler band at either edge.
  drawHeadMark(left, top, width, height) {
    const { pen, theme } = this, band = Math.max(Math.round(height / 8), 2);
    pen.fillStyle = theme.paper;
    pen.globalAlpha = 0.55;
    pen.fillRect(left, top, width, band);
    pen.fillRect(left, top + height - band, width, band);
    pen.globalAlpha = 1;
  }

  drawGap(line, i) {
    const { pen, axis, theme } = this;
    const { row, top, height } = line;
    const left = axis.x(row.gapStart(i)), width = axis.x(row.starts[i]) - left;
    if (width < 0.25 || line.stage < 0) return;
    let y = top, largest = -1, most = 0;
    for (let c = row.firstCause[i]; c < row.firstCause[i + 1]; c++) {
      const part = (row.share[c] / 255) * height;
      pen.fillStyle = theme.stage[NUM_KINDS + row.cause[c]];
      pen.fillRect(left, y, width, part);
      if (part > most) [most, largest] = [part, { y, part, cause: row.cause[c] }];
      y += part;
    }
    const from = Math.max(left, axis.left), room = Math.min(left + width, axis.left + axis.width) - from;
    if (room < 50 || most < 12) return;
    const name = words(theme.causes[largest.cause][0]);
    if (pen.measureText(name).width + 10 > room) return;
    pen.fillStyle = inkOn(theme.stage[NUM_KINDS + largest.cause]);
    pen.fillText(name, from + 5, largest.y + largest.part / 2);
  }

  drawFaults() {
    const { pen, axis, theme, rows } = this, last = rows.at(-1);
    for (const [stage, seconds] of this.report.head.faults) {
      const x = axis.x(seconds / axis.tick_s), text = `stage ${stage} lost`;
      if (x < axis.left || x > axis.left + axis.width) continue;
      pen.fillStyle = CAUSE_COLOURS.fault[darkMode.matches ? 1 : 0];
      pen.fillRect(x - 1, AXIS - 4, 2, last.top + last.height - AXIS + 4);
      const width = pen.measureText(text).width + 10, left = Math.min(x + 1, axis.left + axis.width - width);
      pen.fillRect(left, rows[0].top, width, 17);
      pen.fillStyle = "#ffffff";
      pen.fillText(text, left + 5, rows[0].top + 9);
    }
  }

  drawCrosshair() {
    if (this.hovered === null) return;
    const { pen, axis, theme } = this;
    const x = this.hovered.x;
    pen.fillStyle = theme.quiet;
    pen.globalAlpha = 0.5;
    pen.fillRect(x, AXIS - 6, 1, this.height - AXIS);
    pen.globalAlpha = 1;
    const text = axis.moment(axis.tick(x)), width = pen.measureText(text).width + 12;
    const left = Math.min(Math.max(x - width / 2, axis.left), this.axisWidth - width);
    pen.fillStyle = theme.ink;
    pen.beginPath();
    pen.roundRect(left, 0, width, 17, 4);
    pen.fill();
    pen.fillStyle = theme.paper;
    pen.fillText(text, left + 6, 9);
  }
}
