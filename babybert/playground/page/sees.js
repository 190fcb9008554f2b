// How the model sees it: tokens, the attention of one head as a heat map, and the nearest neighbours of a word.
import { ask, onSubmit } from "./api.js";
import { bars, find, make, plural } from "./dom.js";

const cell = (tag, text, attributes = {}) => make(tag, attributes, String(text));

function headRow(names) {
  const cells = names.map((name) => cell("th", name, { scope: "col" }));
  return make("thead", {}, make("tr", {}, ...cells));
}

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
  const head = headRow(["Position", "Token", "Id", "Segment", "From"]);
  find("sees-tokens").replaceChildren(head, make("tbody", {}, ...rows));
  const unknown = tokens.filter((token) => token.unknown).map((token) => token.source);
  find("sees-unknown").textContent = unknown.length
    ? `Not in the vocabulary, so read as [UNK]: ${unknown.join(", ")}.`
    : "Every word is in the vocabulary.";
}

function showMap({ tokens, attention, layer, head, reason }) {
  find("sees-map").parentElement.hidden = !attention;
  if (!attention) {
    find("sees-map-note").textContent = reason;
    return;
  }
  const largest = Math.max(...attention.flat());
  const names = tokens.map(({ token }) => token);
  const rows = attention.map((weights, from) => {
    const cells = weights.map((weight, to) => {
      const share = Math.round((weight / largest) * 100);
      const kind = `${share >= 60 ? "from60 " : ""}${share >= 70 ? "from70" : ""}`.trim();
      const hint = `${names[from]} to ${names[to]}: ${(weight * 100).toFixed(1)}%`;
      const weightCell = cell("td", Math.round(weight * 100), { class: kind, title: hint });
      weightCell.style.setProperty("--share", `${share}%`);
      return weightCell;
    });
    return make("tr", {}, cell("th", names[from], { scope: "row" }), ...cells);
  });
  const title = make("caption", {}, `Layer ${layer + 1}, head ${head + 1}, weights in percent`);
  find("sees-map").replaceChildren(title, headRow(["from \\ to", ...names]), make("tbody", {}, ...rows));
  find("sees-map-note").textContent =
    "Each row shows how much one position attends to each of the columns; a row adds up to 100. " +
    `The strongest colour is the largest weight, ${(largest * 100).toFixed(1)}%.`;
}

function options(select, count) {
  const entries = Array.from({ length: count }, (_, index) => make("option", { value: index }, String(index + 1)));
  select.replaceChildren(...entries);
}

function showNear({ word, known, neighbours }) {
  if (!known) {
    const reason = `"${word}" is not one word of the vocabulary, so it has no token embedding.`;
    find("near-result").replaceChildren(make("p", {}, reason));
    return "";
  }
  const entries = neighbours.map(({ word: near, cosine }) => {
    const label = make("span", { class: "name" }, near);
    return { label, share: cosine, value: cosine.toFixed(2) };
  });
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
  find("near-note").textContent =
    "The words with the most similar token embeddings (cosine similarity), " +
    `among the first ${inside.among.toLocaleString("en")} of the vocabulary.`;
  const form = find("sees-form");
  onSubmit(form, async (isLatest) => {
    find("sees-result").hidden = true;
    const [layer, head] = [Number(find("sees-layer").value), Number(find("sees-head").value)];
    const sentences = { sentence_a: find("sees-a").value, sentence_b: find("sees-b").value };
    const answer = await ask("inside", { ...sentences, layer, head });
    if (isLatest()) {
      showTokens(answer.tokens);
      showMap(answer);
      find("sees-result").hidden = false;
    }
    return `${plural(answer.tokens.length, "token")}.`;
  });
  for (const id of ["sees-layer", "sees-head"]) {
    find(id).addEventListener("change", () => {
      if (!find("sees-result").hidden) form.requestSubmit();
    });
  }
  onSubmit(find("near-form"), async (isLatest) => {
    find("near-result").replaceChildren();
    const answer = await ask("neighbours", { word: find("near-word").value });
    return isLatest() ? showNear(answer) : "";
  });
}
