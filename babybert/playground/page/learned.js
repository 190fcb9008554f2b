// How it learned: the loss curves of the run, and one sentence filled in by several of its checkpoints.
import { ask, onSubmit } from "./api.js";
import { chart } from "./chart.js";
import { find, make, percent, plural } from "./dom.js";

const TITLES = { mlm_loss: "MLM loss, nats", nsp_loss: "NSP loss, nats", class_loss: "Class loss, nats" };
const CANDIDATES = 4;

function describeCheckpoints(steps) {
  if (!steps.length) return "no checkpoint yet";
  return `${plural(steps.length, "checkpoint")}, at steps ${steps.map((step) => step.toLocaleString("en")).join(", ")}`;
}

async function readCurves() {
  const error = find("learned-error");
  error.hidden = true;
  try {
    const { run, curves, steps } = await ask("curves");
    find("learned-run").textContent = `${run}: ${describeCheckpoints(steps)}.`;
    // A run whose pairs all have one label has no NSP loss, a classifier's run has its own loss only.
    const drawn = Object.entries(TITLES).filter(([key]) => curves[key]);
    find("learned-charts").replaceChildren(...drawn.map(([key, title]) => chart(title, curves[key])));
  } catch (problem) {
    error.textContent = problem.message;
    error.hidden = false;
  }
}

function show({ checkpoints }) {
  const masks = checkpoints[0].masks.length;
  const maskTitles = Array.from({ length: masks }, (_, index) => (masks === 1 ? "Best words" : `Mask ${index + 1}`));
  const titles = ["Step", ...maskTitles].map((title) => make("th", { scope: "col" }, title));
  const head = make("thead", {}, make("tr", {}, ...titles));
  const rows = checkpoints.map(({ step, masks: stepMasks }) => {
    const cells = stepMasks.map(({ candidates }) => {
      const words = candidates.map(({ token, score }) => `${token} ${percent(score)}`);
      return make("td", {}, words.join(", "));
    });
    return make("tr", {}, make("th", { scope: "row" }, step.toLocaleString("en")), ...cells);
  });
  find("learned-table").replaceChildren(head, make("tbody", {}, ...rows));
  find("learned-scroll").hidden = false;
}

export function startLearned({ run, no_run: reason }) {
  find("learned-why").textContent = reason;
  find("learned-why").hidden = Boolean(run);
  find("learned-all").hidden = !run;
  if (!run) return;
  find("learned-read").addEventListener("click", readCurves);
  onSubmit(find("learned-form"), async (isLatest) => {
    find("learned-scroll").hidden = true;
    const answer = await ask("checkpoints", { text: find("learned-text").value, top_k: CANDIDATES });
    if (isLatest()) show(answer);
    const skipped = answer.passed_over.map((reason) => ` Skipped: ${reason}.`).join("");
    return `${plural(answer.checkpoints.length, "checkpoint")}, early to late.${skipped}`;
  });
  readCurves();
}
