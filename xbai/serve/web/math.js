// Formulas in texts that models write: where they are, and how they look. Temml makes MathML, which needs no fonts.
const LONGEST = 4000;
const PAIRS = { "\\(": ["\\)", false], "\\[": ["\\]", true], $$: ["$$", true] };
const OPENING = /\\\(|\\\[|\$|\\boxed\{/g;
/** Of one text; what is beyond stays source. */
const MOST_FORMULAS = 400;
const MOST_TRIALS = 4000;

/** @typedef {{tex: string, display: boolean, end: number}} Formula */

/**
 * The formula that begins at a place; null where none does.
 * @param {string} text
 * @param {number} at
 * @returns {Formula | null}
 */
export function formulaAt(text, at) {
  const two = text.slice(at, at + 2);
  if (two in PAIRS) return delimited(text, at + 2, ...PAIRS[two]);
  if (text[at] === "$") return inDollars(text, at);
  if (text.startsWith("\\boxed{", at)) {
    const end = balanced(text, at + 6);
    return end > 0 ? { tex: text.slice(at, end), display: false, end } : null;
  }
  return null;
}

function delimited(text, begin, close, display) {
  const length = text.slice(begin, begin + LONGEST).indexOf(close);
  if (length < 1) return null;
  return { tex: text.slice(begin, begin + length), display, end: begin + length + close.length };
}

/** As pandoc reads it, so that "$5 and $6" is money. */
function inDollars(text, at) {
  const found = delimited(text, at + 1, "$", false);
  if (!found || /^\s|\s$|\n\n/.test(found.tex) || /\d/.test(text[found.end] ?? "")) return null;
  return found;
}

/**
 * Behind the brace that closes the one at a place; -1 where none does.
 * @param {string} text
 * @param {number} at
 */
export function balanced(text, at) {
  let depth = 0;
  const last = Math.min(text.length, at + LONGEST);
  for (let i = at; i < last; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "{") depth++;
    else if (text[i] === "}" && --depth === 0) return i + 1;
  }
  return -1;
}

/**
 * A text cut into plain strings and formulas.
 * @param {string} text
 * @returns {(string | Formula)[]}
 */
export function pieces(text) {
  const found = [];
  let [begin, formulas, trials] = [0, 0, 0];
  OPENING.lastIndex = 0;
  for (let match; (match = OPENING.exec(text)) && formulas < MOST_FORMULAS && trials < MOST_TRIALS; trials++) {
    const formula = formulaAt(text, match.index);
    if (!formula) continue;
    formulas++;
    found.push(text.slice(begin, match.index), formula);
    begin = OPENING.lastIndex = formula.end;
  }
  return [...found, text.slice(begin)].filter((piece) => piece !== "");
}

/**
 * An element that shows a formula, or its source where it is broken.
 * @param {string} tex
 * @param {boolean} display
 */
export function formula(tex, display) {
  const element = document.createElement("span");
  try {
    // Drawn into the document's own nodes: a `style` that is parsed from text would fall to the page's policy.
    temml.render(tex, element, { displayMode: display, throwOnError: true, trust: false, maxSize: [20, 20] });
    DOMPurify.sanitize(element, {
      IN_PLACE: true,
      USE_PROFILES: { mathMl: true, html: true },
      FORBID_TAGS: ["a", "img"],
    });
    element.className = display ? "formula display" : "formula";
  } catch (error) {
    element.replaceChildren(tex);
    element.className = "formula broken";
    element.title = `LaTeX that cannot be read: ${String(error.message).slice(0, 200)}`;
  }
  return element;
}
