// The service's routes, by addresses relative to the page, so that it also works behind a proxy's prefix.

/** A refusal, or a failure in the middle of a stream. `status` is 0 where there was no answer. */
export class ApiError extends Error {
  /**
   * @param {number} status
   * @param {string} message
   */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/**
 * @param {string} key
 * @returns {Promise<string[]>} the names that the model has
 */
export async function models(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  return (await response.json()).data.map((model) => model.id);
}

/**
 * The chunks of an answer, as the server sends them.
 * @param {object} body of POST /v1/chat/completions
 * @param {string} key
 * @param {AbortSignal} signal
 */
export async function* chat(body, key, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(200, chunk.error.message);
      yield chunk;
    }
  } catch (error) {
    // A browser's own word for it is "network error".
    if (!(error instanceof TypeError)) throw error;
  }
  throw new ApiError(0, "The connection ended before the answer did.");
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The service does not answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error?.message ?? body?.detail ?? `HTTP ${response.status}`);
}

/** The data of server-sent events; comments are left out. */
async function* events(stream) {
  let rest = "";
  for await (const text of decoded(stream)) {
    const blocks = (rest + text).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

/**
 * Text of a stream of bytes, piece by piece; not every browser iterates over streams.
 * @param {ReadableStream<Uint8Array>} stream
 */
export async function* decoded(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
