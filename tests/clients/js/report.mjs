// What a script saw, as lines of JSON: {"name": …, "value": …}; an error as {"error": {…}} in the value's place.

export async function scenario(name, body) {
  let value;
  try {
    value = await body();
  } catch (error) {
    value = { error: described(error) };
  }
  console.log(JSON.stringify({ name, value: value ?? null }));
}

export function described(error) {
  const { status, statusCode, code, responseHeaders } = error;
  const headers = responseHeaders ?? error.headers;
  return {
    kind: error.constructor.name,
    message: error.message,
    status: status ?? statusCode ?? null,
    code: code ?? null,
    retryAfter: (headers?.get?.("retry-after") ?? headers?.["retry-after"]) || null,
  };
}

export const { REAL, REAL_KEY, TOLD, TOLD_KEY, LOSSY, CONSTRAINED, CONSTRAINED_KEY } = process.env;
export const WEATHER = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
