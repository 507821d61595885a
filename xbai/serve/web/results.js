// What a researcher looks at after a run: its questions, and the candidates of one.
import { Candidates, Verdict } from "./candidates.js";
import { html, useMemo, useState } from "./html.js";
import { PlainText } from "./rich_text.js";
import { readResults, scoreGap } from "./result_file.js";

const MOST_ROWS = 500;
const MOST_PROBLEMS = 5;
const NO_FILE = { name: "", opened: 0, share: null, error: "", results: null };

const rights = (question) => question.candidates.filter((one) => one.right).length;
const choice = (question) => question.candidates.find((one) => one.chosen)?.right ?? null;
const FILTERS = {
  "all questions": () => true,
  "choice is right": (question) => choice(question) === true,
  "choice is wrong": (question) => choice(question) === false,
  "missed: a right one was there": (question) => choice(question) === false && rights(question) > 0,
  "right and wrong ones": (question) => rights(question) > 0 && rights(question) < question.candidates.length,
  "none is right": (question) => rights(question) === 0,
};
const SORTS = {
  "in order of the file": () => 0,
  "smallest score gap first": (a, b) => (a.gap ?? Infinity) - (b.gap ?? Infinity),
  "largest score gap first": (a, b) => (b.gap ?? -Infinity) - (a.gap ?? -Infinity),
  "fewest right first": (a, b) => a.share - b.share,
};

/** Looks at a result file of the reader's disk. */
export function Results() {
  const [file, setFile] = useState(NO_FILE);
  const { results } = file;
  const [isOver, setOver] = useState(false);

  const open = async (blob) => {
    if (!blob) return;
    const opened = { ...NO_FILE, name: blob.name, opened: Date.now() };
    try {
      const results = await readResults(blob, (share) => setFile({ ...opened, share }));
      setFile({ ...opened, results });
    } catch (error) {
      setFile({ ...opened, error: `${blob.name} cannot be read: ${error.message}` });
    }
  };
  const choose = async (event) => {
    const field = event.target;
    await open(field.files[0]);
    // So that the same file can be opened again when it has grown.
    field.value = "";
  };
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    open(event.dataTransfer.files[0]);
  };

  return html`
    <div
      class=${isOver ? "results over" : "results"}
      onDragOver=${(event) => (event.preventDefault(), setOver(true))}
      onDragLeave=${() => setOver(false)}
      onDrop=${drop}
    >
      <p class="open-file">
        <label class="button">
          Open results.jsonl
          <input type="file" class="sr" accept=".jsonl,.json" onChange=${choose} />
        </label>
        <span class="muted">${file.name || "or drop one here. It stays in this browser."}</span>
      </p>
      ${file.share !== null && html`<progress max="1" value=${file.share} aria-label="Reading the file"></progress>`}
      ${file.error && html`<p class="notice error" role="alert">${file.error}</p>`}
      ${results && html`<${Problems} problems=${results.problems} />`}
      ${results?.questions.length > 0 && html`<${Questions} key=${file.opened} ...${results} />`}
      ${results?.questions.length === 0 && html`<p class="empty">The file has no result lines.</p>`}
    </div>
  `;
}

function Problems({ problems }) {
  if (!problems.length) return null;
  return html`
    <div class="notice error" role="alert">
      ${problems.slice(0, MOST_PROBLEMS).map((problem) => html`<p>${problem}</p>`)}
      ${problems.length > MOST_PROBLEMS && html`<p>and ${problems.length - MOST_PROBLEMS} more</p>`}
    </div>
  `;
}

