// Below the stages, over the same time: idle time of all, KV blocks, requests.

function drawFrame({ pen, theme, axis }, { name, top, height }) {
  pen.fillStyle = theme.ink;
  pen.fillText(name, 0, top + height / 2 - 8);
  pen.fillStyle = theme.sunken;
  pen.fillRect(axis.left, top, axis.width, height);
}

function trackNote({ pen, theme }, track, text) {
  pen.fillStyle = theme.quiet;
  pen.fillText(text, 0, track.top + track.height / 2 + 8);
}

function drawIdleTrack(timeline, track) {
  const { axis, theme, pen, report } = timeline;
  const bin = 4, step = (axis.span / axis.width) * bin, first = Math.floor(Math.max(axis.from, 0) / step);
  const bins = idleByBin(report, first, step, Math.ceil(Math.min(axis.to, axis.stop) / step) - first);
  const most = bins.reduce((most, shares) => Math.max(most, sum(shares)), 0);
  const scale = [0.05, 0.1, 0.2, 0.5, 1].find((each) => each >= most - 1e-6) ?? 1;
  pen.save();
  pen.beginPath();
  pen.rect(axis.left, track.top, axis.width, track.height);
  pen.clip();
  bins.forEach((shares, b) => {
    const left = axis.x((first + b) * step);
    let y = track.top + track.height;
    for (let cause = shares.length - 1; cause >= 0; cause--) {
      const part = (shares[cause] / scale) * track.height;
      if (part <= 0 || (theme.focus >= NUM_KINDS && theme.focus !== NUM_KINDS + cause)) continue;
      pen.fillStyle = theme.stage[NUM_KINDS + cause];
      pen.fillRect(left, y - part, bin + 0.3, part);
      y -= part;
    }
  });
  pen.restore();
  trackNote(timeline, track, `of all, to ${percent(scale, 0)}`);
}

// Of all stages' time, by cause.
function idleByBin({ stages, head }, first, step, count) {
  const numCauses = head.causes.length, { stop } = head;
  const bins = Array.from({ length: Math.max(count, 0) }, () => new Float64Array(numCauses));
  for (const row of stages) {
    const roughly = row.isRough(step);
    let before = new Float64Array(row.size), after = new Float64Array(row.size);
    row.until(Math.min(first * step, stop), before, roughly);
    bins.forEach((shares, b) => {
      row.until(Math.min((first + b + 1) * step, stop), after, roughly);
      for (let cause = 0; cause < numCauses; cause++) shares[cause] += (after[NUM_KINDS + cause] - before[NUM_KINDS + cause]) / (step * stages.length);
      [before, after] = [after, before];
    });
  }
  return bins;
}

function drawKvTrack(timeline, track) {
  const { report, theme } = timeline, blocks = report.head.kv_blocks || 1;
  drawSteps(timeline, track, report.queue.kv, blocks, theme.full[2], true);
  trackNote(timeline, track, `of ${grouped(blocks)}`);
}

function drawRequestTrack(timeline, track) {
  const { running, waiting, most } = timeline.report.queue;
  drawSteps(timeline, track, running, most, timeline.theme.full[1], true);
  drawSteps(timeline, track, waiting, most, CAUSE_COLOURS.jitter[darkMode.matches ? 1 : 0], false);
  trackNote(timeline, track, `to ${grouped(most)}, red: wait`);
}

// Values that hold until the next; of a column of pixels with several, from least to most.
function drawSteps({ axis, pen, report }, track, values, most, colour, filled) {
  const { at } = report.queue;
  if (!at.length) return;
  const y = (value) => track.top + track.height * (1 - Math.min(value / most, 1));
  const stop = Math.min(axis.x(axis.stop), axis.left + axis.width);
  pen.fillStyle = colour;
  for (let x = axis.left; x < stop; x++) {
    const first = lastAtMost(at, axis.tick(x)), last = lastAtMost(at, axis.tick(x + 1));
    if (last < 0) continue;
    let low = Infinity, high = -Infinity;
    const stride = Math.max(1, Math.floor((last - first) / 64));
    for (let i = Math.max(first, 0); i <= last; i += stride) {
      if (values[i] < low) low = values[i];
      if (values[i] > high) high = values[i];
    }
    if (filled) {
      pen.globalAlpha = 0.55;
      pen.fillRect(x, y(high), 1, track.top + track.height - y(high));
      pen.globalAlpha = 1;
    }
    pen.fillRect(x, y(high) - 1, 1, Math.max(y(low) - y(high), 1.5));
  }
}
