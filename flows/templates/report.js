"use strict";
// Figures bring their data; the colours of their text and lines are the page's, in light and in dark.
const figures = JSON.parse(document.getElementById("figures").textContent);
// Buttons by name: plotly's own set has one that uploads the figure.
const settings = {
  responsive: true,
  displaylogo: false,
  plotlyServerURL: "",
  modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]],
};
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function themed(layout) {
  const page = getComputedStyle(document.documentElement);
  const color = (name) => page.getPropertyValue(name).trim();
  const copy = structuredClone(layout);
  copy.font = { ...copy.font, color: color("--ink") };
  copy.hoverlabel = { ...copy.hoverlabel, bgcolor: color("--card"), bordercolor: color("--line") };
  copy.hoverlabel.font = { ...copy.hoverlabel.font, color: color("--ink") };
  copy.modebar = { bgcolor: "rgba(0,0,0,0)", color: color("--quiet"), activecolor: color("--accent") };
  for (const key of Object.keys(copy).filter((name) => /^[xy]axis\d*$/.test(name))) {
    copy[key] = { ...copy[key], gridcolor: color("--grid"), linecolor: color("--line") };
  }
  return copy;
}

function draw() {
  for (const place of document.querySelectorAll("[data-figure]")) {
    const figure = figures[place.dataset.figure];
    Plotly.react(place, figure.data, themed(figure.layout), settings);
  }
}

draw();
dark.addEventListener("change", draw);
