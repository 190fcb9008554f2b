// The class of a text, or of a pair of texts, as bars.
import { ask, onSubmit } from "./api.js";
import { bars, find, make, percent } from "./dom.js";

export function startClassify(about) {
  if (!about.classifier) {
    find("classify-why").textContent = about.no_classifier;
    find("classify-why").hidden = false;
    return;
  }
  const { pairs } = about.classifier;
  find("classify-all").hidden = false;
  find("classify-second").hidden = !pairs;
  for (const section of ["fill", "follows"]) {
    find(`${section}-all`).hidden = true;
    find(`${section}-why`).textContent = about.no_pretrained;
    find(`${section}-why`).hidden = false;
  }
  onSubmit(find("classify-form"), async (isLatest) => {
    find("classify-result").replaceChildren();
    const text = find("classify-text").value;
    const body = { classify: pairs ? [text, find("classify-pair").value] : text, truncate: true };
    const { label, probability, probabilities } = await ask("predict", body);
    const ranked = Object.entries(probabilities).sort(([, one], [, other]) => other - one);
    const entries = ranked.map(([name, share]) => ({ label: make("span", {}, name), share, value: percent(share) }));
    if (isLatest()) find("classify-result").replaceChildren(bars(entries, "Probability of each class"));
    return `The model answers ${label}, with a probability of ${percent(probability)}.`;
  });
}
