"use strict";
// Tables sort by a click on a heading; a field above a table or a gallery hides what does not hold its words.
const key = (row, column) => {
  const cell = row.cells[column];
  return "value" in cell.dataset ? Number(cell.dataset.value) : null;
};
// Rows without a number stand last, upwards and downwards.
const compare = (first, second, column, sign) => {
  const [a, b] = [key(first, column), key(second, column)];
  if (a !== null && b !== null) return sign * (a - b);
  if (a !== null || b !== null) return a === null ? 1 : -1;
  return sign * first.cells[column].textContent.localeCompare(second.cells[column].textContent);
};
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].sort((a, b) => compare(a, b, column, down ? -1 : 1));
    table.tBodies[0].append(...rows);
  }));
}
const parts = (place) => [...(place.tBodies ? place.tBodies[0].rows : place.children)];
const filter = (place) => {
  const field = document.querySelector(`[data-filter="${place.id}"]`);
  const choice = document.querySelector(`[data-marks="${place.id}"]`);
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const part of parts(place)) {
    const text = part.textContent.toLowerCase();
    const wanted = words.every((word) => text.includes(word)) && (!choice || !choice.value || part.dataset.mark === choice.value);
    part.hidden = !wanted;
    shown += wanted;
  }
  const said = document.querySelector(`output[for="${place.id}"]`);
  said.textContent = shown === parts(place).length ? "" : `${shown} of ${parts(place).length}`;
};
for (const field of document.querySelectorAll("[data-filter], [data-marks]")) {
  const place = document.getElementById(field.dataset.filter || field.dataset.marks);
  for (const event of ["input", "change"]) field.addEventListener(event, () => filter(place));
}
// A click on a picture shows it over the whole window; the browser closes it by Escape and gives the focus back.
// Arrow keys change between what is labelled, FP32 and INT8, on the same place, unless they are needed to pan.
const large = document.getElementById("large");
const sheet = large.querySelector(".sheet");
let views = [];
let shown = 0;
const show = (index) => {
  const place = [sheet.scrollLeft, sheet.scrollTop];
  shown = (index + views.length) % views.length;
  const texts = [...views[shown].closest(".exhibit").querySelectorAll(".side:not(:has(.enlarge))")];
  sheet.replaceChildren(...[views[shown].firstElementChild, ...texts].map((part) => part.cloneNode(true)));
  sheet.scrollTo(...place);
  [...large.querySelector("nav").children].forEach((choice, i) => choice.setAttribute("aria-pressed", i === shown));
};
const choice = (view, index) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = view.dataset.name;
  button.addEventListener("click", () => show(index));
  return button;
};
for (const opener of document.querySelectorAll(".enlarge")) {
  opener.addEventListener("click", () => {
    const exhibit = opener.closest(".exhibit");
    views = [...exhibit.querySelectorAll(".enlarge")];
    document.getElementById("large-title").textContent = exhibit.querySelector("h4").textContent;
    large.querySelector("nav").replaceChildren(...(views.length > 1 ? views.map(choice) : []));
    large.showModal();
    sheet.scrollTo(0, 0);
    show(views.indexOf(opener));
  });
}
large.querySelector(".close").addEventListener("click", () => large.close());
large.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || views.length < 2 || sheet.scrollWidth > sheet.clientWidth) return;
  event.preventDefault();
  show(shown + step);
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
