"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const shape = (name, parent, attributes) => {
    const made = parent.appendChild(document.createElementNS(SVG, name));
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const [height, width, ratio] = data.size;
  $("slice").setAttribute("viewBox", `0 0 ${width} ${height * ratio}`);
  const plane = shape("g", $("slice"), { transform: `scale(1 ${ratio})` });
  const wanted = (rank) => !$("region") || $("region").value === "" || Number($("region").value) === rank;

  function outlines(kind, at) {
    if (!data[kind] || !$(kind).checked) return;
    data[kind][at].forEach((d, rank) => {
      if (d && wanted(rank)) shape("path", plane, { class: `edge ${kind} r${rank}${$("filled").checked ? " filled" : ""}`, d });
    });
  }
  function draw() {
    const at = Number($("at").value), channel = $("modality") ? Number($("modality").value) : 0;
    plane.replaceChildren();
    if (data.images.length && $("image").checked)
      shape("image", plane, { width, height, preserveAspectRatio: "none", href: "data:image/webp;base64," + data.images[channel][at] });
    outlines("label", at);
    outlines("prediction", at);
    const found = ["label", "prediction"].filter((kind) => data.areas[kind] && data.areas[kind][at]);
    $("said").textContent = `Slice ${at + 1} of ${data.depth}${found.length ? `: ${found.join(" and ")} here` : ""}`;
    $("slice").setAttribute("aria-label", $("said").textContent);
    $("now").setAttribute("x1", place(at));
    $("now").setAttribute("x2", place(at));
    $("down").disabled = at === 0;
    $("up").disabled = at === data.depth - 1;
  }
  const place = (at) => (300 * (at + 0.5)) / data.depth;
  const go = (at) => { $("at").value = Math.max(0, Math.min(data.depth - 1, at)); draw(); };

  const tallest = Math.max(1, ...data.areas.prediction, ...(data.areas.label || []));
  for (const kind of ["label", "prediction"]) {
    if (!data.areas[kind]) continue;
    const d = data.areas[kind].map((area, at) => `${at ? "L" : "M"}${place(at).toFixed(1)} ${(39 - (37 * area) / tallest).toFixed(1)}`).join("");
    shape("path", $("profile"), { class: `edge ${kind}`, d });
  }
  shape("line", $("profile"), { id: "now", class: "axis", y1: 0, y2: 40, x1: 0, x2: 0 });

  $("at").oninput = draw;
  for (const id of ["image", "label", "prediction", "filled", "modality", "region"]) if ($(id)) $(id).onchange = draw;
  $("down").onclick = () => go(Number($("at").value) - 1);
  $("up").onclick = () => go(Number($("at").value) + 1);
  $("most").onclick = () => go(data.start);
  const toggle = (id) => { if (!$(id).disabled) { $(id).checked = !$(id).checked; draw(); } };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const by = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 5, PageDown: -5 }[event.key];
    const letter = { i: "image", l: "label", p: "prediction", f: "filled" }[event.key.toLowerCase()];
    if (by) go(Number($("at").value) + by);
    else if (event.key === "Home") go(data.start);
    else if (letter) toggle(letter);
    else return;
    event.preventDefault();
  });
  $("profile").onclick = (event) => {
    const box = $("profile").getBoundingClientRect();
    go(Math.floor(((event.clientX - box.left) / box.width) * data.depth));
  };
  draw();
})();
