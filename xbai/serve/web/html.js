// Preact by tagged templates: no build step.
import htm from "./vendor/htm.js";
import { h } from "./vendor/preact.js";

/** Markup as a template: html`<p>${text}</p>`; text in it is never parsed as markup. */
export const html = htm.bind(h);
export { render } from "./vendor/preact.js";
export { useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/preact-hooks.js";
