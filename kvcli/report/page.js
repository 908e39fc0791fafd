"use strict";
// An interpreter in the library's stead of compiled expressions, and nothing fetched: the page's policy forbids both.
const refuse = () => Promise.reject(new Error("this page loads nothing"));
const theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "custom";
const options = { mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false, ast: true,
  loader: { load: refuse, sanitize: refuse, http: refuse, file: refuse }, tooltip: { theme } };
for (const [name, spec] of Object.entries(JSON.parse(document.getElementById("charts").textContent)))
  window.vegaEmbed(`#chart-${name}`, spec, options).catch((error) => console.error(name, error));
// On paper every table is open.
const closed = new Set();
addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach((x) => {
  closed.add(x); x.open = true; }));
addEventListener("afterprint", () => { closed.forEach((x) => { x.open = false; }); closed.clear(); });
