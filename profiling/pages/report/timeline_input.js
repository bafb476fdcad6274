// Mouse, touch and keys on the timeline and the map of the whole run.

class TimelineInput {
  constructor(timeline, tip, onSelect) {
    Object.assign(this, { timeline, axis: timeline.axis, tip, onSelect, pressed: null });
    const { canvas } = timeline, minimap = timeline.wholeRun.canvas;
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("pointerleave", () => this.leave());
    canvas.addEventListener("dblclick", (event) => this.axis.zoom(0.25, event.offsetX));
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => this.tip.hide());
    minimap.addEventListener("pointerdown", (event) => { minimap.setPointerCapture(event.pointerId); this.jump(event); });
    minimap.addEventListener("pointermove", (event) => { if (event.buttons) this.jump(event); });
  }

  wheel(event) {
    event.preventDefault();
    const sideways = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
    if (Math.abs(sideways) > Math.abs(event.shiftKey ? 0 : event.deltaY)) this.axis.pan(sideways);
    else this.axis.zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY * 0.002))), event.offsetX);
    this.hover(event);
  }

  press(event) {
    this.timeline.canvas.setPointerCapture(event.pointerId);
    this.pressed = { x: event.clientX, last: event.clientX, moved: false };
  }

  move(event) {
    if (this.pressed === null) return this.hover(event);
    if (Math.abs(event.clientX - this.pressed.x) > 3) this.pressed.moved = true;
    if (!this.pressed.moved) return;
    this.timeline.canvas.classList.add("dragged");
    this.tip.hide();
    this.timeline.hovered = null;
    this.axis.pan(this.pressed.last - event.clientX);
    this.pressed.last = event.clientX;
  }

  release(event) {
    const wasClick = this.pressed !== null && !this.pressed.moved;
    this.pressed = null;
    this.timeline.canvas.classList.remove("dragged");
    if (!wasClick) return;
    const found = this.find(event.offsetX, event.offsetY);
    const after = found?.gap < found?.line?.row.count ? found.line.row.place[found.gap] : null; // of a gap, the one that ended it
    this.onSelect(found?.place ?? (found?.stage >= 0 ? after : null));
  }

  leave() {
    this.timeline.hovered = null;
    this.tip.hide();
    this.timeline.wanted();
  }

  jump(event) {
    const { axis } = this;
    const at = ((event.offsetX - GUTTER) / axis.width) * axis.stop;
    const span = Math.min(axis.span, axis.stop);
    axis.show(at - span / 2, at + span / 2);
  }

  hover(event) {
    const found = this.find(event.offsetX, event.offsetY);
    this.timeline.hovered = found;
    this.timeline.canvas.style.cursor = found?.place !== undefined ? "pointer" : "";
    if (found) this.tip.show(found, event.clientX, event.clientY);
    else this.tip.hide();
    this.timeline.wanted();
  }

  // What is at a point: a row's block, the gap before one, or the sum of what is there; or a track.
  find(x, y) {
    const { axis, timeline } = this;
    const tick = axis.tick(x);
    if (x < axis.left || tick < 0 || tick > axis.stop) return null;
    const on = (line) => y >= line.top - ROW_GAP / 2 && y < line.top + line.height + ROW_GAP / 2;
    const track = timeline.tracks.find(on);
    if (track) return { x, tick, track: track.name };
    const line = timeline.rows.find(on);
    if (!line) return { x, tick };
    const { row, stage } = line;
    if (!line.blocks) return { x, tick, line, stage, column: true };
    const slack = (axis.span / axis.width) * 2;
    let i = lastAtMost(row.starts, tick, row.count);
    if (stage < 0 && i + 1 < row.count && row.starts[i + 1] - tick < slack && !(i >= 0 && tick <= row.ends[i])) i += 1;
    if (i >= 0 && tick <= row.ends[i] + (stage < 0 ? slack : 0)) return { x, tick, line, stage, block: i, place: row.place[i] };
    return { x, tick, line, stage, gap: i + 1 };
  }

  key(event) {
    const { axis } = this;
    const actions = {
      ArrowLeft: () => axis.glide(axis.from - axis.span * 0.2, axis.to - axis.span * 0.2),
      ArrowRight: () => axis.glide(axis.from + axis.span * 0.2, axis.to + axis.span * 0.2),
      ArrowUp: () => this.zoomTo(0.5), "+": () => this.zoomTo(0.5), "=": () => this.zoomTo(0.5),
      ArrowDown: () => this.zoomTo(2), "-": () => this.zoomTo(2),
      0: () => axis.glide(0, axis.stop), Home: () => axis.glide(0, axis.span), End: () => axis.glide(axis.stop - axis.span, axis.stop),
      n: () => this.step(1), p: () => this.step(-1),
      Escape: () => { this.tip.hide(); this.onSelect(null); },
    };
    if (!(event.key in actions) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  }

  zoomTo(factor) {
    const { axis } = this;
    const middle = (axis.from + axis.to) / 2, half = Math.min((axis.span * factor) / 2, axis.stop / 2);
    axis.glide(middle - half, middle + half);
  }

  // The next microbatch; the first one that is seen where none is followed.
  step(by) {
    const { report, selected } = this.timeline;
    const row = report.stages[0];
    const next = selected !== null ? selected + by : row.place[Math.max(lastAtMost(row.starts, this.axis.from, row.count) + 1, 0)];
    if (next >= 0 && next < report.microbatches.index.length) this.onSelect(next, true);
  }
}
