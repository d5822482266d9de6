"use strict";
(() => {
  document.documentElement.classList.add("scripted");

  // A command is copied; where the browser refuses, it is selected instead.
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  // The table of arms: a click on a heading sorts, largest first; another click turns the order round. Empty cells stay last.
  const table = document.getElementById("arms");
  if (table) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const headings = [...table.tHead.rows[0].cells];
    const valueOf = (row, column) => row.cells[column].dataset.value ?? "";

    const compare = (column, isNumeric, sign) => (a, b) => {
      const [x, y] = [valueOf(a, column), valueOf(b, column)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (isNumeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true }));
    };

    headings.forEach((heading, column) => {
      const isNumeric = rows.every((row) => !Number.isNaN(Number(valueOf(row, column))));
      heading.querySelector("button").addEventListener("click", () => {
        const before = heading.getAttribute("aria-sort");
        const isDescending = before === "none" ? isNumeric : before === "ascending";
        headings.forEach((other) => other.setAttribute("aria-sort", "none"));
        heading.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
        rows.sort(compare(column, isNumeric, isDescending ? -1 : 1));
        body.append(...rows);
      });
    });

    const search = document.getElementById("arm-search");
    const role = document.getElementById("arm-role");
    const count = document.getElementById("arm-count");
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const fits = (!role.value || row.dataset.role === role.value) && words.every((word) => row.dataset.search.includes(word));
        row.hidden = !fits;
        shown += fits;
      }
      count.textContent = `${shown} of ${rows.length} arms`;
    };
    search.addEventListener("input", filter);
    role.addEventListener("change", filter);
  }

  // What a mark of a chart stands for, beside the pointer.
  const tooltip = document.getElementById("tooltip");
  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest?.("svg [role='graphics-symbol'][aria-label]");
    const axis = mark?.getAttribute("aria-roledescription") === "axis";
    tooltip.hidden = !mark || axis;
    if (tooltip.hidden) return;
    tooltip.textContent = mark.getAttribute("aria-label");
    const { width, height } = tooltip.getBoundingClientRect();
    tooltip.style.left = `${Math.min(event.clientX + 14, innerWidth - width - 8)}px`;
    tooltip.style.top = `${event.clientY - height - 10 > 0 ? event.clientY - height - 10 : event.clientY + 18}px`;
  });
})();
