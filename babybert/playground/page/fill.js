// Fill in: masks are inserted at the cursor or replace a random word. Candidates are bars; clicks complete the text.
import { ask, onSubmit } from "./api.js";
import { bars, find, make, percent, plural } from "./dom.js";

const MASK = "[MASK]";
let pieces = []; // the submitted sentence, split at its masks
let picks = []; // the word that was clicked for each mask, or null

function words(text) {
  return text.split(/[\s,]+/).filter(Boolean);
}

function insertMask(field) {
  const before = field.value.slice(0, field.selectionStart);
  const after = field.value.slice(field.selectionEnd);
  const lead = before && !/\s$/.test(before) ? " " : "";
  const trail = after && !/^[\s.,!?;:)']/.test(after) ? " " : "";
  field.setRangeText(lead + MASK + trail, field.selectionStart, field.selectionEnd, "end");
  field.focus();
}

function hideRandomWord(field) {
  const candidates = [...field.value.matchAll(/\[MASK\]|[\p{L}\p{N}]+/gu)].filter((match) => match[0] !== MASK);
  if (!candidates.length) return "There is no word left to hide.";
  const { 0: word, index } = candidates[Math.floor(Math.random() * candidates.length)];
  field.setRangeText(MASK, index, index + word.length, "end");
  return `Hidden: ${word}`;
}

function completed() {
  const parts = [];
  pieces.forEach((piece, index) => {
    parts.push(piece);
    if (index === pieces.length - 1) return;
    const pick = picks[index] ?? MASK;
    // A WordPiece token that begins with ## continues the word before it.
    const continues = pick.startsWith("##");
    if (continues) parts.push(parts.pop().replace(/\s+$/, ""));
    parts.push(make("mark", {}, continues ? pick.slice(2) : pick));
  });
  return parts;
}

function showCompleted() {
  find("fill-completed").replaceChildren(...completed());
}

function candidateButton(token, mask, group) {
  const button = make("button", { type: "button", "aria-pressed": "false" }, token);
  button.addEventListener("click", () => {
    picks[mask] = token;
    for (const other of group) other.setAttribute("aria-pressed", String(other === button));
    showCompleted();
  });
  group.push(button);
  return button;
}

function show(text, masks) {
  pieces = text.split(MASK);
  picks = masks.map(() => null);
  const highest = Math.max(...masks.flatMap((mask) => mask.candidates.map((candidate) => candidate.score)));
  const columns = masks.map((mask, index) => {
    const group = [];
    const entries = mask.candidates.map(({ token, score }) => {
      const label = candidateButton(token, index, group);
      return { label, share: score / highest, value: percent(score) };
    });
    const title = `Mask ${index + 1}, token ${mask.position}`;
    return make("div", {}, make("h3", {}, title), bars(entries, title));
  });
  find("fill-masks").replaceChildren(...columns);
  find("fill-result").hidden = false;
  showCompleted();
}

export function startFill() {
  const field = find("fill-text");
  const status = find("fill-form").querySelector(".status");
  find("fill-insert").addEventListener("click", () => insertMask(field));
  find("fill-hide").addEventListener("click", () => { status.textContent = hideRandomWord(field); });
  find("fill-use").addEventListener("click", () => {
    field.value = find("fill-completed").textContent;
    field.focus();
  });
  onSubmit(find("fill-form"), async (isLatest) => {
    const text = field.value;
    const targets = words(find("fill-targets").value);
    const count = Number(find("fill-count").value);
    // All target words are shown, however few candidates are chosen.
    const body = targets.length ? { text, targets, top_k: Math.max(count, targets.length) } : { text, top_k: count };
    find("fill-result").hidden = true;
    const { masks } = await ask("predict", body);
    if (isLatest()) show(text, masks);
    return `${plural(masks.length, "mask")}, ${plural(masks[0].candidates.length, "candidate")} each.`;
  });
}
