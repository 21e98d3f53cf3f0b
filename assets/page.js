"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const kept = {
  read() { try { return JSON.parse(sessionStorage.getItem(location.pathname)) || {}; } catch { return {}; } },
  write(value) { try { sessionStorage.setItem(location.pathname, JSON.stringify(value)); } catch { /* a locked browser */ } },
};

// -- what a number means, where it stands
const tip = document.getElementById("tip");
function tell(term) {
  tip.textContent = term.dataset.tip;
  tip.hidden = false;
  const at = term.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const under = at.bottom + 8 + own.height < innerHeight;
  tip.style.left = `${Math.max(12, Math.min(at.left, innerWidth - own.width - 12))}px`;
  tip.style.top = `${under ? at.bottom + 8 : at.top - own.height - 8}px`;
}
for (const term of all(".term")) {
  for (const event of ["mouseenter", "focus", "click"]) term.addEventListener(event, () => tell(term));
  for (const event of ["mouseleave", "blur"]) term.addEventListener(event, () => { tip.hidden = true; });
}
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
addEventListener("keydown", event => { if (event.key === "Escape") tip.hidden = true; });

// -- pictures: two contenders beside or over each other
const pictures = document.getElementById("pictures");
const large = document.getElementById("large");
const cards = pictures ? all(".card", pictures) : [];
const chosen = Object.assign({ left: 0, right: 1, view: "pairs", cut: 50 }, kept.read());
let open = -1;

function shownNames() {
  const select = document.getElementById("left");
  return select ? [chosen.left, chosen.right].map(i => select.options[i].textContent) : [];
}
function show() {
  for (const card of cards) for (const image of all("img", card)) {
    const own = Number(image.dataset.set);
    image.hidden = own !== chosen.left && own !== chosen.right;
    image.className = own === chosen.right && own !== chosen.left ? "right" : "";
  }
  pictures.classList.toggle("overlay", chosen.view === "overlay");
  pictures.classList.toggle("pairs", chosen.view === "pairs");
  pictures.style.setProperty("--cut", `${chosen.cut}%`);
  large.style.setProperty("--cut", `${chosen.cut}%`);
  for (const range of all("input[type=range]")) range.value = chosen.cut;
  kept.write(chosen);
}
function enlarge(index) {
  open = (index + cards.length) % cards.length;
  const images = all("img", cards[open]).filter(image => !image.hidden).map(image => image.cloneNode());
  large.querySelector(".two").replaceChildren(...images);
  large.classList.toggle("overlay", images.length > 1);
  large.classList.toggle("one", images.length === 1);
  large.classList.toggle("small", pictures.classList.contains("small"));
  const ends = all(".ends span", large), names = shownNames();
  ends.forEach((end, i) => { end.textContent = images.length > 1 ? names[i] : ""; });
  large.querySelector("input").hidden = images.length < 2;
  large.querySelector(".text").textContent = cards[open].querySelector("figcaption").textContent;
  large.querySelector(".foot span").textContent = `${open + 1} of ${cards.length}`;
  if (!large.open) large.showModal();
}
if (pictures) {
  const selects = ["left", "right"].map(name => document.getElementById(name)).filter(Boolean);
  const count = selects.length ? selects[0].options.length : 1;
  if (count < 2 || chosen.left >= count || chosen.right >= count) Object.assign(chosen, { left: 0, right: Math.min(1, count - 1) });
  for (const select of selects) {
    select.value = chosen[select.id];
    select.addEventListener("change", () => {
      const other = select.id === "left" ? "right" : "left", before = chosen[select.id];
      chosen[select.id] = Number(select.value);
      if (chosen.left === chosen.right) chosen[other] = before;
      for (const one of selects) one.value = chosen[one.id];
      show();
    });
  }
  for (const radio of all("input[name=view]")) {
    radio.checked = radio.value === chosen.view;
    radio.addEventListener("change", () => { chosen.view = radio.value; show(); });
  }
  for (const range of all("input[type=range]")) range.addEventListener("input", () => { chosen.cut = Number(range.value); show(); });
  cards.forEach((card, i) => card.querySelector(".two").addEventListener("click", () => enlarge(i)));
  for (const button of all("[data-go]", large)) button.addEventListener("click", () => {
    if (button.dataset.go === "0") large.close(); else enlarge(open + Number(button.dataset.go));
  });
  large.addEventListener("click", event => { if (event.target === large) large.close(); });
  show();
}

// -- reading a curve under the pointer
const LEFT = 46, RIGHT = 348, TOP = 12, BOTTOM = 184;
const made = (name, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};
for (const plot of all("svg.plot[data-axes]")) {
  const [x0, x1, y0, y1, log] = plot.dataset.axes.split(" ").map(Number);
  const curves = all("polyline:not(.faint)", plot).map(line => ({
    name: line.dataset.name || "", points: line.getAttribute("points").split(" ").map(p => p.split(",").map(Number)) }));
  const value = y => { const part = (BOTTOM - y) / (BOTTOM - TOP);
    return log ? y0 * (y1 / y0) ** part : y0 + part * (y1 - y0); };
  const own = made("g", { visibility: "hidden" });
  plot.append(own);
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * 360;
    const near = curves.map(c => [c.name, c.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)]);
    if (!near.length) return;
    const x = near[0][1][0], step = Math.round(x0 + (x - LEFT) / (RIGHT - LEFT) * (x1 - x0));
    const side = x > 200 ? { x: x - 6, "text-anchor": "end" } : { x: x + 6 };
    own.replaceChildren(made("line", { class: "cross", x1: x, x2: x, y1: TOP, y2: BOTTOM }), ...near.map(([name, p], i) => {
      const text = made("text", { class: "read", y: TOP + 20 + 14 * i, ...side });
      text.textContent = `${name ? name + " " : ""}${value(p[1]).toPrecision(3)} at ${step}`;
      return text;
    }));
    own.setAttribute("visibility", "visible");
  });
  plot.addEventListener("pointerleave", () => own.setAttribute("visibility", "hidden"));
}

// -- while the run goes on
const live = 1000 * Number(document.body.dataset.live);
function again() {
  if (large.open || document.hidden) setTimeout(again, live); else location.reload();
}
if (live) setTimeout(again, live);
