// One microbatch's way: from its plan through the stages to its result.

function drawFollowed(timeline, place, strong) {
  const { pen, axis, theme, report, rows } = timeline;
  pen.save();
  pen.beginPath();
  pen.rect(axis.left, AXIS - 4, axis.width, timeline.height);
  pen.clip();
  if (strong) {
    pen.globalAlpha = 0.55;
    pen.fillStyle = theme.paper;
    const [first, last] = [rows[0], rows.at(-1)];
    pen.fillRect(axis.left, first.top - 2, axis.width, last.top + last.height - first.top + 4);
    pen.globalAlpha = 1;
  }
  const stops = [{ line: rows[0], i: report.driver.find(place, 0) }];
  for (const line of rows.slice(1)) stops.push({ line, i: line.row.find(place) });
  if (rows.length > 1) stops.push({ line: rows[1], i: rows[1].row.find(place, 1) });
  stops.push({ line: rows[0], i: report.driver.find(place, 1) });
  const there = stops.filter(({ i }) => i >= 0);
  pen.lineJoin = "round";
  for (const { line, i } of there) {
    if (strong && line.stage >= 0) timeline.drawGap(line, i);
    if (strong) timeline.drawBlock(line, i);
    const left = axis.x(line.row.starts[i]), width = Math.max(axis.x(line.row.ends[i]) - left, 2);
    pen.strokeStyle = theme.accent;
    pen.lineWidth = strong ? 2 : 1.5;
    pen.strokeRect(left, line.top - 1, width, line.height + 2);
  }
  if (strong) there.slice(1).forEach((stop, n) => drawConnection(timeline, there[n], stop));
  pen.restore();
}

function drawConnection({ pen, axis, theme }, from, to) {
  const down = to.line.top > from.line.top;
  const x0 = axis.x(from.line.row.ends[from.i]), x1 = axis.x(to.line.row.starts[to.i]);
  const y0 = down ? from.line.top + from.line.height : from.line.top, y1 = down ? to.line.top : to.line.top + to.line.height;
  pen.strokeStyle = theme.accent;
  pen.lineWidth = 1.75;
  if (!down) pen.setLineDash([5, 4]);
  const bend = Math.max(Math.min(Math.abs(x1 - x0) / 2, 60), 6);
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.bezierCurveTo(x0 + bend, y0 + (down ? 8 : -8), x1 - bend, y1 - (down ? 8 : -8), x1, y1);
  pen.stroke();
  pen.setLineDash([]);
  pen.fillStyle = theme.accent;
  pen.beginPath();
  pen.arc(x1, y1, 3, 0, 7);
  pen.fill();
}
