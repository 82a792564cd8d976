// What stands beside the slide: legend, the place at each scale, the top patches. Text goes in as text only.
"use strict";
(function () {
  const parts = window.HeatmapParts;
  const { figures, percent, count } = parts;

  // an element with properties and children (strings or elements)
  function make(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  const byId = (id) => document.getElementById(id);

  // a length in level-0 pixels in µm or mm
  function length(pixels, mpp) {
    const microns = pixels * mpp;
    return microns >= 1000 ? `${Number((microns / 1000).toPrecision(3))} mm` : `${Number(microns.toPrecision(3))} µm`;
  }

  // the largest 1, 2 or 5 times a power of ten that is at most `value`
  function round125(value) {
    const power = 10 ** Math.floor(Math.log10(value));
    return [5, 2, 1].find((factor) => factor * power <= value) * power;
  }

  function drawRamp(layer) {
    const context = byId("ramp").getContext("2d");
    layer.ramp.forEach((colour, at) => {
      context.fillStyle = `rgb(${colour.join(" ")})`;
      context.fillRect(at, 0, 1, 1);
    });
  }

  // [place from 0 to 1, score, second line] below the colours
  function ticks(layer, norm) {
    const range = layer.range(norm);
    if (!range) {
      const named = [[0, "lowest"], [0.5, "median"], [1, "highest"]];
      return named.map(([at, word]) => [at, figures(parts.quantile(layer.sorted, at)), word]);
    }
    const middle = (range[0] + range[1]) / 2;
    if (layer.signed) return [[0, figures(range[0]), "lowers risk"], [0.5, "0", ""], [1, figures(range[1]), "raises risk"]];
    return [[0, `≤ ${figures(range[0])}`, "1st percentile"], [0.5, figures(middle), ""], [1, `≥ ${figures(range[1])}`, "99th percentile"]];
  }

  function legend(layer, norm, shownPercent) {
    byId("legend").hidden = !layer;
    if (!layer) return;
    drawRamp(layer);
    const inside = ticks(layer, norm).map(([at, score, word]) =>
      make("span", { className: `tick tick-${2 * at}` }, make("b", {}, score), make("br"), word));
    byId("ticks").replaceChildren(...inside);
    const note = layer.signed
      ? "Colours are symmetric around 0; their ends are the 99th percentile of the distance from 0."
      : norm === "linear" ? "Colours follow the score, from its 1st to its 99th percentile."
        : "Colours follow the rank: each has the same number of patches.";
    const some = shownPercent >= 100 ? "" : ` Only patches of at least ${figures(layer.threshold(shownPercent))}${layer.signed ? " on either side of 0" : ""} are shown.`;
    byId("legend-note").textContent = note + some;
  }

  const times = (value) => (value >= 10 ? count(Number(value.toPrecision(2))) : value >= 0.01 ? value.toPrecision(2) : value > 0 ? "< 0.01" : "0");

  // "2.3 × mean": attention shares are small numbers that say little by themselves
  const ofMean = (layer, score) => (layer.signed || !(layer.mean > 0) || Number.isNaN(score) ? "" : `${times(score / layer.mean)} × mean`);

  function scoreRow(layer, row, selected) {
    const name = make("th", { scope: "row" }, layer.name);
    if (row === null) return make("tr", {}, name, make("td", {}, "\u2013"), make("td", {}, "\u2013"));
    const score = layer.scores[row];
    const rank = layer.percentile(score);
    const bar = make("span", { className: "rank-fill" });
    bar.style.width = `${rank || 0}%`;
    const colour = layer.signed ? (score < 0 ? "low" : "high") : "even";
    return make("tr", { className: layer === selected ? "chosen" : "" },
      name,
      make("td", {}, figures(score), make("span", { className: "of-mean" }, ofMean(layer, score))),
      make("td", { className: "rank" }, percent(rank), make("span", { className: `rank-bar rank-${colour}` }, bar)));
  }

  function where(grid, row, data) {
    const [x, y] = [grid.x(row), grid.y(row)];
    if (data.ordered) return `patch ${count(row)} of the file`;
    const side = data.mpp ? `${count(grid.edge)} px = ${length(grid.edge, data.mpp)}` : `${count(grid.edge)} px`;
    return `x ${count(x)}, y ${count(y)}; side ${side}`;
  }

  // one card per scale; row is -1 where the place has no patch, null where there is no place
  function card(data, index, row, selected, held) {
    const grid = data.grids[index];
    const made = make("section", { className: `card${row !== null && row < 0 ? " card-none" : ""}${selected?.scale === grid.scale ? " card-chosen" : ""}` },
      make("h3", {}, `${grid.scale}x`));
    made.dataset.scale = grid.scale;
    made.dataset.row = row;
    if (row !== null && row < 0) {
      made.append(make("p", { className: "where" }, data.ordered ? "not known without coordinates" : "no patch of this scale here"));
      return made;
    }
    const layers = data.layers.filter((layer) => layer.scale === grid.scale);
    made.append(make("p", { className: "where" }, row === null ? "" : where(grid, row, data) + held));
    if (!layers.length) return made;
    made.append(make("table", {},
      make("thead", {}, make("tr", {}, ...["map", "score", "percentile"].map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...layers.map((layer) => scoreRow(layer, row, selected)))));
    return made;
  }

  // `rows` of the patches, coarse to fine; null where there is no place
  function placeCards(data, rows, selected, places) {
    const cards = data.grids.map((_, index) => {
      const row = rows ? rows[index] : null;
      const inside = places.children(index, row ?? -1).length;
      const held = inside ? `; holds ${inside} of ${data.grids[index + 1].scale}x` : "";
      return card(data, index, row, selected, held);
    });
    byId("cards").replaceChildren(...cards);
  }

  // the chosen map at the place, in a corner of the slide
  function readout(layer, row) {
    const box = byId("readout");
    box.hidden = !layer || row < 0;
    if (box.hidden) return;
    const score = layer.scores[row];
    const rest = [ofMean(layer, score), `percentile ${percent(layer.percentile(score))}`].filter(Boolean).join("; ");
    box.replaceChildren(make("span", { className: "soft" }, `${layer.name} `), make("b", {}, figures(score)), `; ${rest}`);
  }

  function crop(grid, row) {
    const name = `${grid.scale}x`;
    if (row < 0) return make("span", { className: "crop crop-none" }, make("span", {}, `no ${name}`));
    const picture = make("img", { src: `viewer/patches/${name}_${row}.jpg`, alt: `${name} patch`, loading: "lazy", width: 224, height: 224 });
    return make("span", { className: "crop" }, picture, make("span", {}, name));
  }

  // one of the listed patches: `rows` are its own and those that hold it, to the coarsest scale
  function topPatch(data, layer, rows, rank, go) {
    const own = data.grids.findIndex((grid) => grid.scale === layer.scale);
    const grid = data.grids[own];
    const score = layer.scores[rows[0]];
    const facts = make("span", { className: "top-facts" },
      make("span", { className: "top-rank" }, `${rank}`),
      make("span", { className: "top-score" }, figures(score)),
      make("span", {}, [ofMean(layer, score), `percentile ${percent(layer.percentile(score))}`].filter(Boolean).join("; ")),
      make("span", { className: "soft" }, data.ordered ? where(grid, rows[0], data) : `${layer.scale}x; x ${count(grid.x(rows[0]))}, y ${count(grid.y(rows[0]))}`));
    const pictures = data.image ? make("span", { className: "crops" }, ...rows.map((row, up) => crop(data.grids[own - up], row))) : null;
    const button = make("button", { type: "button", className: "top-patch" }, ...[pictures, facts].filter(Boolean));
    button.addEventListener("click", () => go(own, rows[0]));
    return make("li", {}, button);
  }

  function topPatches(data, layer, go) {
    byId("top").hidden = !layer || !(layer.high.length || layer.low.length);
    if (!layer) return;
    byId("top-name").textContent = layer.name;
    const lists = [];
    for (const [rows, title] of [[layer.high, layer.signed ? "Raise the risk most" : ""], [layer.low, "Lower the risk most"]]) {
      if (!rows.length) continue;
      if (title) lists.push(make("h3", {}, title));
      lists.push(make("ol", { className: `top-list depth-${data.image ? rows[0].length : 0}` },
        ...rows.map((each, at) => topPatch(data, layer, each, at + 1, go))));
    }
    byId("top-lists").replaceChildren(...lists);
  }

  // scale bar and magnification for so many level-0 pixels per screen pixel
  function scaleBar(data, perPixel) {
    const unit = data.mpp ? perPixel * data.mpp : perPixel;
    const round = round125(140 * unit);
    byId("bar").style.width = `${round / unit}px`;
    byId("bar-label").textContent = data.mpp ? length(round, 1) : `${count(round)} px of level 0`;
    byId("magnification").textContent = data.mpp ? `about ${Number((10 / unit).toPrecision(2))}x` : "";
  }

  Object.assign(parts, { byId, legend, placeCards, readout, topPatches, scaleBar });
})();
