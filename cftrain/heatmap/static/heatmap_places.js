// Where patches lie, which one a point is in, which holds which. Knows nothing of the page.
"use strict";
(function () {
  const parts = window.HeatmapParts;
  const MOST_BINS = 2048; // per side of the index
  const MOST_CELLS = 1 << 24;

  // numbers 0..n-1 in groups: those of group g are items[start[g]] to items[start[g + 1] - 1], ascending
  function grouped(groups, n) {
    const start = new Int32Array(n + 1);
    for (const group of groups) if (group >= 0) start[group + 1]++;
    for (let at = 0; at < n; at++) start[at + 1] += start[at];
    const next = start.slice();
    const items = new Int32Array(start[n]);
    groups.forEach((group, item) => {
      if (group >= 0) items[next[group]++] = item;
    });
    return { start, items };
  }

  class Grid {
    constructor(record) {
      this.scale = record.scale;
      this.edge = record.edge;
      this.corners = parts.integers(record.corners);
      this.parents = record.parents === null ? null : parts.integers(record.parents);
      this.n = this.corners.length / 2;
      this.left = this.top = Infinity;
      this.right = this.bottom = -Infinity;
      for (let row = 0; row < this.n; row++) {
        this.left = Math.min(this.left, this.x(row));
        this.top = Math.min(this.top, this.y(row));
        this.right = Math.max(this.right, this.x(row) + this.edge);
        this.bottom = Math.max(this.bottom, this.y(row) + this.edge);
      }
      this.cells = this.regular();
    }

    x(row) {
      return this.corners[2 * row];
    }

    y(row) {
      return this.corners[2 * row + 1];
    }

    // the cell of every patch where all lie side by side on one lattice, no two in one cell; null elsewhere
    regular() {
      const columns = Math.round((this.right - this.left) / this.edge);
      const rows = Math.round((this.bottom - this.top) / this.edge);
      if (columns * rows > MOST_CELLS) return null;
      const taken = new Uint8Array(columns * rows);
      const place = new Int32Array(this.n);
      for (let row = 0; row < this.n; row++) {
        const across = (this.x(row) - this.left) / this.edge;
        const down = (this.y(row) - this.top) / this.edge;
        const column = Math.round(across);
        const line = Math.round(down);
        // corners are whole pixels, an edge need not be
        if (Math.abs(across - column) * this.edge > 1 || Math.abs(down - line) * this.edge > 1) return null;
        place[row] = line * columns + column;
        if (taken[place[row]]++) return null;
      }
      return { columns, rows, place };
    }

    // patches by the bin of their corner
    get bins() {
      if (!this._bins) {
        const size = Math.max(this.edge, (this.right - this.left) / MOST_BINS, (this.bottom - this.top) / MOST_BINS);
        const columns = Math.floor((this.right - this.left) / size) + 1;
        const rows = Math.floor((this.bottom - this.top) / size) + 1;
        const bin = new Int32Array(this.n);
        for (let row = 0; row < this.n; row++) {
          const column = Math.floor((this.x(row) - this.left) / size);
          bin[row] = Math.floor((this.y(row) - this.top) / size) * columns + column;
        }
        this._bins = { size, columns, rows, ...grouped(bin, columns * rows) };
      }
      return this._bins;
    }

    // call back with every patch that may reach into a rectangle
    each(left, top, right, bottom, visit) {
      const { size, columns, rows, start, items } = this.bins;
      const bin = (value, from, limit) => Math.max(0, Math.min(limit - 1, Math.floor((value - from) / size)));
      const last = [bin(right, this.left, columns), bin(bottom, this.top, rows)];
      for (let line = bin(top - this.edge, this.top, rows); line <= last[1]; line++) {
        const from = line * columns;
        const first = start[from + bin(left - this.edge, this.left, columns)];
        for (let at = first; at < start[from + last[0] + 1]; at++) visit(items[at]);
      }
    }

    holds(row, x, y) {
      const left = this.x(row);
      const top = this.y(row);
      return x >= left && y >= top && x < left + this.edge && y < top + this.edge;
    }

    // the patch that a point lies in, of several the one whose middle is nearest; -1 where none does
    find(x, y, allowed) {
      let found = -1;
      let nearest = Infinity;
      this.each(x, y, x, y, (row) => {
        if (!this.holds(row, x, y) || (allowed && !allowed(row))) return;
        const half = this.edge / 2;
        const away = Math.max(Math.abs(this.x(row) + half - x), Math.abs(this.y(row) + half - y));
        if (away < nearest || (away === nearest && row < found)) {
          nearest = away;
          found = row;
        }
      });
      return found;
    }
  }

  class Places {
    // grids coarse to fine
    constructor(grids, ordered) {
      this.grids = grids;
      this.ordered = ordered; // no coordinates: no patch is known to hold another
    }

    // rows of the finer grid's patches in a patch of grid `index`
    children(index, row) {
      const finer = this.grids[index + 1];
      if (row < 0 || this.ordered || !finer || !finer.parents) return [];
      finer.byParent ??= grouped(finer.parents, this.grids[index].n);
      return finer.byParent.items.subarray(finer.byParent.start[row], finer.byParent.start[row + 1]);
    }

    // the patch of each grid at a point, coarse to fine, -1 where there is none. Starts from the grid `anchor`, whose
    // patch is given or the one at the point: upwards by parents, downwards to the child at the point.
    at(x, y, anchor, given) {
      const rows = new Array(this.grids.length).fill(-1);
      rows[anchor] = given ?? this.grids[anchor].find(x, y);
      if (this.ordered) return rows;
      for (let index = anchor - 1; index >= 0; index--) {
        const { parents } = this.grids[index + 1];
        const below = rows[index + 1];
        rows[index] = below >= 0 && parents ? parents[below] : this.grids[index].find(x, y);
      }
      for (let index = anchor + 1; index < this.grids.length; index++) {
        const { parents } = this.grids[index];
        const above = rows[index - 1];
        rows[index] = this.grids[index].find(x, y, above >= 0 && parents ? (row) => parents[row] === above : null);
      }
      return rows;
    }
  }

  Object.assign(parts, { Grid, Places });
})();
