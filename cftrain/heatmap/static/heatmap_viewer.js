// The page: the slide, its maps on top, what is chosen. The choice is in the address after "#", so a link keeps it.
"use strict";
(function () {
  const parts = window.HeatmapParts;
  const { byId } = parts;
  const started = performance.now();
  const STEPS = [0.5, 1, 2, 5, 10, 20, 30, 40, 50, 75, 100]; // per cent of the patches shown

  const data = window.HEATMAP;
  data.grids = data.grids.map((record) => new parts.Grid(record));
  const ramps = Object.fromEntries(Object.entries(data.ramps).map(([kind, text]) => [kind, parts.colours(text)]));
  data.layers = data.layers.map((record) => new parts.Layer(record, ramps));
  const places = new parts.Places(data.grids, data.ordered);
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

  // the finest scale's attention, where there is one
  const first = [...data.layers].reverse().sort((a, b) => a.signed - b.signed || b.scale - a.scale)[0];
  const defaults = { layer: first ? first.name : "off", opacity: data.image ? 0.55 : 1, norm: "percentile", show: 100, place: null, view: null };
  const state = { ...defaults };
  const timing = {};
  let rows = null; // of the patches in the panel, coarse to fine
  let fitting = false;
  let writing = 0;
  let last = defaults.layer; // the map that the key M brings back

  const chosen = () => data.layers.find((layer) => layer.name === state.layer) ?? null;
  const indexOf = (scale) => data.grids.findIndex((grid) => grid.scale === scale);

  const slide = new parts.Slide(byId("slide"), data, calm);
  const { viewer } = slide;
  const overlay = new parts.Overlay(viewer.canvas, () => slide.transform(), !data.image);

  function redraw() {
    const before = performance.now();
    overlay.draw();
    timing.frame = performance.now() - before;
    const where = slide.transform();
    if (where && !data.ordered) parts.scaleBar(data, 1 / where.scaleX);
  }

  // ---- choice and address

  function address() {
    const pairs = [["layer", state.layer], ["opacity", state.opacity], ["norm", state.norm], ["show", state.show]];
    if (state.place) pairs.push(["place", state.place.map(Math.floor).join(",")]);
    if (state.view) pairs.push(["view", state.view.map((each) => Number(each.toPrecision(6))).join(",")]);
    return "#" + pairs.map(([name, value]) => `${name}=${encodeURIComponent(value).replaceAll("%2C", ",")}`).join("&");
  }

  // a little later: browsers refuse addresses that change too often
  function remember() {
    window.clearTimeout(writing);
    writing = window.setTimeout(() => {
      if (window.location.hash !== address()) window.history.replaceState(null, "", address());
    }, 150);
  }

  const numbers = (text, n) => {
    const found = (text ?? "").split(",").map(Number);
    return found.length === n && text && found.every(Number.isFinite) ? found : null;
  };
  const within = (text, low, high, otherwise) => (text !== null && text !== "" && Number.isFinite(Number(text)) ? Math.min(high, Math.max(low, Number(text))) : otherwise);

  function readAddress() {
    const asked = new URLSearchParams(window.location.hash.slice(1));
    const layer = asked.get("layer");
    state.layer = layer === "off" || data.layers.some((each) => each.name === layer) ? layer : defaults.layer;
    state.opacity = within(asked.get("opacity"), 0, 1, defaults.opacity);
    state.norm = asked.get("norm") === "linear" ? "linear" : "percentile";
    state.show = within(asked.get("show"), 0.01, 100, 100);
    state.place = numbers(asked.get("place"), 2);
    state.view = numbers(asked.get("view"), 3);
  }

  // ---- from the choice to the page

  function showControls(layer) {
    for (const each of document.querySelectorAll("input[name=layer]")) each.checked = each.value === state.layer;
    for (const each of document.querySelectorAll("input[name=norm]")) {
      each.checked = each.value === state.norm;
      each.disabled = !layer || layer.signed;
    }
    byId("norms").hidden = !layer || layer.signed;
    byId("opacity").value = Math.round(100 * state.opacity);
    byId("opacity-value").textContent = `${Math.round(100 * state.opacity)} %`;
    const step = STEPS.reduce((best, each, at) => (Math.abs(each - state.show) < Math.abs(STEPS[best] - state.show) ? at : best), 0);
    byId("show").value = step;
    byId("show-value").textContent = state.show >= 100 ? "all patches" : `the ${layer?.signed ? "strongest" : "highest"} ${state.show} %`;
    byId("show").setAttribute("aria-valuetext", byId("show-value").textContent);
    byId("meaning").textContent = layer ? layer.meaning : "No map: the tissue alone.";
    byId("shown-name").textContent = layer ? `${layer.name}, ${layer.scale}x` : "no map";
    byId("toggle").setAttribute("aria-pressed", String(!layer));
  }

  function showPlace(next, pinned) {
    rows = next;
    const none = !rows || rows.every((row) => row < 0);
    byId("place-hint").hidden = Boolean(rows);
    byId("release").hidden = !pinned;
    byId("place").classList.toggle("pinned", pinned);
    byId("place-none").hidden = !rows || !none;
    parts.placeCards(data, rows, chosen(), places);
    parts.readout(chosen(), rows ? rows[anchor()] : -1);
    byId("cards").classList.toggle("idle", !rows);
    overlay.outlines = outlines();
    redraw();
  }

  function outlines() {
    if (!rows) return [];
    const square = (grid, row) => ({ x: grid.x(row), y: grid.y(row), edge: grid.edge });
    const sides = ["above", "right", "left"];
    const own = rows.flatMap((row, index) => (row < 0 ? [] : [{
      ...square(data.grids[index], row), strong: true, label: data.ordered ? "" : `${data.grids[index].scale}x`, side: sides[index % 3],
    }]));
    const inside = rows.flatMap((row, index) => [...places.children(index, row)].map((child) => square(data.grids[index + 1], child)));
    return [...inside.slice(0, 64), ...own];
  }

  function anchor() {
    const layer = chosen();
    return layer ? indexOf(layer.scale) : data.grids.length - 1;
  }

  function pin(x, y, index, row) {
    state.place = [x, y];
    showPlace(places.at(x, y, index ?? anchor(), row), true);
    remember();
  }

  function release() {
    state.place = null;
    showPlace(null, false);
    remember();
  }

  function fade(layer) {
    overlay.opacity = layer || !data.image ? state.opacity : 0;
  }

  function repaint() {
    const before = performance.now();
    const layer = chosen();
    fade(layer);
    overlay.paint(data.grids[anchor()], layer, state.norm, state.show);
    timing.repaint = performance.now() - before;
    showControls(layer);
    parts.legend(layer, state.norm, state.show);
    if (layer) last = layer.name;
  }

  function showAll(move) {
    repaint();
    parts.topPatches(data, chosen(), (index, row) => {
      const grid = data.grids[index];
      slide.zoomTo(grid, row);
      pin(grid.x(row) + grid.edge / 2, grid.y(row) + grid.edge / 2, index, row);
      byId("look").scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
    });
    showPlace(state.place ? places.at(...state.place, anchor()) : null, Boolean(state.place));
    if (move && state.view) slide.show(...state.view);
  }

  function choose(change) {
    const before = { ...state };
    Object.assign(state, change);
    if (state.layer !== before.layer) showAll(false);
    else if (state.norm !== before.norm || state.show !== before.show) repaint();
    else {
      fade(chosen());
      showControls(chosen());
    }
    remember();
  }

  // ---- what people do

  function bindControls() {
    for (const each of document.querySelectorAll("input[name=layer]")) each.addEventListener("change", () => choose({ layer: each.value }));
    for (const each of document.querySelectorAll("input[name=norm]")) each.addEventListener("change", () => choose({ norm: each.value }));
    byId("opacity").addEventListener("input", (event) => choose({ opacity: event.target.value / 100 }));
    byId("show").max = STEPS.length - 1;
    byId("show").addEventListener("input", (event) => choose({ show: STEPS[event.target.value] }));
    byId("release").addEventListener("click", release);
    byId("zoom-in").addEventListener("click", () => slide.zoomBy(1.6));
    byId("zoom-out").addEventListener("click", () => slide.zoomBy(1 / 1.6));
    byId("fit").addEventListener("click", () => viewer.viewport.goHome(calm));
    byId("toggle").addEventListener("click", toggle);
    window.addEventListener("hashchange", () => {
      window.clearTimeout(writing);
      if (window.location.hash === address()) return;
      readAddress();
      showAll(true);
    });
    window.addEventListener("beforeprint", () => slide.print(byId("paper"), overlay));
  }

  const toggle = () => choose({ layer: state.layer === "off" ? last : "off" });

  function bindSlide() {
    let waiting = null;
    viewer.canvas.addEventListener("pointermove", (event) => {
      if (state.place || event.pointerType === "touch" || event.buttons) return;
      if (!waiting) window.requestAnimationFrame(() => {
        if (!state.place && waiting) showPlace(places.at(...slide.under(waiting), anchor()), false);
        waiting = null;
      });
      waiting = event;
    });
    viewer.canvas.addEventListener("pointerleave", () => {
      waiting = null;
      if (!state.place) showPlace(null, false);
    });
    viewer.addHandler("canvas-click", (event) => {
      if (event.quick) pin(...slide.at(event.position));
    });
    viewer.addHandler("canvas-key", keys);
    viewer.addHandler("update-viewport", redraw);
    viewer.addHandler("after-resize", fitAgain);
    viewer.addHandler("animation-finish", () => {
      if (fitting) return;
      state.view = slide.view();
      remember();
    });
  }

  // a window of another size still shows all, if it did
  function fitAgain() {
    if (state.view) return;
    fitting = true;
    window.requestAnimationFrame(() => {
      viewer.viewport.goHome(true);
      fitting = false;
    });
  }

  // arrows, + and - are OpenSeadragon's; its keys that turn and mirror the slide are taken away
  function keys(event) {
    const { key, ctrlKey, metaKey, altKey } = event.originalEvent;
    if (ctrlKey || metaKey || altKey) return;
    if (/^[rfjk]$/i.test(key)) event.preventDefaultAction = true;
    if (key === "Enter") pin(...slide.middle());
    if (key === "Escape") release();
    if (key === "m" || key === "M") toggle();
  }

  const ready = new Promise((resolve, reject) => {
    viewer.addOnceHandler("open-failed", (event) => reject(new Error(event.message)));
    viewer.addOnceHandler("open", () => {
      viewer.canvas.setAttribute("role", "application");
      viewer.canvas.setAttribute("aria-label", "Slide with map. Arrow keys move, plus and minus zoom, 0 shows all, Enter reads the middle, M hides the map.");
      bindControls();
      bindSlide();
      readAddress();
      showAll(true);
      timing.first = performance.now() - started;
      document.documentElement.classList.add("ready");
      resolve();
    });
  });

  // for links, consoles and tests
  window.heatmapViewer = {
    ready, timing, viewer, data,
    pixel: (x, y) => overlay.pixels([[x, y]])[0],
    pixels: (points) => overlay.pixels(points),
    place: (x, y) => places.at(x, y, anchor()),
    set: choose,
    state: () => ({ ...state, rows }),
  };
})();
