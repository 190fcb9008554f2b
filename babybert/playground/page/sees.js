// How the model sees it: tokens, attention of one head as a heat map, neighbours of a word.
import { ask, onSubmit } from "./api.js";
import { bars, find, make, plural } from "./dom.js";

const cell = (tag, text, attributes = {}) => make(tag, attributes, String(text));
const headRow = (names) => make("thead", {}, make("tr", {}, ...names.map((name) => cell("th", name, { scope: "col" }))));

function showTokens(tokens) {
  const rows = tokens.map(({ token, id, segment, source, unknown }, position) =>
    make(
      "tr",
      unknown ? { class: "unknown" } : {},
      cell("td", position, { class: "number" }),
      cell("th", token, { scope: "row" }),
      cell("td", id, { class: "number" }),
      cell("td", segment, { class: "number" }),
      cell("td", unknown ? `${source} (unknown word)` : source),
    ),
  );
  find("sees-tokens").replaceChildren(headRow(["Position", "Token", "Id", "Segment", "From"]), make("tbody", {}, ...rows));
  const unknown = tokens.filter((token) => token.unknown).map((token) => token.source);
  find("sees-unknown").textContent = unknown.length ? `Not in the vocabulary, and read as [UNK]: ${unknown.join(", ")}.` : "Every word is in the vocabulary.";
}

function showMap({ tokens, attention, layer, head, reason }) {
  find("sees-map").parentElement.hidden = !attention;
  if (!attention) {
    find("sees-map-note").textContent = reason;
    return;
  }
  const most = Math.max(...attention.flat());
  const names = tokens.map(({ token }) => token);
  const rows = attention.map((weights, from) => {
    const cells = weights.map((weight, to) => {
      const share = Math.round((weight / most) * 100);
      const kind = `${share >= 60 ? "from60 " : ""}${share >= 70 ? "from70" : ""}`.trim();
      const own = cell("td", Math.round(weight * 100), { class: kind, title: `${names[from]} to ${names[to]}: ${(weight * 100).toFixed(1)}%` });
      own.style.setProperty("--share", `${share}%`);
      return own;
    });
    return make("tr", {}, cell("th", names[from], { scope: "row" }), ...cells);
  });
  const title = make("caption", {}, `Layer ${layer + 1}, head ${head + 1}, in percent`);
  find("sees-map").replaceChildren(title, headRow(["from \\ to", ...names]), make("tbody", {}, ...rows));
  find("sees-map-note").textContent = `Each row is a position, and says how much it attends to each column; a row adds up to 100. The deepest colour is the largest weight, ${(most * 100).toFixed(1)}%.`;
}

function options(select, count) {
  select.replaceChildren(...Array.from({ length: count }, (_, number) => make("option", { value: number }, String(number + 1))));
}

function showNear({ word, known, neighbours }) {
  if (!known) {
    find("near-result").replaceChildren(make("p", {}, `"${word}" is not one word of the vocabulary, so that it has no vector of its own.`));
    return "";
  }
  const entries = neighbours.map(({ word: near, cosine }) => ({ label: make("span", { class: "name" }, near), share: cosine, value: cosine.toFixed(2) }));
  find("near-result").replaceChildren(bars(entries, `Neighbours of ${word}, by cosine`));
  return `${plural(neighbours.length, "neighbour")} of "${word}".`;
}

export function startSees({ inside, no_inside: reason }) {
  find("sees-why").textContent = reason;
  find("sees-why").hidden = Boolean(inside);
  find("sees-all").hidden = !inside;
  if (!inside) return;
  options(find("sees-layer"), inside.layers);
  options(find("sees-head"), inside.heads);
  find("near-note").textContent = `The words whose vectors at the model's input point most nearly the same way (cosine), among the vocabulary's first ${inside.among.toLocaleString("en")}.`;
  const form = find("sees-form");
  onSubmit(form, async (isLatest) => {
    find("sees-result").hidden = true;
    const [layer, head] = [Number(find("sees-layer").value), Number(find("sees-head").value)];
    const found = await ask("inside", { sentence_a: find("sees-a").value, sentence_b: find("sees-b").value, layer, head });
    if (isLatest()) {
      showTokens(found.tokens);
      showMap(found);
      find("sees-result").hidden = false;
    }
    return `${plural(found.tokens.length, "token")}.`;
  });
  for (const id of ["sees-layer", "sees-head"]) find(id).addEventListener("change", () => { if (!find("sees-result").hidden) form.requestSubmit(); });
  onSubmit(find("near-form"), async (isLatest) => {
    find("near-result").replaceChildren();
    const found = await ask("neighbours", { word: find("near-word").value });
    return isLatest() ? showNear(found) : "";
  });
}
