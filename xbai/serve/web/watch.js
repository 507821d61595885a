// While candidates think: one row each, the leader marked.
import { aggregate, shown } from "./candidate.js";
import { html } from "./html.js";
import { Sparkline } from "./sparkline.js";

/**
 * @param {{progress: any}} properties the last that the server told
 */
export function Watch({ progress }) {
  const scores = progress.each.map((one) => aggregate(one.step_scores));
  const leader = scores.reduce((best, score, i) => (score !== null && score > (scores[best] ?? -1) ? i : best), -1);
  const waiting = progress.candidates - progress.begun;
  return html`
    <ol class="watch" aria-label="Candidates at work">
      ${progress.each.map(
        (one, i) => html`
          <li key=${i} class=${`${i === leader ? "leader" : ""} ${one.done ? "done" : ""}`}>
            <span class="number">${i + 1}</span>
            <${Sparkline} scores=${one.step_scores} live />
            <span class="score">${shown(scores[i])}</span>
            <span class="tokens muted">${one.tokens} tokens</span>
            <span class="mark">${i === leader ? "leads" : one.done ? "done" : ""}</span>
          </li>
        `,
      )}
    </ol>
    ${waiting > 0 && html`<p class="muted">${waiting} more wait, and begin only where they are wanted.</p>`}
  `;
}
