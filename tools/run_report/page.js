// The values under the pointer (or, with a chart focused, at the arrow keys' position). Charts are drawn without this.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const tip = document.getElementById("tip");

  const shown = (value) => {
    const size = Math.abs(value);
    return size && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };

  const nearest = (sorted, wanted) => {
    let low = 0, high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < wanted) low = middle; else high = middle;
    }
    return wanted - sorted[low] <= sorted[high] - wanted ? low : high;
  };

  const element = (name, attributes) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };

  for (const figure of document.querySelectorAll("figure.chart")) {
    const chart = JSON.parse(figure.querySelector("script").textContent);
    const svg = figure.querySelector(".plot svg");
    const [left, top, right, bottom] = chart.plot;
    const [firstX, lastX] = chart.xs;
    const scale = (value) => (chart.log ? Math.log10(value) : value);
    const [lowY, highY] = chart.ys.map(scale);
    const across = (x) => left + ((x - firstX) / (lastX - firstX)) * (right - left);
    const up = (y) => bottom - ((scale(y) - lowY) / (highY - lowY)) * (bottom - top);
    const marks = svg.appendChild(element("g", {}));
    let position = null;

    const hide = () => { marks.replaceChildren(); tip.hidden = true; };

    const show = (wanted, clientX, clientY) => {
      marks.replaceChildren();
      const rows = [];
      let at = null;
      for (const line of chart.lines) {
        const i = nearest(line.x, wanted);
        if (line.y[i] === null) continue;
        if (at === null || Math.abs(line.x[i] - wanted) < Math.abs(at - wanted)) at = line.x[i];
        marks.append(element("circle", { class: `dot c${line.colour}`, cx: across(line.x[i]), cy: up(line.y[i]), r: 4 }));
        rows.push([line, line.y[i]]);
      }
      if (at === null) return hide();
      position = at;
      marks.prepend(element("path", { class: "cursor", d: `M${across(at)} ${top}V${bottom}` }));
      tip.replaceChildren();
      tip.append(Object.assign(document.createElement("p"), { textContent: `${chart.x} ${shown(at)}` }));
      for (const [line, value] of rows) {
        const row = document.createElement("div");
        const swatch = element("svg", { class: "swatch", viewBox: "0 0 22 8" });
        swatch.append(element("path", { class: `line c${line.colour}`, d: "M1 4H21" }));
        row.append(swatch, line.label, Object.assign(document.createElement("b"), { textContent: shown(value) }));
        tip.append(row);
      }
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(clientX + 14, innerWidth - box.width - 4))}px`;
      tip.style.top = `${Math.max(4, clientY - box.height - 12)}px`;
    };

    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const inside = Math.min(Math.max(x, left), right);
      show(firstX + ((inside - left) / (right - left)) * (lastX - firstX), event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const stride = (lastX - firstX) / 40;
      const wanted = position === null ? firstX : Math.min(Math.max(position + step * stride, firstX), lastX);
      const box = svg.getBoundingClientRect();
      show(wanted, box.left + (across(wanted) / svg.viewBox.baseVal.width) * box.width, box.top + box.height / 3);
    });
  }
})();
