// What a response comes to, and which responses come to the same.
import { balanced } from "./math.js";

const LONGEST = 120;
const PHRASES = /^(so|thus|hence|therefore|the (final )?answer is|answer|final answer|it is|we get)\b[\s,:]*/i;

/**
 * The last \boxed{...}, else a short last line without the words around it; null where there is neither.
 * @param {string} reasoning
 * @param {string} content
 * @returns {string | null}
 */
export function finalAnswer(reasoning, content) {
  return boxed(content) ?? conclusion(content) ?? boxed(reasoning) ?? conclusion(reasoning);
}

function boxed(text) {
  for (let at = text.lastIndexOf("\\boxed{"); at >= 0; at = at ? text.lastIndexOf("\\boxed{", at - 1) : -1) {
    const end = balanced(text, at + 6);
    if (end > 0) return text.slice(at + 7, end - 1).trim() || null;
  }
  return null;
}

function conclusion(text) {
  const end = text.trimEnd();
  const line = end.slice(Math.max(end.lastIndexOf("\n") + 1, end.length - LONGEST - 1)).trim();
  if (!line || line.length > LONGEST) return null;
  let said = line;
  while (PHRASES.test(said)) said = said.replace(PHRASES, "");
  return (
    said
      .replace(/[.。]+$/, "")
      .replace(/^\$+|\$+$/g, "")
      .trim() || line
  );
}

/**
 * Whether two answers are the same text, spaces and dressing of LaTeX aside, or the same number.
 * @param {string} a
 * @param {string} b
 */
export function sameText(a, b) {
  const [one, other] = [plain(a), plain(b)];
  return one === other || (one !== "" && other !== "" && Number(one) === Number(other));
}

/**
 * Whether an answer of Make 10 (xbai/benchmarks/make10.py) has the numbers in their order, and makes 10 of them.
 * @param {string} answer
 * @param {string} numbers with a space between
 */
export function makes10(answer, numbers) {
  const terms =
    answer
      .replace(/\s/g, "")
      .match(/^\d+([-+]\d+)*$/)?.[0]
      .match(/[-+]?\d+/g) ?? [];
  const isOfThem = terms.map((term) => Math.abs(Number(term))).join(" ") === numbers;
  return isOfThem && terms.reduce((sum, term) => sum + Number(term), 0) === 10;
}

/** @param {string} answer */
export function plain(answer) {
  return answer
    .replace(/\\(left|right|,|;|!|displaystyle)(?![a-z])/g, "")
    .replace(/\\[dt]frac/g, "\\frac")
    .replace(/\\(text|mathrm)\{([^{}]*)\}/g, "$2")
    .replace(/(\d),(?=\d{3}\b)/g, "$1")
    .replace(/[\s$]/g, "")
    .replace(/\.$/, "");
}

/**
 * Groups of equal answers that are equally right, each sorted by score; the group of the best score first, those without
 * an answer last.
 * @param {import("./candidate.js").Candidate[]} candidates sorted by score
 * @returns {{key: string, answer: string | null, members: import("./candidate.js").Candidate[]}[]}
 */
export function grouped(candidates) {
  const groups = new Map();
  for (const candidate of candidates) {
    const key = JSON.stringify([candidate.answer === null ? null : plain(candidate.answer), candidate.right]);
    if (!groups.has(key)) groups.set(key, { key, answer: candidate.answer, members: [] });
    groups.get(key).members.push(candidate);
  }
  const found = [...groups.values()];
  return [...found.filter(({ answer }) => answer !== null), ...found.filter(({ answer }) => answer === null)];
}
