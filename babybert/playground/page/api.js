// The page's questions: JSON there, JSON back; what the server refuses becomes an Error with the API's own line.
import { banner } from "./banner.js";

export async function ask(path, body) {
  const request = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(`/api/${path}`, request);
  } catch {
    banner.down("The playground itself does not answer: has it been stopped?");
    throw new Error("The playground itself does not answer.");
  }
  const version = response.headers.get("X-BabyBERT-Version");
  if (version) showVersion(version);
  const answer = await response.json().catch(() => ({ error: response.statusText }));
  if (response.ok) return answer;
  if (answer.down) banner.down(answer.error);
  else if (response.status >= 500) banner.look(); // is it this question, or all of them?
  throw new Error(answer.down ? answer.error : `${response.status}: ${answer.error}`);
}

// A server that follows a run changes its model while the page is open.
function showVersion(version) {
  const line = document.getElementById("version");
  line.textContent = `The last answer came from version ${version}.`;
  line.hidden = false;
}

// Runs `work` when the form is sent, and shows its error, or the line that it returns, below the form.
export function onSubmit(form, work) {
  const error = form.querySelector(".error");
  const status = form.querySelector(".status");
  let latest = 0;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const own = ++latest;
    error.hidden = true;
    status.textContent = "Asking.";
    let line = "";
    try {
      line = await work(() => own === latest);
    } catch (problem) {
      if (own !== latest) return;
      error.textContent = problem.message;
      error.hidden = false;
    }
    if (own === latest) status.textContent = line;
  });
}
