// The banner: shown while the model does not answer, hidden as soon as it does.
export const SERVER_DOWN = "The playground server does not answer. Is it still running?";
const RETRY_SECONDS = 3; // while the banner is shown
const CHECK_SECONDS = 15; // while it is hidden

class Banner {
  constructor() {
    this.element = document.getElementById("banner");
    this.recovered = document.getElementById("recovered");
    this.isDown = false;
    this.listeners = [];
    this.timer = undefined;
    this.latest = 0; // an answer that is older than what the page knows is ignored
  }

  down(reason) {
    this.latest += 1;
    const retry = `Trying again every ${RETRY_SECONDS} seconds; this message disappears once there is an answer.`;
    const text = `${reason} ${retry}`;
    if (this.element.textContent !== text) this.element.textContent = text;
    this.element.hidden = false;
    this.recovered.textContent = "";
    if (!this.isDown) this.plan(RETRY_SECONDS);
    this.isDown = true;
  }

  up() {
    if (!this.isDown) return;
    this.isDown = false;
    this.element.hidden = true;
    this.element.textContent = "";
    this.recovered.textContent = "The model answers again.";
    for (const listener of this.listeners) listener();
  }

  onRecovery(listener) {
    this.listeners.push(listener);
  }

  plan(seconds) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.look(), seconds * 1000);
  }

  async look() {
    if (this.isDown || !document.hidden) {
      const asked = ++this.latest;
      let problem;
      try {
        const response = await fetch("/api/health");
        ({ problem } = await response.json());
        if (problem) problem += ".";
      } catch {
        problem = SERVER_DOWN;
      }
      if (asked === this.latest) {
        if (problem) this.down(problem);
        else this.up();
      }
    }
    this.plan(this.isDown ? RETRY_SECONDS : CHECK_SECONDS);
  }
}

export const banner = new Banner();
