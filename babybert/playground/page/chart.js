// One loss of a run as an SVG: training points and their running mean, a line of held-out points, dashed baselines.
import { make } from "./dom.js";

const HEIGHT = 260;
const EDGE = { left: 44, right: 12, top: 12, bottom: 38 };
const MAX_POINTS = 400; // of training: more could not be distinguished

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) {
    values.push(Number(value.toPrecision(12)));
  }
  return values;
}

function describe(title, { held_out: held, train, baselines }) {
  const point = ([step, value]) => `${value.toFixed(3)} at step ${step}`;
  const ends = (points) => `${point(points[0])} to ${point(points.at(-1))}`;
  const parts = [];
  if (train.length) parts.push(`training from ${ends(train)}`);
  if (held.length) parts.push(`held out from ${ends(held)}`);
  for (const { name, value } of baselines) parts.push(`${name} ${value.toFixed(3)}`);
  return `${title}: ${parts.join("; ")}.`;
}

function draw(title, curve, width) {
  const { train, mean, held_out: held, baselines } = curve;
  const values = [...train, ...held].map((point) => point[1]).concat(baselines.map((line) => line.value));
  const low = Math.min(0, ...values);
  const high = Math.max(...values) * 1.05;
  const last = Math.max(1, ...[...train, ...held].map((point) => point[0]));
  const x = (step) => EDGE.left + (step / last) * (width - EDGE.left - EDGE.right);
  const y = (value) => HEIGHT - EDGE.bottom - ((value - low) / (high - low)) * (HEIGHT - EDGE.top - EDGE.bottom);
  const svg = make("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": describe(title, curve) });
  const label = (text, attributes) => svg.append(make("text", attributes, text));
  const path = (points, kind) => {
    const coordinates = points.map(([step, value]) => `${x(step)},${y(value)}`).join(" ");
    svg.append(make("polyline", { points: coordinates, class: kind }));
  };
  for (const value of ticks(low, high, 5)) {
    svg.append(make("line", { x1: EDGE.left - 4, x2: EDGE.left, y1: y(value), y2: y(value), class: "axis" }));
    label(String(value), { x: EDGE.left - 7, y: y(value) + 4, "text-anchor": "end" });
  }
  for (const step of ticks(0, last, 4)) {
    svg.append(make("line", { x1: x(step), x2: x(step), y1: y(low), y2: y(low) + 4, class: "axis" }));
    label(step.toLocaleString("en"), { x: x(step), y: y(low) + 18, "text-anchor": "middle" });
  }
  label("step", { x: (EDGE.left + width - EDGE.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" });
  svg.append(make("path", { d: `M ${EDGE.left} ${EDGE.top} V ${y(low)} H ${width - EDGE.right}`, class: "axis" }));
  const stride = Math.ceil(train.length / MAX_POINTS);
  train.forEach(([step, value], index) => {
    if (index % stride === 0) svg.append(make("circle", { cx: x(step), cy: y(value), r: 1.8, class: "train" }));
  });
  path(mean, "mean");
  for (const { name, value } of baselines) {
    path([[0, value], [last, value]], "base");
    const place = { x: width - EDGE.right, y: y(value) - 4, "text-anchor": "end" };
    label(`${name} ${value.toFixed(3)}`, { ...place, class: "base-name" });
  }
  path(held, "held");
  for (const [step, value] of held) svg.append(make("circle", { cx: x(step), cy: y(value), r: 3, class: "mark" }));
  return svg;
}

// A figure with the chart, its legend and a table of the held-out values; redrawn when its width changes.
export function chart(title, curve) {
  const holder = make("div", { class: "chart" });
  const item = (kind, text) => make("li", { class: kind }, text);
  const legend = make(
    "ul",
    { class: "legend" },
    item("mean", "training, running mean"),
    item("held", "held out"),
    item("base", "baselines"),
  );
  const columnHead = (text) => make("th", { scope: "col" }, text);
  const head = make("thead", {}, make("tr", {}, columnHead("Step"), columnHead("Held-out loss")));
  const rows = curve.held_out.map(([step, value]) => {
    const rowHead = make("th", { scope: "row" }, step.toLocaleString("en"));
    return make("tr", {}, rowHead, make("td", {}, value.toFixed(3)));
  });
  const summary = make("summary", {}, `${title}, held out, as numbers`);
  const table = make("details", {}, summary, make("table", {}, head, make("tbody", {}, ...rows)));
  let drawnWidth = 0;
  new ResizeObserver(() => {
    const width = Math.max(260, Math.round(holder.clientWidth));
    if (width !== drawnWidth) holder.replaceChildren(draw(title, curve, width));
    drawnWidth = width;
  }).observe(holder);
  return make("div", {}, make("h4", {}, title), holder, legend, table);
}
