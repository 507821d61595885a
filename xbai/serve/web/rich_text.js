// Texts that models write. All of it is hostile: markup in it is shown, never obeyed.
import { Marked } from "./vendor/marked.js";
import { html, useLayoutEffect, useRef } from "./html.js";
import { formula, formulaAt, pieces } from "./math.js";

/** Longer answers are shown as they are: a parser of Markdown may take very long over a text that is made for that. */
const LONGEST_MARKDOWN = 30_000;
const ALLOWED = {
  ALLOWED_TAGS:
    "p br hr em strong del code pre blockquote ul ol li h1 h2 h3 h4 h5 h6 table thead tbody tr th td a span".split(" "),
  ALLOWED_ATTR: ["href", "start", "align", "data-tex", "data-display"],
  ALLOWED_URI_REGEXP: /^(https?|mailto):/i,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = (text) => text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

const mathematics = {
  name: "mathematics",
  level: "inline",
  start: (source) => source.search(/\\\(|\\\[|\$|\\boxed\{/),
  tokenizer(source) {
    const found = formulaAt(source, 0);
    return found ? { type: "mathematics", raw: source.slice(0, found.end), ...found } : undefined;
  },
  renderer: (token) => `<span data-tex="${escaped(token.tex)}" data-display="${token.display ? 1 : ""}"></span>`,
};
const marked = new Marked({
  gfm: true,
  extensions: [mathematics],
  renderer: { html: ({ text }) => escaped(text), image: ({ text, href }) => escaped(`![${text}](${href})`) },
  // 7*8*9 is a product.
  tokenizer: { emStrong: (source, masked, before) => (/[\d)]/.test(before) ? undefined : false) },
});

/**
 * An answer: Markdown and formulas.
 * @param {{text: string}} properties
 */
export function RichText({ text }) {
  return html`<${Filled} class="rich" text=${text} fill=${rich} />`;
}

/**
 * A text as it was written, but for its formulas.
 * @param {{text: string}} properties
 */
export function PlainText({ text }) {
  return html`<${Filled} class="plain" text=${text} fill=${plain} />`;
}

/**
 * A short text in a line of its own, a formula where it looks like one.
 * @param {{text: string}} properties
 */
export function AnswerText({ text }) {
  return html`<${Filled} tag="span" class="answer-text" text=${text} fill=${answer} />`;
}

/** Filled by the DOM and not by Preact, which knows no nodes that DOMPurify has made. */
function Filled({ tag = "div", text, fill, ...further }) {
  const element = useRef();
  useLayoutEffect(() => element.current.replaceChildren(fill(text)), [text, fill]);
  return html`<${tag} ref=${element} ...${further} />`;
}

function rich(text) {
  if (text.length > LONGEST_MARKDOWN) return plain(text);
  let fragment;
  try {
    fragment = DOMPurify.sanitize(marked.parse(text), ALLOWED);
  } catch {
    return plain(text);
  }
  for (const place of fragment.querySelectorAll("[data-tex]")) {
    place.replaceWith(formula(place.dataset.tex, Boolean(place.dataset.display)));
  }
  for (const link of fragment.querySelectorAll("a"))
    Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  return fragment;
}

function plain(text) {
  const fragment = document.createDocumentFragment();
  for (const piece of pieces(text)) {
    fragment.append(typeof piece === "string" ? piece : formula(piece.tex, piece.display));
  }
  return fragment;
}

function answer(text) {
  return /[\\^_]|^[-\d\s+*/=().,]+$/.test(text) && !/\$|\\\(/.test(text) ? formula(text, false) : plain(text);
}
