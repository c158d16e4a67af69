// Copyright (C) yolo_ext authors. AGPL-3.0 licence.
// The page is complete without this: it makes tables sortable and says which ones scroll sideways.
"use strict";
const number = text => /^[-+]?[\d,]*\.?\d+/.test(text) ? parseFloat(text.replace(/,/g, "")) : NaN;
const order = (a, b) => number(a) - number(b) || a.localeCompare(b, "en", {numeric: true});
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    if (!head.textContent.trim() || head.classList.contains("bar")) return;
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const text = row => row.cells[column].textContent.trim();
      const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * order(text(a), text(b)));
      body.append(...rows);
    });
  });
}
const look = new ResizeObserver(boxes => boxes.forEach(({target}) => {
  target.classList.toggle("over", target.scrollWidth > target.clientWidth + 1);
}));
document.querySelectorAll(".scroll").forEach(box => look.observe(box));
