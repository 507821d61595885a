// What outlives a reload but not the tab.

/**
 * @param {string} name
 * @param {any} otherwise where nothing is kept, or nothing can be
 */
export function kept(name, otherwise) {
  try {
    const text = sessionStorage.getItem(`xbai.${name}`);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

/**
 * @param {string} name
 * @param {any} value null forgets it
 */
export function keep(name, value) {
  try {
    sessionStorage.removeItem(`xbai.${name}`);
    if (value !== null) sessionStorage.setItem(`xbai.${name}`, JSON.stringify(value));
  } catch {
    // Too large for the browser, or storage is off: a reload then begins anew.
  }
}
