// Scores to percentiles and colours. Knows nothing of the page.
"use strict";
(function () {
  const parts = (window.HeatmapParts = {});

  const SHADES = 255;

  function bytes(text) {
    const raw = atob(text);
    const made = new Uint8Array(raw.length);
    for (let at = 0; at < raw.length; at++) made[at] = raw.charCodeAt(at);
    return made.buffer;
  }

  // how many of the sorted values lie below (or, with `also`, at most at) a value
  function countBelow(sorted, value, also) {
    let low = 0;
    let high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < value || (also && sorted[middle] === value)) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // between two values in proportion, as numpy's default
  function quantile(sorted, share) {
    const at = share * (sorted.length - 1);
    const low = Math.floor(at);
    const high = Math.min(low + 1, sorted.length - 1);
    return sorted[low] + (at - low) * (sorted[high] - sorted[low]);
  }

  class Layer {
    constructor(record, ramps) {
      Object.assign(this, { name: record.name, scale: record.scale, kind: record.kind, meaning: record.meaning });
      this.high = record.high;
      this.low = record.low;
      this.signed = record.kind === "attribution";
      this.scores = new Float32Array(bytes(record.scores));
      this.ramp = ramps[record.kind]; // [255][3], lowest to highest
    }

    get sorted() {
      return (this._sorted ??= this.scores.filter(Number.isFinite).sort());
    }

    // what counts as strong: the score, or its distance from 0
    get strengths() {
      return (this._strengths ??= this.signed ? this.sorted.map(Math.abs).sort() : this.sorted);
    }

    get mean() {
      return (this._mean ??= this.sorted.reduce((sum, score) => sum + score, 0) / this.sorted.length);
    }

    // share of patches with a lower score, ties counted half: above 0, below 100
    percentile(score) {
      if (Number.isNaN(score)) return NaN;
      const below = countBelow(this.sorted, score, false);
      return (100 * (below + countBelow(this.sorted, score, true))) / (2 * this.sorted.length);
    }

    // the scores at the two ends of the colours
    range(norm) {
      if (this.signed) {
        const limit = quantile(this.strengths, 0.99) || this.strengths[this.strengths.length - 1] || 1;
        return [-limit, limit];
      }
      return norm === "linear" ? [quantile(this.sorted, 0.01), quantile(this.sorted, 0.99)] : null;
    }

    // place of every patch among the colours, 0 to 254
    levels(norm) {
      const range = this.range(norm);
      const width = range && range[1] - range[0];
      const share = !range
        ? (score) => this.percentile(score) / 100
        : (score) => (width > 0 ? (score - range[0]) / width : 0.5);
      this._levels ??= {};
      return (this._levels[norm] ??= Uint8Array.from(this.scores, (score) => parts.level(share(score))));
    }

    // the least strength among the strongest `percent` of the patches, at least one
    threshold(percent) {
      const count = Math.max(1, Math.round((this.strengths.length * percent) / 100));
      return this.strengths[this.strengths.length - count];
    }

    // 1 where a patch is among the strongest `percent`
    shown(percent) {
      const least = percent >= 100 ? -Infinity : this.threshold(percent); // NaN is never shown
      return Uint8Array.from(this.scores, (score) => ((this.signed ? Math.abs(score) : score) >= least ? 1 : 0));
    }
  }

  // three figures; small and large ones with a power of ten
  function figures(value) {
    if (Number.isNaN(value)) return "n/a";
    if (value === 0) return "0";
    const size = Math.abs(value);
    const minus = value < 0 ? "\u2212" : "";
    if (size >= 0.001 && size < 9999.5) return minus + (size < 100 ? size.toPrecision(3) : Number(size.toPrecision(3)).toString());
    const [mantissa, power] = size.toExponential(2).split("e");
    const raised = [...String(Number(power))].map((one) => (one === "-" ? "\u207b" : "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"[one]));
    return `${minus}${mantissa} \u00d7 10${raised.join("")}`;
  }

  // never "100" or "0": nothing is above all others and itself
  function percent(value) {
    if (Number.isNaN(value)) return "n/a";
    return value > 99 || value < 1 ? (Math.min(99.99, Math.max(0.01, value))).toFixed(2) : value.toFixed(1);
  }

  Object.assign(parts, {
    level: (share) => Math.max(0, Math.min(SHADES - 1, Math.floor(share * SHADES))),
    colours: (text) => {
      const raw = new Uint8Array(bytes(text));
      return Array.from({ length: raw.length / 3 }, (_, at) => [...raw.subarray(3 * at, 3 * at + 3)]);
    },
    integers: (text) => new Int32Array(bytes(text)),
    quantile,
    Layer,
    figures,
    percent,
    count: (value) => Math.round(value).toLocaleString("en-US"),
  });
})();
