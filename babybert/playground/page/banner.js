// The banner: there while nobody answers, gone by itself once somebody does.
const SECONDS_DOWN = 3;
const SECONDS_UP = 15;

class Banner {
  constructor() {
    this.element = document.getElementById("banner");
    this.recovered = document.getElementById("recovered");
    this.isDown = false;
    this.listeners = [];
    this.timer = undefined;
  }

  down(reason) {
    const text = `${reason} Asking again every ${SECONDS_DOWN} seconds; this line goes away by itself.`;
    if (this.element.textContent !== text) this.element.textContent = text;
    this.element.hidden = false;
    this.recovered.textContent = "";
    if (!this.isDown) this.plan(SECONDS_DOWN);
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
      try {
        const response = await fetch("/api/health");
        const { problem } = await response.json();
        if (problem) this.down(`${problem}.`);
        else this.up();
      } catch {
        this.down("The playground itself does not answer: has it been stopped?");
      }
    }
    this.plan(this.isDown ? SECONDS_DOWN : SECONDS_UP);
  }
}

export const banner = new Banner();
