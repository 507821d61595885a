// One candidate, whether a server has sent it or a file has it.
import { finalAnswer } from "./answers.js";

/**
 * @typedef {object} Candidate
 * @property {number} index
 * @property {number | null} score
 * @property {number[]} stepScores
 * @property {string[]} steps their texts; empty where it is not known where they end
 * @property {string} rest of the thinking, after the last step
 * @property {string} content
 * @property {string | null} finish
 * @property {boolean} chosen
 * @property {number | null} tokens
 * @property {string | null} answer
 * @property {boolean | null} right null where nobody knows
 */

/**
 * @param {any} sent of `candidates` in an answer
 * @returns {Candidate}
 */
export function fromServer(sent) {
  const stepScores = sent.step_scores ?? [];
  const steps = sent.steps?.length === stepScores.length ? sent.steps : [];
  // A response without thinking has its steps in the content.
  const body = sent.reasoning || sent.content;
  return {
    index: sent.index,
    score: sent.score,
    stepScores,
    steps,
    rest: body.slice(steps.join("").length),
    content: sent.reasoning ? sent.content : "",
    finish: sent.finish_reason,
    chosen: sent.chosen,
    tokens: null,
    answer: finalAnswer(sent.reasoning, sent.content),
    right: null,
  };
}

/**
 * Geometric mean: what step scores make of a response.
 * @param {number[]} scores
 */
export function aggregate(scores) {
  if (!scores.length) return null;
  return Math.exp(scores.reduce((sum, score) => sum + Math.log(score), 0) / scores.length);
}

/** @param {number[]} scores where the lowest is; -1 without any */
export const lowest = (scores) => scores.reduce((best, score, i) => (best < 0 || score < scores[best] ? i : best), -1);

/** @param {number | null} score */
export const shown = (score) => (typeof score === "number" ? score.toFixed(2) : "–");

/** Best first, those without a score last; of equals in their order. */
export const byScore = (a, b) => (b.score ?? -1) - (a.score ?? -1) || a.index - b.index;
