"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const element = (name, parent, text, css) => {
    const made = parent.appendChild(document.createElement(name));
    if (text !== undefined) made.textContent = text;
    if (css) made.className = css;
    return made;
  };
  const shape = (name, parent, attributes) => {
    const made = parent.appendChild(document.createElementNS(SVG, name));
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const blank = (v) => v === null || v === undefined;
  const number = (v, digits) => v.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");
  const words = (v, kind) => blank(v) ? "–" : v === Infinity ? "∞" : kind === "t" ? v : number(v, kind);
  const distance = (v) => v === "inf" ? Infinity : v;
  const link = (row) => "#scan=" + encodeURIComponent(row[0]);

  // --- the scans that are shown: one choice for pictures and table ---------------------------------------------------

  const state = { region: 0, page: 0, sort: 4, up: true, view: Object.keys(data.pictures).length ? "pictures" : "table" };
  const region = (row) => row[4][state.region] || [];
  const millilitres = data.units.volume === "mL" ? 1 : 0;
  const columns = [
    ["Scan", (r) => r[0], "t"], ["Patient", (r) => r[1], "t"], ["Split", (r) => r[2], "t"],
    ["State", (r) => (region(r)[0] || "").replace("_", " "), "t"],
    ["Dice", (r) => region(r)[1], 3], ["Precision", (r) => region(r)[2], 3], ["Recall", (r) => region(r)[3], 3],
    ["HD95 " + data.units.distance, (r) => distance(region(r)[4]), 1],
    ["Label " + data.units.volume, (r) => region(r)[5], millilitres],
    ["Predicted " + data.units.volume, (r) => region(r)[6], millilitres],
    ["Probability", (r) => region(r)[7], 3], ["Entropy", (r) => region(r)[8], 4],
    ["Surprise", (r) => r[5], 2], ["Warnings", (r) => r[3], 0],
  ];
  const SURPRISE = columns.findIndex(([name]) => name === "Surprise");
  const key = (row) => { const v = columns[state.sort][1](row); return state.sort === SURPRISE && !blank(v) ? -Math.abs(v) : v; };
  const collator = new Intl.Collator("en", { numeric: true });
  const order = (a, b) => {
    const x = key(a), y = key(b);
    if (blank(x) || blank(y)) return blank(x) - blank(y);
    const less = typeof x === "string" ? collator.compare(x, y) : x === y ? 0 : x - y;
    return state.up ? less : -less;
  };
  let wanted = [];
  function choose() {
    const find = $("find").value.trim().toLowerCase(), split = $("split").value, what = $("state").value;
    const fits = (r) => (!split || r[2] === split) && (!what || region(r)[0] === what)
      && (!find || r[0].toLowerCase().includes(find) || (r[1] || "").toLowerCase().includes(find));
    wanted = data.rows.filter(fits).sort(order);
  }

  // --- pictures -----------------------------------------------------------------------------------------------------

  function slice(parent, picture, label, prediction, says) {
    const [width, height, , , image] = picture;
    const drawn = shape("svg", parent, { class: "slice", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": says });
    shape("image", drawn, { width, height, href: "data:image/webp;base64," + image });
    const edges = (paths, kind) => (paths || []).forEach((d, rank) => d && shape("path", drawn, { class: `edge ${kind} r${rank}`, d }));
    if (label) edges(picture[5], "label");
    if (prediction) edges(picture[6], "prediction");
  }
  function panels(parent, row, picture, all) {
    const box = element("div", parent, undefined, "panels"), where = `slice ${picture[2] + 1} of ${row[0]}`;
    const panel = (caption, label, prediction) => {
      const cell = element("div", box);
      slice(cell, picture, label, prediction, `${caption}, ${where}`);
      element("small", cell, caption);
    };
    panel(`${picture[3]}, slice ${picture[2] + 1}`, false, false);
    if (all && picture[5]) panel("label", true, false);
    panel(picture[5] ? "label and prediction" : "prediction", true, true);
  }
  const labelled = (row) => row[4].some((f) => f && f[0] !== "no_label");
  const figures = (row) => (labelled(row) ? "Dice: " : "Mean probability: ") + data.regions.map((name, i) => {
    const f = row[4][i];
    if (!f) return `${name} –`;
    if (f[0] === "no_label") return `${name} ${words(f[7], 3)}`;
    return blank(f[1]) ? `${name} both empty` : `${name} ${number(f[1], 3)}${f[0] === "both" ? "" : ` (${f[0]})`}`;
  }).join(", ");
  function card(parent, row) {
    const box = element("a", parent, undefined, "picture card-link");
    box.href = link(row);
    element("h4", box, row[0]);
    const picture = data.pictures[data.rows.indexOf(row)];
    if (picture) panels(box, row, picture, false);
    else element("div", box, "no picture of this scan on the page", "no-picture");
    element("div", box, `${figures(row)} · ${row[2]}`, "small soft");
  }

  // --- the table ----------------------------------------------------------------------------------------------------

  const heads = columns.map(([name, , kind], i) => {
    const head = element("th", $("rows").tHead.rows[0] || $("rows").tHead.insertRow(), undefined, kind === "t" ? "t" : "");
    head.scope = "col";
    const button = element("button", head, name);
    button.type = "button";
    button.onclick = () => { state.up = state.sort === i ? !state.up : true; state.sort = i; state.page = 0; draw(); };
    const option = element("option", $("sort"), name);
    option.value = i;
    return head;
  });
  function drawTable(rows) {
    const body = document.createElement("tbody");
    for (const row of rows) {
      const line = body.insertRow();
      columns.forEach(([, value, kind], i) => {
        const cell = element("td", line, undefined, kind === "t" ? "t" : "");
        if (i === 0) element("a", cell, row[0]).href = link(row);
        else cell.textContent = words(value(row), kind);
      });
    }
    $("rows").tBodies[0].replaceWith(body);
    heads.forEach((head, i) => i === state.sort ? head.setAttribute("aria-sort", state.up ? "ascending" : "descending") : head.removeAttribute("aria-sort"));
  }
  function draw() {
    choose();
    const size = state.view === "table" ? 50 : 12, last = Math.max(Math.ceil(wanted.length / size) - 1, 0);
    state.page = Math.min(state.page, last);
    const rows = wanted.slice(state.page * size, (state.page + 1) * size);
    $("table").hidden = state.view !== "table";
    $("cards").hidden = state.view === "table";
    $("cards").replaceChildren();
    drawTable(state.view === "table" ? rows : []);
    if (state.view !== "table") rows.forEach((row) => card($("cards"), row));
    document.querySelectorAll("[data-view]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.view === state.view));
    $("sort").value = state.sort;
    $("order").textContent = state.up ? "▲ ascending" : "▼ descending";
    const first = wanted.length ? state.page * size + 1 : 0;
    $("where").textContent = `${number(first, 0)} to ${number(Math.min((state.page + 1) * size, wanted.length), 0)} of ${number(wanted.length, 0)}`;
    $("back").disabled = state.page === 0;
    $("next").disabled = state.page === last;
  }
  const again = () => { state.page = 0; draw(); };
  $("find").oninput = $("split").onchange = $("state").onchange = again;
  $("sort").onchange = (event) => { state.sort = Number(event.target.value); state.up = true; again(); };
  $("order").onclick = () => { state.up = !state.up; again(); };
  $("back").onclick = () => { state.page -= 1; draw(); };
  $("next").onclick = () => { state.page += 1; draw(); };
  document.querySelectorAll("[data-view]").forEach((b) => { b.onclick = () => { state.view = b.dataset.view; again(); }; });
  document.querySelectorAll(".tools").forEach((tools) => { tools.hidden = false; });

  // --- one region of the charts at a time; the table follows -----------------------------------------------------------

  function showRegion(chosen) {
    state.region = chosen;
    document.querySelectorAll("figure[data-region]").forEach((f) => f.classList.toggle("off", Number(f.dataset.region) !== chosen));
    document.querySelectorAll("[data-choose]").forEach((b) => b.setAttribute("aria-pressed", Number(b.dataset.choose) === chosen));
    if ($("region")) $("region").value = chosen;
    again();
  }
  $("region").onchange = (event) => showRegion(Number(event.target.value));
  document.querySelectorAll("[data-choose]").forEach((b) => { b.onclick = () => showRegion(Number(b.dataset.choose)); });
  showRegion(0);

  // --- one scan, opened -----------------------------------------------------------------------------------------------

  const dialog = $("scan");
  let open = null;
  function fill(row) {
    open = row;
    const body = $("scan-body");
    body.replaceChildren();
    $("scan-title").textContent = row[0];
    const picture = data.pictures[data.rows.indexOf(row)];
    if (picture) panels(body, row, picture, true);
    else element("p", body, "This page carries no picture of this scan.", "soft");
    const table = element("table", element("div", body, undefined, "wide"));
    const head = table.createTHead().insertRow();
    ["Region", ...columns.slice(3, 12).map(([name]) => name)].forEach((name, i) => element("th", head, name, i < 2 ? "t" : ""));
    const rows = table.createTBody(), kept = state.region;
    data.regions.forEach((name, i) => {
      const line = rows.insertRow();
      state.region = i;
      element("td", line, name, "t");
      for (const [, value, kind] of columns.slice(3, 12)) element("td", line, words(value(row), kind), kind === "t" ? "t" : "");
    });
    state.region = kept;
    const said = [row[1] ? `patient ${row[1]}` : "patient not named", row[2]];
    if (!blank(row[5])) said.push(`surprise ${row[5] > 0 ? "+" : ""}${number(row[5], 2)} (${row[5] > 0 ? "surer than right" : "better than sure"})`);
    if (row[3]) said.push(`${row[3]} warning${row[3] > 1 ? "s" : ""}`);
    element("p", body, said.join(" · "), "small soft");
    const quoted = (text) => /^[\w./:-]+$/.test(text) ? text : "'" + text.replace(/'/g, "'\\''") + "'";
    element("p", body, "All its slices: ", "small soft").append(Object.assign(document.createElement("code"), { textContent: `brainseg view ${quoted(data.run)} -- ${quoted(row[0])}` }));
    const place = wanted.indexOf(row);
    $("scan-back").disabled = place <= 0;
    $("scan-next").disabled = place < 0 || place === wanted.length - 1;
    if (!dialog.open) dialog.showModal();
  }
  const step = (by) => { const next = wanted[wanted.indexOf(open) + by]; if (next) history.replaceState(null, "", link(next)), fill(next); };
  function follow() {
    if (!location.hash.startsWith("#scan=")) return;
    let id;
    try { id = decodeURIComponent(location.hash.slice(6)); } catch { return; }
    const row = data.rows.find((r) => r[0] === id);
    if (row) fill(row);
  }
  $("scan-back").onclick = () => step(-1);
  $("scan-next").onclick = () => step(1);
  $("scan-close").onclick = () => dialog.close();
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
  dialog.onkeydown = (event) => { if (event.key === "ArrowLeft") step(-1); if (event.key === "ArrowRight") step(1); };
  dialog.onclose = () => { if (location.hash.startsWith("#scan=")) history.replaceState(null, "", location.pathname + location.search); };
  addEventListener("hashchange", follow);

  // --- points: the one under the pointer, or under the arrow keys --------------------------------------------------------

  const tip = $("tip");
  function points(svg, rows) {
    const found = [];
    svg.querySelectorAll("path.dots").forEach((path, i) => {
      const places = path.getAttribute("d").matchAll(/M(-?[\d.]+) (-?[\d.]+)/g);
      let n = 0;
      for (const [, x, y] of places) found.push([Number(x), Number(y), rows[i][n++]]);
    });
    return found.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  }
  document.querySelectorAll("figure[data-chart]").forEach((figure) => {
    const rows = data.charts[figure.dataset.chart], svg = figure.querySelector("svg");
    if (!rows || !rows.length) return;
    let all = null, here = -1;
    const ring = shape("circle", svg, { class: "ring", r: 6 });
    const marked = (n, x, y) => {
      here = n;
      ring.classList.toggle("on", n >= 0);
      tip.hidden = n < 0;
      if (n < 0) return;
      const [cx, cy, row] = all[n], scan = data.rows[row];
      ring.setAttribute("cx", cx);
      ring.setAttribute("cy", cy);
      tip.replaceChildren();
      element("b", tip, scan ? scan[0] : "not in the page's table");
      if (scan) element("div", tip, figures(scan));
      if (x === undefined) { const box = ring.getBoundingClientRect(); x = box.x + box.width / 2; y = box.y; }
      tip.style.left = `${Math.max(8, Math.min(x + 12, innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${y - tip.offsetHeight - 14 > 0 ? y - tip.offsetHeight - 14 : y + 18}px`;
    };
    svg.tabIndex = 0;
    svg.setAttribute("aria-description", "Arrow keys go from scan to scan, Enter opens one.");
    svg.onpointermove = (event) => {
      all = all || points(svg, rows);
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      let best = -1, least = 144;
      all.forEach(([x, y], n) => { const far = (x - at.x) ** 2 + (y - at.y) ** 2; if (far < least) { least = far; best = n; } });
      svg.style.cursor = best < 0 ? "" : "pointer";
      marked(best, event.clientX, event.clientY);
    };
    svg.onpointerleave = svg.onblur = () => marked(-1);
    svg.onclick = (event) => { svg.onpointermove(event); openAt(); };
    function openAt() {
      const scan = here >= 0 && data.rows[all[here][2]];
      marked(-1);
      if (!scan) return;
      history.replaceState(null, "", link(scan));
      fill(scan);
    }
    svg.onkeydown = (event) => {
      const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      all = all || points(svg, rows);
      if (by) { event.preventDefault(); marked(here < 0 ? (by > 0 ? 0 : all.length - 1) : (here + by + all.length) % all.length); }
      else if (event.key === "Enter" && here >= 0) { event.preventDefault(); openAt(); }
      else if (event.key === "Escape") marked(-1);
    };
  });
  follow();
})();
