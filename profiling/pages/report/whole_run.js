// The map above the timeline: the whole run, and which part of it is seen.

class WholeRun {
  constructor(report, theme, axis) {
    Object.assign(this, { report, theme, axis });
    this.canvas = document.getElementById("minimap");
  }

  draw() {
    const { axis, theme } = this;
    const height = 30, { pen, width } = fitCanvas(this.canvas, height);
    const room = Math.max(Math.floor(width - GUTTER - 8), 1);
    const wanted = [room, darkMode.matches, theme.focus].join();
    if (this.imageOf !== wanted) {
      this.imageOf = wanted;
      this.image = this.picture(room, height);
    }
    pen.drawImage(this.image, GUTTER, 0, room, height);
    const left = GUTTER + Math.max(axis.from / axis.stop, 0) * room, right = GUTTER + Math.min(axis.to / axis.stop, 1) * room;
    pen.fillStyle = theme.paper;
    pen.globalAlpha = 0.7;
    pen.fillRect(GUTTER, 0, left - GUTTER, height);
    pen.fillRect(right, 0, GUTTER + room - right, height);
    pen.globalAlpha = 1;
    pen.strokeStyle = theme.accent;
    pen.lineWidth = 2;
    pen.strokeRect(left, 1, Math.max(right - left, 3), height - 2);
    pen.fillStyle = theme.ink;
    pen.textBaseline = "middle";
    pen.fillText("whole run", 0, height / 2);
  }

  // All stages together: computing below, idle time by cause above it.
  picture(room, height) {
    const canvas = document.createElement("canvas"), bin = 2, count = Math.floor(room / bin);
    canvas.width = room;
    canvas.height = height;
    const pen = canvas.getContext("2d");
    idleByBin(this.report, 0, this.axis.stop / count, count).forEach((shares, b) => {
      pen.fillStyle = this.theme.stage[DECODE];
      pen.fillRect(b * bin, 0, bin, height);
      let y = 0;
      shares.forEach((share, cause) => {
        if (share <= 0) return;
        pen.fillStyle = this.theme.stage[NUM_KINDS + cause];
        pen.fillRect(b * bin, y, bin, share * height);
        y += share * height;
      });
    });
    return canvas;
  }
}
