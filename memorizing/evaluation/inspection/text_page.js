"use strict";
// What pages that show a text token by token share. A page defines `choose(position, scrolls)`, which sets `chosen`.
const data = JSON.parse(document.getElementById("data").textContent);
function bytes(text) {
  const raw = atob(text), array = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) array[i] = raw.charCodeAt(i);
  return array.buffer;
}
const tokens = new Uint32Array(bytes(data.tokens));
const text = i => data.table[tokens[i]];
const number = value => value.toLocaleString("en-US");
const visible = piece => piece === "" ? "·" : piece.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣");
function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}
// A token and its neighbourhood: `before` tokens up to it, `after` from it on.
function around(position, before, after) {
  const part = element("span");
  const slice = (from, to) => { let joined = ""; for (let i = Math.max(from, 0); i < Math.min(to, tokens.length); i++) joined += text(i); return joined.replace(/\n\s*/g, "⏎"); };
  part.append(slice(position - before, position - 1));
  if (position > 0) part.append(element("mark", {textContent: visible(text(position - 1)), title: "read here"}));
  part.append(element("span", {className: "next", textContent: visible(text(position)), title: "what followed"}), slice(position + 1, position + after));
  return part;
}
// What is told of the chosen token first.
const chosenToken = position => [`token ${number(position)}: `, element("b", {textContent: visible(text(position))}), `, after `, element("code", {textContent: position ? visible(text(position - 1)) : "(the start)"})];
const textPane = document.getElementById("text");
let chosen = -1;
// Where a key leads from a position.
const moves = {ArrowRight: i => i + 1, ArrowLeft: i => i - 1, Home: () => 0, End: () => tokens.length - 1};
textPane.addEventListener("keydown", event => {
  const move = moves[event.key];
  if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  choose(Math.min(Math.max(move(chosen), 0), tokens.length - 1), true);
});
textPane.addEventListener("click", event => { if (event.target.dataset.position) choose(+event.target.dataset.position, false); });
