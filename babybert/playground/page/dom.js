// Helpers that build the elements of the page.
export const find = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "text", "polyline"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function percent(share) {
  const value = share * 100;
  if (value === 0 || value >= 0.1) return `${value.toFixed(1)}%`;
  return value < 0.001 ? "<0.001%" : `${Number(value.toPrecision(1))}%`;
}

export const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

// A list of bars. Each entry has a label (a node), a share (0 to 1, the length of the bar) and a value (text).
export function bars(entries, label) {
  const list = make("ul", { class: "bars", "aria-label": label });
  for (const { label: name, share, value } of entries) {
    const bar = make("span", { class: "bar" });
    bar.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
    const track = make("span", { class: "track", "aria-hidden": "true" }, bar);
    list.append(make("li", {}, name, track, make("span", { class: "value" }, value)));
  }
  return list;
}
