"use strict";
// Lays the pictures out as they are scrolled to, and filters, searches and orders them.
// Everything is set as text: no word of a caption is ever read as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const form = document.querySelector("form");
const all = document.getElementById("all");

const records = data.records.map((record) => ({
  ...record,
  text: [record.caption, ...record.references, record.id].join("\n").normalize().toLowerCase(),
}));
const numbered = new Map(records.map((record) => [record.number, record]));

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function said(name, className, text) {
  const made = element(name, className, text);
  made.dir = "auto"; // captions run as their language does
  return made;
}

// A card is an empty frame until it comes near the window; far from it, it gives its picture back.
function frame(record) {
  const card = element("figure", "card");
  card.record = record;
  return card;
}

function show(card) {
  if (!card.firstChild) fill(card);
  const image = card.querySelector("img");
  const stored = document.getElementById(`picture${card.record.number}`);
  if (image) image.src = `data:image/webp;base64,${stored.textContent}`;
}

function hide(card) {
  card.querySelector("img")?.removeAttribute("src");
}

function fill(card) {
  const { number, id, caption, references, cider, words, failure } = card.record;
  const picture = element("div", "picture");
  if (failure === undefined) {
    const image = element("img", "");
    image.alt = caption;
    picture.append(image);
  } else {
    picture.append(element("p", "broken", `cannot be read: ${failure}`));
  }
  const list = element("ul", "");
  list.append(...references.map((text) => said("li", "", text)));
  const note = element("p", "note", cider === null ? "" : `CIDEr ${(cider / 100).toFixed(2)} · `);
  note.append(`${words} words · `, element("bdi", "", id));
  const below = element("figcaption", "");
  below.append(said("p", "caption", caption), list, note);
  card.append(picture, below);
}

const nearness = new IntersectionObserver(
  (entries) => entries.forEach((entry) => (entry.isIntersecting ? show : hide)(entry.target)),
  { rootMargin: "800px 0px" },
);

const frames = new Map(records.map((record) => [record, frame(record)]));
frames.forEach((card) => nearness.observe(card));
const ranked = data.ranked.map((number) => numbered.get(number));
const orders = {
  split: () => records,
  best: () => ranked,
  worst: () => ranked.toReversed(),
  random: () => records.map((record) => [Math.random(), record]).sort(([a], [b]) => a - b).map(([, record]) => record),
  longest: () => records.toSorted((a, b) => b.words - a.words),
  shortest: () => records.toSorted((a, b) => a.words - b.words),
};
let ordered = records;

function within(value, low, high) {
  return (low === "" || value >= Number(low)) && (high === "" || value <= Number(high));
}

// Numbers are compared as they are shown, so that a bar of a histogram and its filter hold the same pictures.
function update() {
  const wanted = form.search.value.normalize().toLowerCase().split(/\s+/);
  const found = ordered.filter(
    (record) =>
      (record.cider === null || within(record.cider / 100, form["cider-from"].value, form["cider-to"].value)) &&
      within(record.words, form["words-from"].value, form["words-to"].value) &&
      wanted.every((word) => record.text.includes(word)),
  );
  all.replaceChildren(...found.map((record) => frames.get(record)));
  const count = (number) => number.toLocaleString("en");
  form.querySelector("output").value = `${count(found.length)} of ${count(records.length)} pictures`;
  if (all.getBoundingClientRect().top < 0) form.parentElement.scrollIntoView(); // else one would look at their end
}

function reorder() {
  ordered = orders[form.order.value]();
  update();
}

let pending = 0;
form.addEventListener("input", (event) => {
  clearTimeout(pending);
  pending = setTimeout(event.target === form.order ? reorder : update, 100);
});
form.addEventListener("reset", () => setTimeout(reorder)); // when the fields are empty
form.addEventListener("submit", (event) => event.preventDefault());

for (const bar of document.querySelectorAll("[data-field]")) {
  bar.addEventListener("click", () => {
    form[`${bar.dataset.field}-from`].value = bar.dataset.from;
    form[`${bar.dataset.field}-to`].value = bar.dataset.to;
    update();
    form.parentElement.scrollIntoView();
  });
}

for (const [name, numbers] of Object.entries(data.rows)) {
  const cards = numbers.map((number) => frame(numbered.get(number)));
  cards.forEach(show); // few, and in a strip that scrolls by itself
  document.getElementById(name).replaceChildren(...cards);
}
reorder();
document.body.classList.add("scripted");
