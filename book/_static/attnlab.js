// The atlas table: filter by word, family and pattern; sort by a column. No dependencies.

function sortable(table) {
  const body = table.tBodies[0];
  table.querySelectorAll("th[data-sort]").forEach((head) => {
    const column = head.cellIndex;
    const numeric = head.dataset.sort === "number";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].textContent.trim();
      const rows = [...body.rows].sort((a, b) => {
        const order = numeric
          ? Number(value(a)) - Number(value(b))
          : value(a).localeCompare(value(b));
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
}

function searchable(atlas) {
  const tools = atlas.querySelector(".atlas-tools");
  const search = tools.querySelector("input");
  const pattern = tools.querySelector("select");
  const count = tools.querySelector("output");
  const chips = [...tools.querySelectorAll(".atlas-chip")];
  const rows = [...atlas.querySelectorAll("tbody tr")];

  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const families = chips
      .filter((chip) => chip.getAttribute("aria-pressed") === "true")
      .map((chip) => chip.dataset.family);
    let shown = 0;
    rows.forEach((row) => {
      const fits =
        words.every((word) => row.dataset.words.includes(word)) &&
        (families.length === 0 || families.includes(row.dataset.family)) &&
        (!pattern.value || row.dataset.patterns.split("|").includes(pattern.value));
      row.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${rows.length}`;
  }

  search.addEventListener("input", show);
  pattern.addEventListener("change", show);
  chips.forEach((chip) =>
    chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
      show();
    })
  );
  tools.hidden = false;
  show();
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("[data-atlas]").forEach((atlas) => {
    sortable(atlas.querySelector("table"));
    searchable(atlas);
  });
});
