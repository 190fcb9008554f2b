// Requests to the playground server: JSON in, JSON out. A refused request becomes an Error with the message of the API.
import { banner, SERVER_DOWN } from "./banner.js";

function post(body) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
}

export async function ask(path, body) {
  const request = body === undefined ? {} : post(body);
  let response;
  try {
    response = await fetch(`/api/${path}`, request);
  } catch {
    banner.down(SERVER_DOWN);
    throw new Error(SERVER_DOWN);
  }
  const version = response.headers.get("X-BabyBERT-Version");
  if (version) showVersion(version);
  const answer = await response.json().catch(() => ({ error: response.statusText }));
  if (response.ok) return answer;
  if (answer.down) banner.down(answer.error);
  else if (response.status >= 500) banner.look(); // find out whether the model fails for this request only
  throw new Error(answer.down ? answer.error : `${response.status}: ${answer.error}`);
}

// A server that follows a run may change its model while the page is open.
function showVersion(version) {
  const line = document.getElementById("version");
  line.textContent = `The last answer came from version ${version}.`;
  line.hidden = false;
}

// Runs `work` when the form is submitted, and shows its error, or the text that it returns, below the form.
export function onSubmit(form, work) {
  const error = form.querySelector(".error");
  const status = form.querySelector(".status");
  let latest = 0;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const submission = ++latest;
    error.hidden = true;
    status.textContent = "Waiting for the answer.";
    let result = "";
    try {
      result = await work(() => submission === latest);
    } catch (problem) {
      if (submission !== latest) return;
      error.textContent = problem.message;
      error.hidden = false;
    }
    if (submission === latest) status.textContent = result;
  });
}
