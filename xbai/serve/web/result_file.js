// A result file, or the samples of a training step (docs/formats.md), read in the browser a line at a time; it is sent
// nowhere.
import { finalAnswer, makes10, sameText } from "./answers.js";
import { byScore } from "./candidate.js";
import { decoded } from "./api.js";

const BUSY_MS = 12;
const RIGHT_ABOVE = 0.5;
const THINK_CLOSE = "</think>";
/** Where steps may end, first of English, then of Chinese models; which rule holds, the number of scores tells. */
const STEP_ENDS = [/(?<=\.\n\n)/, /(?<=\n\n)(?!\n)/, /(?<=[。\n])(?![。\n])/];

/**
 * @typedef {object} Question
 * @property {string} name
 * @property {string} prompt
 * @property {string} title
 * @property {string | null} expected
 * @property {string} task
 * @property {boolean} isTraining its file says which candidates are right
 * @property {import("./candidate.js").Candidate[]} candidates
 */

/**
 * @typedef {object} Results
 * @property {Question[]} questions
 * @property {string[]} problems one a line that cannot be read, which it names
 * @property {boolean} isGraded some answer is right, as far as this page can tell, so that others may be called wrong;
 *   or the file says which are
 */

/**
 * Reads without keeping the tab from answering.
 * @param {Blob} file
 * @param {(share: number) => void} tell how much is read, from 0 to 1
 * @returns {Promise<Results>}
 */
export async function readResults(file, tell) {
  const questions = new Map();
  const problems = [];
  let [number, read, since] = [0, 0, performance.now()];
  for await (const line of lines(file.stream())) {
    number++;
    read += line.length + 1;
    if (line.trim()) {
      try {
        const found = JSON.parse(line);
        (typeof found.response === "string" ? addSample : add)(questions, found);
      } catch (error) {
        problems.push(`Line ${number} is not a result line: ${error.message}`);
      }
    }
    if (performance.now() - since > BUSY_MS) {
      tell(Math.min(read / file.size, 1));
      await new Promise((resolve) => setTimeout(resolve));
      since = performance.now();
    }
  }
  return graded([...questions.values()], problems);
}

async function* lines(stream) {
  let rest = [];
  for await (const text of decoded(stream)) {
    const [first, ...further] = text.split("\n");
    rest.push(first);
    for (const next of further) {
      yield rest.join("");
      rest = [next];
    }
  }
  yield rest.join("");
}

/** Published files have a line for each repetition of a question. */
function add(questions, line) {
  const { solution_lst: solutions, content } = line.output ?? {};
  if (!Array.isArray(solutions)) throw new Error("it has no output.solution_lst");
  const isPublished =
    !("settings" in line || "sample_lst" in line.output) &&
    content &&
    solutions.every((text) => text.startsWith(content));
  const prompt = String(isPublished ? content : (line.prompt ?? ""));
  const key = line.index ?? line.prompt;
  const question = questions.get(key) ?? {
    name: String(line.index ?? questions.size),
    prompt,
    title: titleOf(String(isPublished ? line.prompt : prompt)),
    expected: expectedOf(line.answer),
    task: String(line.settings?.task ?? ""),
    isTraining: false,
    candidates: [],
  };
  const first = question.candidates.length;
  question.candidates.push(...solutions.map((text, i) => candidateOf(line.output, i, String(text), prompt, first + i)));
  const chosen =
    (!isPublished && question.candidates.slice(first).find((one) => one.response === content)) ||
    [...question.candidates].sort(byScore)[0];
  if (chosen) for (const one of question.candidates) one.chosen = one === chosen;
  questions.set(key, question);
}

/** A training step has a line a response. */
function addSample(questions, { prompt, response, correct, graded, score, step_scores, tokens }) {
  const key = String(prompt);
  const question = questions.get(key) ?? {
    name: String(questions.size),
    prompt: key,
    title: titleOf(key),
    expected: null,
    task: "",
    isTraining: true,
    candidates: [],
  };
  const output = { score_lst: [score], step_score_lst: [step_scores], token_count_lst: [tokens] };
  const right = graded === false || correct === undefined ? null : correct > RIGHT_ABOVE;
  question.candidates.push({ ...candidateOf(output, 0, response, "", question.candidates.length), right });
  const [best] = [...question.candidates].sort(byScore);
  for (const one of question.candidates) one.chosen = one === best && best.score !== null;
  questions.set(key, question);
}

function candidateOf(output, i, solution, prompt, index) {
  const response = solution.startsWith(prompt) ? solution.slice(prompt.length) : solution;
  const close = response.indexOf(THINK_CLOSE);
  const thinking = (close < 0 ? response : response.slice(0, close)).replace(/^\s*<think>\n?/, "");
  const content = close < 0 ? "" : response.slice(close + THINK_CLOSE.length).trim();
  const stepScores = output.step_score_lst?.[i] ?? [];
  const steps = stepsOf(thinking, stepScores.length);
  return {
    index,
    response,
    score: output.score_lst?.[i] ?? null,
    stepScores,
    steps,
    rest: thinking.slice(steps.join("").length) || output.error_lst?.[i] || "",
    content,
    finish: output.finish_reason_lst?.[i] ?? null,
    chosen: false,
    tokens: output.token_count_lst?.[i] ?? null,
    answer: finalAnswer(thinking, content),
    right: null,
  };
}

function stepsOf(thinking, count) {
  if (!count) return [];
  for (const end of STEP_ENDS) {
    const parts = thinking.split(end);
    // What follows the last step, if anything does, is none.
    if (parts.length === count || parts.length === count + 1) return parts.slice(0, count);
  }
  return [];
}

function expectedOf(answer) {
  if (typeof answer === "string" || typeof answer === "number") return String(answer);
  return Array.isArray(answer) && answer.length === 1 ? expectedOf(answer[0]) : null;
}

function titleOf(prompt) {
  return prompt
    .replace(/<[|｜][^<>]{1,40}[|｜]>(system|user|assistant)?/g, " ")
    .replace(/<think>/g, " ")
    .trim()
    .replace(/\s+/g, " ")
    .slice(0, 300);
}

function graded(questions, problems) {
  const verdicts = questions.map(({ expected, task, isTraining, candidates }) => {
    if (isTraining) return candidates.map(({ right }) => right);
    const isRight = task.startsWith("make10") ? makes10 : sameText;
    return candidates.map(({ answer }) => (expected === null ? null : answer !== null && isRight(answer, expected)));
  });
  const isGraded = questions.some(({ isTraining }, q) => isTraining || verdicts[q].includes(true));
  if (isGraded) questions.forEach(({ candidates }, q) => candidates.forEach((one, i) => (one.right = verdicts[q][i])));
  return { questions, problems, isGraded };
}

/**
 * By how much the best right candidate scores above the best wrong one; without verdicts, the best answer above others.
 * @param {Question} question
 * @returns {number | null}
 */
export function scoreGap({ candidates }) {
  const scored = candidates.filter((one) => one.score !== null).sort(byScore);
  if (!scored.length) return null;
  const [best] = scored;
  if (best.right === null) {
    const next = scored.find((one) => !sameText(one.answer ?? "", best.answer ?? ""));
    return next ? best.score - next.score : null;
  }
  const right = scored.find((one) => one.right);
  const wrong = scored.find((one) => !one.right);
  return right && wrong ? right.score - wrong.score : null;
}
