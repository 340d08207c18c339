"use strict";
// Draws what analysis/page.py has put into #data. Text from data becomes text nodes or goes through `safe`, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
let printing = false;
const safe = (text) => String(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
const numbers = (list) => list.map((value) => (value === null ? NaN : value));

function theme() {
  const isDark = dark.matches && !printing;
  return {
    text: isDark ? "#e4e7ec" : "#1d2129",
    line: isDark ? "#3a424e" : "#dde1e7",
    hover: isDark ? "#262c35" : "#ffffff",
    color: (method) => (isDark && data.colors[method] === "#000000" ? "#ffffff" : data.colors[method]),
  };
}

function layout(extra) {
  const { text, line, hover } = theme();
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, tickfont: { size: 11 } };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: text, family: "system-ui, sans-serif", size: 12 },
    margin: { l: 48, r: 12, t: 8, b: 40 }, showlegend: false, hovermode: "closest",
    hoverlabel: { bgcolor: hover, bordercolor: line, font: { color: text, size: 12 }, namelength: -1 },
    ...extra,
    xaxis: { ...axis, ...(extra.xaxis || {}) }, yaxis: { ...axis, ...(extra.yaxis || {}) },
  };
}

const label = (text) => ({ text, font: { size: 11 }, standoff: 6 });
const rgba = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;

function band(x, low, high, color) {
  const kept = x.map((_, i) => i).filter((i) => low[i] !== null && high[i] !== null);
  return {
    x: [...kept.map((i) => x[i]), ...kept.map((i) => x[i]).reverse()],
    y: [...kept.map((i) => high[i]), ...kept.map((i) => low[i]).reverse()],
    fill: "toself", fillcolor: rgba(color, 0.2), line: { width: 0 }, mode: "lines", hoverinfo: "skip",
  };
}

function curveTraces(task) {
  const { color } = theme();
  const ends = task.series.flatMap((series) => (series.x.length ? [series.x[series.x.length - 1]] : []));
  const end = Math.max(1, ...ends);
  const traces = [];
  for (const series of task.series) {
    const shade = color(series.method);
    if (series.level) {
      traces.push({
        x: [0, end], y: [series.mean[0], series.mean[0]], mode: "lines", name: safe(series.label),
        line: { color: shade, dash: "dash", width: 2 }, hovertemplate: "%{y:.1f}, at the end",
      });
      continue;
    }
    for (const run of series.runs) {
      traces.push({
        x: run.x, y: numbers(run.y), mode: "lines", hoverinfo: "skip", line: { color: rgba(shade, 0.35), width: 1, dash: series.dash },
      });
    }
    const error = series.stderr;
    const low = series.mean.map((mean, i) => (error[i] === null ? null : mean - error[i]));
    const high = series.mean.map((mean, i) => (error[i] === null ? null : mean + error[i]));
    traces.push(band(series.x, low, high, shade));
    traces.push({
      x: series.x, y: series.mean, mode: series.x.length > 30 ? "lines" : "lines+markers", name: safe(series.label),
      line: { color: shade, width: 2.5, dash: series.dash }, marker: { size: 5 }, customdata: error.map((e) => (e === null ? "-" : e.toFixed(1))),
      hovertemplate: "%{y:.1f} ± %{customdata}",
    });
    for (const run of series.lost) {
      traces.push({
        x: run.x, y: numbers(run.y), mode: "lines+markers", name: `${safe(series.label)}, run without a result`,
        line: { color: "#7f7f7f", dash: "dot", width: 1 }, marker: { size: 4, symbol: "x" }, hovertemplate: "%{y:.1f}",
      });
    }
  }
  return traces;
}

