// Ask, watch, read.
import { chat } from "./api.js";
import { Candidates } from "./candidates.js";
import { shown } from "./candidate.js";
import { html, useEffect, useRef, useState } from "./html.js";
import { RichText } from "./rich_text.js";
import { after, begun, ended, isRunning } from "./run.js";
import { keep, kept } from "./session.js";
import { Watch } from "./watch.js";

const EFFORTS = { none: 1, low: 2, medium: 8, high: 32 };
const SHOWN_OF_THINKING = 2000;
const FIRST_FORM = { prompt: "", effort: "medium", temperature: "", seed: "", allAnswer: false };

/**
 * @param {{names: string[] | null, apiKey: string, onKeyRefused: () => void}} properties names of the model, of which
 *     there are several where it can choose; null while nobody knows
 */
export function Ask({ names, apiKey, onKeyRefused }) {
  const [form, setForm] = useState(() => kept("form", FIRST_FORM));
  const [run, setRun] = useState(() => kept("run", null));
  const abort = useRef(null);
  const chooses = names === null || names.length > 1;
  const effort = chooses ? form.effort : "none";

  useEffect(() => keep("form", form), [form]);
  useEffect(() => {
    if (!isRunning(run)) keep("run", run);
  }, [run?.state]);
  useEffect(() => {
    const onEscape = (event) => event.key === "Escape" && abort.current?.abort();
    addEventListener("keydown", onEscape);
    return () => removeEventListener("keydown", onEscape);
  }, []);

  const ask = async (event) => {
    event.preventDefault();
    if (!form.prompt.trim() || isRunning(run)) return;
    abort.current = new AbortController();
    let current = begun(form.prompt);
    const show = throttled(setRun);
    show(current);
    try {
      for await (const chunk of chat(bodyOf(form, effort), apiKey, abort.current.signal))
        show((current = after(current, chunk)));
      current = ended(current, "done");
    } catch (error) {
      current = error.name === "AbortError" ? ended(current, "stopped") : ended(current, "error", error.message);
      if (error.status === 401) onKeyRefused();
    }
    show(current);
  };

  const submit = (event) => {
    event.preventDefault();
    event.target.form.requestSubmit();
  };

  return html`
    <form class="ask" onSubmit=${ask} aria-label="Ask the model">
      <label class="sr" for="prompt">Question</label>
      <textarea
        id="prompt"
        rows="3"
        placeholder="Ask something"
        value=${form.prompt}
        onInput=${(event) => setForm({ ...form, prompt: event.target.value })}
        onKeyDown=${(event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && submit(event)}
      ></textarea>
      <div class="options">
        <label>
          Effort
          <select
            value=${effort}
            disabled=${!chooses}
            onChange=${(event) => setForm({ ...form, effort: event.target.value })}
          >
            ${Object.entries(EFFORTS).map(
              ([name, count]) =>
                html`<option value=${name}>${name} (${count === 1 ? "1 sample" : `best of ${count}`})</option>`,
            )}
          </select>
        </label>
        <${NumberField}
          ...${{ form, setForm }}
          name="temperature"
          label="Temperature"
          placeholder="0.8"
          step="0.1"
          max="2"
        />
        <${NumberField} ...${{ form, setForm }} name="seed" label="Seed" placeholder="any" step="1" />
        <label class="check" title="Else only the best one goes on to its answer">
          <input
            type="checkbox"
            checked=${form.allAnswer}
            disabled=${effort === "none"}
            onChange=${(event) => setForm({ ...form, allAnswer: event.target.checked })}
          />
          every candidate answers
        </label>
        ${
          isRunning(run)
            ? html`<button type="button" class="stop" onClick=${() => abort.current.abort()}>Stop</button>`
            : html`<button type="submit" disabled=${!form.prompt.trim()}>Ask</button>`
        }
      </div>
    </form>
    ${run ? html`<${Outcome} run=${run} />` : html`<${Empty} />`}
  `;
}

function NumberField({ form, setForm, name, label, ...further }) {
  return html`
    <label>
      ${label}
      <input
        type="number"
        min="0"
        inputmode="decimal"
        value=${form[name]}
        onInput=${(event) => setForm({ ...form, [name]: event.target.value })}
        ...${further}
      />
    </label>
  `;
}

function Empty() {
  return html`
    <div class="empty">
      <p>Ask a question, and watch candidates think. The model scores every step of each, and the best one answers.</p>
      <p class="muted">
        <kbd>Enter</kbd> asks, <kbd>Shift Enter</kbd> begins a line, <kbd>Esc</kbd> stops, <kbd>j</kbd> <kbd>k</kbd> go
        from candidate to candidate, <kbd>Enter</kbd> opens one, <kbd>l</kbd> jumps to its lowest step.
      </p>
    </div>
  `;
}

function Outcome({ run }) {
  const chosen = run.candidates.find((one) => one.chosen);
  return html`
    <article class="answer" aria-busy=${isRunning(run)} data-state=${run.state}>
      <p class="asked">${run.prompt}</p>
      ${run.content && html`<div class="content"><${RichText} text=${run.content} /></div>`}
      ${run.reasoning &&
      !run.content &&
      !run.candidates.length &&
      html`<div class="thinking">${run.reasoning.slice(-SHOWN_OF_THINKING)}</div>`}
      ${!run.content && run.state === "done" && html`<p class="muted">It ended without an answer.</p>`}
      ${run.state === "error" && html`<p class="notice error" role="alert">${run.error}</p>`}
      ${run.state === "stopped" && html`<p class="notice">Stopped${run.content ? " before the end" : ""}.</p>`}
      ${run.finish === "length" && html`<p class="notice">There was no room for the whole answer.</p>`}
      <p class="facts muted" role="status">${facts(run, chosen)}</p>
    </article>
    ${
      run.candidates.length > 0
        ? html`<h2>Candidates</h2>
          <${Candidates} candidates=${run.candidates} />`
        : run.progress && html`<${Watch} progress=${run.progress} />`
    }
  `;
}

function facts(run, chosen) {
  const count = run.candidates.length;
  const tokens = run.usage?.completion_tokens ?? run.progress?.tokens;
  return [
    run.state === "thinking" &&
      (run.progress ? `${run.progress.done} of ${run.progress.candidates} candidates done` : "thinking"),
    run.state === "answering" && "answering",
    count > 1 && `best of ${count}`,
    chosen && chosen.score !== null && `score ${shown(chosen.score)}`,
    tokens !== undefined && `${tokens.toLocaleString("en")} tokens`,
    run.seconds > 0 && `${run.seconds.toFixed(1)} s`,
  ]
    .filter(Boolean)
    .join(" · ");
}

function bodyOf(form, effort) {
  const number = (text) => (text === "" ? undefined : Number(text));
  return {
    messages: [{ role: "user", content: form.prompt }],
    reasoning_effort: effort,
    temperature: number(form.temperature),
    seed: number(form.seed),
    answer_once: !form.allAnswer,
    return_candidates: true,
    stream_options: { include_usage: true, include_progress: true },
  };
}

/** Shows the last value of each frame: tokens may come faster than a text can be laid out. */
function throttled(show) {
  let [next, isWaiting] = [null, false];
  return (value) => {
    next = value;
    if (isWaiting) return;
    isWaiting = true;
    // A hidden tab gets no frames.
    (document.hidden ? setTimeout : requestAnimationFrame)(() => {
      isWaiting = false;
      show(next);
    });
  };
}
