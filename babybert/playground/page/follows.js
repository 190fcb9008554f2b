// Does B follow A? The probability as a gauge and in words.
import { ask, onSubmit } from "./api.js";
import { find, make, percent } from "./dom.js";

const HALF_CIRCLE = Math.PI * 80;

function gauge(probability) {
  const arc = { d: "M 20 100 A 80 80 0 0 1 180 100", fill: "none", "stroke-width": 22 };
  const text = (x, y, words, kind = "") => make("text", { x, y, class: kind }, words);
  const svg = make(
    "svg",
    { viewBox: "0 0 200 124", "aria-hidden": "true" },
    make("path", { ...arc, class: "whole" }),
    make("path", { ...arc, class: "part", "stroke-dasharray": `${probability * HALF_CIRCLE} 1000` }),
    make("line", { x1: 100, y1: 6, x2: 100, y2: 34, stroke: "currentColor", "stroke-width": 2 }),
    text(100, 98, percent(probability), "number"),
    text(30, 120, "not next"),
    text(172, 120, "next"),
  );
  const attributes = {
    class: "gauge",
    role: "meter",
    "aria-label": "Probability that B follows A",
    "aria-valuemin": 0,
    "aria-valuemax": 1,
    "aria-valuenow": probability,
    "aria-valuetext": percent(probability),
  };
  return make("div", attributes, svg);
}

function explain(isNext, probability) {
  const verdict = isNext ? "Yes: B follows A." : "No: B does not follow A.";
  const doubt = Math.abs(probability - 0.5) < 0.05 ? " The model is close to undecided." : "";
  const score = `The model gives ${percent(probability)} to "B is the next sentence"; from 50% the answer is yes.`;
  return `${verdict} ${score}${doubt}`;
}

export function startFollows() {
  const a = find("follows-a");
  const b = find("follows-b");
  find("follows-swap").addEventListener("click", () => { [a.value, b.value] = [b.value, a.value]; });
  onSubmit(find("follows-form"), async (isLatest) => {
    find("follows-gauge").replaceChildren();
    const { is_next: isNext, probability } = await ask("predict", { sentence_a: a.value, sentence_b: b.value });
    if (isLatest()) find("follows-gauge").replaceChildren(gauge(probability));
    return explain(isNext, probability);
  });
}
