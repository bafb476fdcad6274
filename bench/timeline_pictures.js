// Run in a report: leaves of the page the part of the timeline to be seen, with the keys of what is
// in it, and returns where that lies: x, y, width, height.
([cause, from_s, to_s, shown, hasTracks]) => {
  const { timeline, axis, report } = pipeserveReport;
  const main = document.querySelector("main");
  const section = document.getElementById("timeline").closest("section");
  for (const one of document.body.querySelectorAll("header, main > section")) {
    if (one !== section) one.hidden = true;
  }
  for (const one of section.querySelectorAll(".heading, #minimap, .hint")) {
    one.style.display = "none";
  }
  document.body.style.padding = "0";
  Object.assign(main.style, { padding: "0", margin: "0", maxWidth: "none" });
  Object.assign(section.style, { margin: "0", border: "none", padding: "12px 16px 6px" });
  section.style.borderRadius = "0";

  timeline.tracks = hasTracks ? timeline.tracks.filter((track) => track.name !== "idle") : [];
  const lastRow = timeline.rows.at(-1);
  timeline.tracks.forEach((track, place) => {
    track.top = lastRow.top + lastRow.height + 10 + place * 47;
  });
  const rows = [...timeline.rows, ...timeline.tracks];
  timeline.height = Math.max(...rows.map((row) => row.top + row.height)) + 6;
  axis.show(from_s / axis.tick_s, to_s / axis.tick_s);
  timeline.draw();

  const seen = new Map(); // category -> ticks
  for (const stage of report.stages) {
    stage
      .between(Math.max(axis.from, 0), Math.min(axis.to, axis.stop))
      .forEach((ticks, category) => seen.set(category, (seen.get(category) ?? 0) + ticks));
  }
  const total = [...seen.values()].reduce((a, b) => a + b, 0);
  for (const key of document.querySelectorAll(".key")) {
    const isOwn = key.innerText.trim() === cause;
    const isSeen = (seen.get(Number(key.dataset.category)) ?? 0) >= shown * total;
    key.hidden = false;
    key.style.display = isOwn || isSeen ? "" : "none";
    if (isOwn) Object.assign(key.style, { fontWeight: "650", border: "1.5px solid currentColor" });
  }
  const box = section.getBoundingClientRect();
  return [box.left + scrollX, box.top + scrollY, box.width, box.height];
}
