// The page of `xbai serve`: ask the model, or look at a result file.
import { models } from "./api.js";
import { Ask } from "./ask.js";
import { html, render, useEffect, useState } from "./html.js";
import { listenToKeys } from "./keys.js";
import { Results } from "./results.js";
import { keep, kept } from "./session.js";

const RETRY_MS = 2000;
const VIEWS = { ask: "Ask", results: "Results" };

function App() {
  const [view, setView] = useState(() => kept("view", "ask"));
  const [apiKey, setApiKey] = useState(() => kept("key", ""));
  const [isRefused, setRefused] = useState(false);
  const [names, setNames] = useState(null);
  const [trouble, setTrouble] = useState("");

  useEffect(() => keep("view", view), [view]);
  useEffect(() => {
    let timer = null;
    const load = () =>
      models(apiKey).then(
        (found) => (setNames(found), setTrouble(""), setRefused(false)),
        (error) => {
          if (error.status === 401) return setRefused(true);
          setTrouble(error.message);
          timer = setTimeout(load, RETRY_MS);
        },
      );
    load();
    return () => clearTimeout(timer);
  }, [apiKey]);
  const submitKey = (key) => {
    keep("key", key);
    setRefused(false);
    setApiKey(key);
  };

  return html`
    <header>
      <h1>XBai</h1>
      <span class="model muted">${names?.[0] ?? ""}</span>
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(
          ([name, label]) => html`
            <button
              type="button"
              class="tab"
              aria-current=${view === name ? "page" : null}
              onClick=${() => setView(name)}
            >
              ${label}
            </button>
          `,
        )}
      </nav>
    </header>
    ${isRefused && html`<${KeyForm} wasGiven=${apiKey !== ""} onSubmit=${submitKey} />`}
    ${trouble && html`<p class="notice" role="status">${trouble} Trying again.</p>`}
    <main hidden=${view !== "ask"}>
      <${Ask} names=${names} apiKey=${apiKey} onKeyRefused=${() => setRefused(true)} />
    </main>
    <main hidden=${view !== "results"} class="wide"><${Results} /></main>
  `;
}

function KeyForm({ wasGiven, onSubmit }) {
  const [key, setKey] = useState("");
  return html`
    <form class="key notice" onSubmit=${(event) => (event.preventDefault(), onSubmit(key.trim()))}>
      <label for="key">${wasGiven ? "That is not the service's API key." : "This service asks for its API key."}</label>
      <input
        id="key"
        type="password"
        autocomplete="off"
        value=${key}
        onInput=${(event) => setKey(event.target.value)}
      />
      <button type="submit" disabled=${!key.trim()}>Use it</button>
      <span class="muted">It is kept for this tab only.</span>
    </form>
  `;
}

listenToKeys();
render(html`<${App} />`, document.getElementById("app"));
