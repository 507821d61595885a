// One question and what has come of it: plain values, so that a reload can show them again.
import { fromServer } from "./candidate.js";

/**
 * @typedef {object} Run
 * @property {"thinking" | "answering" | "done" | "stopped" | "error"} state
 * @property {string} prompt
 * @property {object | null} progress the last that the server told
 * @property {string} reasoning
 * @property {string} content
 * @property {import("./candidate.js").Candidate[]} candidates
 * @property {object | null} usage
 * @property {string | null} finish
 * @property {string} error
 * @property {number} began of the clock, in milliseconds
 * @property {number} seconds
 */

/**
 * @param {string} prompt
 * @returns {Run}
 */
export function begun(prompt) {
  return {
    state: "thinking",
    prompt,
    progress: null,
    reasoning: "",
    content: "",
    candidates: [],
    usage: null,
    finish: null,
    error: "",
    began: Date.now(),
    seconds: 0,
  };
}

/**
 * The run after one more chunk.
 * @param {Run} run
 * @param {any} chunk
 * @returns {Run}
 */
export function after(run, chunk) {
  const choice = chunk.choices[0];
  const delta = choice?.delta ?? {};
  const content = run.content + (delta.content ?? "");
  return {
    ...run,
    state: content ? "answering" : run.state,
    progress: chunk.progress ?? run.progress,
    reasoning: run.reasoning + (delta.reasoning ?? delta.reasoning_content ?? ""),
    content,
    candidates: chunk.candidates?.map(fromServer) ?? run.candidates,
    usage: chunk.usage ?? run.usage,
    finish: choice?.finish_reason ?? run.finish,
  };
}

/**
 * @param {Run} run
 * @param {"done" | "stopped" | "error"} state
 * @param {string} error
 * @returns {Run}
 */
export function ended(run, state, error = "") {
  return { ...run, state, error, seconds: (Date.now() - run.began) / 1000 };
}

/** @param {Run} run */
export const isRunning = (run) => run?.state === "thinking" || run?.state === "answering";
