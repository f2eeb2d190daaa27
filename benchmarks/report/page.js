// Draws the figures with plotly, and wires filters, sorting and the links from points to runs. Without it the page has
// every number in its tables.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const cellFacts = JSON.parse(document.getElementById("cells").textContent);
  const boxes = [...document.querySelectorAll(".filters input")];
  const options = { responsive: true, displaylogo: false, displayModeBar: false };

  const chosen = (cell) => {
    const facts = cellFacts[cell];
    return boxes.every((box) => box.checked || String(facts[box.name]) !== box.value);
  };

  // A trace with the points of chosen cells only: every list as long as the list of cells is one entry per point.
  const filtered = (trace) => {
    const { cells, whole } = trace.meta || {};
    if (whole) return boxes.every((box) => box.checked) ? trace : null;
    if (!Array.isArray(cells)) return chosen(cells) ? trace : null;
    const keep = cells.map(chosen);
    const pick = (value) => {
      if (Array.isArray(value)) return value.length === keep.length ? value.filter((_, i) => keep[i]) : value;
      if (value && typeof value === "object")
        return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, pick(part)]));
      return value;
    };
    return keep.some(Boolean) ? pick(trace) : null;
  };

  const draw = () => {
    for (const row of document.querySelectorAll("tr[data-cell]")) row.hidden = !chosen(row.dataset.cell);
    if (!window.Plotly) return;
    for (const figure of figures) {
      const place = document.querySelector(`#${figure.id} .chart`);
      const layout = structuredClone(figure.layout);
      const narrow = place.clientWidth < 560;
      if (narrow) { // long names would leave no room for the bars
        layout.font.size = 11;
        layout.margin = { ...layout.margin, l: 40, r: 8 };
        for (const axis of [layout.xaxis, layout.yaxis]) axis.nticks = 5;
      }
      const traces = structuredClone(figure.traces.map(filtered).filter(Boolean));
      if (narrow) for (const trace of traces) shorten(trace);
      window.Plotly.react(place, traces, layout, options);
      if (!place.dataset.wired) {
        place.dataset.wired = "yes";
        place.on("plotly_click", (event) => {
          const { cells } = event.points[0].data.meta || {};
          const cell = Array.isArray(cells) ? cells[event.points[0].pointIndex] : cells;
          if (cell) location.hash = `cell-${cell}`;
        });
      }
    }
    document.body.dataset.drawn = String(figures.length);
  };

  const shorten = (trace) => {
    const breaks = (name) => (typeof name === "string" ? name.replace(/, /g, ",<br>") : name);
    if (trace.orientation === "h" || typeof (trace.y || [])[0] === "string") trace.y = trace.y.map(breaks);
  };

  const sort = (button) => {
    const head = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
    const column = [...head.parentNode.children].indexOf(head);
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.children[column].textContent.trim();
    const number = (text) => parseFloat(text.replace(/,/g, ""));
    const compare = (a, b) => {
      const [x, y] = [number(value(a)), number(value(b))];
      if (Number.isNaN(x) && Number.isNaN(y)) return value(a).localeCompare(value(b));
      return Number.isNaN(x) ? 1 : Number.isNaN(y) ? -1 : x - y;
    };
    const rows = [...body.rows].sort(compare);
    body.append(...(down ? rows.reverse() : rows));
  };

  const show = () => { // a link to runs opens them
    const target = location.hash && document.getElementById(location.hash.slice(1));
    const details = target && (target.matches("details") ? target : target.querySelector("details"));
    if (details) details.open = true;
    if (target) target.scrollIntoView();
  };

  const load = async () => {
    const packed = document.getElementById("plotly").textContent;
    if (!packed) return;
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };

  for (const box of boxes) box.addEventListener("change", draw);
  for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sort(button));
  addEventListener("hashchange", show);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((details) => (details.open = true)));
  load().then(draw).then(show);
})();
