"use strict";
// Everything a corpus wrote comes in as text: it is set by textContent, and links are made of http and https alone.
const page = JSON.parse(document.getElementById("pairs").textContent);
const dialog = document.querySelector("dialog");
const cards = [...document.querySelectorAll("article[data-id]")];
const order = cards.map((card) => card.dataset.id);
let shown = null;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function pictureOf(id) {
  const image = document.querySelector(`article[data-id="${id}"] figure img`);
  return image ? image.src : page.pairs[id].picture || null;
}

function imageOf(id, kind) {
  const source = pictureOf(id);
  if (source === null) return make("p", { class: "none" }, "The image cannot be read.");
  const small = document.querySelector(`article[data-id="${id}"] figure img.small`) ? " small" : "";
  return make("img", { src: source, alt: page.pairs[id].caption, class: kind + small });
}

function value(content) {
  const text = typeof content === "string" ? content : JSON.stringify(content);
  if (!/^https?:\/\/\S+$/i.test(text)) return document.createTextNode(text);
  return make("a", { href: text, rel: "noreferrer noopener", target: "_blank" }, text);
}

function table(rows) {
  const cells = ([name, content]) => make("tr", {}, make("td", {}, name), make("td", { class: "mono" }, value(content)));
  return make("table", {}, make("tbody", {}, ...rows.map(cells)));
}

function bars(rows) {
  const list = make("dl");
  for (const { name, share, text, kind } of rows) {
    const fill = make("i", { class: kind });
    fill.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
    list.append(make("dt", {}, name), make("div", { class: "bar" }, fill), make("dd", {}, text));
  }
  return list;
}

function section(title, content) {
  return content === null ? [] : [make("h3", {}, title), content];
}

function termBars(terms) {
  const entries = Object.entries(terms || {});
  if (!entries.length) return null;
  const most = Math.max(...entries.map((entry) => entry[1]));
  return bars(entries.map(([name, score]) => ({ name, share: score / most, text: score.toFixed(3), kind: "bm25" })));
}

function note(text) {
  return text ? make("p", { class: "made" }, text) : "";
}

function others(list) {
  if (!list || !list.length) return null;
  const buttons = list.filter((one) => one.id in page.pairs).map(({ id, score }) => {
    const text = (score === undefined ? "" : `${score.toFixed(3)}  `) + page.pairs[id].caption;
    const source = pictureOf(id);
    return make("button", { type: "button", onclick: () => show(id) },
      source === null ? null : make("img", { src: source, alt: "" }), make("span", {}, text));
  });
  return make("div", { class: "near" }, ...buttons);
}

function commandLine(id) {
  if (!page.command) return null;
  const text = `${page.command} --id ${id}`;
  const button = make("button", { type: "button", onclick: () => copy(text, button) }, "copy");
  return make("div", { class: "command" }, make("code", {}, text), button);
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // a page from a file may not be let near the clipboard
    const area = make("textarea");
    area.value = text;
    button.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "copied";
  setTimeout(() => { button.textContent = "copy"; }, 1500);
}

function show(id) {
  const pair = page.pairs[id];
  const place = order.indexOf(id);
  const step = (by) => show(order[place + by]);
  const title = place < 0 ? "not among the hits" : `${place + 1} of ${order.length}`;
  const earlier = make("button", { type: "button", "aria-label": "earlier hit", onclick: () => step(-1) }, "\u2190");
  const later = make("button", { type: "button", "aria-label": "later hit", onclick: () => step(1) }, "\u2192");
  earlier.disabled = place <= 0;
  later.disabled = place < 0 || place === order.length - 1;
  const close = make("button", { type: "button", onclick: () => dialog.close() }, "close");
  const back = shown !== null && place < 0 && order.includes(shown) ? shown : null;
  const head = make("div", { class: "bar-top" }, make("b", {}, title),
    back === null ? null : make("button", { type: "button", onclick: () => show(back) }, "back"), earlier, later, close);
  const left = make("div", {}, imageOf(id, "whole"),
    ...section("Nearest pairs", others(pair.neighbors)), ...section("The same picture", others(pair.repeats)));
  const right = make("div", {}, make("h3", {}, "Caption"), make("p", { class: "text" }, pair.caption),
    ...section("Scores", pair.scores ? bars(pair.scores) : null), note(pair.made ? `score = ${pair.made}` : ""),
    ...section("Words that earned bm25", termBars(pair.terms)), note(pair.missing?.length ? `not in the caption: ${pair.missing.join(", ")}` : ""),
    ...section("Look for what is like it", commandLine(id)), ...section("The pair", table(pair.facts)),
    ...section("Metadata", Object.keys(pair.metadata).length ? table(Object.entries(pair.metadata)) : null));
  dialog.replaceChildren(head, make("div", { class: "panel" }, left, right));
  shown = id;
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  close.focus();
}

for (const button of document.querySelectorAll(".repeat button")) {
  button.addEventListener("click", () => copy(button.previousElementSibling.textContent, button));
}
for (const card of cards) {
  card.addEventListener("click", () => show(card.dataset.id));
  card.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    show(card.dataset.id);
  });
}
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => {
  const card = cards[order.indexOf(shown)];
  if (card) card.focus();
});
document.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by) return;
  const place = dialog.open ? order.indexOf(shown) : cards.indexOf(document.activeElement);
  const next = place + by;
  if (place < 0 || next < 0 || next >= order.length) return;
  event.preventDefault();
  if (dialog.open) show(order[next]);
  else cards[next].focus();
});
