// The map and the outlines, on two canvases over the slide that move with it.
"use strict";
(function () {
  const parts = window.HeatmapParts;
  const NEAR = 6; // a patch of so many screen pixels is drawn by itself where patches lie on no lattice
  const LONGEST_RASTER = 4096;
  const GHOST = [128, 128, 128, 70]; // a patch that has no colour, where there is no slide to see

  const packed = ([red, green, blue], alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  const css = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;

  // rows by rising strength, so that of patches that lie on each other the strongest is on top
  function rising(painted) {
    const strength = (row) => {
      if (!painted.shown[row]) return 0;
      return 1 + (painted.signed ? Math.abs(2 * painted.levels[row] - 254) : painted.levels[row]);
    };
    const start = new Int32Array(258);
    const n = painted.shown.length;
    for (let row = 0; row < n; row++) start[strength(row) + 1]++;
    for (let at = 0; at < 257; at++) start[at + 1] += start[at];
    const order = new Int32Array(n);
    for (let row = 0; row < n; row++) order[start[strength(row)]++] = row;
    return order;
  }

  // one pixel per patch, or where they lie on no lattice small squares on a finer raster
  function raster(grid, colours, order) {
    const made = document.createElement("canvas");
    const { cells } = grid;
    const longest = Math.max(grid.right - grid.left, grid.bottom - grid.top);
    const side = cells ? 1 : Math.max(1, Math.min(NEAR, Math.floor((LONGEST_RASTER * grid.edge) / longest)));
    const pixel = cells ? grid.edge : Math.max(grid.edge / side, longest / LONGEST_RASTER);
    made.width = cells ? cells.columns : Math.ceil((grid.right - grid.left) / pixel);
    made.height = cells ? cells.rows : Math.ceil((grid.bottom - grid.top) / pixel);
    const context = made.getContext("2d");
    const image = context.createImageData(made.width, made.height);
    const pixels = new Uint32Array(image.data.buffer);
    if (cells) cells.place.forEach((place, row) => (pixels[place] = colours[row]));
    else {
      for (const row of order) {
        const left = Math.round((grid.x(row) - grid.left) / pixel);
        const top = Math.round((grid.y(row) - grid.top) / pixel);
        const right = Math.min(left + side, made.width);
        const bottom = Math.min(top + side, made.height) * made.width;
        for (let line = top * made.width; line < bottom; line += made.width) {
          for (let at = line + left; at < line + right; at++) pixels[at] = colours[row];
        }
      }
    }
    context.putImageData(image, 0, 0);
    return { canvas: made, right: grid.left + made.width * pixel, bottom: grid.top + made.height * pixel };
  }

  class Overlay {
    // `transform()` says where level-0 pixel (0, 0) is on the screen and how many screen pixels one of them is
    constructor(element, transform, ghosts) {
      this.element = element;
      this.transform = transform;
      this.ghosts = ghosts;
      this.map = this.canvas("map");
      this.marks = this.canvas("marks");
      this.painted = null;
      this.outlines = [];
      this.ghost = packed(GHOST, GHOST[3]);
    }

    canvas(name) {
      const made = document.createElement("canvas");
      made.className = `overlay overlay-${name}`;
      this.element.append(made);
      return made;
    }

    set opacity(value) {
      this.map.style.opacity = value;
    }

    // colours of a layer's patches; with no layer only the ghosts of a grid
    paint(grid, layer, norm, percent) {
      const painted = { grid, signed: layer?.signed, levels: layer?.levels(norm), shown: layer?.shown(percent) };
      painted.shown ??= new Uint8Array(grid.n);
      painted.ramp = layer ? layer.ramp.map(css) : [];
      const colour = layer ? layer.ramp.map((each) => packed(each, 255)) : [];
      const none = this.ghosts ? this.ghost : 0;
      const colours = Uint32Array.from(painted.shown, (shown, row) => (shown ? colour[painted.levels[row]] : none));
      painted.order = grid.cells ? null : rising(painted);
      painted.raster = raster(grid, colours, painted.order);
      this.painted = painted;
      this.draw();
    }

    // make a canvas as large as the viewer, in device pixels; its context, cleared, in CSS pixels
    cleared(canvas) {
      const ratio = window.devicePixelRatio || 1;
      const { clientWidth, clientHeight } = this.element;
      const [width, height] = [Math.round(clientWidth * ratio), Math.round(clientHeight * ratio)];
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
      const context = canvas.getContext("2d");
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, width, height);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      return context;
    }

    draw() {
      const where = this.transform();
      if (!where) return;
      const context = this.cleared(this.map);
      if (this.painted) {
        const { grid } = this.painted;
        if (grid.cells || grid.edge * where.scaleX < NEAR) this.drawRaster(context, where);
        else this.drawPatches(context, where);
      }
      this.drawMarks(this.cleared(this.marks), where);
    }

    drawRaster(context, { x, y, scaleX, scaleY }) {
      const { grid, raster: made } = this.painted;
      context.imageSmoothingEnabled = false;
      context.drawImage(made.canvas, x + grid.left * scaleX, y + grid.top * scaleY,
        (made.right - grid.left) * scaleX, (made.bottom - grid.top) * scaleY);
    }

    drawPatches(context, { x, y, scaleX, scaleY }) {
      const { grid, shown, levels, ramp, order } = this.painted;
      const visible = new Uint8Array(grid.n);
      const { clientWidth, clientHeight } = this.element;
      grid.each(-x / scaleX, -y / scaleY, (clientWidth - x) / scaleX, (clientHeight - y) / scaleY, (row) => {
        visible[row] = 1;
      });
      for (const row of order) {
        if (!visible[row] || !(shown[row] || this.ghosts)) continue;
        const [left, top] = [x + grid.x(row) * scaleX, y + grid.y(row) * scaleY];
        const [width, height] = [grid.edge * scaleX, grid.edge * scaleY];
        if (!shown[row]) context.clearRect(left, top, width, height);
        context.fillStyle = shown[row] ? ramp[levels[row]] : `rgb(${GHOST.slice(0, 3).join(" ")} / ${GHOST[3] / 255})`;
        context.fillRect(left, top, width, height);
      }
    }

    // squares {x, y, edge, strong, label, side}: strong ones may have a label, the others are thin
    drawMarks(context, { x, y, scaleX, scaleY }) {
      context.font = "600 12px system-ui, -apple-system, 'Segoe UI', Arial, sans-serif";
      context.textBaseline = "middle";
      for (const mark of this.outlines) {
        const box = [x + mark.x * scaleX, y + mark.y * scaleY, mark.edge * scaleX, mark.edge * scaleY];
        const strokes = mark.strong ? [["#101418", 5], ["#ffffff", 2.25]] : [["rgb(16 20 24 / 0.7)", 2], ["rgb(255 255 255 / 0.8)", 0.8]];
        for (const [colour, width] of strokes) {
          Object.assign(context, { strokeStyle: colour, lineWidth: width });
          context.strokeRect(...box);
        }
      }
      for (const mark of this.outlines) {
        if (mark.label && mark.edge * scaleX > 22) {
          this.drawLabel(context, mark, [x + mark.x * scaleX, y + mark.y * scaleY, mark.edge * scaleX, mark.edge * scaleY]);
        }
      }
    }

    // outside the square, at another side for every scale, so that labels of nested squares never meet
    drawLabel(context, mark, [left, top, width, height]) {
      const wide = context.measureText(mark.label).width + 10;
      const high = 18;
      const gap = 2.5;
      const places = { above: [left - gap, top - high - gap], right: [left + width + gap, top - gap], left: [left - wide - gap, top + height - high + gap] };
      const [x, y] = places[mark.side];
      const { clientWidth, clientHeight } = this.element;
      const inside = [Math.max(0, Math.min(clientWidth - wide, x)), Math.max(0, Math.min(clientHeight - high, y))];
      // a square out of sight keeps its label to itself
      if (left + width < 0 || top + height < 0 || left > clientWidth || top > clientHeight) return;
      context.fillStyle = "#101418";
      context.fillRect(...inside, wide, high);
      context.fillStyle = "#ffffff";
      context.fillText(mark.label, inside[0] + 5, inside[1] + high / 2 + 0.5);
    }

    // red, green, blue, alpha of the map at level-0 pixels, as computed; null outside the window
    pixels(points) {
      const where = this.transform();
      const { width, height } = this.map;
      const ratio = width / this.element.clientWidth;
      // through a copy: a canvas that is read often is no longer drawn by the graphics card
      const copy = Object.assign(document.createElement("canvas"), { width, height });
      const context = copy.getContext("2d", { willReadFrequently: true });
      context.drawImage(this.map, 0, 0);
      const { data } = context.getImageData(0, 0, width, height);
      return points.map(([x, y]) => {
        const column = Math.floor((where.x + x * where.scaleX) * ratio);
        const line = Math.floor((where.y + y * where.scaleY) * ratio);
        if (column < 0 || line < 0 || column >= width || line >= height) return null;
        return [...data.subarray(4 * (line * width + column), 4 * (line * width + column) + 4)];
      });
    }
  }

  parts.Overlay = Overlay;
})();