function Questions({ questions, isGraded }) {
  const [filter, setFilter] = useState("all questions");
  const [sort, setSort] = useState("in order of the file");
  const [words, setWords] = useState("");
  const [open, setOpen] = useState(null);
  const rows = useMemo(
    () =>
      questions.map((question) => ({
        question,
        gap: scoreGap(question),
        share: rights(question) / (question.candidates.length || 1),
      })),
    [questions],
  );
  const found = rows
    .filter(({ question }) => FILTERS[filter](question) && question.title.toLowerCase().includes(words.toLowerCase()))
    .sort(SORTS[sort]);

  return html`
    <p class="facts">${summary(questions, isGraded)}</p>
    <div class="filters">
      <label class="grow">
        <span class="sr">Words of the question</span>
        <input
          type="search"
          placeholder="Find in questions"
          value=${words}
          onInput=${(event) => setWords(event.target.value)}
        />
      </label>
      ${isGraded && html`<${Choice} label="Show" value=${filter} options=${FILTERS} onChange=${setFilter} />`}
      <${Choice} label="Sort" value=${sort} options=${SORTS} onChange=${setSort} />
    </div>
    <div class=${open ? "panes has-open" : "panes"}>
      <div class="list" data-rows="questions">
        <p class="muted count" role="status">${found.length} of ${questions.length}</p>
        <ol>
          ${found.slice(0, MOST_ROWS).map((row) => {
            const isOpen = row.question === open;
            return html`<${QuestionRow} key=${row.question.name} ...${row} isOpen=${isOpen} onOpen=${setOpen} />`;
          })}
        </ol>
        ${found.length > MOST_ROWS && html`<p class="muted">The first ${MOST_ROWS} are shown; filter for others.</p>`}
      </div>
      <div class="detail">
        ${open
          ? html`<${QuestionDetail} key=${open.name} question=${open} onClose=${() => setOpen(null)} />`
          : html`<p class="empty">
              Choose a question to see its candidates. <kbd>j</kbd> <kbd>k</kbd> go from one to the next, <kbd>→</kbd>
              to its candidates, <kbd>←</kbd> back.
            </p>`}
      </div>
    </div>
  `;
}

function Choice({ label, value, options, onChange }) {
  return html`
    <label>
      ${label}
      <select value=${value} onChange=${(event) => onChange(event.target.value)}>
        ${Object.keys(options).map((name) => html`<option value=${name}>${name}</option>`)}
      </select>
    </label>
  `;
}

const signed = (gap) => (gap === null ? "" : `${gap < 0 ? "−" : "+"}${Math.abs(gap).toFixed(2)}`);

function QuestionRow({ question, gap, share, isOpen, onOpen }) {
  const right = choice(question);
  const [mark, verdict] = right ? ["✓", "right"] : ["✗", "wrong"];
  const shareText = `${rights(question)}/${question.candidates.length}`;
  return html`
    <li>
      <button type="button" class="question row" aria-current=${isOpen} onClick=${() => onOpen(question)}>
        ${right !== null && html`<span class=${`mark ${verdict}`} title=${`the choice is ${verdict}`}>${mark}</span>`}
        <span class="title">${question.title || question.name}</span>
        ${right !== null && html`<span class="share" style=${{ "--share": share }}>${shareText}</span>`}
        <span class="gap" title="score gap">${signed(gap)}</span>
      </button>
    </li>
  `;
}

function QuestionDetail({ question, onClose }) {
  return html`
    <button type="button" class="back quiet" onClick=${onClose}>← questions</button>
    <div class="asked"><${PlainText} text=${question.title} /></div>
    <p class="facts muted">
      question ${question.name} · ${question.candidates.length} samples
      ${question.expected !== null && html` · expected <b>${question.expected}</b>`}
      ${choice(question) !== null && html` · chosen: <${Verdict} right=${choice(question)} />`}
    </p>
    <details class="prompt"><summary>Prompt</summary><pre>${question.prompt}</pre></details>
    <${Candidates} candidates=${question.candidates} />
  `;
}

function summary(questions, isGraded) {
  const most = questions.reduce((most, { candidates }) => Math.max(most, candidates.length), 0);
  const percent = (test) => `${((100 * questions.filter(test).length) / questions.length).toFixed(1)} %`;
  const size = `${questions.length} questions × ${most} samples`;
  if (!isGraded) return `${size}. No answer equals the expected one as text: what is right, xbai metric says.`;
  return (
    `${size} · chosen right ${percent((question) => choice(question))} · some right ` +
    `${percent((question) => rights(question) > 0)} · ${gradedBy(questions[0])}`
  );
}

function gradedBy({ isTraining, task }) {
  if (isTraining) return "graded in training";
  return task.startsWith("make10") ? "answers checked as sums" : "right is: answer equal as text (xbai metric grades)";
}
