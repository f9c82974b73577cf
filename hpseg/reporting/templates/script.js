"use strict";
const photographs = document.getElementById("photographs");
const NAMES = photographs ? ["picture", "overlay", photographs.dataset.kind] : [];

// A place on a slider: 0 the picture, 100 the overlay, 200 the clusters, in between both of two.
function place(slider, value) {
  const figure = slider.closest("figure");
  slider.value = value;
  slider.setAttribute("aria-valuetext", NAMES[Math.round(value / 100)]);
  for (const image of figure.querySelectorAll(".overlay")) image.style.opacity = Math.min(1, value / 100);
  for (const image of figure.querySelectorAll(".clusters")) image.style.opacity = Math.max(0, value / 100 - 1);
}

const sliders = [...document.querySelectorAll(".slider input")];
const views = [...document.querySelectorAll("#photographs .views input")];
for (const slider of sliders) {
  slider.addEventListener("input", () => {
    place(slider, Number(slider.value));
    for (const view of views) view.checked = sliders.every((other) => other.value === view.value);
  });
  for (const stage of slider.closest("figure").querySelectorAll(".stage")) {
    stage.addEventListener("click", () => {
      place(slider, (Math.floor(Number(slider.value) / 100) + 1) % 3 * 100);
      slider.dispatchEvent(new Event("input"));
    });
  }
}
for (const view of views) {
  view.addEventListener("change", () => sliders.forEach((slider) => place(slider, Number(view.value))));
}
for (const slider of sliders) place(slider, 100); // a browser may keep where it was before

// Of two runs one at a time.
const choices = [...document.querySelectorAll(".runs input")];
function show(run) {
  for (const choice of choices) choice.checked = choice.value === run;
  for (const part of document.querySelectorAll("[data-run]")) part.hidden = part.dataset.run !== run;
}
for (const choice of choices) choice.addEventListener("change", () => show(choice.value));
if (choices.length) show("0");

// Values below the pointer.
const curves = document.getElementById("curves");
const charts = curves ? JSON.parse(curves.textContent) : [];
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const lines = charts[Number(svg.dataset.chart)];
  const pointer = svg.querySelector(".pointer");
  const [rule, text] = [pointer.querySelector("line"), pointer.querySelector("text")];
  const dots = pointer.querySelectorAll("circle");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const told = lines.map((line, number) => {
      let best = 0;
      line.places.forEach(([left], index) => {
        if (Math.abs(left - x) < Math.abs(line.places[best][0] - x)) best = index;
      });
      dots[number].setAttribute("cx", line.places[best][0]);
      dots[number].setAttribute("cy", line.places[best][1]);
      return [line.places[best][0], `${line.steps[best]}: ${line.values[best]}`];
    });
    const left = told[0][0];
    const late = left > svg.viewBox.baseVal.width / 2;
    rule.setAttribute("x1", left);
    rule.setAttribute("x2", left);
    text.textContent = told.map(([, words]) => words).join("   ");
    text.setAttribute("x", late ? left - 8 : left + 8);
    text.setAttribute("text-anchor", late ? "end" : "start");
    pointer.setAttribute("visibility", "visible");
  });
  svg.addEventListener("pointerleave", () => pointer.setAttribute("visibility", "hidden"));
}
