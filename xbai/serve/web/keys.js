// One hand on the keyboard: rows are buttons, so that Enter opens what has the focus.
const STEPS = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 };

/** Listens for the keys that go from row to row, from list to list, and to the lowest step. */
export function listenToKeys() {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key in STEPS && go(STEPS[event.key])) event.preventDefault();
    if (event.key === "ArrowRight") focus(lists().at(-1)?.querySelector(".row"));
    if (event.key === "ArrowLeft") focus(lists()[0]?.querySelector("[aria-current=true]"));
    if (event.key === "l") toLowest();
  });
}

const shownView = () => document.querySelector("main:not([hidden])");
const lists = () => [...shownView().querySelectorAll("[data-rows]")];

function go(step) {
  const active = document.activeElement;
  const list = active.closest("[data-rows]") ?? lists().at(-1);
  const rows = [...(list?.querySelectorAll(".row") ?? [])];
  if (!rows.length) return false;
  const at = rows.indexOf(active.closest(".candidate")?.querySelector(".row") ?? active);
  focus(rows[Math.min(Math.max(at + step, 0), rows.length - 1)]);
  return true;
}

function focus(row) {
  row?.focus({ preventScroll: true });
  row?.scrollIntoView({ block: "nearest" });
}

function toLowest() {
  const candidate =
    document.activeElement.closest(".candidate") ?? shownView().querySelector(".candidate:has([aria-expanded=true])");
  candidate?.querySelector(".to-lowest")?.click();
}
