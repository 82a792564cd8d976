// The slide in OpenSeadragon, spoken to in level-0 pixels.
"use strict";
(function () {
  const parts = window.HeatmapParts;
  const DEEPEST = 4; // screen pixels per level-0 pixel
  const LARGEST = 400; // screen pixels per patch where there are no coordinates
  const EMPTY = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAAAAACH5BAEAAAAALAAAAAABAAEAAAIBRAA7";

  // without an image one clear tile, so that there is something to move
  function source(image, frame) {
    if (!image) return { width: frame[0], height: frame[1], tileSize: Math.max(...frame), minLevel: 0, maxLevel: 0, getTileUrl: () => EMPTY };
    return {
      width: image.tiles[0], height: image.tiles[1], tileSize: image.tile, minLevel: 0, maxLevel: image.levels - 1,
      getTileUrl: (level, x, y) => `viewer/tiles/${level}/${x}_${y}.jpg`,
    };
  }

  // level-0 rectangle that holds all patches: [x, y, width, height]
  function reach(grids) {
    const low = [Infinity, Infinity], high = [-Infinity, -Infinity];
    for (const grid of grids) {
      for (let row = 0; row < grid.n; row++) {
        low[0] = Math.min(low[0], grid.x(row));
        low[1] = Math.min(low[1], grid.y(row));
        high[0] = Math.max(high[0], grid.x(row) + grid.edge);
        high[1] = Math.max(high[1], grid.y(row) + grid.edge);
      }
    }
    return [...low, high[0] - low[0], high[1] - low[1]];
  }

  class Slide {
    constructor(element, data, calm) {
      this.calm = calm;
      this.frame = data.image ? data.image.size : data.size;
      const tiles = source(data.image, this.frame);
      this.aspect = tiles.height / tiles.width;
      const deepest = data.ordered ? LARGEST / data.grids[data.grids.length - 1].edge : DEEPEST;
      // the canvas drawer: WebGL may not use pictures of a folder
      this.viewer = OpenSeadragon({
        element, drawer: "canvas", tileSources: tiles, prefixUrl: "", showNavigationControl: false,
        showNavigator: Boolean(data.image), navigatorPosition: "BOTTOM_RIGHT", navigatorSizeRatio: 0.16,
        navigatorBackground: "transparent", navigatorBorderColor: "#88919b", navigatorDisplayRegionColor: "#c04f00",
        gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
        gestureSettingsTouch: { dblTapToZoom: true, pinchRotate: false },
        cooperativeGestures: window.matchMedia("(pointer: coarse)").matches, // one finger scrolls the page
        visibilityRatio: 0.4, minZoomImageRatio: 0.7, maxZoomPixelRatio: (deepest * this.frame[0]) / tiles.width,
        animationTime: calm ? 0 : 0.6, springStiffness: 9, zoomPerScroll: 1.3, immediateRender: calm,
        subPixelRoundingForTransparency: 2, // always: no hairlines between tiles
      });
      // without an image there is nothing to see but the patches, and they need not begin at 0
      if (!data.image) this.viewer.addOnceHandler("open", () => this.homeIs(reach(data.grids)));
    }

    // what "fit" shows, in place of the whole frame
    homeIs([x, y, width, height]) {
      const { viewport } = this.viewer;
      const margin = 0.04 * Math.max(width, height);
      const corner = this.toViewport(x - margin, y - margin);
      const size = this.toViewport(width + 2 * margin, height + 2 * margin);
      viewport.getHomeBounds = () => new OpenSeadragon.Rect(corner.x, corner.y, size.x, size.y);
      viewport.getHomeZoom = () => 1 / Math.max(size.x, size.y * viewport.getAspectRatio());
      viewport.goHome(true);
    }

    toViewport(x, y) {
      return new OpenSeadragon.Point(x / this.frame[0], (y / this.frame[1]) * this.aspect);
    }

    toLevel0(point) {
      return [point.x * this.frame[0], (point.y / this.aspect) * this.frame[1]];
    }

    // screen pixel of level-0 (0, 0), and screen pixels per level-0 pixel; null before there is a slide
    transform() {
      if (!this.viewer.isOpen()) return null;
      const { viewport } = this.viewer;
      const corner = viewport.pixelFromPoint(this.toViewport(0, 0), true);
      const far = viewport.pixelFromPoint(this.toViewport(...this.frame), true);
      return {
        x: corner.x, y: corner.y,
        scaleX: (far.x - corner.x) / this.frame[0], scaleY: (far.y - corner.y) / this.frame[1],
      };
    }

    // level-0 pixel at a screen pixel of the viewer
    at(pixel) {
      return this.toLevel0(this.viewer.viewport.pointFromPixel(pixel, true));
    }

    // level-0 pixel under a pointer
    under(event) {
      const box = this.viewer.canvas.getBoundingClientRect();
      return this.at(new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top));
    }

    middle() {
      return this.toLevel0(this.viewer.viewport.getCenter(true));
    }

    // [x, y of the middle, width] of what is in sight; null where that is all
    view() {
      const { viewport } = this.viewer;
      const [now, home] = [viewport.getBounds(true), viewport.getHomeBounds()];
      const moved = now.getCenter().distanceTo(home.getCenter()) > 0.001 * now.width;
      const zoomed = Math.abs(viewport.getZoom(true) / viewport.getHomeZoom() - 1) > 0.001;
      return moved || zoomed ? [...this.middle(), now.width * this.frame[0]] : null;
    }

    show(x, y, width) {
      const { viewport } = this.viewer;
      viewport.zoomTo(this.frame[0] / width, null, true);
      viewport.panTo(this.toViewport(x, y), true);
    }

    zoomTo(grid, row) {
      const margin = 2.5 * grid.edge;
      const corner = this.toViewport(grid.x(row) - margin, grid.y(row) - margin);
      const size = this.toViewport(2 * margin + grid.edge, 2 * margin + grid.edge);
      this.viewer.viewport.fitBounds(new OpenSeadragon.Rect(corner.x, corner.y, size.x, size.y), this.calm);
    }

    zoomBy(factor) {
      this.viewer.viewport.zoomBy(factor);
      this.viewer.viewport.applyConstraints();
    }

    // what is in sight, as one picture: canvases do not fit themselves to paper
    print(paper, overlay) {
      const { width, height } = overlay.map;
      Object.assign(paper, { width, height });
      const context = paper.getContext("2d");
      context.drawImage(this.viewer.drawer.canvas, 0, 0, width, height);
      context.globalAlpha = Number(overlay.map.style.opacity);
      context.drawImage(overlay.map, 0, 0);
      context.globalAlpha = 1;
      context.drawImage(overlay.marks, 0, 0);
    }
  }

  parts.Slide = Slide;
})();