const drawers = {
  curve(area, task) {
    return [curveTraces(task), layout({
      hovermode: "x unified", xaxis: { title: label("gradient steps, all stages"), hoverformat: ",d" },
      yaxis: { title: label(task.unit) },
    })];
  },
  profile(area) {
    const { color } = theme();
    const traces = data.profiles.flatMap((profile) => [
      band(profile.x, profile.low, profile.high, color(profile.method)),
      {
        x: profile.x, y: profile.value, mode: "lines", name: safe(profile.label),
        line: { color: color(profile.method), width: 2.5 }, hovertemplate: "%{y:.2f}",
      },
    ]);
    return [traces, layout({
      hovermode: "x unified", xaxis: { title: label("normalized score"), hoverformat: ".1f" },
      yaxis: { title: label("share of runs with a higher score"), range: [0, 1.03] },
    })];
  },
  interval(area, statistic) {
    const { color } = theme();
    const traces = statistic.rows.map((row) => ({
      x: [row.value], y: [safe(row.label)], mode: "markers", marker: { color: color(row.method), size: 10, symbol: "line-ns",
        line: { color: color(row.method), width: 3 } },
      error_x: row.low === null ? undefined : {
        type: "data", symmetric: false, array: [row.high - row.value], arrayminus: [row.value - row.low],
        color: color(row.method), thickness: 7, width: 0,
      },
      hovertemplate: `${safe(row.label)}: %{x:.1f}` + (row.low === null ? "" : ` (${row.low.toFixed(1)} to ${row.high.toFixed(1)})`) + "<extra></extra>",
    }));
    return [traces, layout({ yaxis: { autorange: "reversed", type: "category" } })];
  },
  grid(area, map) {
    const strength = map.strength || "guidance scale";
    const text = map.z.map((line) => line.map((value) => (value === null ? "" : value.toFixed(0))));
    return [[{
      type: "heatmap", x: map.x.map(String), y: map.y.map(String), z: map.z, text, texttemplate: "%{text}",
      colorscale: "Cividis", colorbar: { thickness: 10, outlinewidth: 0 }, xgap: 2, ygap: 2,
      hovertemplate: `beta %{y}, ${strength} %{x}: %{z:.1f}<extra></extra>`,
    }], layout({
      xaxis: { title: label(strength), type: "category" }, yaxis: { title: label("beta"), type: "category" },
    })];
  },
};

const items = {
  curve: (i) => data.curves[i], profile: () => null, interval: (i) => data.intervals[i], grid: (i) => data.grids[i],
};
const drawn = new Set();
function draw(area) {
  const [traces, frame] = drawers[area.dataset.kind](area, items[area.dataset.kind](Number(area.dataset.index)));
  drawn.add(area);
  return Plotly.react(area, traces, frame, { responsive: true, displaylogo: false, displayModeBar: false });
}

const areas = [...document.querySelectorAll(".area")];
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
  }
}, { rootMargin: "300px" });
areas.forEach((area) => seen.observe(area));

function paint() {
  document.documentElement.classList.toggle("dark", dark.matches && !printing); // DataTables' own name for it
  for (const swatch of document.querySelectorAll(".swatch")) swatch.style.background = theme().color(swatch.dataset.method);
}
paint();
dark.addEventListener("change", () => { paint(); drawn.forEach(draw); });
window.addEventListener("beforeprint", () => {
  printing = true;
  paint();
  areas.forEach(draw);
});
window.addEventListener("afterprint", () => { printing = false; paint(); drawn.forEach(draw); });

const words = { search: "Filter", searchPlaceholder: "any word", lengthMenu: "_MENU_ a page", info: "_START_ to _END_ of _TOTAL_",
  infoFiltered: "(of _MAX_)", zeroRecords: "nothing fits" };
for (const table of document.querySelectorAll("table.scores")) {
  new DataTable(table, { paging: false, info: false, order: [], language: words });
}
if (document.getElementById("run-table")) {
  const text = DataTable.render.text();
  new DataTable("#run-table", {
    data: data.runs, order: [], pageLength: 25, deferRender: true, language: words,
    columns: data.run_columns.map((name) => ({
      title: name, className: name in data.run_digits || name === "seed" ? "num" : "",
      render: name === "MLflow"
        ? (id, kind) => (kind === "display" && id ? `<a href="${safe(data.mlflow + encodeURIComponent(id))}">run</a>` : safe(id))
        : name === "status"
          ? (status, kind) => (kind === "display" && status !== "finished" ? `<span class="failed">${safe(status)}</span>` : safe(status))
          : name in data.run_digits ? DataTable.render.number(",", ".", data.run_digits[name]) : text,
    })),
  });
}

const filter = document.getElementById("curve-filter");
if (filter) {
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    for (const plot of document.querySelectorAll("#curves .plot")) {
      plot.hidden = !plot.dataset.name.toLowerCase().includes(wanted);
    }
  });
}
document.documentElement.dataset.ready = "true";
