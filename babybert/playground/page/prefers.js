// Which sentence does the model prefer? The score of each token of two sentences, as numbers and as colours.
import { ask, onSubmit } from "./api.js";
import { find, make, percent } from "./dom.js";

const signed = (value) => (value > -0.005 ? "0.00" : value.toFixed(2).replace("-", "\u2212"));

function tokenEntry({ token, source, unknown, log_probability: score, other }, lowest, otherName) {
  // From white (expected) to the strongest colour, that of the lowest score of both sentences.
  const share = lowest < 0 ? Math.round((score / lowest) * 100) : 0;
  const inOther = other === null ? "" : `; in sentence ${otherName}: ${signed(other)}`;
  const hint = `${percent(Math.exp(score))} given the rest of the sentence${inOther}`;
  const kind = `${unknown ? "unknown " : ""}${share >= 60 ? "from60 " : ""}${share >= 70 ? "from70" : ""}`.trim();
  const name = unknown ? `${source} (unknown word)` : token;
  const entry = make("li", { class: kind, title: hint }, make("span", { class: "name" }, name));
  entry.append(" ", make("span", { class: "value" }, signed(score)));
  entry.style.setProperty("--share", `${share}%`);
  return entry;
}

function sentenceBlock({ score, tokens }, name, otherName, lowest, isPreferred) {
  const mark = isPreferred ? " (preferred)" : "";
  const title = make("h3", {}, `Sentence ${name}: ${signed(score)}${mark}`);
  const label = `Tokens of sentence ${name} with their scores`;
  const entries = tokens.map((token) => tokenEntry(token, lowest, otherName));
  return make("div", {}, title, make("ol", { class: "scores", "aria-label": label }, ...entries));
}

export function startPrefers({ inside, no_inside: reason }) {
  find("prefers-why").textContent = reason;
  find("prefers-why").hidden = Boolean(inside);
  find("prefers-all").hidden = !inside;
  if (!inside) return;
  onSubmit(find("prefers-form"), async (isLatest) => {
    find("prefers-result").replaceChildren();
    const texts = { sentence_a: find("prefers-a").value, sentence_b: find("prefers-b").value };
    const { sentences, preferred, verdict } = await ask("preference", texts);
    if (isLatest()) {
      const lowest = Math.min(...sentences.flatMap(({ tokens }) => tokens.map((token) => token.log_probability)));
      const [a, b] = sentences;
      find("prefers-result").replaceChildren(
        sentenceBlock(a, "A", "B", lowest, preferred === "a"),
        sentenceBlock(b, "B", "A", lowest, preferred === "b"),
      );
    }
    return verdict;
  });
}
