"use strict";
// Draws the figures in the colours of the theme that is shown, and makes legends and the copy button work. No network.
(() => {
  const { figures, themes } = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const hidden = new Map(); // figure -> the formulas that the reader switched off
  let printing = false;

  const theme = () => themes[dark.matches && !printing ? "dark" : "light"];

  // "series-1/0.2" becomes the colour of the theme with that opacity.
  function tone(token) {
    const [name, opacity] = String(token).split("/");
    const hex = theme().tones[name];
    if (!hex) return token;
    if (opacity === undefined) return hex;
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${r},${g},${b},${opacity})`;
  }

  // Tokens stand only under keys that end in "color", so no text of the user is ever taken for one.
  function coloured(value, key) {
    if (Array.isArray(value)) return value.map((item) => coloured(item, key));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, coloured(item, name)]));
    }
    return typeof value === "string" && /color$/.test(key) ? tone(value) : value;
  }

  function draw(id) {
    const place = document.getElementById(`plot-${id}`);
    if (!place || place.clientWidth === 0) return; // inside a closed <details>; drawn when it opens
    const figure = coloured(figures[id], "");
    const off = hidden.get(id) || new Set();
    for (const trace of figure.data) trace.visible = !off.has(String(trace.meta.formula));
    figure.layout.template = theme().template;
    figure.layout.autosize = !printing;
    // A page is laid out for paper only after figures were drawn, so they get the width of A4 or half of it by hand.
    if (printing) figure.layout.width = place.clientWidth > 480 ? 640 : 305;
    // Fingers scroll the page, they do not draw zoom boxes.
    figure.layout.dragmode = window.matchMedia("(pointer: coarse)").matches ? false : "zoom";
    if (!place.classList.contains("drawn")) {
      place.textContent = "";
      place.classList.add("drawn");
    }
    Plotly.react(place, figure.data, figure.layout, { displayModeBar: false, responsive: true });
    // The label of the figure says what it shows; loose numbers from its axes would only disturb a screen reader.
    for (const drawing of place.children) drawing.setAttribute("aria-hidden", "true");
  }

  const all = () => Object.keys(figures).forEach(draw);

  // Figures near the window are drawn at once, the others when the browser has nothing else to do, one after the other.
  function open() {
    const later = [];
    for (const id of Object.keys(figures)) {
      const place = document.getElementById(`plot-${id}`);
      if (place && place.clientWidth && place.getBoundingClientRect().top > 2 * window.innerHeight) later.push(id);
      else draw(id);
    }
    // A window in the background is never idle; half a second is long enough to wait.
    const idle = (work) =>
      window.requestIdleCallback ? window.requestIdleCallback(work, { timeout: 500 }) : setTimeout(work, 20);
    const next = () => {
      const id = later.shift();
      if (id === undefined) {
        document.documentElement.classList.add("all-drawn");
        return;
      }
      if (!document.getElementById(`plot-${id}`).classList.contains("drawn")) draw(id);
      idle(next);
    };
    next();
  }

  if (typeof Plotly === "undefined") {
    document.documentElement.classList.add("no-figures");
  } else {
    open();
    // Plotly measures its texts in an empty drawing of its own.
    document.getElementById("js-plotly-tester")?.setAttribute("aria-hidden", "true");
    dark.addEventListener("change", all);
    for (const box of document.querySelectorAll("details")) {
      box.addEventListener("toggle", () => {
        if (box.open) box.querySelectorAll(".plot").forEach((plot) => draw(plot.id.slice("plot-".length)));
      });
    }
    const turn = (on) => { if (on !== printing) { printing = on; all(); } };
    window.addEventListener("beforeprint", () => turn(true));
    window.addEventListener("afterprint", () => turn(false));
  }

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const { charts, formula } = button.dataset;
      const show = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", String(show));
      for (const id of charts.split(" ")) {
        const off = hidden.get(id) || new Set();
        show ? off.delete(formula) : off.add(formula);
        hidden.set(id, off);
        if (typeof Plotly !== "undefined") draw(id);
      }
    });
  }

  function select(element) {
    const range = document.createRange();
    range.selectNodeContents(element);
    const selection = window.getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
  }

  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copy);
      let done = false;
      try {
        await navigator.clipboard.writeText(source.textContent);
        done = true;
      } catch {
        // Some browsers keep the clipboard from pages on disk; selecting and the old command still work there.
        select(source);
        done = document.execCommand("copy");
      }
      button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
      document.getElementById("copied").textContent = done ? "The lines are in the clipboard." : "The lines are selected.";
      setTimeout(() => { button.textContent = "Copy"; }, 2500);
    });
  }
})();
