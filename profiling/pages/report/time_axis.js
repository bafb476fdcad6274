// Which part of the run is looked at, and where a moment is drawn.

const LEAST_TICKS = 40;

class TimeAxis {
  constructor(stop, tick_s) {
    this.stop = stop;
    this.tick_s = tick_s;
    this.from = 0;
    this.to = stop;
    this.left = 0; // of the drawing, in pixels
    this.width = 1;
    this.listeners = [];
  }

  get span() { return this.to - this.from; }
  x(tick) { return this.left + ((tick - this.from) / this.span) * this.width; }
  tick(x) { return this.from + ((x - this.left) / this.width) * this.span; }
  onChange(listener) { this.listeners.push(listener); }

  show(from, to) {
    const margin = 0.02;
    const span = Math.min(Math.max(to - from, LEAST_TICKS), this.stop * (1 + 2 * margin) || LEAST_TICKS);
    const middle = (from + to) / 2;
    const room = Math.max(span * margin, this.stop * 1e-9);
    from = Math.max(Math.min(middle - span / 2, this.stop + room - span), -room);
    if (span >= this.stop + 2 * room) from = (this.stop - span) / 2;
    this.from = from;
    this.to = from + span;
    this.listeners.forEach((listener) => listener());
  }

  // As exactly as the length of what is seen asks for.
  moment(tick) {
    const decimals = Math.min(Math.max(2 - Math.floor(Math.log10(this.span * this.tick_s)), 0), 6);
    return `${(Math.min(Math.max(tick, 0), this.stop) * this.tick_s).toFixed(decimals)} s`;
  }

  // Which part is seen.
  text() {
    const seen = Math.min(this.to, this.stop) - Math.max(this.from, 0);
    return `${this.moment(this.from)} to ${this.moment(this.to)}, ${duration(seen * this.tick_s)} in all`;
  }

  showAll() { this.show(0, this.stop); }
  pan(pixels) {
    const ticks = (pixels / this.width) * this.span;
    this.show(this.from + ticks, this.to + ticks);
  }
  zoom(factor, x = this.left + this.width / 2) {
    const at = this.tick(x), share = (at - this.from) / this.span;
    const span = Math.min(Math.max(this.span * factor, LEAST_TICKS), this.stop);
    this.show(at - share * span, at + (1 - share) * span);
  }

  // Glides there; without motion where the reader wants none.
  glide(from, to) {
    cancelAnimationFrame(this.gliding);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return this.show(from, to);
    const [from0, to0, began] = [this.from, this.to, performance.now()];
    const step = (now) => {
      const done = Math.min((now - began) / 220, 1), eased = 1 - (1 - done) ** 3;
      this.show(from0 + (from - from0) * eased, to0 + (to - to0) * eased);
      if (done < 1) this.gliding = requestAnimationFrame(step);
    };
    this.gliding = requestAnimationFrame(step);
  }

  // Round moments, about `wanted` of them: ticks, and how to write them.
  marks(wanted) {
    const rough = (this.span * this.tick_s) / wanted;
    const power = 10 ** Math.floor(Math.log10(rough));
    let step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    if (rough > 10) step = [15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600].find((each) => each >= rough) ?? step;
    const found = [];
    for (let n = Math.ceil((this.from * this.tick_s) / step); n * step <= this.to * this.tick_s; n++) {
      if (n >= 0) found.push({ tick: (n * step) / this.tick_s, text: momentText(n * step, step) });
    }
    return found;
  }
}

function momentText(seconds, step) {
  if (step >= 1 && seconds >= 60) {
    const minutes = Math.floor(Math.round(seconds) / 60), rest = Math.round(seconds) % 60;
    return rest ? `${minutes} min ${rest} s` : `${minutes} min`;
  }
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  if (step >= 1e-3 || seconds >= 10) return `${seconds.toFixed(Math.min(decimals, 6))} s`;
  return `${(seconds * 1e3).toFixed(Math.max(decimals - 3, 0))} ms`;
}
