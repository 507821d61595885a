// A path of SVG: ten numbers need no library for plots.
import { html } from "./html.js";
import { lowest } from "./candidate.js";

const WIDTH = 96;
const HEIGHT = 22;
const EDGE = 3;

/**
 * Step scores from 0 (bottom) to 1 (top), with a dot at the lowest, or at the last while they grow.
 * @param {{scores: number[], live?: boolean}} properties
 */
export function Sparkline({ scores, live = false }) {
  if (!scores.length) return html`<svg class="sparkline" viewBox="0 0 ${WIDTH} ${HEIGHT}" aria-hidden="true"></svg>`;
  const worst = lowest(scores);
  const marked = live ? scores.length - 1 : worst;
  const x = (i) => (scores.length === 1 ? WIDTH / 2 : EDGE + (i / (scores.length - 1)) * (WIDTH - 2 * EDGE));
  const y = (score) => HEIGHT - EDGE - score * (HEIGHT - 2 * EDGE);
  const line = scores.map((score, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(score).toFixed(1)}`).join("");
  const label = `${scores.length} steps, the lowest, number ${worst + 1}, scores ${scores[worst].toFixed(2)}`;
  return html`
    <svg class="sparkline" viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label=${label}>
      <path class="floor" d=${`M0 ${HEIGHT - 0.5}H${WIDTH}`} />
      <path class="line" d=${line} />
      <circle class=${live ? "last" : "lowest"} cx=${x(marked)} cy=${y(scores[marked])} r="2.4" />
    </svg>
  `;
}
