// Candidates by score, equal answers together, each closed until somebody wants to read it.
import { grouped } from "./answers.js";
import { byScore, lowest, shown } from "./candidate.js";
import { html, useEffect, useMemo, useRef, useState } from "./html.js";
import { AnswerText, PlainText, RichText } from "./rich_text.js";
import { Sparkline } from "./sparkline.js";

const ENDS = {
  length: "cut off",
  pruned: "given up",
  not_begun: "not begun",
  not_chosen: "not chosen",
  refused: "refused",
};

/**
 * @param {{candidates: import("./candidate.js").Candidate[]}} properties
 */
export function Candidates({ candidates }) {
  const groups = useMemo(() => grouped([...candidates].sort(byScore)), [candidates]);
  return html`
    <div class="groups" data-rows="candidates">
      ${groups.map(
        ({ key, answer, members }) => html`
          <section class="group" key=${key}>
            <h3>
              ${answer === null
                ? html`<span class="muted">no final answer</span>`
                : html`<${AnswerText} text=${answer} />`}
              <${Verdict} right=${members[0].right} />
              <span class="muted count">× ${members.length}</span>
            </h3>
            <ol>${members.map((one) => html`<${CandidateRow} key=${one.index} candidate=${one} />`)}</ol>
          </section>
        `,
      )}
    </div>
  `;
}

/**
 * Right or wrong, where anybody knows.
 * @param {{right: boolean | null}} properties
 */
export function Verdict({ right }) {
  if (right === null) return null;
  return html`<span class=${right ? "verdict right" : "verdict wrong"}>${right ? "✓ right" : "✗ wrong"}</span>`;
}

function CandidateRow({ candidate }) {
  const [isOpen, setOpen] = useState(false);
  const [jumps, setJumps] = useState(0);
  const row = useRef();
  const worst = lowest(candidate.stepScores);
  useEffect(() => {
    if (jumps) goTo(row.current.querySelector(`[data-step="${worst}"]`));
  }, [jumps]);
  const jump = () => {
    setOpen(true);
    setJumps(jumps + 1);
  };
  return html`
    <li ref=${row} class=${candidate.chosen ? "candidate chosen" : "candidate"}>
      <div class="candidate-bar">
        <button type="button" class="candidate-head row" aria-expanded=${isOpen} onClick=${() => setOpen(!isOpen)}>
          <span class="number">${candidate.index + 1}</span>
          <${Sparkline} scores=${candidate.stepScores} />
          <span class="score">${shown(candidate.score)}</span>
          ${candidate.chosen && html`<span class="tag chosen">chosen</span>`}
          ${ENDS[candidate.finish] && html`<span class="tag">${ENDS[candidate.finish]}</span>`}
          ${candidate.tokens !== null && html`<span class="muted tokens">${candidate.tokens} tokens</span>`}
        </button>
        ${
          candidate.steps.length > 0 &&
          html`<button type="button" class="to-lowest quiet" onClick=${jump} title="Jump to the lowest step (l)">
          lowest ${shown(candidate.stepScores[worst])}
        </button>`
        }
      </div>
      ${isOpen && html`<${CandidateText} candidate=${candidate} />`}
    </li>
  `;
}

function CandidateText({ candidate }) {
  const { steps, stepScores, rest, content } = candidate;
  return html`
    <div class="candidate-text">
      ${steps.map(
        (text, i) => html`
          <div class="step" key=${i} data-step=${i} tabindex="-1" style=${{ "--score": stepScores[i] }}>
            <span class="step-score" title=${`step ${i + 1} of ${steps.length}`}>${shown(stepScores[i])}</span>
            <${PlainText} text=${text.trim()} />
          </div>
        `,
      )}
      ${
        stepScores.length > 0 &&
        !steps.length &&
        html`<p class="muted">Where its ${stepScores.length} steps end cannot be told from the text.</p>`
      }
      ${rest.trim() && html`<div class="rest"><${PlainText} text=${rest.trim()} /></div>`}
      ${content && html`<div class="content"><${RichText} text=${content} /></div>`}
    </div>
  `;
}

function goTo(step) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  step.scrollIntoView({ block: "center", behavior: calm ? "auto" : "smooth" });
  step.focus({ preventScroll: true });
}
