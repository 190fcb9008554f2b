// Starts the page: asks the server about the model, and passes that on to the sections.
import { ask } from "./api.js";
import { banner } from "./banner.js";
import { startClassify } from "./classify.js";
import { find, plural } from "./dom.js";
import { startFill } from "./fill.js";
import { startFollows } from "./follows.js";
import { startLearned } from "./learned.js";
import { startPrefers } from "./prefers.js";
import { startSees } from "./sees.js";

function sizes(inside) {
  if (!inside) return "";
  const parts = [
    `vocabulary of ${inside.vocab_size.toLocaleString("en")} (${inside.tokenizer})`,
    `width ${inside.width}`,
    plural(inside.layers, "layer"),
    plural(inside.heads, "head"),
    `up to ${inside.max_positions} positions`,
  ];
  return ` Its sizes: ${parts.join(", ")}.`;
}

async function start() {
  startFill();
  startFollows();
  const about = await ask("about");
  find("about").textContent = about.name + sizes(about.inside);
  startClassify(about);
  startPrefers(about);
  startSees(about);
  startLearned(about);
  await banner.look();
}

start();
